"""Break elastic training on purpose, many times, and compare with a run that was left alone.

    python benchmarks/faults.py --stage train [--kills 8] [--seed 0] [--kinds worker,driver,...]
                                [--parallel shard]

One command, `python -m lrmc_ray.train`, trains a small model on a cluster of three raylets on this
machine. At random moments a fault of a random kind strikes:

    worker      kill -9 of a training worker
    raylet      kill -9 of a raylet with its workers; a new raylet joins when training goes on
    driver      kill -9 of the command, then the same command again
    sigterm     SIGTERM to the command (it must end with 143), then the same command again
    preemption  `ray drain-node` with a deadline, then the node goes; a new one joins
    checkpoint  kill -9 of the command, the newest checkpoint deleted, torn or with a flipped bit
    snapshot    kill -9 of the command, a torn snapshot of Ray Train in its place

At the end the ledger is audited and the parameters are compared with those of one worker that was
left alone; with the model in shards they agree up to rounding alone, which grows from step to step,
so the number is only told. A fault counts as recovered when training has passed the step at which
it struck. `seconds_to_recover` runs from the fault to that step, the start of a new command
included.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("worker", "raylet", "driver", "sigterm", "preemption", "checkpoint", "snapshot")
NODES = 3
PREEMPTION_SECONDS = 8
RECOVERY_SECONDS = 240
STEPS_BETWEEN = (6, 14)
"""Fewest and most steps between a recovery and the next fault."""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "12",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "OMP_NUM_THREADS": "1",
}
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class NotRecoveredError(Exception):
    """Training did not go on."""


class Machine:
    """A cluster of raylets, and the one command that trains on it."""

    def __init__(self, work: Path, *, steps: int, seed: int, parallel: str) -> None:
        from ray.cluster_utils import Cluster

        from tests.support.tiny import make_data, make_model

        self.output = work / "runs"
        self.log = work / "command.log"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 150 * 2**20,
                "resources": {"lrmc_trial": 64},
                "_system_config": QUICK_HEALTH_CHECKS,
            },
        )
        self.nodes = [self._add_node() for _ in range(NODES)]
        model = make_model(work / "model")
        data = make_data(work / "train.jsonl", num_rows=90)
        self._command = [
            *(sys.executable, "-m", "lrmc_ray.train", "--address", self._cluster.address),
            *("--model", str(model), "--train-data", str(data), "--json"),
            f"train.steps={steps}",
            f"train.seed={seed}",
            "train.batch_size=24",
            "train.micro_batches=4",
            "train.checkpoint_every=5",
            "train.lr=1e-3",
            "train.tau=0.9",
            "train.tail_samples=64",
            "train.schedule=cosine",
            "train.max_grad_norm=1.0",
            "resources.resize_seconds=3",
        ]
        self._parallel = [f"train.parallel={parallel}"]
        if parallel == "shard":
            self._parallel.append("train.reduction=fast")
        self.process: subprocess.Popen[bytes] | None = None

    def _add_node(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def start(self) -> None:
        """Type the command."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, *self._parallel, "--output", str(self.output)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=ROOT,
            )

    def train_alone(self, output: Path) -> Path:
        """The same training on one worker, undisturbed; its directory."""
        shutil.copytree(self.output / "records", output / "records")
        command = [*self._command, "--output", str(output), "resources.workers=[1,1]"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return next((output / "training").iterdir())

    @property
    def directory(self) -> Path | None:
        """Where the training keeps its files, once it has any."""
        return next((self.output / "training").glob("*"), None)

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the ledger."""
        if self.directory is None or not (self.directory / "ledger.jsonl").exists():
            return []
        content = (self.directory / "ledger.jsonl").read_text()
        return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]

    def step(self) -> int:
        """The newest step in the ledger; -1 before the first."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else -1

    def workers(self) -> list[int]:
        """Process ids of the training workers on our raylets."""
        import psutil

        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return sorted(found)

    def remove_node(self, node: Any) -> None:
        """SIGKILL to a raylet and what runs on it."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def fill_up(self) -> None:
        """Let nodes join until there are as many as in the beginning."""
        while len(self.nodes) < NODES:
            self.nodes.append(self._add_node())

    def drain(self, node: Any) -> None:
        """Tell Ray that the node is about to be taken away, as a spot market does."""
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                *("drain-node", "--address", self._cluster.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
                *("--deadline-remaining-seconds", str(PREEMPTION_SECONDS)),
            ],
            check=True,
            capture_output=True,
        )

    def stop_command(self, number: signal.Signals) -> int:
        """Send a signal to the command and wait for its end; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        """End everything."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._cluster.shutdown()


def wait_until(condition: Callable[[], bool], machine: Machine, what: str) -> None:
    """Wait for ``condition``.

    Raises:
        NotRecoveredError: the command has ended or takes too long.
    """
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not condition():
        assert machine.process is not None
        if machine.process.poll() not in (None, 0):
            tail = machine.log.read_text(errors="replace")[-2000:]
            raise NotRecoveredError(
                f"{what}: the command ended with {machine.process.poll()}\n{tail}"
            )
        if time.monotonic() > deadline:
            raise NotRecoveredError(f"{what}: not within {RECOVERY_SECONDS} s")
        time.sleep(0.05)


def damage_checkpoint(directory: Path, rng: random.Random) -> str:
    """Spoil the newest checkpoint, unless it is the only one; what was done."""
    checkpoints = sorted((directory / "checkpoints").glob("step_" + "[0-9]" * 8))
    if len(checkpoints) < 2:
        return "left alone, there is no other"
    newest = checkpoints[-1]
    how = rng.choice(["deleted", "emptied", "torn", "bit flipped"])
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    path = newest / rng.choice(names)
    if how == "deleted":
        shutil.rmtree(newest)
        return f"{newest.name} deleted"
    content = bytearray(path.read_bytes())
    if how == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    damaged = {"emptied": bytearray(), "torn": content[: len(content) // 2]}.get(how, content)
    path.write_bytes(damaged)
    return f"{newest.name}/{path.relative_to(newest)} {how}"


def tear_snapshot(directory: Path) -> None:
    """A snapshot of Ray Train that ends in the middle, under every name that a run had."""
    runs = list((directory / "ray").glob("run-*")) or [directory / "ray" / "run-0"]
    for run in runs:
        run.mkdir(parents=True, exist_ok=True)
        (run / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [{"che')


def strike(machine: Machine, kind: str, rng: random.Random) -> str:
    """One fault; where it ended the command, the command is typed again."""
    assert machine.directory is not None
    if kind == "worker":
        pid = rng.choice(machine.workers())
        os.kill(pid, signal.SIGKILL)
        return f"process {pid}"
    if kind in ("raylet", "preemption"):
        node = rng.choice(machine.nodes)
        if kind == "preemption":
            machine.drain(node)
            time.sleep(PREEMPTION_SECONDS)
        machine.remove_node(node)
        return f"node {node.node_id[:6]}"
    if kind == "sigterm":
        code = machine.stop_command(signal.SIGTERM)
        if code != 143:
            raise NotRecoveredError(f"the command ended with {code} after SIGTERM, not with 143")
        detail = f"checkpoint at {sorted((machine.directory / 'checkpoints').iterdir())[-1].name}"
    else:
        machine.stop_command(signal.SIGKILL)
        detail = ""
    if kind == "checkpoint":
        detail = damage_checkpoint(machine.directory, rng)
    elif kind == "snapshot":
        tear_snapshot(machine.directory)
    machine.start()
    return detail


def run_faults(
    machine: Machine, kinds: Sequence[str], rng: random.Random, *, steps: int
) -> list[dict[str, Any]]:
    """Strike once per entry of ``kinds``, each time after some steps; what came of it."""
    machine.start()
    wait_until(lambda: machine.step() >= 0, machine, "start")
    faults = []
    for number, kind in enumerate(kinds):
        goal = machine.step() + rng.randint(*STEPS_BETWEEN)

        def has_run(goal: int = goal) -> bool:
            return machine.step() >= goal

        wait_until(has_run, machine, f"steps before {kind}")
        time.sleep(rng.random() * 0.3)
        if kind in ("worker", "raylet", "preemption"):
            wait_until(lambda: bool(machine.workers()), machine, "workers")
        start = time.monotonic()
        detail = strike(machine, kind, rng)
        # Of a preemption, what is lost begins when the node is gone.
        struck_at = machine.step()
        attempts = machine.lines()[-1]["attempt"]

        def is_over(struck_at: int = struck_at, attempts: int = attempts, kind: str = kind) -> bool:
            last = machine.lines()[-1]
            is_new = last["attempt"] > attempts or kind == "preemption"
            return bool(is_new and last["step"] > struck_at)

        fault: dict[str, Any] = {"kind": kind, "step": struck_at, "detail": detail}
        try:
            wait_until(is_over, machine, f"recovery from {kind}")
            fault |= {"recovered": True, "seconds": time.monotonic() - start}
        except NotRecoveredError as error:
            fault |= {"recovered": False, "seconds": float("nan"), "detail": str(error)}
        if kind == "preemption":
            fault["seconds"] -= PREEMPTION_SECONDS
        world_size = machine.lines()[-1]["world_size"]
        print(
            f"{number + 1:3d} {kind:11s} step {struck_at:4d} of {steps}  "
            f"{fault['seconds']:6.1f} s, then {world_size} workers  {fault['detail']}",
            flush=True,
        )
        faults.append(fault)
        if not fault["recovered"]:
            break
        machine.fill_up()
    return faults


def largest_difference(one: Path, other: Path) -> float:
    """Between the parameters of two models."""
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def measure(
    kinds: Sequence[str], *, seed: int, steps: int, parallel: str, work: Path
) -> dict[str, Any]:
    """Train under faults and alone; the scoreboard."""
    from lrmc_ray.train.ledger import read_ledger

    machine = Machine(work, steps=steps, seed=seed, parallel=parallel)
    faults: list[dict[str, Any]] = []
    difference = float("nan")
    try:
        faults = run_faults(machine, kinds, random.Random(seed), steps=steps)
        assert machine.process is not None
        code = machine.process.wait(timeout=RECOVERY_SECONDS + steps)
        if code:
            raise NotRecoveredError(machine.log.read_text(errors="replace")[-3000:])
        assert machine.directory is not None
        alone = machine.train_alone(work / "alone")
        difference = largest_difference(
            machine.directory / "model" / "model.safetensors", alone / "model" / "model.safetensors"
        )
        audit = json.loads((machine.directory / "manifest.json").read_text())["ledger"]
        lines = read_ledger(machine.directory / "ledger.jsonl")
    finally:
        machine.close()
    by_kind: dict[str, list[float]] = {}
    for fault in faults:
        by_kind.setdefault(fault["kind"], []).append(fault["seconds"])
    print(f"\n{'fault':12s}{'number':>8s}{'median s':>10s}{'max s':>8s}")
    for kind, seconds in by_kind.items():
        print(f"{kind:12s}{len(seconds):8d}{statistics.median(seconds):10.1f}{max(seconds):8.1f}")
    sizes = Counter(line.world_size for line in lines)
    print(
        f"{audit['attempts']} starts; steps by number of workers: "
        + ", ".join(f"{size}: {count}" for size, count in sorted(sizes.items()))
        + f"; {audit['replays_that_differ']} replayed steps differ"
    )
    seconds = [fault["seconds"] for fault in faults if fault["recovered"]]
    return {
        "faults": len(faults),
        "recovered": sum(fault["recovered"] for fault in faults),
        "steps_lost": audit["steps_missing"],
        "steps_replayed": audit["steps_replayed"],
        "samples_missing": audit["samples_missing"],
        "samples_duplicated": audit["samples_duplicated"],
        "max_abs_parameter_difference": difference,
        "seconds_to_recover_median": round(statistics.median(seconds), 2),
        "seconds_to_recover_max": round(max(seconds), 2),
    }


def choose_kinds(kinds: Sequence[str], number: int, rng: random.Random) -> list[str]:
    """``number`` faults: every kind about equally often, in a random order."""
    chosen = [kinds[index % len(kinds)] for index in range(number)]
    rng.shuffle(chosen)
    return chosen


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=8, metavar="N", help="faults in all")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and victims")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--parallel", default="replicate", choices=["replicate", "shard"])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what was made there")
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds must be among {', '.join(KINDS)}, got {args.kinds}")
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(ROOT))
    chosen = choose_kinds(kinds, args.kills, random.Random(args.seed))
    steps = (args.kills + 1) * (STEPS_BETWEEN[1] + 8)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(chosen, seed=args.seed, steps=steps, parallel=args.parallel, work=work)
    print(json.dumps(result))
    may_differ = args.parallel == "shard"
    is_exact = (may_differ or result["max_abs_parameter_difference"] == 0) and not (
        result["steps_lost"] or result["samples_missing"] or result["samples_duplicated"]
    )
    return 0 if is_exact and result["recovered"] == args.kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
