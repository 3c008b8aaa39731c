"""Waiting for tasks that score, and ending those that hang."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.stacks import (
    is_gone,
    kill_all,
    listening,
    process_birth,
    ray_node,
    report,
    stacks_of,
    write_stacks,
)
from lrmc_ray.console import format_seconds
from lrmc_ray.errors import DiskError, EvaluationError
from lrmc_ray.files.artifacts import fingerprint
from lrmc_ray.files.beats import PROGRESS, Pauses, beat, beating, file_writer
from lrmc_ray.files.names import STACKS
from lrmc_ray.files.place import Place
from lrmc_ray.files.storage import Storage

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Time between two looks at the signs of life."""

STORAGE_SECONDS = 15.0
"""The same where each look, and each sign, is a request to a storage."""

OWNER_SECONDS = 60.0
"""Time without a new sign after which it is asked whether the process that gave it still lives."""

STOP_SECONDS = 15.0
"""How long tasks that are stopped may take to end."""


@dataclass(frozen=True)
class Watched:
    """One task that scores, as those see it that wait for it."""

    work: str
    """Directory of the scores that it is a part of, as the driver calls it."""
    number: int
    """Among the tasks of these scores."""
    place: Place
    """Where nodes find each other's files."""
    driver: str = field(default_factory=lambda: os.uname().nodename)
    """Name of the machine that waits: in a storage, another one's directory may have the same
    path."""

    @property
    def _name(self) -> str:
        """Of the file with its signs of life, in a storage."""
        # No directory for each work: Arrow leaves one behind when its last file is removed.
        work = fingerprint([self.driver, self.work])
        return f"scoring/{work}_{PROGRESS}_{self.number}"

    @property
    def _path(self) -> Path:
        return Path(self.work) / f".{PROGRESS}_{self.number}"

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Give signs of life as this task, and answer when it is asked where it hangs."""
        owner = f"{ray_node()} {os.getpid()} {process_birth(os.getpid())}"

        def local() -> AbstractContextManager[None]:
            write = file_writer(self._path)
            return beating(lambda sign: write(f"{owner} {sign}"))

        def stored(storage: Storage) -> AbstractContextManager[None]:
            quick = _quick(storage)

            def write(sign: str) -> None:
                quick.write(self._name, f"{owner} {sign}".encode())

            return beating(write, every=STORAGE_SECONDS)

        with listening(self.work), self.place.either(local, stored):
            yield

    def sign(self) -> bytes | None:
        """The latest sign; None before the first."""
        return self.place.either(
            lambda: self.place.read(str(self._path)),
            lambda storage: _quick(storage).read(self._name),
        )

    def forget(self) -> None:
        """Remove the signs, where that can be done."""
        with contextlib.suppress(DiskError, OSError):
            self.place.either(
                lambda: self._path.unlink(missing_ok=True),
                lambda storage: _quick(storage).delete(self._name),
            )


def _quick(storage: Storage) -> Storage:
    """The same, which tries once: scoring does not wait for a storage that does not answer."""
    return Storage(storage.uri, retry_seconds=())


def results_of(
    references: Sequence[Any],
    tasks: Sequence[Watched],
    hang_seconds: float | None,
    *,
    stop: Callable[[Any], None],
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """What the Ray tasks return, all of them.

    Args:
        references: of the tasks.
        tasks: the same tasks, which give signs of life.
        hang_seconds: how long one may give none; None for the rule of ``Pauses``.
        stop: ends a task of Ray.
        is_wanted: whether to go on, asked about once a second.

    Raises:
        EvaluationError: one hangs, and the log says where; or they are not wanted any more.
        RayError: one failed. Then, as after any error, those that had not ended have been ended.
    """
    import ray

    watch, stopper = _Watch(hang_seconds), _Stopper(stop)
    every = tasks[0].place.either(lambda: LOOK_SECONDS, lambda _: STORAGE_SECONDS)
    waiting = dict(zip(references, tasks, strict=True))
    looked = time.monotonic()
    (Path(tasks[0].work) / STACKS).unlink(missing_ok=True)
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
            for reference in done:
                ray.get(reference)  # one that failed ends the others' wait
                watch.forget(waiting.pop(reference))
                beat()
            check_wanted(is_wanted)
            if time.monotonic() - looked < every:
                continue
            looked = time.monotonic()
            for task in waiting.values():
                if watch.is_hanging(task):
                    _end(task, list(waiting), watch.patience(task), stopper)
        return list(ray.get(list(references)))
    finally:
        stopper.stop_and_wait(list(waiting))
        for task in tasks:
            task.forget()


def check_wanted(is_wanted: Callable[[], bool]) -> None:
    """Refuse to go on with scores that nobody wants any more.

    Raises:
        EvaluationError: nobody does.
    """
    if not is_wanted():
        raise EvaluationError("scoring was given up by the command that had asked for it")


class _Watch:
    """For how long each task has given no new sign of life."""

    def __init__(self, hang_seconds: float | None) -> None:
        self._pauses = Pauses(hang_seconds)
        self._asked: dict[int, float] = {}
        """Of tasks that are silent, for how long they were when their process was asked for."""

    def patience(self, task: Watched) -> float:
        """Seconds for which ``task`` may be silent."""
        return self._pauses.limit(task.number)

    def forget(self, task: Watched) -> None:
        """``task`` has ended, or must begin anew."""
        self._pauses.forget(task.number)
        self._asked.pop(task.number, None)

    def is_hanging(self, task: Watched) -> bool:
        """Whether ``task`` has given no new sign of life for longer than it may."""
        try:
            sign = task.sign()
        except DiskError as error:
            _log.debug("whether scoring gets on is not known: %s", error)
            beat()  # this process waits for the storage, and does not hang
            return False
        silent = 0.0 if sign is None else self._pauses.look(task.number, sign)
        if not silent:
            self._asked.pop(task.number, None)
        elif self._is_due(task, silent) and _has_lost_its_process(sign):
            self.forget(task)
            silent = 0.0
        if not silent:
            beat()  # it gets on or waits for its turn, and others wait for this process
        return silent > self.patience(task)

    def _is_due(self, task: Watched, silent: float) -> bool:
        """Whether to ask for the process of ``task`` again."""
        due = self._asked.get(task.number, 0.0) + OWNER_SECONDS
        if silent <= min(due, self.patience(task)):
            return False
        self._asked[task.number] = silent
        return True


def _has_lost_its_process(sign: bytes | None) -> bool:
    """Whether the process that gave ``sign`` has ended: Ray starts its task again, in its turn."""
    try:
        node, pid, born, *_ = (sign or b"").decode().split(" ")
        return is_gone(node, int(pid), int(born))
    except ValueError:  # half of a sign was read
        return False


class _Stopper:
    """Ends tasks of Ray, each once.

    Never one whose result is there. Ray 2.60 may still be noting it down, and to cancel it then has
    ended the process that asked.
    """

    def __init__(self, stop: Callable[[Any], None]) -> None:
        self._stop = stop
        self._stopped: set[Any] = set()

    def stop(self, references: Sequence[Any]) -> None:
        """Stop those that have not ended, and do not wait."""
        for reference in _unfinished(references, timeout=0.0):
            if reference not in self._stopped:
                self._stopped.add(reference)
                self._stop(reference)

    def stop_and_wait(self, references: Sequence[Any]) -> None:
        """Stop them, and wait for a while: one that goes on would show itself again."""
        self.stop(references)
        _unfinished(references, timeout=STOP_SECONDS)


def _unfinished(references: Sequence[Any], *, timeout: float) -> list[Any]:
    """Those whose result is not there after ``timeout`` seconds."""
    import ray

    if not references:
        return []
    found: list[Any]
    _, found = ray.wait(
        list(references), num_returns=len(references), timeout=timeout, fetch_local=False
    )
    return found


def _end(task: Watched, waiting: Sequence[Any], patience: float, stopper: _Stopper) -> None:
    """End the scoring that ``task`` is a part of.

    Raises:
        EvaluationError: always; names what says where it hangs.
    """
    stacks = stacks_of(task.work)
    stopper.stop(waiting)
    kill_all(stacks)
    _log.warning("scoring hangs\n%s", report(stacks))
    where = write_stacks(Path(task.work) / STACKS, stacks)
    raise EvaluationError(
        f"scoring must show progress within {format_seconds(patience)} and did not; {where} says "
        "where it hangs, raise resources.hang_seconds if it is only slow"
    )
