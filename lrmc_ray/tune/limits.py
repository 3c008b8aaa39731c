"""How long a run may take, and what becomes of one that takes longer or is interrupted."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lrmc_ray.console import format_seconds
from lrmc_ray.files.study import trial_directory
from lrmc_ray.tune.processes import finish_steps, kill_run, last_process
from lrmc_ray.tune.result import write_failure

_log = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""How long an interrupted command waits for the checkpoints of what still runs."""

CLOCK_SECONDS = 2.0
"""Most by which the clocks of two nodes may differ."""

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


def write_overdue(directory: Path, taken: float, limit: float, setting: str) -> None:
    """Leave in a run's directory that it fails for having taken too long.

    Args:
        directory: of the run.
        taken: seconds since it began.
        limit: seconds that it had.
        setting: what gives it more.
    """
    cause = (
        f"it has not ended after {format_seconds(taken)}, more than {format_seconds(limit)}; raise "
        f"{setting} if it is only slow"
    )
    write_failure(directory, cause)


class RunningTrials:
    """The trials of a search that run now, and how those that must stop are stopped."""

    def __init__(self, directory: Path, kill: Callable[[Path], bool] = kill_run) -> None:
        """None so far.

        Args:
            directory: of the study.
            kill: ends the process of a trial, given its directory; whether it was there.
        """
        self._directory = directory
        self._kill = kill
        self.handed_out: dict[int, float] = {}
        """When each was handed out here, in seconds since 1970."""

    def begin(self, number: int) -> None:
        """Trial ``number`` is handed out."""
        self.handed_out[number] = time.time()

    def end(self, number: int) -> None:
        """Trial ``number`` has ended."""
        self.handed_out.pop(number, None)

    def stop_overdue(self, limit: float) -> None:
        """Kill the processes of trials beyond ``limit`` seconds; Ray Tune then sees them fail."""
        for number, handed_out in list(self.handed_out.items()):
            directory = trial_directory(self._directory, number)
            process = last_process(directory)
            # One from before is that of an earlier sitting; clocks of nodes may differ a little.
            if process is None or process.began < handed_out - CLOCK_SECONDS:
                continue
            taken = time.time() - process.began
            if taken <= limit:
                continue
            write_overdue(directory, taken, limit, "search.trial_timeout_seconds")
            if not self._kill(directory):
                _log.warning("trial %d is overdue, and its process was not found", number)
            self.end(number)

    def finish_steps(self, seconds: float = STOP_SECONDS) -> None:
        """Let every trial finish its step and save a checkpoint, for at most ``seconds``."""
        finish_steps(
            [trial_directory(self._directory, number) / "training" for number in self.handed_out],
            seconds,
        )
