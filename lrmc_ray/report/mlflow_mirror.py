"""Brings one MLflow experiment up to a study: runs, params, metrics, the chart.

Results are logged at step 0, MLflow's step of values that have no curve; those that are not
numbers are left out.

Sending is idempotent: runs are found again by their tags ``lrmc.study`` and ``lrmc.trial``, and of
each metric only steps beyond the last one that MLflow has are sent. So of a step that had been sent
and was redone after a crash MLflow keeps the first value, and the local file the last.
"""

import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.command_line import pasteable
from lrmc_ray.config.base import flatten
from lrmc_ray.console import public
from lrmc_ray.errors import DataError
from lrmc_ray.files.metrics_log import StepMetrics, last_of_each_step, read_new_lines
from lrmc_ray.files.names import BEST_MODEL, default_tracking_uri
from lrmc_ray.files.study import Artifact, TrainingFile
from lrmc_ray.report.mlflow_place import (
    artifacts_beside,
    check_kept_within,
    database_of,
    follow_a_move,
)
from lrmc_ray.report.mlflow_shown import (
    NOTE_TAG,
    ROLE_TAG,
    RUN_ID,
    STUDY_TAG,
    TRIAL_TAG,
    ShownRun,
    ShownStudy,
    shown_results,
    trade_off_view,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


CAUSE_TAG = "lrmc.cause"
DIRECTORY_TAG = "lrmc.directory"
"""Of a model that MLflow knows: where it is."""
PRUNED_TAG = "lrmc.stopped_early"
"""Of a trial that stopped itself: MLflow has no state of its own for it, and shows it as KILLED."""
_PARENT_TAG = "mlflow.parentRunId"
_COLOR_TAG = "mlflow.runColor"


# MLflow draws a run's colour by its id, so that of six trials three may look the same.
_YARDSTICK_COLOR = "#c2410c"
_TRIAL_COLORS = (
    "#0f766e",
    "#b45309",
    "#4f46e5",
    "#be185d",
    "#0369a1",
    "#65a30d",
    "#7c3aed",
    "#475569",
)


# MLflow's limits. Its client splits what is too much for one request.
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 250, 6000, 8000, 36


# MLflow's own names of a run's states, and Optuna's of a trial's.
_STATUSES = {
    "SCHEDULED": "SCHEDULED",
    "WAITING": "SCHEDULED",
    "RUNNING": "RUNNING",
    "FINISHED": "FINISHED",
    "COMPLETE": "FINISHED",
    "FAILED": "FAILED",
    "FAIL": "FAILED",
    "KILLED": "KILLED",
    "PRUNED": "KILLED",
}
ENDED_STATUSES = ("FINISHED", "FAILED", "KILLED")
_Warn = Callable[[Exception], None]


def metric_name(name: str) -> str:
    """``name`` as MLflow accepts it, for params and tags too.

    ``nl2sql/acc,none`` becomes ``nl2sql/acc_none``.
    """
    allowed = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)
    # MLflow also refuses names that mean something else as a path.
    return posixpath.normpath(allowed).lstrip("/.")[:_KEY_LENGTH] or "_"


def prepare_mlflow() -> None:
    """Before the first import: give up soon, tell nobody about us, say nothing on stderr."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # With the defaults, one call to a dead server takes four minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # Our stdout is for results.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # it configures its loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # They would report every retry, and every error with its traceback; we report every cause once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


@dataclass
class _MirroredRun:
    """What MLflow already has of one run."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    has_datasets: bool
    model_id: str | None
    """What MLflow calls the best model."""
    artifact_uri: str
    """Where its files are kept."""
    last_steps: dict[str, int]
    """Highest step by metric."""
    offset: int = 0
    """Bytes of the metrics file that were read."""
    artifacts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Modification time (ns) and size of each artifact sent, by its path."""
    finished_as: ShownRun | None = None
    """A run that has ended and is complete."""


class StudyMirror:
    """Brings MLflow up to a study, remembering what is there already."""

    def __init__(self, tracking_uri: str, experiment: str, directory: Path) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._directory = directory
        self.trade_off_path: str | None = None
        self.runs_created = 0
        self.points_sent = 0
        self.forget()

    def forget(self) -> None:
        """Ask MLflow again: after a failure, nobody knows what arrived."""
        self._client: MlflowClient | None = None
        self._runs: dict[int | None, _MirroredRun] = {}

    def update(self, study: ShownStudy, *, warn: _Warn) -> None:
        """Send what MLflow does not have.

        Args:
            study: what it is to show.
            warn: is told of files that cannot be read; they do not hold up the rest.

        Raises:
            MlflowException: MLflow does not answer or refuses.
        """
        if not re.fullmatch(r"[\w.\-]+", study.id):
            raise DataError(f"a study's id is made of letters, digits, _ . and -, got {study.id!r}")
        if self._client is None:
            prepare_mlflow()
            from mlflow import MlflowClient

            follow_a_move(self._uri, self._experiment, self._directory)
            self._client = MlflowClient(self._uri)
            self._experiment_id = self._find_experiment(self._client)
            self._load_runs(self._client, study.id)
            self._save_view(self._client, study.id, study.name)
        tags = {STUDY_TAG: study.id}
        parent = self._update_run(self._client, None, study.name, tags, study.run, study, warn)
        for number, trial in study.trials.items():
            known = self._runs[number].tags if number in self._runs else {}
            role = trial.role or known.get(ROLE_TAG, "search")
            tags = {
                STUDY_TAG: study.id,
                TRIAL_TAG: str(number),
                ROLE_TAG: role,
                _PARENT_TAG: parent.run_id,
                _COLOR_TAG: known.get(_COLOR_TAG) or _color(number, role),
            }
            self._update_run(
                self._client, number, f"trial {number} {role}", tags, trial, study, warn
            )

    def _find_experiment(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        database = database_of(self._uri)
        location = None if database is None else artifacts_beside(database)
        return client.create_experiment(self._experiment, artifact_location=location)

    def _save_view(self, client: "MlflowClient", study_id: str, study_name: str) -> None:
        key = f"lrmc-{study_id}"
        tag = f"mlflow.sharedViewState.{key}"
        if tag not in client.get_experiment(self._experiment_id).tags:
            client.set_experiment_tag(
                self._experiment_id, tag, trade_off_view(study_id, study_name)
            )
        self.trade_off_path = (
            f"#/experiments/{self._experiment_id}/runs?workflowType=machine_learning"
            f"&compareRunsMode=CHART&viewStateShareKey={key}"
        )

    def _load_runs(self, client: "MlflowClient", study_id: str) -> None:
        token: str | None = None
        while token != "":
            page = client.search_runs(
                [self._experiment_id],
                f"tags.`{STUDY_TAG}` = '{study_id}'",
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                trial = run.data.tags.get(TRIAL_TAG)
                number = None if trial is None else int(trial)
                if number not in self._runs:
                    self._runs[number] = _mirrored(client, run)
            token = page.token or ""

    def _update_run(
        self,
        client: "MlflowClient",
        number: int | None,
        name: str,
        tags: dict[str, str],
        wanted: ShownRun,
        study: ShownStudy,
        warn: _Warn,
    ) -> _MirroredRun:
        """One run, the study's (``number`` None) or a trial's, up to what it is to show."""
        if number in self._runs and self._runs[number].finished_as == wanted:
            return self._runs[number]
        status = mlflow_status(wanted.state)
        tags = _all_tags(tags, wanted)
        if number not in self._runs:
            run = client.create_run(
                self._experiment_id,
                start_time=round(1000 * (wanted.started or time.time())),
                tags=tags,
                run_name=name,
            )
            self.runs_created += 1
            self._runs[number] = _mirrored(client, run)
        have = self._runs[number]
        if NOTE_TAG in tags:  # its figure is found by the run's own id
            tags[NOTE_TAG] = tags[NOTE_TAG].replace(RUN_ID, have.run_id)
        _log_params_and_tags(client, have, wanted.params, tags)
        if study.datasets and not have.has_datasets:
            _log_datasets(client, have.run_id, study.datasets)
            have.has_datasets = True
        lines = self._read_new_lines(have, wanted.metrics_file, warn)
        if status in ENDED_STATUSES:
            results = _numbers(shown_results(wanted.results))
            lines.append(StepMetrics(0, wanted.ended or time.time(), results))
        self.points_sent += _log_lines(client, have, lines)
        if number is None:
            for artifact in study.artifacts:
                self._send_artifact(client, have, artifact, warn)
            if study.model is not None and status == "FINISHED":
                self._name_model(client, have, study.model)
        _set_status(client, have, status, wanted.ended)
        have.finished_as = wanted if number is not None and status in ENDED_STATUSES else None
        return have

    def _name_model(self, client: "MlflowClient", have: _MirroredRun, directory: str) -> None:
        """Tell MLflow of the best model and where it is. Its gigabytes are not copied."""
        from mlflow.entities import LoggedModelOutput

        if have.model_id is not None:
            if client.get_logged_model(have.model_id).tags.get(DIRECTORY_TAG) != directory:
                client.set_logged_model_tags(have.model_id, {DIRECTORY_TAG: directory})
            return
        model = client.create_logged_model(
            self._experiment_id,
            name=BEST_MODEL,
            source_run_id=have.run_id,
            tags={"mlflow.model.isExternal": "true", DIRECTORY_TAG: directory},
            model_type="fine-tuned",
        )
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(have.run_id, [LoggedModelOutput(model.model_id, 0)])
        have.model_id = str(model.model_id)

    def _read_new_lines(
        self, have: _MirroredRun, metrics_file: str | None, warn: _Warn
    ) -> list[StepMetrics]:
        if not metrics_file:
            return []
        try:
            new_lines, have.offset = read_new_lines(self._directory / metrics_file, have.offset)
        except (DataError, OSError) as error:
            warn(error)
            return []
        return last_of_each_step(new_lines)

    def _send_artifact(
        self,
        client: "MlflowClient",
        have: _MirroredRun,
        artifact: Artifact,
        warn: _Warn,
    ) -> None:
        path = self._directory / artifact.path
        try:
            check_kept_within(have.artifact_uri, self._uri, self._directory)
            stat = path.stat()
        except (DataError, OSError) as error:
            warn(error)
            return
        if have.artifacts.get(str(path)) != (stat.st_mtime_ns, stat.st_size):
            client.log_artifact(have.run_id, str(path), artifact.folder or None)
            have.artifacts[str(path)] = (stat.st_mtime_ns, stat.st_size)


def _mirrored(client: "MlflowClient", run: "Run") -> _MirroredRun:
    run_id = str(run.info.run_id)
    models = run.outputs.model_outputs if run.outputs else []
    return _MirroredRun(
        run_id=run_id,
        status=str(run.info.status),
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        has_datasets=bool(run.inputs and run.inputs.dataset_inputs),
        model_id=str(models[0].model_id) if models else None,
        artifact_uri=str(run.info.artifact_uri),
        last_steps={
            key: max(point.step for point in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
    )


def _all_tags(tags: Mapping[str, str], wanted: ShownRun) -> dict[str, str]:
    """``tags`` and those of ``wanted``, as MLflow accepts them."""
    every = {**tags, **wanted.tags}
    if wanted.cause:
        every[CAUSE_TAG] = wanted.cause
    if wanted.state == "PRUNED":
        every[PRUNED_TAG] = "true"
    return {metric_name(key): str(value)[:_TAG_LENGTH] for key, value in every.items()}


def _log_params_and_tags(
    client: "MlflowClient", have: _MirroredRun, wanted: Mapping[str, Any], tags: dict[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    params = [
        Param(metric_name(key), str(value)[:_PARAM_LENGTH])
        for key, value in flatten(wanted).items()
        # A param that is there cannot be changed, and MLflow refuses the attempt.
        if metric_name(key) not in have.params
    ]
    new_tags = [RunTag(k, v) for k, v in tags.items() if have.tags.get(k) != v]
    if params or new_tags:
        client.log_batch(have.run_id, params=params, tags=new_tags)
    have.params |= {param.key: param.value for param in params}
    have.tags |= tags
    if CAUSE_TAG in have.tags and CAUSE_TAG not in tags:
        client.delete_tag(have.run_id, CAUSE_TAG)
        del have.tags[CAUSE_TAG]


def _set_status(
    client: "MlflowClient", have: _MirroredRun, status: str, ended: float | None
) -> None:
    if status == have.status:
        return
    if status in ENDED_STATUSES:
        client.set_terminated(have.run_id, status, round(1000 * (ended or time.time())))
    else:
        client.update_run(have.run_id, status)
    have.status = status


def _log_lines(client: "MlflowClient", have: _MirroredRun, lines: Iterable[StepMetrics]) -> int:
    from mlflow.entities import Metric

    points = []
    for line in lines:
        for name, value in line.metrics.items():
            key = metric_name(name)
            if line.step > have.last_steps.get(key, -1):
                points.append(Metric(key, value, round(1000 * line.time), line.step))
                have.last_steps[key] = line.step
    if points:
        client.log_batch(have.run_id, metrics=points)
    return len(points)


def _log_datasets(client: "MlflowClient", run_id: str, datasets: Iterable[TrainingFile]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=dataset.name,
                digest=dataset.digest[:_DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": dataset.source}),
            ),
            [InputTag("mlflow.data.context", "training")],
        )
        for dataset in datasets
    ]
    client.log_inputs(run_id, inputs)


def root_cause(error: BaseException) -> BaseException:
    """What began it: MLflow wraps a refused connection in five layers of text."""
    while parent := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = parent
    return error


def in_one_line(error: BaseException) -> str:
    """An error's text without line breaks and passwords."""
    return public(f"{type(error).__name__}: {error}".splitlines()[0])[:200]


def catch_up_command(study_dir: Path, tracking_uri: str) -> str:
    """What to type to bring MLflow up to a study. Of an address, passwords are to be put in."""
    words = ["mlflow-sync", study_dir]
    if tracking_uri != default_tracking_uri(study_dir.parent):
        words += ["--tracking-uri", public(tracking_uri)]
    return pasteable("lrmc", *words)


def _color(number: int, role: str) -> str:
    """Of a trial in MLflow's charts; the yardstick has one of its own."""
    return _YARDSTICK_COLOR if role == "yardstick" else _TRIAL_COLORS[number % len(_TRIAL_COLORS)]


def mlflow_status(state: str) -> str:
    """MLflow's name of a run's or trial's state.

    Raises:
        DataError: there is none.
    """
    try:
        return _STATUSES[state.upper()]
    except KeyError:
        raise DataError(f"a state is one of {', '.join(_STATUSES)}, got {state!r}") from None


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
