"""Tokens per second of the whole recording job against a bare forward loop of the same model.

    python benchmarks/record_throughput.py [--model demo] [--tokens 16000] [--threads 1]
    python benchmarks/record_throughput.py --memory [--times-object-store 10]

The job is Ray Data with one actor, selection, files and checksums included, start-up apart: it is
timed from the end of its first file to the end of its last. The loop runs ``model(ids).logits`` on
the same batches in this process, before and after the job. How the time of one actor is spent is
measured in this process, too.

With --memory a small random model records data whose record is several times Ray's object store
(80 MB, about the least that Ray takes), and the memory of driver and actors is watched.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests.support.tiny

OBJECT_STORE_BYTES = 80 << 20


def forward_loop(model: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Tokens per second, and per CPU second, of the bare loop; padding does not count."""
    import torch

    from lrmc_ray.record.candidates import batches

    tokens = 0
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for batch in batches(rows):
            longest = max(len(row["input_ids"]) for row in batch)
            input_ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
            for index, row in enumerate(batch):
                input_ids_BT[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                tokens += len(row["input_ids"])
            model(input_ids=input_ids_BT, use_cache=False)
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu_start)


def shares(recorder: Any, rows: Sequence[Mapping[str, Any]], directory: Path) -> dict[str, float]:
    """What the time of an actor goes into, as shares; ``tokens_per_second`` beside them."""
    from lrmc_ray.method import head, subsets
    from lrmc_ray.models import forward
    from lrmc_ray.record.describe import describe
    from lrmc_ray.record.schema import write_part

    seconds: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    places = (
        ("forward", forward, "batch_hidden_states"),
        ("logits", head, "head_logits"),
        ("selection", subsets, "select_candidates"),
    )
    originals = [getattr(module, attribute) for _, module, attribute in places]
    start = time.perf_counter()
    try:
        for (name, module, attribute), original in zip(places, originals, strict=True):
            setattr(module, attribute, timed(name, original))
        samples = recorder.record(rows)
    finally:
        for (_, module, attribute), original in zip(places, originals, strict=True):
            setattr(module, attribute, original)
    path = directory / "profile.parquet"
    timed("file", write_part)(path, samples, {"lrmc.tau": "0.9"})
    timed("file", describe)(path, tokenizer_size=10**9)
    total = time.perf_counter() - start
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        **{name: value / total for name, value in seconds.items()},
        "rest": 1 - sum(seconds.values()) / total,
        "tokens_per_second": tokens / total,
    }


def start_ray(num_cpus: int) -> None:
    from lrmc_ray.cluster.session import RAY_ENVIRONMENT

    for name, value in {**RAY_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
        os.environ.setdefault(name, value)
    import logging

    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=OBJECT_STORE_BYTES,
    )


def job(prepared: Any, plan: Mapping[str, Any], tokens_of: Mapping[str, int]) -> dict[str, float]:
    """The whole Ray job; tokens per second from the end of its first file to that of its last."""
    import numpy as np

    from lrmc_ray.record.actors import run_actors

    start = time.perf_counter()
    with Watch() as watch:
        parts = list(run_actors(prepared, plan["shards"], plan["tokenizer_size"]))
    whole_seconds = time.perf_counter() - start
    ends = sorted(
        ((prepared.partial / part["name"]).stat().st_mtime_ns / 1e9, part["name"]) for part in parts
    )
    tokens = sum(tokens_of[name] for _, name in ends[1:])
    times, cpu = zip(*watch.actor_cpu, strict=True)
    cpu_seconds = np.interp(ends[-1][0], times, cpu) - np.interp(ends[0][0], times, cpu)
    return {
        "tokens_per_second": tokens / (ends[-1][0] - ends[0][0]),
        "tokens_per_actor_cpu_second": tokens / cpu_seconds,
        "seconds_with_start_up": whole_seconds,
    }


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lrmc_ray.config import load_settings
    from lrmc_ray.record.candidates import CandidateRecorder
    from lrmc_ray.record.examples import read_examples
    from lrmc_ray.record.names import EXAMPLES, PLAN
    from lrmc_ray.record.prepare import prepare

    torch.set_num_threads(args.threads)
    settings = load_settings(
        None,
        [
            f'model.name="{args.model}"',
            f"train.tau={args.tau}",
            f"record.k_max={args.k_max}",
            "resources.actors=[1,1]",
            f"resources.cpus_per_worker={args.threads}",
        ],
    )
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(settings, Path(directory))
        plan = json.loads((prepared.partial / PLAN).read_text())
        examples = prepared.partial / EXAMPLES
        tokens_of: dict[str, int] = {}
        shards = []
        # Every n-th shard: short and long samples alike, as the whole has them.
        wanted = max(3, args.tokens * len(plan["shards"]) // plan["tokens"])
        for shard in plan["shards"][:: max(1, len(plan["shards"]) // wanted)][:wanted]:
            rows = read_examples(examples, shard["start"], shard["stop"])
            tokens_of[shard["name"]] = sum(len(row["input_ids"]) for row in rows)
            shards.append(shard)
        # One shard is enough for the loop: the one of middle length.
        middle = shards[len(shards) // 2]
        loop_rows = read_examples(examples, middle["start"], middle["stop"])
        recorder = CandidateRecorder(
            prepared.model_directory,
            tau=args.tau,
            k_min=2,
            k_max=args.k_max,
            prompt_k_max=64,
            threads=args.threads,
        )
        forward_loop(recorder._model, loop_rows[:2])  # warm up
        loops = [forward_loop(recorder._model, loop_rows)]
        spent = shares(recorder, loop_rows, Path(directory))
        start_ray(num_cpus=args.threads + 1)
        whole = job(prepared, {**plan, "shards": shards}, tokens_of)
        import ray

        ray.shutdown()
        loops.append(forward_loop(recorder._model, loop_rows))
    loop, cpu_loop = (statistics.mean(values) for values in zip(*loops, strict=True))
    ratio = whole["tokens_per_second"] / loop
    cpu_ratio = whole["tokens_per_actor_cpu_second"] / cpu_loop
    print(f"{'':44s}{'wall':>9s}{'CPU':>9s}  tokens per second")
    for name, (wall, cpu) in zip(("before", "after"), loops, strict=True):
        print(f"{'bare forward loop, ' + name:44s}{wall:9.1f}{cpu:9.1f}")
    wall, cpu = whole["tokens_per_second"], whole["tokens_per_actor_cpu_second"]
    print(f"{'Ray job, one actor, start-up apart':44s}{wall:9.1f}{cpu:9.1f}")
    print(f"{'ratio':44s}{ratio:9.3f}{cpu_ratio:9.3f}")
    print(f"{'the job with its start-up':44s}{whole['seconds_with_start_up']:9.1f} s")
    for name in ("forward", "logits", "selection", "file", "rest"):
        print(f"{'share of an actor: ' + name:44s}{spent[name]:9.1%}")
    return {
        "benchmark": "record_throughput",
        "model": args.model,
        "tau": args.tau,
        "k_max": args.k_max,
        "threads": args.threads,
        "job_tokens": sum(tokens_of.values()),
        "loop_tokens_per_second": loops,
        "job": whole,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "shares": spent,
        "torch": torch.__version__,
    }


class Watch:
    """Peak memory of this process, the recording actors and the object store, in bytes."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, int, int]] = []
        self.actor_cpu: list[tuple[float, float]] = []
        """Time of day, and CPU seconds of the actors so far."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._stop.wait(0.25):
            actors = store = 0
            for child in own.children(recursive=True):
                try:
                    title = " ".join(child.cmdline())
                    memory = child.memory_info()
                    used = child.cpu_times()
                except psutil.Error:
                    continue
                if "MapBatches(Recorder)" in title:
                    actors = max(actors, memory.rss - memory.shared)
                    self.actor_cpu.append((time.time(), used.user + used.system))
                if "raylet/raylet" in title:
                    store = memory.shared
            info = own.memory_info()
            self.samples.append(
                (time.perf_counter() - self._start, info.rss - info.shared, actors, store)
            )

    def peaks(self) -> dict[str, float]:
        """In MB: the peaks, and the driver's and actor's medians in the job's halves."""
        half = len(self.samples) // 2
        result = {
            name: max(sample[column] for sample in self.samples) / 1e6
            for column, name in ((1, "driver_peak"), (2, "actor_peak"), (3, "object_store_peak"))
        }
        for column, name in ((1, "driver"), (2, "actor")):
            for part, samples in (("first", self.samples[:half]), ("second", self.samples[half:])):
                values = [sample[column] for sample in samples if sample[2]]
                result[f"{name}_{part}_half"] = statistics.median(values or [0]) / 1e6
        return result


def memory(args: argparse.Namespace) -> dict[str, Any]:
    import random

    import torch

    from lrmc_ray.config import load_settings
    from lrmc_ray.files.artifacts import read_manifest
    from lrmc_ray.record.run import record
    from tests.support.tiny import make_model

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = make_model(root / "model")
        start_ray(num_cpus=2)
        for times in (1, args.times_object_store):
            # Candidates are 6 bytes each in memory, about 330 of the 512 tokens at tau 0.99.
            num_tokens = times * OBJECT_STORE_BYTES // (6 * 330)
            rng = random.Random(args.seed)
            data = root / f"train-{times}.jsonl"
            words = ["resistance", "current", "voltage", "ohm", "of", "the", "is", "42", "wire"]
            with data.open("w") as file:
                for _ in range(num_tokens // 330):
                    text = " ".join(rng.choice(words) for _ in range(rng.randint(60, 140)))
                    file.write(json.dumps({"text": text}) + "\n")
            settings = load_settings(
                None,
                [
                    f'model.name="{model}"',
                    f'data.train="{data}"',
                    "data.max_length=1024",
                    "resources.actors=[1,1]",
                ],
            )
            start = time.perf_counter()
            with Watch() as watch:
                finished = record(settings, root / f"runs-{times}")
            summary = read_manifest(finished, made_by="")["summary"]
            in_memory = 6 * summary["k_mean"] * summary["supervised_positions"]
            results[str(times)] = {
                "text_bytes": data.stat().st_size,
                "tokens": summary["tokens"],
                "record_bytes": summary["bytes"],
                "candidates_in_memory_bytes": round(in_memory),
                "seconds": round(time.perf_counter() - start, 1),
                **watch.peaks(),
            }
        import ray

        ray.shutdown()
    print(f"object store {OBJECT_STORE_BYTES / 1e6:.0f} MB; MB unless said otherwise")
    names = list(next(iter(results.values())))
    print(f"{'':32s}" + "".join(f"{times + ' x':>12s}" for times in results) + f"{'ratio':>9s}")
    small, large = results.values()
    for name in names:
        scale = 1e6 if name.endswith("_bytes") else 1
        ratio = large[name] / small[name] if small[name] else float("nan")
        print(f"{name:32s}{small[name] / scale:12.1f}{large[name] / scale:12.1f}{ratio:9.2f}")
    return {"benchmark": "record_memory", "object_store_bytes": OBJECT_STORE_BYTES, **results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tau", type=float, default=0.99)
    parser.add_argument("--k-max", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens of the Ray job, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="memory in place of speed")
    parser.add_argument("--times-object-store", type=int, default=10)
    args = parser.parse_args()
    print(json.dumps(memory(args) if args.memory else throughput(args)))


if __name__ == "__main__":
    main()
