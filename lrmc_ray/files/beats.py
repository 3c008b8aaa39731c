"""Signs of life: whoever computes gives them, whoever waits sees by them what hangs.

:func:`beat` is called where work gets on: in every forward pass, for every piece of a file that
crosses to a storage, while cores are waited for. Where nobody listens it costs one comparison.
:class:`Pauses` is the other side: which works have shown nothing new for too long.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from lrmc_ray.errors import LrmcError

_log = logging.getLogger(__name__)

PROGRESS = "progress"
"""A file in a run's directory that changes as long as the run gets on."""

BEAT_SECONDS = 1.0
"""Shortest time between two signs that are written to a file."""

LEAST_SECONDS = 600.0
"""A work may always be silent for this long."""

START_SECONDS = 1800.0
"""A work whose second sign has not come may be: it loads its model, or waits for its workers."""

PAUSE_FACTOR = 10.0
"""A work may be silent for this many times the longest pause that any made, and went on."""

MOST_PER_LOOK = 10.0
"""What counts between two looks at most: if it was longer, the one who looks was stopped."""


class _Beats:
    """Where this process writes its signs, if anywhere."""

    def __init__(self) -> None:
        self.write: Callable[[str], None] | None = None
        self.every = BEAT_SECONDS
        self.count = 0
        self.next = 0.0
        self.lock = threading.Lock()


_beats = _Beats()


def beat() -> None:
    """Say that this process has got on."""
    if _beats.write is None or time.monotonic() < _beats.next:
        return
    with _beats.lock:
        write = _beats.write
        if write is None:
            return
        _beats.next = time.monotonic() + _beats.every
        _beats.count += 1
        try:
            write(f"{os.getpid()} {_beats.count}")
        except (OSError, LrmcError) as error:
            _log.debug("a sign of life was not written: %s", error)


@contextlib.contextmanager
def beating(write: Callable[[str], None], *, every: float = BEAT_SECONDS) -> Iterator[None]:
    """Write this process's signs of life with ``write`` while the context lasts, one at once.

    Args:
        write: takes a text that differs from the one before.
        every: shortest time between two, in seconds.
    """
    before = (_beats.write, _beats.every)
    _beats.write, _beats.every, _beats.next = write, every, 0.0
    beat()
    try:
        yield
    finally:
        _beats.write, _beats.every = before


def file_writer(path: Path) -> Callable[[str], None]:
    """Writes signs into a file, whose directory must be there."""

    def write(sign: str) -> None:
        path.write_text(sign, encoding="utf-8")

    return write


def beat_with(model: Any) -> None:
    """Give a sign of life in every forward pass of ``model``."""
    embeddings = model.get_input_embeddings()
    if embeddings is not None:
        embeddings.register_forward_pre_hook(_in_forward)


def _in_forward(_module: Any, _arguments: Any) -> None:
    beat()


class OwnTime:
    """Seconds that this process was awake and looking.

    A clock that is set does not change them, and neither does an hour for which this process was
    stopped: then nobody knows what the others did.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at 0.

        Args:
            clock: one that is never set.
        """
        self._clock = clock
        self._looked = clock()
        self._seconds = 0.0

    def look(self) -> float:
        """The time now; it must be asked for again and again."""
        now = self._clock()
        self._seconds += min(now - self._looked, MOST_PER_LOOK)
        self._looked = now
        return self._seconds


class Pauses:
    """How long each of several works has shown nothing new.

    Signs are compared with those before, and never with a clock of another machine.
    """

    def __init__(
        self, chosen: float | None = None, *, expected: float = 0.0, time: OwnTime | None = None
    ) -> None:
        """Watch nothing yet.

        Args:
            chosen: seconds that a work may be silent; None for the rule.
            expected: the longest pause that was forecast, in seconds.
            time: of this process.
        """
        self._chosen = chosen
        self.longest = expected
        self._time = time or OwnTime()
        self._signs: dict[Hashable, tuple[Any, float, int]] = {}

    def look(self, work: Hashable, sign: Any) -> float:
        """Note what ``work`` shows now; returns for how many seconds it has shown that.

        Args:
            work: a name of it.
            sign: anything that changes as long as it gets on.
        """
        now = self._time.look()
        if work not in self._signs:
            self._signs[work] = (sign, now, 0)
        before, since, changes = self._signs[work]
        if sign != before:
            self.longest = max(self.longest, now - since)
            self._signs[work] = (sign, now, changes + 1)
            return 0.0
        return now - since

    def limit(self, work: Hashable) -> float:
        """Seconds for which ``work`` may show nothing new."""
        if self._chosen is not None:
            return self._chosen
        has_begun = work in self._signs and self._signs[work][2] > 0
        least = LEAST_SECONDS if has_begun else START_SECONDS
        return max(least, PAUSE_FACTOR * self.longest)

    def forget(self, work: Hashable) -> None:
        """``work`` has ended."""
        self._signs.pop(work, None)
