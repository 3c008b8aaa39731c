"""Trials whose process died while it trained: they are begun again, as lost workers are."""

import logging
from pathlib import Path

from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.train.run_files import LocalRun

_log = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Processes of a trial lost in a row, without a new checkpoint, that one command puts up with."""


class LostProcesses:
    """How often the process of each trial was lost while it trained in place of a worker."""

    def __init__(self) -> None:
        self._lost: dict[Path, tuple[int | None, int]] = {}

    def goes_on(self, directory: Path) -> bool:
        """Whether a trial whose process has just died without a word is to be begun again.

        Only from the middle of its training: before and after it, the same would happen again.
        Where workers train, they may outlive the trial's process; its end is final then.

        Args:
            directory: of the trial, with its ``training``.
        """
        files = LocalRun(directory / "training")
        by_workers = files.reservation() is not None
        if by_workers or not files.directory.is_dir() or is_finished(files.directory):
            return False
        newest = max(files.steps(), default=None)
        reached, count = self._lost.get(directory, (newest, 0))
        count = count + 1 if newest == reached else 1
        self._lost[directory] = newest, count
        if count > MAX_LOSSES:
            return False
        _log.warning(
            "the process of trial %d died in training; it goes on from %s",
            int(directory.name),
            "its beginning" if newest is None else f"its checkpoint of step {newest}",
        )
        return True
