"""One trial of a search: train, evaluate, compare with the base, clean up.

Runs in a Ray Tune trial. Everything it makes is in its own directory, under the trial's number in
the study; a trial that died goes on there when it is started again.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import read_manifest, write_json
from lrmc_ray.config import RunSettings, trial_settings
from lrmc_ray.errors import LrmcError
from lrmc_ray.evaluate import MADE_BY as EVALUATE
from lrmc_ray.evaluate import evaluate
from lrmc_ray.run_files import MODEL
from lrmc_ray.train import MADE_BY as TRAIN
from lrmc_ray.train import train

RESULT = "result.json"
FAILURE = "failure.json"


class ObjectiveError(LrmcError):
    """A trial's score is not a finite number, so it has failed and must not be compared."""


def trial_directory(study_directory: Path, number: int) -> Path:
    """Where trial ``number`` keeps everything."""
    return study_directory / "trials" / f"{number:04d}"


def run_trial(
    config: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    study_directory: str,
    record: str,
    base_scores: str,
) -> dict[str, float]:
    """Train and score the trial ``config``; returns the metrics that Tune is told, once.

    Raises:
        LrmcError: the trial failed; the cause is in its ``failure.json`` as well.
    """
    study = Path(study_directory)
    directory = trial_directory(study, config["number"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FAILURE).unlink(missing_ok=True)
    try:
        run = RunSettings.model_validate(dict(settings))
        tuned = trial_settings(run.train, {**config["params"], **config["overrides"]})
        run = run.model_copy(update={"train": tuned})
        result = _run(run, directory, Path(record), Path(base_scores))
    except Exception as error:
        cause = str(error) if isinstance(error, LrmcError) else f"{type(error).__name__}: {error}"
        write_json(directory / FAILURE, {"cause": cause})
        raise
    write_json(directory / RESULT, result)
    metrics: dict[str, float] = result["results"]
    return metrics


def _run(settings: RunSettings, directory: Path, record: Path, base: Path) -> dict[str, Any]:
    from lrmc_ray.scores import Scores, compare

    training = train(settings, record, directory / "training")
    scores = evaluate(settings, training / MODEL, directory, split="dev", base=base)
    trained = read_manifest(training, made_by=TRAIN)
    scored = read_manifest(scores, made_by=EVALUATE)
    search = settings.search
    comparison = compare(
        Scores.load(base),
        Scores.load(scores),
        forgetting_weight=search.forgetting_weight,
        seed=search.seed,
    )
    results = comparison.metrics() | scored["drift"]
    for name in ("eval/domain_gain", "eval/forgetting", "eval/combined"):
        if not math.isfinite(results[name]):
            raise ObjectiveError(
                f"{name} must be a finite number, got {results[name]}; the tuned model is broken, "
                "lower train.lr"
            )
    return {
        "results": results,
        "scores": str(scores.relative_to(directory)),
        "train": settings.train.model_dump(mode="json"),
        "cost": {
            "train_seconds": trained["train_seconds"],
            "evaluate_seconds": scored["seconds"],
            "processed_tokens": trained["processed_tokens"],
            "original_tokens": trained["original_tokens"],
        },
    }


def read_result(directory: Path) -> dict[str, Any] | None:
    """What a finished trial left; None if it has not finished."""
    try:
        result: dict[str, Any] = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result


def failure_cause(directory: Path) -> str | None:
    """Why the trial failed, as it said itself; None if it could not."""
    try:
        cause: str = json.loads((directory / FAILURE).read_text(encoding="utf-8"))["cause"]
    except FileNotFoundError:
        return None
    return cause
