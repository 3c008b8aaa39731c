"""Brings MLflow up to a study that is on disk: the command ``lrmc mlflow-sync``."""

import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

from lrmc_ray.console import public
from lrmc_ray.errors import DataError, LrmcError, ResourceError
from lrmc_ray.files.study import STUDY_FILE, StudyFile
from lrmc_ray.report.mlflow import EXPERIMENT, best_model_of, read_forwarded, shown
from lrmc_ray.report.mlflow_mirror import (
    StudyMirror,
    in_one_line,
    prepare_mlflow,
    root_cause,
)
from lrmc_ray.report.mlflow_note import study_note, study_scores
from lrmc_ray.report.mlflow_shown import NOTE_TAG, ShownStudy
from lrmc_ray.report.study import load_study


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a pass added to MLflow."""

    runs: int
    """Runs created."""
    points: int
    """Metric values logged."""
    trade_off_path: str
    """Where MLflow's page shows the trade-off; see ``StudyTracker.trade_off_path``."""


def sync(study_dir: Path, tracking_uri: str, experiment: str | None = None) -> Forwarded:
    """Bring MLflow up to ``study_dir``; a second call adds nothing.

    Not to be called while a ``StudyTracker`` forwards the same study: both would create the
    runs that are missing. Hold the directory's lock.

    Raises:
        IncompleteArtifactError: there is no study in ``study_dir``.
        DataError: its ``study.json`` or a metrics file is corrupt; all other trials are forwarded.
        ResourceError: MLflow cannot be reached.
    """
    study = read_forwarded(study_dir)
    _check_within(study, study_dir)
    prepare_mlflow()
    from mlflow.exceptions import MlflowException

    experiment = experiment or study.experiment or EXPERIMENT
    mirror = StudyMirror(tracking_uri, experiment, study_dir)
    problems: list[Exception] = []
    try:
        mirror.update(_described(shown(study), study_dir), warn=problems.append)
    except (MlflowException, OSError, sqlite3.Error) as error:  # requests' errors are OSErrors
        raise ResourceError(
            f"MLflow at {public(tracking_uri)} must answer, but {in_one_line(root_cause(error))}; "
            "start it, or give another --tracking-uri, and run this again"
        ) from error
    if problems:
        raise DataError("; ".join(str(problem) for problem in problems))
    assert mirror.trade_off_path is not None
    return Forwarded(mirror.runs_created, mirror.points_sent, mirror.trade_off_path)


def _check_within(study: StudyFile, study_dir: Path) -> None:
    """Refuse a study that names files of others, which would be sent to the server.

    Raises:
        DataError: a file lies outside of the study's directory.
    """
    for artifact in study.artifacts:
        path = (study_dir / artifact.path).resolve()
        if not path.is_relative_to(study_dir.resolve()):
            raise DataError(
                f"{study_dir / STUDY_FILE}: artifacts must lie in its directory, {artifact.path} "
                f"is {path}; take the entry out"
            )


def _described(study: ShownStudy, study_dir: Path) -> ShownStudy:
    """``study`` with what it has found, as far as that can be read."""
    model = best_model_of(study_dir)
    study = replace(study, model=str(model) if model else None)
    try:
        loaded = load_study(study_dir)
    except LrmcError:
        return study  # nothing is scored yet, or the scores are elsewhere
    tags = {NOTE_TAG: study_note(loaded)}
    return replace(study, run=replace(study.run, tags=tags, results=study_scores(loaded)))
