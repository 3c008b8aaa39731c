"""A training step with the model in shards: ours against torch's own FSDP2 loop.

    python -m benchmarks.sharded_step [--workers 2] [--steps 10] [--rounds 3] [--layers 8]

Workers of one machine hold shards of the same random model, and take the same batches, in turn:

    fsdp2      torch's `fully_shard` on every layer and on the whole, full cross-entropy of the
               supervised tokens, fused AdamW; every worker its part of a batch in one pass
    default    as `lrmc train --parallel shard --reduction fast`: the loss on candidates with anchor
               and tail, MoClip, 4 micro-batches
    one pass   the same with as many micro-batches as workers
    full       full cross-entropy and AdamW in our loop, with as many micro-batches as workers

All samples have one length, so that nothing is won by packing, and no beginning in common. A round
has so many steps of every way; one round before them does not count. Tokens per second are those of
the median round. Wall seconds are of whole steps, the workers wait for each other; CPU seconds are
the sum over the workers, which a busy machine changes less.

The last line is one JSON object: `sharded_over_fsdp2` is tokens per second of `default` over those
of `fsdp2`, and `full_over_fsdp2` the same of `full`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.local_workers import found_by, join, leave
from benchmarks.memory_forecast import make_samples

WAYS = ("fsdp2", "default", "one pass", "full")
LR = 1e-5


def theirs(args: argparse.Namespace, rank: int, directory: Path) -> Callable[[], object]:
    """A step of torch's own loop."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    mesh = init_device_mesh("cpu", (args.workers,))
    units = [*model.model.layers, model]
    for unit in units:
        fully_shard(unit, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)  # gloo has no mean
        unit.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    samples = make_samples(args.batch_size, args.length)
    num_supervised = sum(int(sample.is_supervised_P.sum()) for sample in samples)
    own = samples[rank :: args.workers]
    ids_BT = torch.stack([sample.input_ids_T for sample in own])
    labels_BP = torch.stack(
        [sample.input_ids_T[1:].where(sample.is_supervised_P, torch.tensor(-100)) for sample in own]
    )

    def step() -> None:
        optimizer.zero_grad()
        logits_BPV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits_BPV.flatten(0, 1), labels_BP.flatten(), reduction="sum")
        (loss / num_supervised).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(args: argparse.Namespace, way: str, rank: int, directory: Path) -> Callable[[], object]:
    """A step as a run takes it."""
    from lrmc_ray.config import TrainSettings
    from lrmc_ray.method.training_loop import StepOptions, train
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.models.borders import longest_packed
    from lrmc_ray.train.learner import Learner
    from lrmc_ray.train.measures import Probe

    changes: dict[str, Any] = {} if way == "default" else {"micro_batches": args.workers}
    if way == "full":
        changes |= {"loss": "full", "optimizer": "adamw", "anchor_weight": 0.0, "tail_samples": 0}
        changes |= {"probe_every": 0}
    settings = TrainSettings(
        parallel="shard", reduction="fast", batch_size=args.batch_size, lr=LR, **changes
    )
    group = WorkerGroup(rank, args.workers)
    device = torch.device("cpu")
    learner = Learner(settings, directory, device, group=group)
    probe = Probe(settings, learner.head_now, group=group, device=device)
    samples = make_samples(args.batch_size, args.length)
    steps: Iterator[Any] = train(
        learner.trained_model,
        learner.optimizer,
        lambda _: samples,
        learner.loss,
        StepOptions(
            num_micro_batches=settings.micro_batches,
            reduction="fast",
            attention_cost=learner.attention_cost,
            pack_up_to=longest_packed(learner.model.config),
            max_grad_norm=settings.max_grad_norm,
            probe=probe.measure,
            probes_at=probe.is_due,
            after_update=learner.vocabulary.after_update,
        ),
        group,
        steps=range(sys.maxsize),
        lr_of_step=lambda _: LR,
    )
    return lambda: next(steps)


def worker(rank: int, args: argparse.Namespace, directory: Path) -> None:
    """All ways, in turn; rank 0 leaves what they took."""
    join(rank, args, directory)
    model = directory / "model"
    steps = {
        way: theirs(args, rank, model) if way == "fsdp2" else ours(args, way, rank, model)
        for way in args.ways
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for number in range(args.rounds + 1):
        for way, step in steps.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps if number else 2):
                step()
            cpu = time.process_time() - cpu
            dist.barrier()
            used = torch.tensor([cpu], dtype=torch.float64)
            dist.all_reduce(used)
            row = ((time.perf_counter() - wall) / args.steps, float(used) / args.steps)
            if number:
                found[way].append(row)
                if rank == 0:
                    print(f"  {way}: wall {row[0]:.3f}, cpu {row[1]:.3f}", file=sys.stderr)
    leave(rank, directory, found)


def main() -> None:
    """Print a table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of a way in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    args = parser.parse_args()
    found = found_by(worker, args)
    tokens = args.batch_size * args.length
    rows = {}
    for way, values in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        rows[way] = {"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": tokens / wall}
    first = rows[args.ways[0]]
    print(f"{'':10s}{'s/step':>10s}{'CPU s':>10s}{'tokens/s':>10s}{'ratio':>8s}{'of CPU':>8s}")
    for way, row in rows.items():
        print(
            f"{way:10s}{row['seconds']:10.3f}{row['cpu_seconds']:10.3f}"
            f"{row['tokens_per_second']:10.0f}{first['seconds'] / row['seconds']:8.3f}"
            f"{first['cpu_seconds'] / row['cpu_seconds']:8.3f}"
        )
    ratios = {}
    for way, name in (("default", "sharded"), ("full", "full")):
        if {way, "fsdp2"} <= rows.keys():
            for kind, key in (("", "seconds"), ("_of_cpu", "cpu_seconds")):
                ratios[f"{name}_over_fsdp2{kind}"] = rows["fsdp2"][key] / rows[way][key]
    print(
        json.dumps(
            {
                "benchmark": "sharded_step",
                "torch": torch.__version__,
                **vars(args),
                "ways_measured": rows,
                **ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
