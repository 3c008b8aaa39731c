"""What a large record and its training take, from measured costs; and the driver's memory.

    python benchmarks/scaling.py                         # 1B tokens, Qwen3-4B, 8, 64, 512 GPUs
    python benchmarks/scaling.py --memory 1000,10000,100000,1000000

The first command multiplies: costs per token, candidate and file are those of
benchmarks/README.md, speeds of GPUs and of storage are assumptions and flags, since nothing here
was measured on a GPU. The second one measures: the real code of the driver on synthetic samples,
each size in a process of its own, once with short samples and once with samples of ten times as
many tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from lrmc_ray.record.actors import MOST_BLOCKS  # noqa: E402
from lrmc_ray.record.prepare import LARGEST_SHARD_TOKENS  # noqa: E402

# Measured (benchmarks/README.md)
BYTES_PER_CANDIDATE = 2.42
"""On disk, of supervised positions at tau 0.99: ids and log-probabilities."""
BYTES_PER_PROMPT_CANDIDATE = 1.89
BYTES_PER_POSITION = 12.0
"""Positions, gold ids, offsets, outside mass, and the text itself."""
BYTES_IN_MANIFEST = 150
"""Of one file's entry: name, rows, digest."""
BYTES_IN_PLAN = 92
RAY_DATA_SHARE = 0.89
"""Of the bare loop's speed that the Ray Data job reaches."""
START_SECONDS = 60.0
DRIVER_BASE_BYTES = 420e6
DRIVER_BYTES_PER_FILE = 700
"""Names, rows and digests of a file, its shard, its share of a Ray Data block."""
DRIVER_BYTES_PER_SAMPLE = 133
WORKER_BYTES_PER_SAMPLE = 168
"""Names and domains of all samples, and two epochs' orders, in every training worker."""


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here."""

    parameters: float = 4.02e9
    """Qwen3-4B."""
    vocabulary: int = 151_936
    supervised_share: float = 0.4
    k_supervised: float = 150.0
    k_prompt: float = 30.0
    tokens_per_sample: float = 1000.0
    gpu_tflops: float = 989.0
    """An H100's bf16 data sheet."""
    forward_share: float = 0.4
    """Of it, in recording."""
    train_share: float = 0.3
    gpu_bytes: float = 80e9
    storage_gb_per_second: float = 5.0
    """What the shared file system gives all nodes together."""
    network_gb_per_second: float = 50.0
    """Between two nodes, in one direction."""
    batch_samples: int = 512
    epochs: float = 1.0


def simulate(tokens: float, gpus: int, a: Assumptions) -> dict[str, float]:
    """A record of ``tokens`` and one epoch of full fine-tuning on ``gpus``, one worker each."""
    files = -(-tokens // LARGEST_SHARD_TOKENS)
    samples = tokens / a.tokens_per_sample
    supervised = tokens * a.supervised_share
    record_bytes = (
        supervised * a.k_supervised * BYTES_PER_CANDIDATE
        + (tokens - supervised) * a.k_prompt * BYTES_PER_PROMPT_CANDIDATE
        + tokens * BYTES_PER_POSITION
    )
    forward = 2 * a.parameters * tokens
    flops = a.gpu_tflops * 1e12 * gpus
    compute = forward / (flops * a.forward_share * RAY_DATA_SHARE)
    writing = record_bytes / (a.storage_gb_per_second * 1e9)
    # The digest of every file, once more, by the driver alone.
    closing = record_bytes / 1.0e9
    workers = gpus  # and as many micro-batches: the fewest that keep all of them busy
    steps = samples * a.epochs / a.batch_samples
    step_compute = 6 * a.parameters * a.batch_samples * a.tokens_per_sample
    step_compute /= a.gpu_tflops * 1e12 * workers * a.train_share
    gradient = 4 * a.parameters
    # Strict: every micro-batch's gradient goes to all workers, one after the other.
    strict = workers * gradient / (a.network_gb_per_second * 1e9)
    fast = gradient * 2 / (a.network_gb_per_second * 1e9)
    # A sample lies anywhere: its whole file is read and verified, a cache of 2 GB apart.
    file_bytes = record_bytes / files
    cached = min(1.0, 2e9 / record_bytes)
    reads = a.batch_samples * file_bytes * (1 - cached) / (a.storage_gb_per_second * 1e9)
    return {
        "gpus": gpus,
        "record_gb": record_bytes / 1e9,
        "record_files": files,
        "file_mb": file_bytes / 1e6,
        "manifest_mb": files * BYTES_IN_MANIFEST / 1e6,
        "plan_mb": files * BYTES_IN_PLAN / 1e6,
        "ray_blocks": min(files, MOST_BLOCKS),
        "record_hours": (START_SECONDS + max(compute, writing) + closing) / 3600,
        "record_compute_hours": compute / 3600,
        "record_writing_hours": writing / 3600,
        "record_closing_hours": closing / 3600,
        "driver_gb": (
            DRIVER_BASE_BYTES + files * DRIVER_BYTES_PER_FILE + samples * DRIVER_BYTES_PER_SAMPLE
        )
        / 1e9,
        "worker_index_gb": samples * WORKER_BYTES_PER_SAMPLE / 1e9,
        "train_start_file_opens": workers,  # the index
        "train_state_gb_per_gpu": 16 * a.parameters / 1e9,
        "train_steps": steps,
        "step_compute_seconds": step_compute,
        "step_strict_seconds": strict if workers > 1 else 0.0,
        "step_fast_seconds": fast if workers > 1 else 0.0,
        "step_read_seconds": reads,
        "train_hours_fast": steps * max(step_compute + fast, reads) / 3600,
        "train_hours_strict": steps * max(step_compute + strict, reads) / 3600,
        "checkpoint_gb": 12 * a.parameters / 1e9,
        "checkpoint_seconds": 12 * a.parameters / (a.storage_gb_per_second * 1e9),
    }


# Measuring the driver


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_child(kind: str, samples: int, words: int) -> dict[str, float]:
    """Peak memory of one process that does the driver's or a worker's part; runs in a child."""
    with tempfile.TemporaryDirectory(prefix="lrmc-scaling-") as work:
        if kind == "prepare":
            return _prepare(Path(work), samples, words)
        return _index(Path(work), samples)


def _prepare(work: Path, samples: int, words: int) -> dict[str, float]:
    """Reading, checking, tokenizing and cutting into shards, as `record` does before Ray."""
    from lrmc_ray.config import load_settings
    from lrmc_ray.record.names import PLAN
    from lrmc_ray.record.prepare import prepare
    from tests.support.tiny import make_model

    model = make_model(work / "model")
    data = work / "train.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for number in range(samples):
            row = {"prompt": f"{number}", "completion": "a b " * (words // 2)}
            file.write(json.dumps(row) + "\n")
    settings = load_settings(None, [f'model.name="{model}"', f'data.train="{data}"'])
    before = peak_megabytes()
    prepared = prepare(settings, work / "runs")
    plan = json.loads((prepared.partial / PLAN).read_text())
    return {
        "tokens": plan["tokens"],
        "shards": len(plan["shards"]),
        "plan_bytes": (prepared.partial / PLAN).stat().st_size,
        "megabytes": peak_megabytes() - before,
    }


def _index(work: Path, samples: int) -> dict[str, float]:
    """What every training worker knows of all samples: names, domains, their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrmc_ray.config import TrainSettings
    from lrmc_ray.files.artifacts import file_digest, write_manifest
    from lrmc_ray.record.names import INDEX
    from lrmc_ray.record.reader import Records
    from lrmc_ray.train.samples import TrainingSamples

    rows = 1000
    files = []
    schema = pa.schema([("sample_id", pa.string()), ("domain", pa.string())])
    with pq.ParquetWriter(work / INDEX, schema, write_page_checksum=True) as index:
        for part in range(-(-samples // rows)):
            count = min(rows, samples - part * rows)
            names = [f"{part * rows + i:016x}" for i in range(count)]
            index.write_table(pa.table({"sample_id": names, "domain": [""] * count}, schema))
            files.append({"name": f"part-{part:05d}.parquet", "rows": count, "sha256": "0" * 64})
    write_manifest(
        work,
        {
            "kind": "records",
            "provenance": {},
            "vocabulary_size": 1,
            "files": files,
            "index": {"name": INDEX, "sha256": file_digest(work / INDEX)},
        },
    )
    before = peak_megabytes()
    made = TrainingSamples(Records(work), TrainSettings())
    made.ids_of_step(made.epoch_length // 4)
    return {
        "files": len(files),
        "manifest_bytes": (work / "manifest.json").stat().st_size,
        "megabytes": peak_megabytes() - before,
    }


def run_child(kind: str, samples: int, words: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, str(samples), str(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def show_memory(sizes: Sequence[int]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"{'samples':>10} {'tokens':>12} {'driver, MB':>11} {'plan, MB':>9} {'worker, MB':>11}")
    for samples in sizes:
        for words in (10, 100):
            if words == 100 and samples > max(sizes) // 10:
                continue  # ten times the tokens of the size below
            prepared = run_child("prepare", samples, words)
            index = run_child("index", samples, 0) if words == 10 else {"megabytes": float("nan")}
            print(
                f"{samples:>10} {prepared['tokens']:>12} {prepared['megabytes']:>11.1f} "
                f"{prepared['plan_bytes'] / 1e6:>9.2f} {index['megabytes']:>11.1f}"
            )
            key = f"{samples}_samples_{prepared['tokens']}_tokens"
            results[f"driver_mb_{key}"] = round(prepared["megabytes"], 1)
            if words == 10:
                results[f"worker_mb_{samples}_samples"] = round(index["megabytes"], 1)
    return results


def show_simulation(tokens: float, gpus: Sequence[int], a: Assumptions) -> dict[str, Any]:
    columns = [simulate(tokens, count, a) for count in gpus]
    print(f"{tokens:.3g} tokens. Assumed: {asdict(a)}\n")
    for name in columns[0]:
        print(f"{name:>26}" + "".join(f"{column[name]:>14.4g}" for column in columns))
    return {f"{column['gpus']:g}_gpus": column for column in columns}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--gpus", default="8,64,512")
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--memory", metavar="SAMPLES", help="measure the driver at these sizes")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        kind, samples, words = arguments.child
        print(json.dumps(measure_child(kind, int(samples), int(words))))
        return 0
    if arguments.memory:
        results = show_memory([int(size) for size in arguments.memory.split(",")])
    else:
        assumed = Assumptions(**{name: getattr(arguments, name) for name in asdict(Assumptions())})
        results = show_simulation(
            arguments.tokens, [int(count) for count in arguments.gpus.split(",")], assumed
        )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
