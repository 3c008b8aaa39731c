"""A search whose trials fail in six ways and whose driver is killed again and again.

    python benchmarks/faults_tune.py --kills 3 --seed 0

Runs ``lrmc_ray.tune`` on a random model of 0.2M parameters. Of the trials one raises, one calls
os._exit, one is killed with SIGKILL, one goes over its memory, one returns NaN and one hangs. The
driver is killed with SIGKILL at random moments, and the same command started again each time.

Last line, one JSON object: trials, terminal (ended COMPLETE or FAIL), running_left, re_executed
(starts beyond the first of each trial; at most kills times trials side by side),
mlflow_children_duplicated, placement_groups_left, processes_left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAULTS = ("raise", "exit", "kill", "memory", "nan", "hang")
FIRST_FAULTY = 2  # after the defaults and plain fine-tuning
CONCURRENT = 2
MARK = "LRMC_FAULTS_RUN"
SPACE = """\
[search]
name = "faults"
trial_timeout_seconds = {timeout}
[train]
steps = 4
batch_size = 4
micro_batches = 2
checkpoint_every = 1
[evaluate]
limit = 4
drift_samples = 2
[resources]
max_concurrent = {concurrent}
[parameters]
tau = {{ low = 0.80, high = 0.999 }}
delta_max = {{ low = 10, high = 120 }}
"""


def sitting(arguments: Sequence[str], result: Path) -> int:
    """One run of the command inside a Ray session of its own, and what it leaves in there."""
    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.console import run_command
    from lrmc_ray.tune.command import main as tune

    with ray_session(log=result.with_suffix(".ray.log"), num_cpus=CONCURRENT):
        import ray  # not before: the session sets how Ray authenticates

        before = ray.available_resources()
        code = run_command(tune, arguments)
        names = ("CPU", "lrmc_trial")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            after = ray.available_resources()
            if all(after.get(name) == before[name] for name in names):
                break
            time.sleep(0.5)
        groups = ray.util.placement_group_table().values()
        result.write_text(
            json.dumps(
                {
                    "code": code,
                    "groups": sum(group["state"] != "REMOVED" for group in groups),
                    "before": {name: before[name] for name in names},
                    "after": {name: after.get(name) for name in names},
                }
            )
        )
    return code


def marked_processes(mark: str) -> list[int]:
    """Living processes that descend from this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                status = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(path.parent.name)] if status != "Z" else []
        except OSError:
            continue  # ended meanwhile, or not ours
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="of the driver")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one trial")
    parser.add_argument(
        "--longest", type=float, default=30.0, help="most seconds from a trial's start to a kill"
    )
    parser.add_argument("--work", type=Path, help="directory to keep (default: a temporary one)")
    parser.add_argument("--sitting", type=Path, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.sitting:
        return sitting(rest, arguments.sitting)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="lrmc-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        summary = run(arguments, work)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    for key, value in summary.items():
        print(f"{key:28} {value}")
    keys = (
        *("trials", "terminal", "running_left", "re_executed", "mlflow_children_duplicated"),
        *("placement_groups_left", "processes_left"),
    )
    print(json.dumps({key: summary[key] for key in keys}))
    bad = summary["running_left"] or summary["placement_groups_left"] or summary["processes_left"]
    bad = bad or summary["mlflow_children_duplicated"]
    return int(bool(bad) or summary["terminal"] != summary["trials"])


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root)]
    from tests.support.tiny import make_data, make_model

    model, data = make_model(work / "model"), make_data(work / "train.jsonl")
    space, output, result = work / "faults.toml", work / "runs", work / "sitting.json"
    space.write_text(SPACE.format(timeout=arguments.timeout, concurrent=CONCURRENT))
    mark = uuid.uuid4().hex
    numbered = enumerate(FAULTS[: max(0, arguments.trials - FIRST_FAULTY)], start=FIRST_FAULTY)
    environment = {
        **os.environ,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "LRMC_TESTING": "1",
        "LRMC_TRIAL_FAULTS": ",".join(f"{number}:{fault}" for number, fault in numbered),
    }
    command = [
        *(sys.executable, __file__, "--sitting", str(result), "--space", str(space)),
        *("--model", str(model), "--train-data", str(data), "--output", str(output)),
        *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        f"search.trials={arguments.trials}",
    ]
    rng = random.Random(arguments.seed)
    start = time.monotonic()
    kills = 0
    for _ in range(arguments.kills):
        started = count_starts(output)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and count_starts(output) == started:
            time.sleep(0.1)
        try:
            process.wait(rng.uniform(0.0, arguments.longest))
            break  # it ended before it could be killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    result.unlink(missing_ok=True)
    subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
    left = json.loads(result.read_text())
    deadline = time.monotonic() + 30
    while (alive := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        "seconds": round(time.monotonic() - start),
        "kills": kills,
        "exit_code": left["code"],
        "resources_restored": left["before"] == left["after"],
        **audit(next(output.glob("*faults-*"))),
        "placement_groups_left": left["groups"],
        "processes_left": len(alive),
    }


def count_starts(output: Path) -> int:
    """How often a trial has been started."""
    paths = output.glob("*faults-*/trials/*/processes.jsonl")
    return sum(path.read_text().count("\n") for path in paths)


def audit(study_directory: Path) -> dict[str, Any]:
    """The study's own database, the trials' directories and MLflow, each on its own."""
    import optuna
    from mlflow import MlflowClient

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{study_directory / 'study.db'}"
    study = optuna.load_study(study_name=None, storage=storage)
    trials = [trial for trial in study.trials if trial.user_attrs.get("ready")]
    states = [trial.state.name for trial in trials]
    starts = [
        path.read_text().count("\n") for path in study_directory.glob("trials/*/processes.jsonl")
    ]
    client = MlflowClient(f"sqlite:///{study_directory.parent / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    children = [run.data.tags.get("lrmc.trial") for run in runs]
    numbers = [number for number in children if number is not None]
    return {
        "trials": len(trials),
        "terminal": sum(state in ("COMPLETE", "FAIL") for state in states),
        "complete": states.count("COMPLETE"),
        "failed": states.count("FAIL"),
        "causes": {trial.number: trial.user_attrs.get("cause") for trial in trials
                   if trial.state.name == "FAIL"},
        "running_left": states.count("RUNNING") + states.count("WAITING"),
        "re_executed": sum(count - 1 for count in starts),
        "mlflow_children": len(numbers),
        "mlflow_children_duplicated": len(numbers) - len(set(numbers)),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
