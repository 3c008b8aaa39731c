"""``study.json``: what a search is and has found. ``tune`` writes it, everybody else reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from lrmc_ray.config.search import Objective
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import write_json

STUDY_FILE = "study.json"
TRIALS = "trials"
"""The folder of the trials' directories, here and in a storage."""

Role = Literal["defaults", "yardstick", "search"]
"""What a trial is there for; ``yardstick`` is plain fine-tuning."""
TrialState = Literal["COMPLETE", "FAIL", "RUNNING", "PRUNED"]
Number = int | float
"""Stays what it is, so that a file that is read and written again does not change."""


Form = TypeVar("Form", bound="StudyFile")


class _Part(BaseModel):
    """A part of the file; keys that a newer version added are kept, and nobody looks at them."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class FoundRange:
    """The range of a searched setting that was found automatically, and why it is that one."""

    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class FoundPrecision:
    """What ``train.precision = "auto"`` came to, and why."""

    precision: Literal["fp32", "bf16"]
    reason: str


class TrainingFile(_Part):
    """A file of training data."""

    name: str
    digest: str
    """The first 32 hex digits of the SHA-256 of its content."""
    source: str
    """Its path."""


class Artifact(_Part):
    """A file that MLflow gets a copy of."""

    path: str
    folder: str = ""
    """Where it is in MLflow's run."""


class TrialEntry(_Part):
    """One trial. Paths are relative to the study's directory."""

    number: int = Field(ge=0)
    role: Role
    state: TrialState
    cause: str | None = None
    """Why it failed or was stopped."""
    params: dict[str, Any] = {}
    """What the search chose for it."""
    settings: dict[str, Any] = {}
    """All of its settings of ``train``."""
    directory: str | None = None
    scores: str | None = None
    metrics_file: str | None = None
    results: dict[str, Any] = {}
    rung: dict[str, Any] | None = None
    """What it was scored on the way, and the decision: see ``early_stopping.Decision``."""
    cost: dict[str, Number] = {}
    """``train_seconds``, ``evaluate_seconds``, ``processed_tokens``, ``original_tokens``."""
    started: float | None = None
    """In seconds since 1970."""
    ended: float | None = None


class StudyFile(_Part):
    """``study.json``. Paths are relative to its directory."""

    schema_version: Literal[1] = Field(alias="schema")
    id: str
    """The name and the fingerprint of settings and contents; also the directory's name."""
    asked: str | None = None
    """Fingerprint of the settings alone."""
    contents: dict[str, str] = {}
    """Digests of what every trial is trained and scored on."""
    name: str
    created: str
    state: Literal["RUNNING", "FINISHED"]
    objective: Objective = "combined"
    forgetting_weight: float = Field(ge=0, allow_inf_nan=False)
    max_forgetting: float = Field(0.01, allow_inf_nan=False)
    """What the objective ``budget`` allows, as a fraction."""
    space: dict[str, Any] = {}
    """The searched settings, with automatic ranges once they are found."""
    ranges: dict[str, FoundRange] | None = None
    """Ranges that were found automatically."""
    precision: FoundPrecision | None = None
    """What ``train.precision = "auto"`` came to, for all trials."""
    settings: dict[str, Any] = {}
    """All others, by section."""
    versions: dict[str, str] = {}
    datasets: list[TrainingFile] = []
    experiment: str | None = None
    """MLflow's."""
    artifacts: list[Artifact] = []
    trade_off_path: str | None = None
    """Where MLflow's page shows forgetting against gain."""
    stored_as: str | None = None
    """The study's name in the storage, where there is one."""
    stage_seconds: dict[str, Number] = {}
    sessions: list[tuple[float, float]] = []
    """Begin and end of every sitting, in seconds since 1970."""
    forecast: dict[str, Any] | None = None
    """What it was expected to take: see ``forecast.Forecast``."""
    importance: dict[str, dict[str, float]] = {}
    """Of each parameter, for ``eval/domain_gain`` and the others: shares that add up to one."""
    record: dict[str, Any] = {}
    """What the manifest of Stage 0 sums up."""
    base_scores: str | None = None
    trials: list[TrialEntry] = []
    best: int | None = None
    """Number of the trial that the search chose."""
    closest: int | None = None
    """Where no trial keeps the budget: the one that comes closest to it."""
    final: dict[str, str] = {}
    """Scores of ``base``, ``best`` and ``yardstick`` on the test items."""
    final_limit: int | None = None
    """Items per task of these; None for all."""
    ended: float | None = None

    def trial(self, number: int) -> TrialEntry | None:
        """The entry of trial ``number``; None if there is none."""
        return next((entry for entry in self.trials if entry.number == number), None)


@dataclass(frozen=True, slots=True)
class TrialLine:
    """The little of a :class:`TrialEntry` by which trials are counted; all of it was checked."""

    number: int
    state: TrialState
    scores: str | None
    results: dict[str, Any]
    """Gain and forgetting alone."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """That of a whole entry, of which one at a time is made."""
        return no_info_after_validator_function(cls.of, handler.generate_schema(TrialEntry))

    @classmethod
    def of(cls, entry: TrialEntry) -> Self:
        """The line of a trial."""
        names = ("eval/domain_gain", "eval/forgetting")
        results = {name: entry.results[name] for name in names if name in entry.results}
        return cls(entry.number, entry.state, entry.scores, results)


class StudyOutline(StudyFile):
    """A study of many trials in little memory, for those who only read it."""

    trials: list[TrialLine] = []  # type: ignore[assignment]  # nothing is put into the list


def find_study(directory: Path) -> Path:
    """The study directory in or directly below ``directory``.

    Raises:
        IncompleteArtifactError: there is none.
        ConfigError: there are several; the user must name one.
    """
    if (directory / STUDY_FILE).is_file():
        return directory
    if not directory.is_dir():
        raise IncompleteArtifactError(
            f"{directory} does not exist; give the --output of a search, or the study in it"
        )
    found = sorted(path.parent for path in directory.glob(f"*/{STUDY_FILE}"))
    found += sorted(path.parent for path in directory.glob(f"*/*/{STUDY_FILE}"))
    if not found:
        raise IncompleteArtifactError(
            f"{directory} has no {STUDY_FILE}, so no search has written its results there; "
            f"run `python -m lrmc_ray.tune --output {directory}` first"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ConfigError(f"one study is needed, {directory} holds several; name one: {names}")
    return found[0]


def read_study(directory: Path) -> StudyFile:
    """The study that ``directory`` holds.

    Raises:
        IncompleteArtifactError: no search has started there.
        DataError: the file is damaged.
    """
    return _read(directory, StudyFile)


def read_outline(directory: Path) -> StudyOutline:
    """The same without most of what it says of its trials.

    Raises:
        IncompleteArtifactError: no search has started there.
        DataError: the file is damaged.
    """
    return _read(directory, StudyOutline)


def _read(directory: Path, form: type[Form]) -> Form:
    path = directory / STUDY_FILE
    try:
        return form.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{directory} has no {STUDY_FILE}: no search has started there; "
            "run `python -m lrmc_ray.tune` first"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}; remove the file and run the same "
            "`python -m lrmc_ray.tune` command again, it writes it anew"
        ) from None


def write_study(directory: Path, study: StudyFile) -> None:
    """Write ``study`` into its directory, atomically; a field that nobody set is left out."""
    write_json(directory / STUDY_FILE, study.model_dump(by_alias=True, exclude_unset=True))


def trial_directory(study_directory: Path, number: int) -> Path:
    """Where trial ``number`` keeps everything."""
    return study_directory / TRIALS / f"{number:04d}"
