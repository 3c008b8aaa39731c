"""What ``study.json`` says of a search, kept up to date while the search runs."""

import bisect
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.config import RunSettings, TrainSettings, trial_settings
from lrmc_ray.errors import LrmcError
from lrmc_ray.files.artifacts import fingerprint
from lrmc_ray.files.names import METRICS
from lrmc_ray.files.study import (
    STUDY_FILE,
    StudyFile,
    TrialEntry,
    TrialState,
    read_study,
    trial_directory,
    write_study,
)
from lrmc_ray.report.mlflow import EXPERIMENT
from lrmc_ray.train.driver import with_steps
from lrmc_ray.train.early_stopping import read_decision
from lrmc_ray.tune.choice import choose_best
from lrmc_ray.tune.provenance import datasets, versions, why_new
from lrmc_ray.tune.result import COMBINED, read_result

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_log = logging.getLogger(__name__)

WRITE_FACTOR = 20.0
"""Of the time of a search, at most one part in so many goes into writing ``study.json``."""

_STATES: Mapping[str, TrialState] = {
    "WAITING": "RUNNING",
    "RUNNING": "RUNNING",
    "COMPLETE": "COMPLETE",
    "PRUNED": "PRUNED",
    "FAIL": "FAIL",
}
"""Optuna's names of a trial's states, and ours."""


def study_identity(settings: RunSettings) -> dict[str, Any]:
    """What makes two searches the same one: all but how many trials, how fast, and what follows."""
    identity = settings.model_dump(mode="json", exclude={"resources"})
    for key in ("trials", "keep_models", "trial_timeout_seconds", "final_limit"):
        del identity["search"][key]
    return identity


def study_fingerprint(settings: RunSettings, contents: Mapping[str, str]) -> str:
    """Twelve hex digits that tell searches apart.

    Args:
        settings: of the search.
        contents: what its trials are trained and scored on, see ``provenance.contents``.
    """
    return fingerprint({**study_identity(settings), "contents": dict(contents)})


def study_directory(settings: RunSettings, output: Path, contents: Mapping[str, str]) -> Path:
    """Where a search keeps everything: its name and fingerprint, in the output directory."""
    return output.resolve() / f"{settings.study_name()}-{study_fingerprint(settings, contents)}"


class Description:
    """``study.json`` of one search: read or begun, and brought up to every trial.

    Attributes:
        file: what it says. Two threads work on it, so ``lock`` is held where a trial is changed.
        settings: the search, as it was asked for.
        recorded: the record, once it is there.
    """

    def __init__(
        self,
        directory: Path,
        settings: RunSettings,
        contents: Mapping[str, str],
        *,
        experiment: str | None = None,
    ) -> None:
        """Read the study in ``directory``, or begin it.

        Args:
            directory: of the study; made if it is not there.
            settings: the search.
            contents: what its trials are trained and scored on.
            experiment: of MLflow, in place of the one that the study has.
        """
        self.directory = directory
        self.settings = settings
        self.recorded: Path | None = None
        self.lock = threading.RLock()
        self._is_behind = False
        self._next_write = 0.0
        directory.mkdir(parents=True, exist_ok=True)
        self._began = (time.time(), time.monotonic())
        now = self._began[0]
        if (directory / STUDY_FILE).is_file():
            self.file = read_study(directory)
            self.file.sessions = [*self.file.sessions, (now, now)]
            if experiment is not None:
                self.file.experiment = experiment
        else:
            why = why_new(directory, STUDY_FILE, study_identity(settings), contents)
            if why is not None:
                _log.warning("%s", why)
            self.file = _new_file(settings, directory.name, experiment or EXPERIMENT, now)
            self.file.asked = fingerprint(study_identity(settings))
            self.file.contents = dict(contents)
            self.write()

    def now(self) -> float:
        """Seconds since 1970, by the clock as it was when this sitting began.

        A clock that is set meanwhile changes no duration.
        """
        wall, monotonic = self._began
        return wall + time.monotonic() - monotonic

    def write(self) -> None:
        """Bring ``study.json`` on disk up to date."""
        began, _ = self.file.sessions[-1]
        self.file.sessions[-1] = (began, self.now())
        start = time.monotonic()
        write_study(self.directory, self.file)
        self._is_behind = False
        self._next_write = time.monotonic() + WRITE_FACTOR * (time.monotonic() - start)

    def write_soon(self) -> None:
        """Bring it up to date now, or with the next call, if the last one was just before.

        What is not written is not lost: the study's database has it, and trials their results.
        """
        self._is_behind = True
        self.catch_up()

    def catch_up(self) -> None:
        """Write what :meth:`write_soon` has left, if it is time for that."""
        with self.lock:
            if self._is_behind and time.monotonic() >= self._next_write:
                self.write()

    def snapshot(self) -> StudyFile:
        """A copy for those who only look; it shares entries, which are replaced, never changed."""
        with self.lock:
            return self.file.model_copy(update={"trials": list(self.file.trials)})

    def describe(self, trial: "FrozenTrial") -> TrialEntry:
        """Bring the entry of ``trial`` up to date; it is added if it is new."""
        directory = trial_directory(self.directory, trial.number)
        trials = self.file.trials
        place = bisect.bisect_left(trials, trial.number, key=lambda entry: entry.number)
        if place < len(trials) and trials[place].number == trial.number:
            # In place of the old one, which others may be looking at.
            entry = trials[place] = trials[place].model_copy()
        else:
            entry = TrialEntry(number=trial.number, role=trial.user_attrs["role"], state="RUNNING")
            trials.insert(place, entry)
        tuned = trial_settings(
            self.settings.train, {**trial.params, **trial.user_attrs["overrides"]}
        )
        entry.role = trial.user_attrs["role"]
        entry.state = _STATES[trial.state.name]
        entry.cause = trial.user_attrs.get("cause")
        entry.params = dict(trial.params)
        entry.settings = self.with_steps(tuned).model_dump(mode="json")
        entry.directory = directory.relative_to(self.directory).as_posix()
        entry.metrics_file = f"{entry.directory}/training/{METRICS}"
        entry.scores, entry.results, entry.cost = None, {}, {}
        decision = read_decision(directory / "training")
        entry.rung = None if decision is None else asdict(decision)
        if entry.started is None:
            entry.started = self.now()
        result = read_result(directory)
        if entry.state == "COMPLETE" and result is not None and COMBINED in result.results:
            entry.scores = f"{entry.directory}/{result.scores}"
            entry.results, entry.cost = result.results, result.cost
        if entry.state == "PRUNED" and result is not None and decision is not None:
            entry.cause, entry.cost = decision.reason(result.train["steps"]), result.cost
        if entry.state != "RUNNING" and entry.ended is None:
            entry.ended = self.now()
        return entry

    def with_steps(self, tuned: TrainSettings) -> TrainSettings:
        """A trial's settings with ``epochs``, if they are set, turned into ``steps``."""
        if tuned.epochs is None or self.recorded is None:
            return tuned
        settings = self.settings.model_copy(update={"train": tuned})
        try:
            return with_steps(settings, self.recorded).train
        except LrmcError:  # the trial itself fails of it, with its cause
            return tuned

    def choose_best(self) -> None:
        """Name the best trial, or the one that comes closest; see :func:`choose_best`."""
        choose_best(self.file, self.settings.search)

    def stored_name(self) -> str:
        """The study's name in a storage; of its own, so that what is there belongs to it."""
        if self.file.stored_as is None:
            self.file.stored_as = f"studies/{self.file.id}-{secrets.token_hex(4)}"
            self.write()
        return self.file.stored_as

    @property
    def final_limit(self) -> int | None:
        """Items per task of the last scoring; None for all."""
        return self.settings.search.final_limit or self.settings.evaluate.limit

    @property
    def num_failed(self) -> int:
        """Trials that failed."""
        return sum(trial.state == "FAIL" for trial in self.file.trials)

    @property
    def is_finished(self) -> bool:
        """Whether the search has ended, with as many trials as are asked for now."""
        trials = self.file.trials
        return (
            self.file.state == "FINISHED"
            and len(trials) >= self.settings.search.trials
            and self.file.final_limit == self.final_limit
            and all(trial.state != "RUNNING" for trial in trials)
        )

    def end(self) -> None:
        """Declare the search finished."""
        self.file.state = "FINISHED"
        self.file.ended = self.now()
        self.write()


def _new_file(settings: RunSettings, name: str, experiment: str, now: float) -> StudyFile:
    """What is known before anything has run. All of it is said, so that all of it is written."""
    sections = settings.model_dump(mode="json")
    return StudyFile(
        schema=1,
        id=name,
        name=settings.study_name(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        state="RUNNING",
        objective=settings.search.objective,
        forgetting_weight=settings.search.forgetting_weight,
        max_forgetting=settings.search.max_forgetting,
        space=sections.pop("parameters"),
        settings=sections,
        versions=versions(),
        stage_seconds={},
        sessions=[(now, now)],
        experiment=experiment,
        forecast=None,
        importance={},
        record={},
        datasets=datasets(settings),
        artifacts=[],
        trials=[],
        best=None,
        closest=None,
        final={},
    )
