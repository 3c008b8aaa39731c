"""What Ray Train and the strict reduction cost, on SmolLM2-135M and the NL2SQL demo.

    python benchmarks/elastic_overhead.py [--steps 6] [--workers 2] [--model demo]

The same steps, with one torch thread per worker:

    bare            `TrainingRun` in this process, without Ray
    ray, 1 worker   `python -m lrmc_ray.train`'s TorchTrainer on one worker
    fast, strict    with that many workers, either reduction

A step's time is that between two lines of `metrics.jsonl`, so whatever happens between the steps
counts; the first step does not. Starting Ray is reported apart. Ratios are of medians.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def step_seconds(directory: Path) -> list[float]:
    """Between the lines of the metrics, the first step left out."""
    from lrmc_ray.files.metrics_log import read_metrics

    times = [line.time for line in read_metrics(directory / "metrics.jsonl")]
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="of each variant, the first not timed")
    parser.add_argument("--workers", type=int, default=2, help="of the comparison of reductions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", default="demo", help="directory of another model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.config import load_settings
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.record.run import record
    from lrmc_ray.train.driver import train
    from lrmc_ray.train.loop import TrainingRun
    from lrmc_ray.train.run_files import LocalRun

    torch.set_num_threads(1)

    def settings(workers: int, reduction: str) -> Any:
        return load_settings(
            None,
            [
                f'model.name="{args.model}"',
                f"train.steps={args.steps}",
                f"train.batch_size={args.batch_size}",
                f"train.reduction={reduction}",
                f"train.seed={args.seed}",
                "train.checkpoint_every=1000000",
                f"resources.workers=[{workers},{workers}]",
            ],
        )

    found: dict[str, list[float]] = {}
    starts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch)
        with ray_session(log=output / "ray.log", num_cpus=max(2, args.workers)):
            recorded = record(settings(1, "strict"), output)
            bare = output / "bare"
            bare.mkdir()
            TrainingRun(
                settings(1, "strict").train,
                record=recorded,
                model_directory=local_directory(settings(1, "strict").model),
                files=LocalRun(bare),
                group=WorkerGroup(),
                device=torch.device("cpu"),
            ).run()
            found["bare"] = step_seconds(bare)
            variants = {
                "ray, 1 worker": (1, "strict"),
                f"fast, {args.workers} workers": (args.workers, "fast"),
                f"strict, {args.workers} workers": (args.workers, "strict"),
            }
            for number, (name, (workers, reduction)) in enumerate(variants.items()):
                start = time.monotonic()
                directory = train(settings(workers, reduction), recorded, output / f"run-{number}")
                found[name] = step_seconds(directory)
                starts[name] = time.monotonic() - start - sum(found[name])
    medians = {name: statistics.median(values) for name, values in found.items()}
    fast, strict = list(medians)[2:]
    print(f"{'':20s}{'s/step':>9s}{'fastest':>9s}{'/ bare':>8s}{'start s':>9s}")
    for name, median in medians.items():
        start_text = f"{starts[name]:9.1f}" if name in starts else f"{'':9s}"
        print(
            f"{name:20s}{median:9.3f}{min(found[name]):9.3f}"
            f"{median / medians['bare']:8.3f}{start_text}"
        )
    print(f"strict / fast: {medians[strict] / medians[fast]:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "elastic_overhead",
                "torch": torch.__version__,
                **vars(args),
                "seconds_per_step": medians,
                "fastest_seconds": {name: min(values) for name, values in found.items()},
                "start_seconds": starts,
                "trainer_over_bare": medians["ray, 1 worker"] / medians["bare"],
                "strict_over_fast": medians[strict] / medians[fast],
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
