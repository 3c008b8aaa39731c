"""The base model's scores of a search, made beside the first trials.

Training needs none. A trial that has trained waits for them, and holds no slot while it waits: so
those who score get theirs, whatever is lost meanwhile, and nothing waits for ever. Only a trial
that is scored on the way, for early stopping, would need them while it holds its slots. In such a
search, and where the first trial takes all slots, the base is scored before the trials.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.console import ProgressBar, format_seconds, progress
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.beats import beat
from lrmc_ray.files.in_background import InBackground
from lrmc_ray.tune.forecast import divide

_log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Time between two looks of a trial that waits."""

END_SECONDS = 20.0
"""How long scoring that is not wanted any more may take to end."""


def slots_beside(settings: RunSettings, slots: int) -> int:
    """Of ``slots``, those that the first trial leaves for scoring; 0 where the base comes first.

    Raises:
        ResourceError: not one trial fits.
    """
    _, (fewest, most) = divide(slots, settings.resources, settings.search.trials)
    workers = max(fewest, min(most, settings.train.micro_batches))
    return 0 if settings.search.stops_early else slots - workers


def await_scores(directory: Path) -> None:
    """Return when the scores in ``directory`` are finished; give signs of life until then.

    Whoever makes them ends this process if that fails.
    """
    while not is_finished(directory):
        beat()
        time.sleep(LOOK_SECONDS)


class BaseScores:
    """The base model's scores: there, or in the making, which ends with the context.

    Attributes:
        directory: where they are, or will be.
        are_there: whether they are, and have been noted.
    """

    def __init__(
        self,
        directory: Path,
        make: Callable[[int, Callable[[], bool]], None],
        note: Callable[[], None],
        *,
        num_tasks: int = 0,
    ) -> None:
        """Nothing has been made yet.

        Args:
            directory: where they will be.
            make: makes them on so many slots, for as long as the function says that they are
                wanted.
            note: called, by the thread that asks for them, once they are there.
            num_tasks: of the scores.
        """
        self.directory = directory
        self.are_there = False
        self._make, self._note, self._num_tasks = make, note, num_tasks
        self._work = InBackground()
        self._is_unwanted = threading.Event()
        self._began = 0.0

    def begin(self, slots: int, beside: int) -> None:
        """Make them: beside what comes next, on ``beside`` slots, or now on all ``slots``.

        Raises:
            LrmcError: of those that are made now, whatever scoring raises.
        """
        if beside > 0 and not is_finished(self.directory):
            _log.info("scoring the base model beside the first trial, on %d of %d slots",
                      beside, slots)  # fmt: skip
            self._began = time.monotonic()
            self._work.start(lambda: self._make(beside, lambda: not self._is_unwanted.is_set()))
            return
        with self._bar() as bar:
            self._make(slots, lambda: True)
            bar.advance(self._num_tasks)
        self._settle()

    def look(self) -> None:
        """Note them if they have come.

        Raises:
            BaseException: whatever scoring raised.
        """
        if not self.are_there and not self._work.is_busy:
            self._work.wait()
            _log.info("the base model is scored, after %s",
                      format_seconds(time.monotonic() - self._began))  # fmt: skip
            self._settle()

    def wait(self) -> None:
        """Wait for them, if they have not come.

        Raises:
            BaseException: whatever scoring raised.
        """
        if self.are_there:
            return
        with self._bar() as bar:
            self._work.wait()
            bar.advance(self._num_tasks)
        self._settle()

    def _bar(self) -> AbstractContextManager[ProgressBar]:
        return progress("Scoring the base model", total=self._num_tasks, unit="tasks")

    def _settle(self) -> None:
        self._note()
        self.are_there = True

    def __enter__(self) -> "BaseScores":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what is still being made: Ray must not be asked for anything once it is shut down."""
        self._is_unwanted.set()
        deadline = time.monotonic() + END_SECONDS
        while self._work.is_busy and time.monotonic() < deadline:
            time.sleep(0.05)
