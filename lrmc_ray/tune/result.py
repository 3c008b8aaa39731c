"""What a trained and scored model leaves in its directory: its result, or why there is none."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.files.artifacts import write_json

RESULT = "result.json"
FAILURE = "failure.json"

GAIN, FORGETTING, COMBINED = "eval/domain_gain", "eval/forgetting", "eval/combined"
"""The results that a search is about."""


@dataclass(frozen=True)
class RunResult:
    """How a run went that ended well."""

    results: dict[str, float]
    """Of the comparison with the base model; empty for a trial that stopped itself early."""
    scores: str | None
    """Directory of its scores, below its own."""
    train: dict[str, Any]
    """Its settings of ``train``."""
    cost: dict[str, float]
    """See ``study.TrialEntry.cost``."""


def write_result(directory: Path, result: RunResult, result_file: str = RESULT) -> None:
    """Leave what a run has found."""
    write_json(directory / result_file, asdict(result))


def read_result(directory: Path, result_file: str = RESULT) -> RunResult | None:
    """What a finished run left; None if it has not finished."""
    try:
        return RunResult(**json.loads((directory / result_file).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_failure(directory: Path, cause: str) -> None:
    """Leave why a run failed."""
    write_json(directory / FAILURE, {"cause": cause})


def failure_cause(directory: Path) -> str | None:
    """Why the run failed, as it said itself; None if it could not."""
    try:
        cause: str = json.loads((directory / FAILURE).read_text(encoding="utf-8"))["cause"]
    except FileNotFoundError:
        return None
    return cause
