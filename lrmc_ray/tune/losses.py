"""Runs whose process died while it trained: they are begun again, as lost workers are."""

import logging
from pathlib import Path

from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.train.run_files import LocalRun

_log = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Processes of a run lost in a row, without a new checkpoint, that one command puts up with."""


class LostProcesses:
    """How often the process of each trial, or of a comparison's run, was lost in training.

    A process that trains in place of a worker is replaced as Ray Train replaces a worker.
    """

    def __init__(self, *, trains_in_place: bool) -> None:
        """Count from zero.

        Args:
            trains_in_place: whether the runs' own processes train. Where workers do, these may
                outlive a run's process, and its end is final.
        """
        self._trains_in_place = trains_in_place
        self._lost: dict[Path, tuple[int | None, int]] = {}

    def goes_on(self, directory: Path) -> bool:
        """Whether a run whose process has just died without a word is to be begun again.

        Only from the middle of its training: before and after it, the same would happen again.

        Args:
            directory: of the run, with its ``training``.
        """
        training = directory / "training"
        if not self._trains_in_place or not training.is_dir() or is_finished(training):
            return False
        newest = max(LocalRun(training).steps(), default=None)
        reached, count = self._lost.get(directory, (newest, 0))
        count = count + 1 if newest == reached else 1
        self._lost[directory] = newest, count
        if count > MAX_LOSSES:
            return False
        _log.warning(
            "the process of %s died in training; it goes on from %s",
            directory.name,
            "its beginning" if newest is None else f"its checkpoint of step {newest}",
        )
        return True
