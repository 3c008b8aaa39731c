"""One trial of a search: train, evaluate, compare with the base, clean up.

Runs in a Ray Tune trial. Everything it makes is in its own directory, under the trial's number in
the study; a trial that died goes on there when it is started again.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings, trial_settings
from lrmc_ray.errors import DiskError, LrmcError, ObjectiveError
from lrmc_ray.evaluate.run import MADE_BY as EVALUATE
from lrmc_ray.evaluate.run import Split, evaluate
from lrmc_ray.files.artifacts import read_manifest, write_json
from lrmc_ray.files.names import MODEL
from lrmc_ray.files.storage import open_storage
from lrmc_ray.files.study import TRIALS, trial_directory
from lrmc_ray.train.driver import MADE_BY as TRAIN
from lrmc_ray.train.driver import train, with_steps
from lrmc_ray.train.early_stopping import Rung, read_decision, rung_of
from lrmc_ray.train.stored import StoredRun
from lrmc_ray.tune.faults import suffer_fault, wanted_fault
from lrmc_ray.tune.processes import PROCESSES, this_process

_log = logging.getLogger(__name__)


RESULT = "result.json"


FAILURE = "failure.json"


BASE_SCORES = "base_scores"
"""In a storage, what trials compare with on the way."""


RUNG_STEP, RUNG_VALUE, RUNG_FORGETTING = "rung/step", "rung/value", "rung/forgetting"
"""What Tune is told of a trial that was scored on the way."""


PRUNED = "rung/pruned"
"""1 for a trial that was stopped there, and has no results."""


def run_trial(
    config: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    study_directory: str,
    record: str,
    base_scores: str,
    stored_as: str | None = None,
) -> dict[str, float]:
    """Train and score the trial ``config``; returns the metrics that Tune is told, once.

    ``stored_as`` names the study in the storage, where the workers share no disk with this process.

    Raises:
        LrmcError: the trial failed; the cause is in its ``failure.json`` as well.
    """
    directory = trial_directory(Path(study_directory), config["number"])

    def work() -> dict[str, Any]:
        run = RunSettings.model_validate(dict(settings))
        tuned = trial_settings(run.train, {**config["params"], **config["overrides"]})
        run = with_steps(run.model_copy(update={"train": tuned}), Path(record))
        own, trials, base = None, str(directory.parent.resolve()), str(Path(base_scores).resolve())
        if stored_as is not None:
            trials, base = f"{stored_as}/{TRIALS}", f"{stored_as}/{BASE_SCORES}"
            own = f"{trials}/{directory.name}"
        rung = rung_of(
            run,
            number=config["number"],
            role=config["role"],
            trials=trials,
            base_scores=base,
        )
        result = train_and_score(
            run, directory, Path(record), Path(base_scores), rung=rung, stored_as=own
        )
        leave_storage(run, own)
        return result

    metrics: dict[str, float] = attempt(directory, str(config["number"]), work)["results"]
    return metrics | _rung_metrics(directory / "training")


def attempt(
    directory: Path, name: str, work: Callable[[], dict[str, Any]], *, result_file: str = RESULT
) -> dict[str, Any]:
    """What ``work`` returns, kept in ``directory``, or the cause of its failure.

    Args:
        directory: of the trial.
        name: of the trial, where a test asks for a fault.
        work: trains and scores.
        result_file: name of the file that holds the result.

    Raises:
        LrmcError: the trial failed; the cause is in its ``failure.json`` as well.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FAILURE).unlink(missing_ok=True)
    with (directory / PROCESSES).open("a", encoding="utf-8") as log:
        log.write(json.dumps(this_process()) + "\n")
    try:
        fault = wanted_fault(name)
        result = suffer_fault(fault, directory) if fault else work()
    except Exception as error:
        cause = str(error) if isinstance(error, LrmcError) else f"{type(error).__name__}: {error}"
        write_json(directory / FAILURE, {"cause": cause})
        raise
    if fault != "nan":  # as JSON has no such number
        write_json(directory / result_file, result)
    return result


def _rung_metrics(training: Path) -> dict[str, float]:
    decision = read_decision(training)
    if decision is None:
        return {}
    told = {
        RUNG_STEP: float(decision.step),
        RUNG_VALUE: decision.value,
        RUNG_FORGETTING: decision.forgetting,
        PRUNED: float(decision.stop),
    }
    # Tune ends the whole search where a trial does not report what its searcher is to maximize.
    return told | ({"eval/combined": decision.combined} if decision.stop else {})


def train_and_score(
    settings: RunSettings,
    directory: Path,
    record: Path,
    base: Path,
    *,
    rung: Rung | None = None,
    split: Split = "dev",
    general_from: Path | None = None,
    stored_as: str | None = None,
) -> dict[str, Any]:
    """Train, score against ``base`` and compare; what a trial's result holds.

    Args:
        settings: of this trial.
        directory: of this trial.
        record: what it is trained on.
        base: the base model's scores on the same split.
        rung: where the trial may be stopped early; then it has no results.
        split: which questions the domain's task asks.
        general_from: scores of the same model whose general tasks are taken over.
        stored_as: name of the trial in the storage.

    Raises:
        ObjectiveError: a score is not finite.
    """
    from lrmc_ray.evaluate.changes import compare
    from lrmc_ray.evaluate.items import Scores

    stored_run = f"{stored_as}/training" if stored_as else None
    training = train(settings, record, directory / "training", rung=rung, stored_as=stored_run)
    trained = read_manifest(training, made_by=TRAIN)
    train_cost = {
        "train_seconds": trained["train_seconds"],
        "processed_tokens": trained["processed_tokens"],
        "original_tokens": trained["original_tokens"],
        "train_cores": trained["world_size"] * settings.resources.cpus_per_worker,
        "train_cpu_seconds": trained["cpu_seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "evaluate_cores": settings.resources.cpus_per_worker,
    }
    if trained["pruned"]:
        return {
            "results": {},
            "scores": None,
            "train": settings.train.model_dump(mode="json"),
            "cost": {**train_cost, "evaluate_seconds": 0.0},
        }
    scores = evaluate(
        settings,
        training / MODEL,
        directory,
        split=split,
        base=base,
        general_from=general_from,
        here=True,
        stored_as=f"{stored_run}/{MODEL}" if stored_run else None,
    )
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
        "cost": {**train_cost, "evaluate_seconds": scored["seconds"]},
    }


def leave_storage(settings: RunSettings, stored_as: str | None) -> None:
    """Remove what a run that has ended, and whose model is here, has in the storage."""
    storage = open_storage(settings.resources.storage)
    if storage is None or stored_as is None:
        return
    try:
        StoredRun(storage, f"{stored_as}/training", Path()).clear()
    except DiskError as error:  # its result is here
        _log.warning("%s is left in the storage: %s", stored_as, error)


def read_result(directory: Path, result_file: str = RESULT) -> dict[str, Any] | None:
    """What a finished trial left; None if it has not finished."""
    try:
        result: dict[str, Any] = json.loads((directory / result_file).read_text(encoding="utf-8"))
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
