"""Forwards a study to MLflow: a parent run for the study, a child run per trial.

The truth is on disk: ``study.json`` and each trial's metrics file (``metrics_log``). MLflow gets a
copy, from the driver process only, and nothing waits for it: :class:`StudyTracker` works in a side
thread, and what a dead or frozen server missed is made up for by a later pass of the same thread
or by ``mlflow_sync.sync``. Both bring MLflow up to a
:class:`~lrmc_ray.report.mlflow_shown.ShownStudy`.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lrmc_ray.console import public
from lrmc_ray.errors import IncompleteArtifactError, ResourceError
from lrmc_ray.files.names import BEST_MODEL
from lrmc_ray.files.study import STUDY_FILE, Artifact, StudyFile, TrainingFile, read_study
from lrmc_ray.report.mlflow_mirror import (
    StudyMirror,
    catch_up_command,
    in_one_line,
    prepare_mlflow,
    root_cause,
)
from lrmc_ray.report.mlflow_place import check_kept_within, follow_a_move
from lrmc_ray.report.mlflow_shown import NOTE_TAG, STUDY_TAG, TRIAL_TAG, ShownRun, ShownStudy

EXPERIMENT = "lrmc_ray"
"""Default name of the MLflow experiment."""

_MAX_BACKOFF_SECONDS = 60.0

_logger = logging.getLogger(__name__)


class StudyTracker:
    """Shows a running study in MLflow without ever holding it up; a context manager.

    Every method only notes what should be seen and returns; a side thread brings MLflow up to it.
    Leaving the ``with`` block closes it: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED.

    Args:
        tracking_uri: where to; see :func:`default_tracking_uri`.
        study_id: identifies the study when it goes on after a crash.
        study_name: what people read.
        directory: start of relative paths.
        experiment: the MLflow experiment.
        params: of the study.
        tags: of the study.
        datasets: the training data.
        catch_up: the command that a warning names as the remedy.
        poll_seconds: time between looks at the metrics files.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        study_id: str,
        study_name: str,
        directory: Path,
        experiment: str = EXPERIMENT,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        datasets: Sequence[TrainingFile] = (),
        catch_up: str = "lrmc mlflow-sync",
        poll_seconds: float = 5.0,
    ) -> None:
        self._shown_uri = public(tracking_uri)
        self._catch_up = catch_up
        self._poll_seconds = poll_seconds
        run = ShownRun(params=dict(params or {}), tags=dict(tags or {}), started=time.time())
        self._study = ShownStudy(study_id, study_name, run, datasets=tuple(datasets))
        self._mirror = StudyMirror(tracking_uri, experiment, directory)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._warned: set[str] = set()
        self._is_failing = False
        self._is_complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def child(
        self,
        number: int,
        params: Mapping[str, Any],
        *,
        role: str = "search",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Show trial ``number`` as running; on resume the run that it had is used again."""
        run = ShownRun(role=role, params=dict(params), tags=dict(tags or {}), started=time.time())
        with self._lock:
            self._show(number, run)
        self._wake.set()

    def forward(self, number: int, metrics_path: Path) -> None:
        """From now on, forward what is appended to the metrics file of trial ``number``."""
        with self._lock:
            self._show(number, replace(self._trial(number), metrics_file=str(metrics_path)))

    def finish(
        self,
        number: int,
        status: str,
        metrics: Mapping[str, float] | None = None,
        *,
        cause: str | None = None,
    ) -> None:
        """End trial ``number`` as FINISHED, PRUNED, FAILED or KILLED, with its final scores."""
        with self._lock:
            run = replace(
                self._trial(number),
                state=status,
                results=dict(metrics or {}),
                cause=cause,
                ended=time.time(),
            )
            self._show(number, run)
        self._wake.set()

    def _trial(self, number: int) -> ShownRun:
        """What is known of a trial; one of an earlier process may end without having begun here."""
        return self._study.trials.get(number, ShownRun())

    def _show(self, number: int, run: ShownRun) -> None:
        self._study = replace(self._study, trials={**self._study.trials, number: run})

    def describe(self, note: str, scores: Mapping[str, float], model: Path | None) -> None:
        """Say what the study has found: a description in Markdown, its scores, the best model."""
        with self._lock:
            run = replace(
                self._study.run, tags={**self._study.run.tags, NOTE_TAG: note}, results=dict(scores)
            )
            self._study = replace(self._study, run=run, model=str(model) if model else None)
        self._wake.set()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file to the study's run; logged again, it replaces the one before."""
        with self._lock:
            artifact = Artifact(path=str(path), folder=folder)
            if artifact not in self._study.artifacts:
                artifacts = (*self._study.artifacts, artifact)
                self._study = replace(self._study, artifacts=artifacts)
        self._wake.set()

    def close(
        self, status: str = "FINISHED", *, cause: str | None = None, timeout_seconds: float = 30.0
    ) -> bool:
        """End the study's run and wait for the last pass, but not for long.

        Returns:
            Whether MLflow has everything. If not, a warning says how to catch up.
        """
        with self._lock:
            run = replace(self._study.run, state=status, cause=cause, ended=time.time())
            self._study = replace(self._study, run=run)
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if not self._is_complete:
            _logger.warning(
                "MLflow at %s does not have everything. Nothing is lost; to catch up, run `%s`",
                self._shown_uri,
                self._catch_up,
            )
        return self._is_complete

    @property
    def trade_off_path(self) -> str | None:
        """Where MLflow's page shows forgetting against domain gain, one point per trial.

        To be put behind the server's address, ``http://127.0.0.1:5000/`` for a plain ``mlflow ui``.
        None as long as MLflow has not answered.
        """
        return self._mirror.trade_off_path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._closing.is_set():
            return
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):
            self.close("FAILED", cause=f"{kind.__name__}: {error}")
        else:
            self.close("KILLED", cause=kind.__name__)

    def _work(self) -> None:
        backoff = self._poll_seconds
        while True:
            # In this order: a wake-up after it is not lost.
            self._wake.clear()
            is_last = self._closing.is_set()
            with self._lock:
                study = self._study  # never changed, only replaced
            try:
                self._mirror.update(study, warn=self._warn)
            except Exception as error:
                self._mirror.forget()
                self._warn(error)
                self._is_failing = True
                if not is_last:
                    self._closing.wait(backoff)
                    backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
            else:
                if self._is_failing:
                    _logger.info("MLflow at %s is up to date again", self._shown_uri)
                self._is_failing = False
                self._is_complete = is_last
                backoff = self._poll_seconds
                if not is_last:
                    self._wake.wait(self._poll_seconds)
            if is_last:
                return

    def _warn(self, error: Exception) -> None:
        root = root_cause(error)
        kind = f"{type(root).__name__} {getattr(error, 'error_code', '')}"
        if kind in self._warned:
            return
        self._warned.add(kind)
        _logger.warning(
            "MLflow at %s misses data (%s). The run goes on and nothing is lost; "
            "it is tried again, and `%s` catches up later",
            self._shown_uri,
            in_one_line(root),
            self._catch_up,
        )


def best_model_of(study_dir: Path) -> Path | None:
    """The best model of a study; None while there is none."""
    directory = study_dir.resolve() / BEST_MODEL
    return directory if directory.is_dir() else None


def register_model(study_dir: Path, model: Path, name: str, tracking_uri: str) -> str:
    """Put the study's best model into MLflow's registry; returns its version.

    The version holds a copy of the directory as it is: ``mlflow models`` and ``mlflow.pyfunc`` load
    it by ``models:/NAME/VERSION``, and ``from_pretrained`` opens what
    ``mlflow.artifacts.download_artifacts`` brings. A second call for the same trial copies nothing.

    Raises:
        IncompleteArtifactError: there is no study, or it is not in MLflow.
        DataError: the database of the output directory points elsewhere.
        ResourceError: MLflow cannot be reached or refuses.
    """
    study = read_forwarded(study_dir)
    prepare_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    wanted = {STUDY_TAG: study.id, TRIAL_TAG: str(study.best)}
    try:
        follow_a_move(tracking_uri, study.experiment or EXPERIMENT, study_dir)
        client = MlflowClient(tracking_uri)
        for version in client.search_model_versions(f"name = '{name}'"):
            if wanted.items() <= dict(version.tags).items():
                return str(version.version)
        found = client.get_experiment_by_name(study.experiment or EXPERIMENT)
        runs = (
            []
            if found is None
            else client.search_runs([found.experiment_id], f"tags.`{STUDY_TAG}` = '{study.id}'")
        )
        parents = [run for run in runs if TRIAL_TAG not in run.data.tags]
        if not parents:
            raise IncompleteArtifactError(
                f"the study {study.id} is not in MLflow at {public(tracking_uri)}; run "
                f"`{catch_up_command(study_dir, tracking_uri)}` first"
            )
        run_id = parents[0].info.run_id
        check_kept_within(str(parents[0].info.artifact_uri), tracking_uri, study_dir)
        client.log_artifacts(run_id, str(model), "best_model")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{parents[0].info.artifact_uri.rstrip('/')}/best_model"
        version = client.create_model_version(name, source, run_id, tags=wanted)
    except (MlflowException, OSError, sqlite3.Error) as error:
        raise ResourceError(
            f"MLflow at {public(tracking_uri)} must take the model {name}, but "
            f"{in_one_line(root_cause(error))}; start it, or choose another name"
        ) from error
    return str(version.version)


def read_forwarded(study_dir: Path) -> StudyFile:
    """The study in ``study_dir``, which MLflow is to get.

    Raises:
        IncompleteArtifactError: there is none.
        DataError: its ``study.json`` is damaged.
    """
    if not (study_dir / STUDY_FILE).is_file():
        raise IncompleteArtifactError(
            f"{study_dir} has no {STUDY_FILE}, so there is no study to forward; "
            "give the directory that `lrmc tune` named"
        )
    return read_study(study_dir)


def shown(study: StudyFile) -> ShownStudy:
    """What MLflow is to show of a study that is read; a trial's params lie over its settings."""
    trials = {
        trial.number: ShownRun(
            state=trial.state,
            role=trial.role,
            cause=trial.cause,
            params={**trial.settings, **trial.params},
            metrics_file=trial.metrics_file,
            results=trial.results,
            started=trial.started,
            ended=trial.ended,
        )
        for trial in study.trials
    }
    run = ShownRun(state=study.state, params=study.settings, ended=study.ended)
    return ShownStudy(study.id, study.name, run, trials, study.datasets, study.artifacts)
