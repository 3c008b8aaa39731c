"""Waiting for tasks that score, and ending those that hang."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.stacks import kill_all, listening, report, stacks_of
from lrmc_ray.console import format_seconds
from lrmc_ray.errors import DiskError, EvaluationError
from lrmc_ray.files.beats import PROGRESS, Pauses, beat, beating, file_writer
from lrmc_ray.files.names import STACKS
from lrmc_ray.files.place import Place
from lrmc_ray.files.storage import Storage

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Time between two looks at the signs of life."""

STORAGE_SECONDS = 15.0
"""The same where each look, and each sign, is a request to a storage."""


@dataclass(frozen=True)
class Watched:
    """One task that scores, as those see it that wait for it."""

    work: str
    """Directory of the scores that it is a part of, as the driver calls it."""
    number: int
    """Among the tasks of these scores."""
    place: Place
    """Where nodes find each other's files."""

    @property
    def _name(self) -> str:
        """Of the file with its signs of life, in a storage; there, paths have no meaning."""
        # No directory for each work: Arrow leaves one behind when its last file is removed.
        return f"scoring/{self.work.strip('/').replace('/', '_')}_{PROGRESS}_{self.number}"

    @property
    def _path(self) -> Path:
        return Path(self.work) / f".{PROGRESS}_{self.number}"

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Give signs of life as this task, and answer when it is asked where it hangs."""

        def stored(storage: Storage) -> AbstractContextManager[None]:
            # Scoring does not wait for a storage that does not answer.
            quick = Storage(storage.uri, retry_seconds=())

            def write(sign: str) -> None:
                quick.write(self._name, sign.encode())

            return beating(write, every=STORAGE_SECONDS)

        with (
            listening(self.work),
            self.place.either(lambda: beating(file_writer(self._path)), stored),
        ):
            yield

    def sign(self) -> bytes | None:
        """The latest sign; None before the first."""
        return self.place.read(self.place.either(lambda: str(self._path), lambda _: self._name))

    def forget(self) -> None:
        """Remove the signs, where that can be done."""
        with contextlib.suppress(DiskError, OSError):
            self.place.either(
                lambda: self._path.unlink(missing_ok=True),
                lambda storage: storage.delete(self._name),
            )


def results_of(
    references: Sequence[Any],
    tasks: Sequence[Watched],
    hang_seconds: float | None,
    *,
    stop: Callable[[Any], None],
) -> list[Any]:
    """What the Ray tasks return, all of them.

    Args:
        references: of the tasks.
        tasks: the same tasks, which give signs of life.
        hang_seconds: how long one may give none; None for the rule of ``Pauses``.
        stop: ends a task of Ray.

    Raises:
        EvaluationError: one hangs; it has been ended, and the log says where it hung.
        RayError: one failed.
    """
    import ray

    pauses = Pauses(hang_seconds)
    every = tasks[0].place.either(lambda: LOOK_SECONDS, lambda _: STORAGE_SECONDS)
    waiting = dict(zip(references, tasks, strict=True))
    looked = time.monotonic()
    (Path(tasks[0].work) / STACKS).unlink(missing_ok=True)
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
            for reference in done:
                ray.get(reference)  # one that failed ends the others' wait
                pauses.forget(waiting.pop(reference).number)
                beat()
            if time.monotonic() - looked < every:
                continue
            looked = time.monotonic()
            for task in waiting.values():
                if is_hanging(task, pauses):
                    _end(task, list(waiting), pauses, stop)
        return list(ray.get(list(references)))
    finally:
        for task in tasks:
            task.forget()


def is_hanging(task: Watched, pauses: Pauses) -> bool:
    """Whether ``task`` has given no new sign of life for longer than it may."""
    try:
        sign = task.sign()
    except DiskError as error:
        _log.debug("whether scoring gets on is not known: %s", error)
        return False
    if sign is None:  # it waits for its turn
        beat()
        return False
    silent = pauses.look(task.number, sign)
    if not silent:
        beat()  # for those who wait for this process
    return silent > pauses.limit(task.number)


def _end(
    task: Watched, waiting: Sequence[Any], pauses: Pauses, stop: Callable[[Any], None]
) -> None:
    """End the scoring that ``task`` is a part of.

    Raises:
        EvaluationError: always; names the file that says where it hangs.
    """
    stacks = stacks_of(task.work)
    text = report(stacks)
    path = Path(task.work) / STACKS
    path.write_text(text + "\n", encoding="utf-8")
    _log.warning("scoring hangs\n%s", text)
    for reference in waiting:
        stop(reference)
    kill_all(stacks)
    raise EvaluationError(
        f"scoring must show progress within {format_seconds(pauses.limit(task.number))} and did "
        f"not; {path} says where it hangs, raise resources.hang_seconds if it is only slow"
    )
