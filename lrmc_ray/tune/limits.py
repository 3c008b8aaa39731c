"""How long a run may take or be silent, and what becomes of one that must stop.

The limit in all needs a run that has ended. The limit for silence holds from the first run on: it
rests on the longest pause between two signs of progress that any run made here, and on the
forecast of one step.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.stacks import Stack, kill_all, report, stacks_of, write_stacks
from lrmc_ray.console import format_seconds
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.beats import PROGRESS, OwnTime, Pauses
from lrmc_ray.files.names import METRICS, STACKS
from lrmc_ray.tune.processes import count_starts, finish_steps
from lrmc_ray.tune.result import write_failure

_log = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""How long an interrupted command waits for the checkpoints of what still runs."""

SHORTEST_LIMIT_SECONDS = 600.0
"""Time that every run has, where no limit is set."""

LIMIT_FACTOR = 10.0
"""A run may take this many times as long as the longest that has ended."""


def time_limit(chosen: float | None, costs: Iterable[Mapping[str, float]]) -> float:
    """Seconds after which a run is stopped.

    Args:
        chosen: the limit that was set; None for one that follows from ``costs``.
        costs: of all runs; empty for those that have not ended.
    """
    if chosen is not None:
        return chosen
    taken = [cost["train_seconds"] + cost["evaluate_seconds"] for cost in costs if cost]
    if not taken:
        return math.inf
    return max(SHORTEST_LIMIT_SECONDS, LIMIT_FACTOR * max(taken))


class RunWatch:
    """The runs that go on now: those that take too long or hang are ended, with their stacks."""

    def __init__(
        self,
        kill: Callable[[Path], bool],
        *,
        setting: str,
        hang_seconds: float | None = None,
        step_seconds: float = 0.0,
        stacks: Callable[[Path], list[Stack]] | None = None,
        time: OwnTime | None = None,
    ) -> None:
        """None so far.

        Args:
            kill: ends the process of a run, given its directory; whether it was there.
            setting: what gives a run more time in all.
            hang_seconds: how long a run may show no progress; None for the rule of ``Pauses``.
            step_seconds: what one step of training was forecast to take.
            stacks: says what the processes of a run do; by default asks them.
            time: of this process.
        """
        self._kill, self._setting = kill, setting
        self._stacks = stacks or stacks_of
        self._time = time or OwnTime()
        self._pauses = Pauses(hang_seconds, expected=step_seconds, time=self._time)
        self._starts: dict[Path, int] = {}
        """Of every run, how often it had begun when it was handed out here."""
        self._began: dict[Path, float] = {}
        self._metrics: dict[Path, int] = {}
        """Of every run, the bytes of its metrics when it was handed out here."""

    @property
    def directories(self) -> list[Path]:
        """Of the runs that go on."""
        return list(self._starts)

    def begin(self, directory: Path) -> None:
        """The run in ``directory`` is handed out; it may still wait for its turn."""
        self._metrics[directory] = _size(directory / "training" / METRICS)
        self._starts[directory] = count_starts(directory)

    def has_stepped(self, directory: Path) -> bool:
        """Whether the run in ``directory`` has made a step since it was handed out."""
        return _size(directory / "training" / METRICS) != self._metrics.get(directory)

    def end(self, directory: Path) -> None:
        """The run in ``directory`` has ended."""
        self._starts.pop(directory, None)
        self._began.pop(directory, None)
        self._metrics.pop(directory, None)
        self._pauses.forget(directory)

    def look(self, limit: float, is_waiting: Callable[[Path], bool] = lambda _: False) -> None:
        """End the runs that have taken more than ``limit`` seconds, and those that hang.

        Args:
            limit: seconds.
            is_waiting: whether a run waits for what another work makes. That is not its own time:
                it has the whole limit again when it goes on.
        """
        for directory, before in list(self._starts.items()):
            starts = count_starts(directory)
            if starts == before:
                continue  # it waits for its turn
            now = self._time.look()
            if is_waiting(directory):
                self._began.pop(directory, None)
            taken = now - self._began.setdefault(directory, now)
            silent = self._pauses.look(directory, (starts, *_signs(directory)))
            patience = self._pauses.limit(directory)
            if taken > limit:
                cause = (
                    f"it has not ended after {format_seconds(taken)}, more than "
                    f"{format_seconds(limit)}; raise {self._setting} if it is only slow"
                )
            elif silent > patience:
                cause = (
                    f"it has shown no progress for {format_seconds(silent)}, more than "
                    f"{format_seconds(patience)}, and hangs; {STACKS} in its directory says where; "
                    "raise resources.hang_seconds if it is only slow"
                )
            else:
                continue
            self._stop(directory, cause)

    def _stop(self, directory: Path, cause: str) -> None:
        """Leave the cause and the stacks in the run's directory, and kill its processes.

        They are killed even where the disk is full.
        """
        stacks = self._stacks(directory)
        _log.warning("%s is ended: %s\n%s", directory.name, cause, report(stacks))
        try:
            write_failure(directory, cause)  # before the end of its process is noticed
        finally:
            if not self._kill(directory):
                _log.warning("%s is ended, and its process was not found", directory.name)
            # A worker that hangs does not hear that its trial has died.
            if stacks:
                kill_all(stacks)
            write_stacks(directory / STACKS, stacks)
            self.end(directory)

    def finish_steps(self, seconds: float = STOP_SECONDS) -> None:
        """Let every run finish its step and save a checkpoint, for at most ``seconds``."""
        finish_steps([directory / "training" for directory in self._starts], seconds)


def _signs(directory: Path) -> tuple[Any, ...]:
    """What changes in a run's directory as long as the run gets on."""
    training = directory / "training"
    return (
        _content(directory / PROGRESS),
        _content(training / PROGRESS),
        _size(training / METRICS),
        is_finished(training),
    )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
