"""Forwards a study to MLflow: a parent run for the study, a child run per trial.

The truth is on disk: ``study.json`` and each trial's metrics file (``metrics_log``). MLflow gets a
copy, from the driver process only, and nothing waits for it: :class:`StudyTracker` works in a side
thread, and what a dead or frozen server missed is made up for by a later pass of the same thread
or by :func:`sync`. Both bring MLflow up to a *study description*, which is the content of
``study.json``::

    {"id": "demo-1f2e3d4c5b6a", "name": "demo",
     "trials": [{"number": 0, "state": "FINISHED",
                 "role": "search", "cause": null, "settings": {}, "params": {"tau": 0.95},
                 "tags": {}, "metrics_file": "trials/0/metrics.jsonl",
                 "results": {"eval/domain_gain": 0.12},
                 "started": 1761200000.0, "ended": 1761200300.0}],
     "state": "RUNNING", "cause": null, "settings": {}, "params": {}, "tags": {}, "results": {},
     "datasets": [{"name": "nl2sql", "digest": "9a0c", "source": "/data/nl2sql.jsonl"}],
     "artifacts": [{"path": "space.toml", "folder": "config"}]}

Results are logged at step 0, MLflow's step of values that have no curve; those that are not
numbers are left out. Only ``id``, ``name``, ``trials`` and a trial's ``number`` and ``state`` must
be there. Times are seconds since 1970. Relative paths start at the study's directory.

Sending is idempotent: runs are found again by their tags ``lrmc.study`` and ``lrmc.trial``, and of
each metric only steps beyond the last one that MLflow has are sent. So of a step that had been sent
and was redone after a crash MLflow keeps the first value, and the local file the last.
"""

import copy
import json
import logging
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lrmc_ray.errors import DataError, IncompleteArtifactError, ResourceError
from lrmc_ray.metrics_log import StepMetrics, last_of_each_step, read_new_lines

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STUDY = "study.json"
EXPERIMENT = "lrmc_ray"
"""Default name of the MLflow experiment."""
STUDY_TAG = "lrmc.study"
TRIAL_TAG = "lrmc.trial"
ROLE_TAG = "lrmc.role"
CAUSE_TAG = "lrmc.cause"
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
_MAX_BACKOFF_SECONDS = 60.0
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

_ENDED = ("FINISHED", "FAILED", "KILLED")

_Warn = Callable[[Exception], None]
_logger = logging.getLogger(__name__)


def default_tracking_uri(output: Path) -> str:
    """The SQLite database of an output directory."""
    return f"sqlite:///{output.absolute() / 'mlflow.db'}"


def metric_name(name: str) -> str:
    """``name`` as MLflow accepts it, for params and tags too.

    ``nl2sql/acc,none`` becomes ``nl2sql/acc_none``.
    """
    allowed = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)
    # MLflow also refuses names that mean something else as a path.
    return posixpath.normpath(allowed).lstrip("/.")[:_KEY_LENGTH] or "_"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a pass added to MLflow."""

    runs: int
    """Runs created."""
    points: int
    """Metric values logged."""
    trade_off_path: str
    """Where MLflow's page shows the trade-off; see :attr:`StudyTracker.trade_off_path`."""


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
        datasets: ``name``, ``digest`` and ``source`` of each input; see the file's head.
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
        datasets: Sequence[Mapping[str, str]] = (),
        catch_up: str = "lrmc mlflow-sync",
        poll_seconds: float = 5.0,
    ) -> None:
        self._uri = tracking_uri
        self._catch_up = catch_up
        self._poll_seconds = poll_seconds
        self._study: dict[str, Any] = {
            "id": study_id,
            "name": study_name,
            "state": "RUNNING",
            "params": dict(params or {}),
            "tags": dict(tags or {}),
            "datasets": [dict(dataset) for dataset in datasets],
            "artifacts": [],
            "started": time.time(),
        }
        self._trials: dict[int, dict[str, Any]] = {}
        self._mirror = _Mirror(tracking_uri, experiment, directory)
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
        with self._lock:
            self._trials[number] = {
                "number": number,
                "state": "RUNNING",
                "role": role,
                "params": dict(params),
                "tags": dict(tags or {}),
                "started": time.time(),
            }
        self._wake.set()

    def forward(self, number: int, metrics_path: Path) -> None:
        """From now on, forward what is appended to the metrics file of trial ``number``."""
        with self._lock:
            self._trial(number)["metrics_file"] = str(metrics_path)

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
            self._trial(number).update(
                {
                    "state": status,
                    "results": dict(metrics or {}),
                    "cause": cause,
                    "ended": time.time(),
                }
            )
        self._wake.set()

    def _trial(self, number: int) -> dict[str, Any]:
        """What is known of a trial; one of an earlier process may end without having begun here."""
        return self._trials.setdefault(number, {"number": number, "state": "RUNNING"})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file to the study's run; logged again, it replaces the one before."""
        with self._lock:
            artifact = {"path": str(path), "folder": folder}
            if artifact not in self._study["artifacts"]:
                self._study["artifacts"].append(artifact)
        self._wake.set()

    def close(
        self, status: str = "FINISHED", *, cause: str | None = None, timeout_seconds: float = 30.0
    ) -> bool:
        """End the study's run and wait for the last pass, but not for long.

        Returns:
            Whether MLflow has everything. If not, a warning says how to catch up.
        """
        with self._lock:
            self._study |= {"state": status, "cause": cause, "ended": time.time()}
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if not self._is_complete:
            _logger.warning(
                "MLflow at %s does not have everything. Nothing is lost; to catch up, run `%s`",
                self._uri,
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
                study = copy.deepcopy(self._study | {"trials": list(self._trials.values())})
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
                    _logger.info("MLflow at %s is up to date again", self._uri)
                self._is_failing = False
                self._is_complete = is_last
                backoff = self._poll_seconds
                if not is_last:
                    self._wake.wait(self._poll_seconds)
            if is_last:
                return

    def _warn(self, error: Exception) -> None:
        root = _root_cause(error)
        kind = f"{type(root).__name__} {getattr(error, 'error_code', '')}"
        if kind in self._warned:
            return
        self._warned.add(kind)
        _logger.warning(
            "MLflow at %s misses data (%s). The run goes on and nothing is lost; "
            "it is tried again, and `%s` catches up later",
            self._uri,
            _in_one_line(root),
            self._catch_up,
        )


def sync(study_dir: Path, tracking_uri: str, experiment: str | None = None) -> Forwarded:
    """Bring MLflow up to ``study_dir``; a second call adds nothing.

    Not to be called while a :class:`StudyTracker` forwards the same study: both would create the
    runs that are missing. Hold the directory's lock.

    Raises:
        IncompleteArtifactError: there is no study in ``study_dir``.
        DataError: its ``study.json`` or a metrics file is corrupt; all other trials are forwarded.
        ResourceError: MLflow cannot be reached.
    """
    study = read_study(study_dir)
    has_ended = all(_status(trial["state"]) in _ENDED for trial in study["trials"])
    study.setdefault("state", "FINISHED" if has_ended else "RUNNING")
    _prepare_mlflow()
    from mlflow.exceptions import MlflowException

    experiment = experiment or study.get("experiment") or EXPERIMENT
    mirror = _Mirror(tracking_uri, experiment, study_dir)
    problems: list[Exception] = []
    try:
        mirror.update(study, warn=problems.append)
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        raise ResourceError(
            f"MLflow at {tracking_uri} must answer, but {_in_one_line(_root_cause(error))}; "
            "start it, or give another --tracking-uri, and run this again"
        ) from error
    if problems:
        raise DataError("; ".join(str(problem) for problem in problems))
    assert mirror.trade_off_path is not None
    return Forwarded(mirror.runs_created, mirror.points_sent, mirror.trade_off_path)


def register_model(study_dir: Path, model: Path, name: str, tracking_uri: str) -> str:
    """Put the study's best model into MLflow's registry; returns its version.

    The version holds the Hugging Face directory as it is: ``mlflow.artifacts.download_artifacts(
    "models:/NAME/VERSION")`` and ``from_pretrained`` open it. (MLflow 3.17's transformers flavour
    cannot save what transformers 5 has written.) A second call for the same trial finds the first.

    Raises:
        IncompleteArtifactError: there is no study, or it is not in MLflow.
        ResourceError: MLflow cannot be reached or refuses.
    """
    study = read_study(study_dir)
    _prepare_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    wanted = {STUDY_TAG: str(study["id"]), TRIAL_TAG: str(study.get("best"))}
    try:
        client = MlflowClient(tracking_uri)
        for version in client.search_model_versions(f"name = '{name}'"):
            if wanted.items() <= dict(version.tags).items():
                return str(version.version)
        found = client.get_experiment_by_name(study.get("experiment") or EXPERIMENT)
        runs = (
            []
            if found is None
            else client.search_runs([found.experiment_id], f"tags.`{STUDY_TAG}` = '{study['id']}'")
        )
        parents = [run for run in runs if TRIAL_TAG not in run.data.tags]
        if not parents:
            raise IncompleteArtifactError(
                f"the study {study['id']} is not in MLflow at {tracking_uri}; run "
                f"`lrmc mlflow-sync {study_dir}` first"
            )
        run_id = parents[0].info.run_id
        client.log_artifacts(run_id, str(model), "best_model")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{parents[0].info.artifact_uri.rstrip('/')}/best_model"
        version = client.create_model_version(name, source, run_id, tags=wanted)
    except (MlflowException, OSError) as error:
        raise ResourceError(
            f"MLflow at {tracking_uri} must take the model {name}, but "
            f"{_in_one_line(_root_cause(error))}; start it, or choose another name"
        ) from error
    return str(version.version)


def read_study(study_dir: Path) -> dict[str, Any]:
    """The study description in ``study_dir``; the file's head says what is in it.

    Raises:
        IncompleteArtifactError: there is none.
        DataError: it is not JSON, or a field is missing.
    """
    path = study_dir / STUDY
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part, keys in (
            (study, ("id", "name", "trials")),
            *((trial, ("number", "state")) for trial in study["trials"]),
        ):
            for key in keys:
                part[key]
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{study_dir} has no {STUDY}, so there is no study to forward; "
            "give the directory that `lrmc tune` named"
        ) from None
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} must be a JSON object with id, name and trials, each with "
            f"number and state, but {type(error).__name__}: {error}; "
            "run `lrmc tune` again, it writes the file anew"
        ) from None
    return study


def _prepare_mlflow() -> None:
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
    # It would report every retry; we report every cause once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@dataclass
class _MirroredRun:
    """What MLflow already has of one run."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    has_datasets: bool
    last_steps: dict[str, int]
    """Highest step by metric."""
    offset: int = 0
    """Bytes of the metrics file that were read."""
    artifacts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Modification time (ns) and size of each artifact sent, by its path."""
    finished_as: Mapping[str, Any] | None = None
    """Description of a run that has ended and is complete."""


class _Mirror:
    """Brings MLflow up to a study description, remembering what is there already."""

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

    def update(self, study: Mapping[str, Any], *, warn: _Warn) -> None:
        """Send what MLflow does not have.

        Args:
            study: see the file's head.
            warn: is told of files that cannot be read; they do not hold up the rest.

        Raises:
            MlflowException: MLflow does not answer or refuses.
        """
        study_id = str(study["id"])
        if not re.fullmatch(r"[\w.\-]+", study_id):
            raise DataError(f"a study's id is made of letters, digits, _ . and -, got {study_id!r}")
        if self._client is None:
            _prepare_mlflow()
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
            self._experiment_id = self._find_experiment(self._client)
            self._load_runs(self._client, study_id)
            self._save_view(self._client, study_id, str(study["name"]))
        tags = {STUDY_TAG: study_id}
        parent = self._update_run(self._client, None, str(study["name"]), tags, study, study, warn)
        for trial in study["trials"]:
            number = int(trial["number"])
            known = self._runs[number].tags if number in self._runs else {}
            role = trial.get("role") or known.get(ROLE_TAG, "search")
            tags = {
                STUDY_TAG: study_id,
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
        location = None
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///"))
            location = (database.absolute().parent / "mlartifacts").as_uri()
        return client.create_experiment(self._experiment, artifact_location=location)

    def _save_view(self, client: "MlflowClient", study_id: str, study_name: str) -> None:
        key = f"lrmc-{study_id}"
        tag = f"mlflow.sharedViewState.{key}"
        if tag not in client.get_experiment(self._experiment_id).tags:
            client.set_experiment_tag(
                self._experiment_id, tag, _trade_off_view(study_id, study_name)
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
        wanted: Mapping[str, Any],
        study: Mapping[str, Any],
        warn: _Warn,
    ) -> _MirroredRun:
        """One run, the study's (``number`` None) or a trial's, up to its description."""
        from mlflow.entities import Param, RunTag

        if number in self._runs and self._runs[number].finished_as == wanted:
            return self._runs[number]
        status = _status(wanted.get("state") or "RUNNING")
        tags = tags | dict(wanted.get("tags") or {})
        if wanted.get("cause"):
            tags[CAUSE_TAG] = str(wanted["cause"])
        if wanted.get("state") == "PRUNED":
            tags[PRUNED_TAG] = "true"
        tags = {metric_name(key): str(value)[:_TAG_LENGTH] for key, value in tags.items()}
        if number not in self._runs:
            run = client.create_run(
                self._experiment_id,
                start_time=round(1000 * (wanted.get("started") or time.time())),
                tags=tags,
                run_name=name,
            )
            self.runs_created += 1
            self._runs[number] = _mirrored(client, run)
        have = self._runs[number]

        params = [
            Param(metric_name(key), str(value)[:_PARAM_LENGTH])
            for key, value in _flat({**(wanted.get("settings") or {}), **wanted.get("params", {})})
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
        if study.get("datasets") and not have.has_datasets:
            _log_datasets(client, have.run_id, study["datasets"])
            have.has_datasets = True

        lines = self._read_new_lines(have, wanted, warn)
        if status in _ENDED:
            results = _numbers(wanted.get("results") or {})
            lines.append(StepMetrics(0, wanted.get("ended") or time.time(), results))
        self.points_sent += _log_lines(client, have, lines)
        for artifact in wanted.get("artifacts") or ():
            self._send_artifact(client, have, artifact, warn)
        if status != have.status:
            if status in _ENDED:
                ended = round(1000 * (wanted.get("ended") or time.time()))
                client.set_terminated(have.run_id, status, ended)
            else:
                client.update_run(have.run_id, status)
            have.status = status
        have.finished_as = wanted if number is not None and status in _ENDED else None
        return have

    def _read_new_lines(
        self, have: _MirroredRun, wanted: Mapping[str, Any], warn: _Warn
    ) -> list[StepMetrics]:
        if not wanted.get("metrics_file"):
            return []
        path = self._directory / wanted["metrics_file"]
        try:
            new_lines, have.offset = read_new_lines(path, have.offset)
        except (DataError, OSError) as error:
            warn(error)
            return []
        return last_of_each_step(new_lines)

    def _send_artifact(
        self,
        client: "MlflowClient",
        have: _MirroredRun,
        artifact: Mapping[str, str],
        warn: _Warn,
    ) -> None:
        path = self._directory / artifact["path"]
        try:
            stat = path.stat()
        except OSError as error:
            warn(error)
            return
        if have.artifacts.get(str(path)) != (stat.st_mtime_ns, stat.st_size):
            client.log_artifact(have.run_id, str(path), artifact.get("folder") or None)
            have.artifacts[str(path)] = (stat.st_mtime_ns, stat.st_size)


def _trade_off_view(study_id: str, study_name: str) -> str:
    """A saved view, as the button "Views" of MLflow's page of runs stores it in a tag.

    The format is MLflow 3.17's own. A page that does not know it shows its default charts.
    """

    def chart(kind: str, **settings: Any) -> dict[str, Any]:
        return {
            "uuid": f"lrmc-{kind}",
            "type": kind,
            "metricSectionId": "lrmc",
            "runsCountToCompare": 100,
            "deleted": False,
            "isGenerated": False,
            **settings,
        }

    state = {
        "searchFilter": f"tags.`{STUDY_TAG}` = '{study_id}'",
        "runsHiddenMode": "SHOW_ALL",
        # Groups show their runs at once, while a parent's children are folded away.
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": ROLE_TAG}],
        },
        "useGroupedValuesInCharts": False,
        "compareRunCharts": [
            chart(
                "SCATTER",
                xaxis={"key": "eval/domain_gain", "type": "METRIC"},
                yaxis={"key": "eval/forgetting", "type": "METRIC"},
            ),
            chart("BAR", metricKey="eval/combined"),
            chart("LINE", metricKey="train/loss", selectedMetricKeys=["train/loss"]),
        ],
        "compareRunSections": [
            {
                "uuid": "lrmc",
                "name": "Trade-off",
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
        ],
        # Otherwise sections are sorted by name.
        "isAccordionReordered": True,
    }
    now = round(1000 * time.time())
    return json.dumps(
        {
            "name": f"{study_name}: forgetting against domain gain",
            "createdAt": now,
            "updatedAt": now,
            "state": json.dumps(state),
        }
    )


def _mirrored(client: "MlflowClient", run: "Run") -> _MirroredRun:
    run_id = str(run.info.run_id)
    return _MirroredRun(
        run_id=run_id,
        status=str(run.info.status),
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        has_datasets=bool(run.inputs and run.inputs.dataset_inputs),
        last_steps={
            key: max(point.step for point in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
    )


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


def _log_datasets(
    client: "MlflowClient", run_id: str, datasets: Iterable[Mapping[str, str]]
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=dataset["name"],
                digest=dataset["digest"][:_DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": dataset["source"]}),
            ),
            [InputTag("mlflow.data.context", dataset.get("context", "training"))],
        )
        for dataset in datasets
    ]
    client.log_inputs(run_id, inputs)


def _root_cause(error: BaseException) -> BaseException:
    """What began it: MLflow wraps a refused connection in five layers of text."""
    while parent := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = parent
    return error


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _color(number: int, role: str) -> str:
    """Of a trial in MLflow's charts; the yardstick has one of its own."""
    return _YARDSTICK_COLOR if role == "yardstick" else _TRIAL_COLORS[number % len(_TRIAL_COLORS)]


def _status(state: str) -> str:
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
