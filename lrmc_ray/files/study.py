"""``study.json``: what a search is and has found. ``tune`` writes it, everybody else reads it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrmc_ray.config.search import Objective
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError

STUDY_FILE = "study.json"


# study.json


class _Entry(BaseModel):
    """Frozen; keys that a newer version added are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TrialEntry(_Entry):
    """One trial, as ``study.json`` tells it."""

    number: int = Field(ge=0)
    role: Literal["defaults", "yardstick", "search"]
    """``yardstick`` is plain fine-tuning."""
    state: Literal["COMPLETE", "FAIL", "RUNNING", "PRUNED"]
    cause: str | None = None
    """Why it failed or was stopped."""
    params: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    directory: str | None = None
    scores: str | None = None
    metrics_file: str | None = None
    results: dict[str, Any] = {}
    rung: dict[str, Any] | None = None
    """What it was scored on the way, and the decision: see ``early_stopping.Decision``."""
    cost: dict[str, float] = {}
    """``train_seconds``, ``evaluate_seconds``, ``processed_tokens``, ``original_tokens``."""


class StudyFile(_Entry):
    """``study.json``. Paths are relative to its directory."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    created: str
    objective: Objective = "combined"
    forgetting_weight: float = Field(ge=0, allow_inf_nan=False)
    max_forgetting: float = Field(0.01, allow_inf_nan=False)
    """What the objective ``budget`` allows, as a fraction."""
    space: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    base_scores: str | None = None
    stage_seconds: dict[str, float] = {}
    sessions: tuple[tuple[float, float], ...] = ()
    """Begin and end of every sitting, in seconds since 1970."""
    forecast: dict[str, Any] | None = None
    importance: dict[str, dict[str, float]] = {}
    """Of each parameter, for ``eval/domain_gain`` and the others: shares that add up to one."""
    record: dict[str, Any] = {}
    trials: tuple[TrialEntry, ...] = ()
    best: int | None = None
    final: dict[str, str] = {}
    """Scores of ``base``, ``best`` and ``yardstick`` on items that no choice was made on."""


def find_study(directory: Path) -> Path:
    """The study directory in or directly below ``directory``.

    Raises:
        IncompleteArtifactError: there is none.
        ConfigError: there are several; the user must name one.
    """
    if (directory / STUDY_FILE).is_file():
        return directory
    found = sorted(path.parent for path in directory.glob(f"*/{STUDY_FILE}"))
    found += sorted(path.parent for path in directory.glob(f"*/*/{STUDY_FILE}"))
    if not found:
        raise IncompleteArtifactError(
            f"{directory} has no {STUDY_FILE}, so no search has written its results there; "
            f"run `python -m lrmc_ray.tune --output {directory}` first"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ConfigError(
            f"a report is about one study, {directory} holds several; name one: {names}"
        )
    return found[0]


def read_study_file(study_dir: Path) -> StudyFile:
    """The study that ``study_dir`` holds.

    Raises:
        IncompleteArtifactError: no search has started there.
        DataError: the file is damaged.
    """
    path = study_dir / STUDY_FILE
    try:
        return StudyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{study_dir} has no {STUDY_FILE}: no search has started there; "
            "run `python -m lrmc_ray.tune` first"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}; remove the file and run the same "
            "`python -m lrmc_ray.tune` command again, it writes it anew"
        ) from None


TRIALS = "trials"


def trial_directory(study_directory: Path, number: int) -> Path:
    """Where trial ``number`` keeps everything."""
    return study_directory / TRIALS / f"{number:04d}"
