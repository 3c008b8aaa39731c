"""One trial of a search: train, evaluate, compare with the base, clean up.

Runs in a Ray Tune trial. Everything it makes is in its own directory, under the trial's number in
the study; a trial that died goes on there when it is started again.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import is_finished, read_manifest, write_json, write_manifest
from lrmc_ray.config import RunSettings, trial_settings
from lrmc_ray.early_stopping import Decision, Rung, read_decision, rung_of
from lrmc_ray.errors import DiskError, LrmcError
from lrmc_ray.evaluate import MADE_BY as EVALUATE
from lrmc_ray.evaluate import Split, evaluate
from lrmc_ray.run_files import CHECKPOINT_NOW, MODEL, RUNG
from lrmc_ray.storage import open_storage
from lrmc_ray.stored_run import StoredRun
from lrmc_ray.train import MADE_BY as TRAIN
from lrmc_ray.train import train, with_steps

_log = logging.getLogger(__name__)

LEFTOVER_SECONDS = 10.0
"""How long a killed process may take to vanish."""
PROCESSES = "processes.jsonl"
"""The processes in which a trial ran, one a line, the last one last: so the search can stop it."""
RESULT = "result.json"
FAILURE = "failure.json"
TRIALS = "trials"
BASE_SCORES = "base_scores"
"""In a storage, what trials compare with on the way."""
DIED = "its process died"
RUNG_STEP, RUNG_VALUE, RUNG_FORGETTING = "rung/step", "rung/value", "rung/forgetting"
"""What Tune is told of a trial that was scored on the way."""
PRUNED = "rung/pruned"
"""1 for a trial that was stopped there, and has no results."""


class ObjectiveError(LrmcError):
    """A trial's score is not a finite number, so it has failed and must not be compared."""


def trial_directory(study_directory: Path, number: int) -> Path:
    """Where trial ``number`` keeps everything."""
    return study_directory / TRIALS / f"{number:04d}"


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
        log.write(json.dumps(_this_process()) + "\n")
    try:
        fault = _fault(name)
        result = _suffer(fault, directory) if fault else work()
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
    from lrmc_ray.scores import Scores, compare

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


def death_cause(directory: Path) -> str:
    """What can be said of a trial whose process died without a word."""
    return DIED + (" while its model was scored" if is_finished(directory / "training") else "")


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


def end_leftovers(trials: Path) -> None:
    """End processes of a killed sitting, which still hold their directories in ``trials``."""
    for directory in sorted(trials.glob("*")):
        process = last_process(directory)
        if process is None or not kill_process(process["pid"], process["born"]):
            continue
        _log.warning("ended process %d of an earlier sitting", process["pid"])
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while process_birth(process["pid"]) == process["born"] and time.monotonic() < deadline:
            time.sleep(0.1)


def finish_steps(trainings: Sequence[Path], seconds: float) -> None:
    """Let running trainings finish their step and save a checkpoint, for at most ``seconds``."""
    asked = [path / CHECKPOINT_NOW for path in trainings if path.is_dir() and not is_finished(path)]
    for path in asked:
        path.touch()
    if asked:
        _log.info("stopping; waiting up to %.0f s for checkpoints", seconds)
    deadline = time.monotonic() + seconds
    while any(path.exists() for path in asked) and time.monotonic() < deadline:
        time.sleep(0.1)
    for path in asked:
        path.unlink(missing_ok=True)


# Faults that tests ask for: LRMC_TESTING=1 LRMC_TRIAL_FAULTS=2:raise,3:hang,4:none


def _fault(name: str) -> str | None:
    if os.environ.get("LRMC_TESTING") != "1":
        return None
    faults = os.environ.get("LRMC_TRIAL_FAULTS", "").split(",")
    return dict(fault.split(":") for fault in faults if fault).get(name)


def _suffer(fault: str, directory: Path) -> dict[str, Any]:
    """Fail in the way that was asked for; ``none`` and ``prune`` end well at once, without work."""
    if fault == "raise":
        raise ValueError("a fault was asked for")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.startswith("scoring_"):
        from lrmc_ray.ray_session import held_cores

        (directory / "training").mkdir(exist_ok=True)
        write_manifest(directory / "training", {})
        with held_cores(1):
            return _suffer(fault.removeprefix("scoring_"), directory)
    if fault == "memory":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
        bytearray(2**31)
    if fault == "hang":
        time.sleep(1e9)
    names = ("eval/domain_gain", "eval/forgetting", "eval/combined")
    if fault == "none":
        cost = {"train_seconds": 1.0, "evaluate_seconds": 1.0}
        return {"results": dict.fromkeys(names, 0.0), "scores": "scores", "cost": cost}
    if fault == "prune":
        number = int(directory.name)
        decision = Decision(number, 3, -1.0, -0.5, 0.5, -1.0, {"0": 0.0}, 0.0, True, 1.0)
        (directory / "training").mkdir()
        write_json(directory / "training" / RUNG, asdict(decision))
        cost = {"train_seconds": 1.0, "evaluate_seconds": 0.0}
        return {"results": {}, "scores": None, "train": {"steps": 6}, "cost": cost}
    assert fault == "nan", f"unknown fault {fault}"
    return {"results": dict.fromkeys(names, math.nan)}
