"""One trial of a search: train, evaluate, compare with the base, clean up.

Runs in a Ray Tune trial. Everything it makes is in its own directory, under the trial's number in
the study; a trial that died goes on there when it is started again.
"""

import json
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import read_manifest, write_json
from lrmc_ray.config import RunSettings, trial_settings
from lrmc_ray.early_stopping import Decision, read_decision, rung_of
from lrmc_ray.errors import LrmcError
from lrmc_ray.evaluate import MADE_BY as EVALUATE
from lrmc_ray.evaluate import evaluate
from lrmc_ray.run_files import MODEL, RUNG
from lrmc_ray.train import MADE_BY as TRAIN
from lrmc_ray.train import train, with_steps

PROCESSES = "processes.jsonl"
"""The processes in which a trial ran, one a line, the last one last: so the search can stop it."""
RESULT = "result.json"
FAILURE = "failure.json"
RUNG_STEP, RUNG_VALUE, RUNG_FORGETTING = "rung/step", "rung/value", "rung/forgetting"
"""What Tune is told of a trial that was scored on the way."""
PRUNED = "rung/pruned"
"""1 for a trial that was stopped there, and has no results."""


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
    with (directory / PROCESSES).open("a", encoding="utf-8") as log:
        log.write(json.dumps(_this_process()) + "\n")
    try:
        if fault := _fault(config["number"]):
            return _suffer(fault, directory)
        run = RunSettings.model_validate(dict(settings))
        tuned = trial_settings(run.train, {**config["params"], **config["overrides"]})
        run = run.model_copy(update={"train": tuned})
        result = _run(run, directory, Path(record), Path(base_scores), config)
    except Exception as error:
        cause = str(error) if isinstance(error, LrmcError) else f"{type(error).__name__}: {error}"
        write_json(directory / FAILURE, {"cause": cause})
        raise
    write_json(directory / RESULT, result)
    metrics: dict[str, float] = result["results"]
    return metrics | _rung_metrics(directory / "training")


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


def _run(
    settings: RunSettings, directory: Path, record: Path, base: Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    from lrmc_ray.scores import Scores, compare

    settings = with_steps(settings, record)
    rung = rung_of(
        settings,
        number=config["number"],
        role=config["role"],
        trials=directory.parent,
        base_scores=base,
    )
    training = train(settings, record, directory / "training", rung=rung)
    trained = read_manifest(training, made_by=TRAIN)
    train_cost = {
        "train_seconds": trained["train_seconds"],
        "processed_tokens": trained["processed_tokens"],
        "original_tokens": trained["original_tokens"],
        "train_cores": trained["world_size"] * settings.resources.cpus_per_worker,
        "evaluate_cores": settings.resources.cpus_per_worker,
    }
    if trained["pruned"]:
        return {
            "results": {},
            "scores": None,
            "train": settings.train.model_dump(mode="json"),
            "cost": {**train_cost, "evaluate_seconds": 0.0},
        }
    scores = evaluate(settings, training / MODEL, directory, split="dev", base=base)
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


def _this_process() -> dict[str, Any]:
    import ray

    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    return {"pid": pid, "born": process_birth(pid), "node": node, "began": time.time()}


def last_process(directory: Path) -> dict[str, Any] | None:
    """The process in which a trial runs, or ran last; None if it never began."""
    try:
        lines = (directory / PROCESSES).read_text(encoding="utf-8").splitlines()
        process: dict[str, Any] = json.loads(lines[-1])
    except (FileNotFoundError, IndexError, ValueError):  # or torn by a crash
        return None
    return process


def process_birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is none of that number."""
    try:
        # The second field, the program's name, may contain anything but ends in the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def kill_process(pid: int, born: int | None) -> bool:
    """End a process of this node at once, unless its number has gone to another one."""
    if born is None or process_birth(pid) != born:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


# Faults that tests ask for: LRMC_TESTING=1 LRMC_TRIAL_FAULTS=2:raise,3:hang,4:none


def _fault(number: int) -> str | None:
    if os.environ.get("LRMC_TESTING") != "1":
        return None
    faults = os.environ.get("LRMC_TRIAL_FAULTS", "").split(",")
    return dict(fault.split(":") for fault in faults if fault).get(str(number))


def _suffer(fault: str, directory: Path) -> dict[str, float]:
    """Fail in the way that was asked for; ``none`` and ``prune`` end well at once, without work."""
    if fault == "raise":
        raise ValueError("a fault was asked for")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
        bytearray(2**31)
    if fault == "hang":
        time.sleep(1e9)
    names = ("eval/domain_gain", "eval/forgetting", "eval/combined")
    if fault == "none":
        cost = {"train_seconds": 1.0, "evaluate_seconds": 1.0}
        results = dict.fromkeys(names, 0.0)
        write_json(directory / RESULT, {"results": results, "scores": "scores", "cost": cost})
        return results
    if fault == "prune":
        number = int(directory.name)
        decision = Decision(number, 3, -1.0, -0.5, 0.5, -1.0, {"0": 0.0}, 0.0, True, 1.0)
        (directory / "training").mkdir()
        write_json(directory / "training" / RUNG, asdict(decision))
        cost = {"train_seconds": 1.0, "evaluate_seconds": 0.0}
        result = {"results": {}, "scores": None, "train": {"steps": 6}, "cost": cost}
        write_json(directory / RESULT, result)
        return _rung_metrics(directory / "training")
    assert fault == "nan", f"unknown fault {fault}"
    return dict.fromkeys(names, math.nan)
