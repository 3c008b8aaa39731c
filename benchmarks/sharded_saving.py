"""What it costs a step that checkpoints of shards are saved, with and without waiting for them.

    python -m benchmarks.sharded_saving [--every 10] [--layers 12] [--rounds 3]

Workers train the same random model three ways, in turn, with a checkpoint behind every so many
steps: never, so that training stands still until it is written, and as runs do it, in a thread
beside the steps. Per step, with the pauses for saving in it, the slower worker counts:

    wall     seconds
    thread   CPU seconds of the thread that trains: the copy of the shards is in it, the writing
             is not. With a core to spare for the writing, this is what a step would pay.
    process  CPU seconds of the whole worker

The last line is one JSON object; `cost` has what saving adds to the wall seconds of a step, as a
share of them, and `cost_of_thread` the same of the thread.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_workers import found_by, join, leave
from benchmarks.memory_forecast import make_samples

WAYS = ("never", "waits", "beside")
CLOCKS = {
    "wall": time.perf_counter,
    "thread": time.thread_time,
    "process": time.process_time,
}


def train(
    args: argparse.Namespace, way: str, learner: Any, samples: list[Any], directory: Path
) -> dict[str, float]:
    """Seconds per step by every clock, of saving and of its parts."""
    from lrmc_ray.method.training_loop import StepOptions
    from lrmc_ray.method.training_loop import train as training_steps
    from lrmc_ray.train.resume import Checkpoints
    from lrmc_ray.train.run_files import LocalRun

    checkpoints = Checkpoints(
        learner.settings,
        LocalRun(directory),
        record="",
        group=learner.group,
        device=torch.device("cpu"),
    )
    steps = training_steps(
        learner.trained_model,
        learner.optimizer,
        lambda _: samples,
        learner.loss,
        StepOptions(num_micro_batches=learner.settings.micro_batches, reduction="fast"),
        learner.group,
        steps=range(args.steps + 1),
        lr_of_step=lambda _: learner.settings.lr,
    )
    copying, saves = 0.0, 0
    next(steps)
    learner.group.gather(None)
    start = {name: clock() for name, clock in CLOCKS.items()}
    with checkpoints.completed():
        for result in steps:
            if way != "never" and (result.step - 1) % args.every == 0:
                before = time.perf_counter()
                checkpoints.save(
                    result.step, learner.state(), best=None, shards=learner.sharded_state
                )
                copying += time.perf_counter() - before
                saves += 1
                if way == "waits":
                    checkpoints.wait()
        end = {name: clock() for name, clock in CLOCKS.items()}
    found = {name: (end[name] - start[name]) / args.steps for name in CLOCKS}
    return found | {"pause": copying / max(1, saves)}


def worker(rank: int, args: argparse.Namespace, directory: Path) -> None:
    """All ways, in turn."""
    from lrmc_ray.config import TrainSettings
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.train.learner import Learner

    join(rank, args, directory)
    settings = TrainSettings(
        parallel="shard",
        reduction="fast",
        batch_size=args.batch_size,
        micro_batches=args.workers,
        packing=False,
    )
    group = WorkerGroup(rank, args.workers)
    learner = Learner(settings, directory / "model", torch.device("cpu"), group=group)
    samples = make_samples(args.batch_size, args.length)
    held = sum(s.own.nbytes for s in learner.sharding.shards.values()) if learner.sharding else 0
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way in WAYS:
            run = directory / f"{way}-{number}"
            # The first checkpoint of a run is waited for, so there is one.
            (run / "checkpoints" / "step_00000000").mkdir(parents=True, exist_ok=True)
            row = train(args, way, learner, samples, run)
            rows = group.gather(row)
            slowest = {name: max(row[name] for row in rows) for name in row}
            if number:  # the first round makes memory, moments and copies
                found[way].append(slowest)
            if rank == 0:
                print(f"  {way}: {slowest}", file=sys.stderr, flush=True)
    leave(rank, directory, {"ways": found, "weights": held})


def main() -> None:
    """Print a table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--steps", type=int, default=10, help="of a way in a round")
    parser.add_argument("--rounds", type=int, default=3, help="after one that does not count")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    found = found_by(worker, args)
    names = (*CLOCKS, "pause")
    rows = {
        way: {name: statistics.median(row[name] for row in rows) for name in names}
        for way, rows in found["ways"].items()
    }
    print(f"{'seconds':10s}" + "".join(f"{name:>10s}" for name in names))
    for way, row in rows.items():
        print(f"{way:10s}" + "".join(f"{row[name]:10.3f}" for name in names))
    never = rows["never"]
    print(
        json.dumps(
            {
                "benchmark": "sharded_saving",
                "torch": torch.__version__,
                **vars(args),
                "bytes_of_weights_of_a_worker": found["weights"],
                "seconds": rows,
                "cost": {way: rows[way]["wall"] / never["wall"] - 1 for way in WAYS[1:]},
                "cost_of_thread": {
                    way: rows[way]["thread"] / never["thread"] - 1 for way in WAYS[1:]
                },
            }
        )
    )


if __name__ == "__main__":
    main()
