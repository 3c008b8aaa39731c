"""One trial of a search: train, evaluate, compare with the base, clean up.

Runs in a Ray Tune trial. Everything it makes is in its own directory, under the trial's number in
the study; a trial that died goes on there when it is started again.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.stacks import listening
from lrmc_ray.config import RunSettings, trial_settings
from lrmc_ray.errors import DiskError, LrmcError, ObjectiveError
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.names import MADE_BY as EVALUATE
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.beats import PROGRESS, beating, file_writer
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.names import MODEL, STACKS
from lrmc_ray.files.place import place_of
from lrmc_ray.files.study import TRIALS, trial_directory
from lrmc_ray.train.driver import MADE_BY as TRAIN
from lrmc_ray.train.driver import check_converged, train, with_steps
from lrmc_ray.train.early_stopping import Rung, read_decision, rung_of
from lrmc_ray.train.run_files import run_files
from lrmc_ray.tune.base_scores import await_scores
from lrmc_ray.tune.faults import asked_fault, fail_on_purpose
from lrmc_ray.tune.processes import write_process
from lrmc_ray.tune.result import (
    COMBINED,
    FAILURE,
    FORGETTING,
    GAIN,
    RESULT,
    RunResult,
    write_failure,
    write_result,
)

_log = logging.getLogger(__name__)

RUNG_STEP, RUNG_VALUE, RUNG_FORGETTING = "rung/step", "rung/value", "rung/forgetting"
"""What Tune is told of a trial that was scored on the way."""

PRUNED = "rung/pruned"
"""1 for a trial that was stopped there, and has no results."""


def trainable(config: dict[str, Any], **fixed: Any) -> None:
    """What Ray Tune runs: one trial, one report."""
    from ray import tune

    tune.report(run_trial(config, **fixed))


def run_trial(
    config: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    study_directory: str,
    home: str,
    record: str,
    base_scores: str,
    sent_scores: str,
) -> dict[str, float]:
    """Train and score the trial ``config``; returns the metrics that Tune is told, once.

    Args:
        config: ``number``, ``role``, ``params`` and ``overrides`` of the trial.
        settings: of the search.
        study_directory: of the study.
        home: what all nodes call it.
        record: what trials are trained on.
        base_scores: where the base model's scores are, or will be.
        sent_scores: what all nodes call them.

    Raises:
        LrmcError: the trial failed; the cause is in its ``failure.json`` as well.
    """
    directory = trial_directory(Path(study_directory), config["number"])

    def work() -> RunResult:
        run = RunSettings.model_validate(dict(settings))
        tuned = trial_settings(run.train, {**config["params"], **config["overrides"]})
        run = with_steps(run.model_copy(update={"train": tuned}), Path(record))
        own = f"{home}/{TRIALS}/{directory.name}"
        rung = rung_of(
            run,
            number=config["number"],
            role=config["role"],
            trials=f"{home}/{TRIALS}",
            base_scores=sent_scores,
        )
        result = train_and_score(
            run, directory, Path(record), Path(base_scores), rung=rung, stored_as=own
        )
        leave_storage(run, own)
        return result

    result = attempt(directory, str(config["number"]), work)
    return result.results | _rung_metrics(directory / "training")


def attempt(
    directory: Path, name: str, work: Callable[[], RunResult], *, result_file: str = RESULT
) -> RunResult:
    """What ``work`` returns, kept in ``directory``, or the cause of its failure.

    Args:
        directory: of the run.
        name: of the run, by which a test asks for a fault.
        work: trains and scores.
        result_file: name of the file that holds the result.

    Raises:
        LrmcError: the run failed; the cause is in its ``failure.json`` as well.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for left in (FAILURE, STACKS):
        (directory / left).unlink(missing_ok=True)
    write_process(directory)
    try:
        with listening(directory), beating(file_writer(directory / PROGRESS)):
            fault = asked_fault(name)
            result = fail_on_purpose(fault, directory) if fault else work()
    except Exception as error:
        cause = str(error) if isinstance(error, LrmcError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # of a full disk, which the driver sees for itself
            write_failure(directory, cause)
        raise
    finally:
        (directory / PROGRESS).unlink(missing_ok=True)
    if fault != "nan":  # as JSON has no such number
        write_result(directory, result, result_file)
        passed("tune.result_written", name)
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
    return told | ({COMBINED: decision.combined} if decision.stop else {})


def train_and_score(
    settings: RunSettings,
    directory: Path,
    record: Path,
    base: Path,
    *,
    stored_as: str,
    rung: Rung | None = None,
    split: Split = "dev",
    general_from: Path | None = None,
) -> RunResult:
    """Train, score against ``base`` and compare.

    Args:
        settings: of this run.
        directory: of this run.
        record: what it is trained on.
        base: the base model's scores on the same split, waited for once it has trained.
        stored_as: name of the run in a storage.
        rung: where the trial may be stopped early; then it has no results.
        split: which questions the domain's task asks.
        general_from: scores of the same model whose general tasks are taken over.

    Raises:
        DivergedError: training diverged.
        ObjectiveError: a score is not finite.
    """
    stored_run = f"{stored_as}/training"
    training = train(
        settings, record, directory / "training", rung=rung, stored_as=stored_run, here=True
    )
    trained = read_manifest(training, made_by=TRAIN)
    own = settings.train.model_dump(mode="json")
    cost = _training_cost(trained, settings.resources.cpus_per_worker)
    if trained["pruned"]:
        return RunResult({}, None, own, {**cost, "evaluate_seconds": 0.0})
    check_converged(trained)
    await_scores(base)
    scores = evaluate(
        settings,
        training / MODEL,
        directory,
        split=split,
        base=base,
        general_from=general_from,
        here=True,
        stored_as=f"{stored_run}/{MODEL}",
    )
    scored = read_manifest(scores, made_by=EVALUATE)
    return RunResult(
        results=_against_base(settings, base, scores) | scored["drift"],
        scores=str(scores.relative_to(directory)),
        train=own,
        cost={**cost, "evaluate_seconds": scored["seconds"]},
    )


def _training_cost(trained: Mapping[str, Any], cpus_per_worker: int) -> dict[str, float]:
    """What the manifest of a training says of its cost."""
    return {
        "train_seconds": trained["train_seconds"],
        "processed_tokens": trained["processed_tokens"],
        "original_tokens": trained["original_tokens"],
        "train_cores": trained["world_size"] * cpus_per_worker,
        "train_cpu_seconds": trained["cpu_seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "evaluate_cores": cpus_per_worker,
    }


def _against_base(settings: RunSettings, base: Path, scores: Path) -> dict[str, float]:
    """The numbers of the comparison with the base model.

    Raises:
        ObjectiveError: one that the search is about is not finite.
    """
    compared = compare(
        Scores.load(base),
        Scores.load(scores),
        forgetting_weight=settings.search.forgetting_weight,
        seed=settings.search.seed,
    )
    results = compared.metrics()
    for name in (GAIN, FORGETTING, COMBINED):
        if not math.isfinite(results[name]):
            raise ObjectiveError(
                f"{name} must be a finite number, got {results[name]}; the tuned model is broken, "
                "lower train.lr"
            )
    return results


def leave_storage(settings: RunSettings, stored_as: str) -> None:
    """Remove what a run that has ended, and whose model is here, has in the storage."""
    place = place_of(settings.resources.storage)
    try:
        run_files(place, Path(), f"{stored_as}/training").clear()
    except DiskError as error:  # its result is here
        _log.warning("%s is left in the storage: %s", stored_as, error)
