"""Bytes of a record per candidate and per supervised token, against what others store.

    python benchmarks/record_size.py [--model demo] [--tokens 6000] [--tau 0.99] [--threads 1]

A random sample of the training data is recorded with the real model and written in several ways:
as the record is, with other encodings and levels, and as int64 ids with float32 log-probabilities
in plain Parquet. Every variant is read back and compared bit by bit. A second table keeps exactly
50 candidates at every supervised position that has as many, and compares with the 114 bytes per
token that DistillKit (arcee-ai) publishes for its compressed logits at k = 50.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import CandidateSets, cut
from lrmc_ray.record import schema
from lrmc_ray.record.candidates import CandidateRecorder
from lrmc_ray.record.names import EXAMPLES, PLAN
from lrmc_ray.record.prepare import prepare
from lrmc_ray.tune.plan import random_rows

PUBLISHED_BYTES_PER_TOKEN = 114.0
"""DistillKit's README, "budget pick", k = 50: ids of 17 bits, which are 106 of the bytes, one exact
log-probability, and a polynomial of three terms in place of the others."""
PUBLISHED_K = 50

PER_CANDIDATE = ("candidate_ids", "candidate_logprobs")


def variants() -> dict[str, dict[str, Any]]:
    """Ways of writing the same table, as arguments of ``pyarrow.parquet.write_table``."""
    ours = dict(schema.LAYOUT)
    encodings = ours["column_encoding"]

    def with_encoding(name: str, encoding: str) -> dict[str, Any]:
        return {**ours, "column_encoding": {**encodings, f"{name}.list.element": encoding}}

    plain = {
        "compression": "zstd",
        "write_page_checksum": True,
        "row_group_size": ours["row_group_size"],
    }
    without_ids = {
        name: value for name, value in encodings.items() if not name.startswith("candidate_ids")
    }
    return {
        "record": ours,
        "zstd 1": {**ours, "compression_level": 1},
        "zstd 9": {**ours, "compression_level": 9},
        "zstd 19": {**ours, "compression_level": 19},
        "uncompressed": {**ours, "compression": "none", "compression_level": None},
        "ids plain": with_encoding("candidate_ids", "PLAIN"),
        "ids by dictionary": {
            **ours,
            "use_dictionary": ["domain", "candidate_ids.list.element"],
            "column_encoding": without_ids,
        },
        "log-probabilities plain": with_encoding("candidate_logprobs", "PLAIN"),
        "Parquet's defaults, zstd": plain,
    }


def written(table: pa.Table, options: dict[str, Any]) -> tuple[bytes, float, float]:
    """The file, and the seconds that writing and reading it took."""
    buffer = io.BytesIO()
    start = time.perf_counter()
    pq.write_table(table, buffer, **options)
    write_seconds = time.perf_counter() - start
    start = time.perf_counter()
    again = pq.read_table(io.BytesIO(buffer.getvalue()), page_checksum_verification=True)
    read_seconds = time.perf_counter() - start
    if not again.equals(table):
        raise SystemExit("what was read is not what was written")
    return buffer.getvalue(), write_seconds, read_seconds


def column_bytes(content: bytes, names: Sequence[str]) -> int:
    layout = pq.ParquetFile(io.BytesIO(content)).metadata
    return sum(
        layout.row_group(group).column(index).total_compressed_size
        for group in range(layout.num_row_groups)
        for index in range(layout.num_columns)
        if layout.row_group(group).column(index).path_in_schema.split(".")[0] in names
    )


def wide(table: pa.Table) -> pa.Table:
    """The same candidates as int64 ids and float32 log-probabilities."""
    columns = {
        "candidate_ids": table["candidate_ids"].cast(pa.list_(pa.int64())),
        "candidate_logprobs": table["candidate_logprobs"].cast(pa.list_(pa.float32())),
    }
    return pa.table(columns)


def with_gaps(table: pa.Table) -> pa.Table:
    """Log-probabilities as gaps between neighbours of a row, in float16 steps; lossless too."""
    column = table["candidate_logprobs"].combine_chunks()
    steps = column.flatten().to_numpy(zero_copy_only=False).view(np.uint16).astype(np.int32)
    offsets = table["candidate_offsets"].combine_chunks()
    begins = np.concatenate([[0], np.cumsum(pa.compute.list_value_length(column).to_numpy())])
    gaps = np.diff(steps, prepend=0)
    for row, own in enumerate(offsets.to_pylist()):
        first = begins[row] + np.array(own[:-1], dtype=np.int64)
        gaps[first] = steps[first]
    lists = pa.ListArray.from_arrays(pa.array(begins, type=pa.int32()), pa.array(gaps))
    return pa.table({"gaps": lists})


def supervised_only(samples: Sequence[Sample], size: int | None = None) -> list[Sample]:
    """Supervised positions alone; with ``size``, those of at least so many, cut to it.

    A cut set may lose its gold token, so this is for counting bytes only.
    """
    kept = []
    for sample in samples:
        wanted = sample.is_supervised_P
        if size is not None:
            wanted = wanted & (sample.candidates.sizes >= size)
        index = wanted.nonzero()[:, 0]
        candidates = sample.candidates.rows(index)
        if size is not None:
            rank = torch.arange(candidates.token_ids.numel())
            rank -= candidates.offsets[candidates.row_ids]
            keep = rank < size
            candidates = CandidateSets(
                torch.arange(len(index) + 1) * size,
                candidates.token_ids[keep],
                candidates.logprobs[keep],
                candidates.gold_ids,
            )
        if len(index):
            kept.append(
                replace(
                    sample,
                    positions_P=sample.positions_P[index],
                    is_supervised_P=sample.is_supervised_P[index],
                    candidates=candidates,
                )
            )
    return kept


def at_mean_size(samples: Sequence[Sample], size: float) -> tuple[float, list[Sample]]:
    """The tau at which supervised positions keep ``size`` candidates on average, and the cut."""
    samples = supervised_only(samples)

    def mean(tau: float) -> float:
        sizes = [cut(sample.candidates, tau).sizes for sample in samples]
        return float(torch.cat(sizes).double().mean())

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < size else (low, middle)
    return high, [replace(s, candidates=cut(s.candidates, high)) for s in samples]


def compare(title: str, samples: Sequence[Sample]) -> dict[str, Any]:
    table = schema.to_table(samples, {"lrmc.tau": "1"})
    num_candidates = sum(sample.candidates.token_ids.numel() for sample in samples)
    num_supervised = sum(int(sample.is_supervised_P.sum()) for sample in samples)
    wide_table = wide(table)
    raw = 12 * num_candidates
    print(
        f"\n{title}: {len(samples)} samples, {num_supervised} supervised positions, "
        f"{num_candidates} candidates ({num_candidates / num_supervised:.1f} per supervised one)"
    )
    header = ("file B", "B/token", "B/cand.", "vs int64+f32", "write ms", "read ms")
    print(f"{'variant':34s}" + "".join(f"{name:>13s}" for name in header))
    rows: dict[str, Any] = {}

    def line(name: str, content: bytes, names: Sequence[str], write: float, read: float) -> None:
        size = column_bytes(content, names)
        rows[name] = {
            "file_bytes": len(content),
            "bytes_per_supervised_token": len(content) / num_supervised,
            "bytes_per_candidate": size / num_candidates,
            "share_of_int64_float32": size / raw,
            "write_seconds": write,
            "read_seconds": read,
        }
        values: tuple[str, ...] = (f"{len(content)}", f"{len(content) / num_supervised:.1f}")
        values += (f"{size / num_candidates:.3f}", f"{size / raw:.1%}")
        values += (f"{write * 1e3:.0f}", f"{read * 1e3:.0f}")
        print(f"{name:34s}" + "".join(f"{value:>13s}" for value in values), flush=True)

    for name, options in variants().items():
        content, write, read = written(table, options)
        line(name, content, PER_CANDIDATE, write, read)
    content, write, read = written(wide_table, {"compression": "zstd"})
    line("int64 + float32, zstd", content, PER_CANDIDATE, write, read)
    options = {"compression": "zstd", "use_dictionary": False}
    options["column_encoding"] = {"gaps.list.element": "BYTE_STREAM_SPLIT"}
    content, write, read = written(with_gaps(table), options)
    gaps = column_bytes(content, ["gaps"]) / num_candidates
    own = column_bytes(written(table, variants()["record"])[0], ["candidate_logprobs"])
    print(
        f"log-probabilities alone: {own / num_candidates:.3f} B/candidate; as gaps in the order of "
        f"the row, which no Parquet encoding does by itself: {gaps:.3f}"
    )
    return {
        "samples": len(samples),
        "supervised_positions": num_supervised,
        "candidates": num_candidates,
        "variants": rows,
        "logprobs_bytes_per_candidate": own / num_candidates,
        "logprobs_as_gaps_bytes_per_candidate": gaps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train-data", default="demo", nargs="+")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens that the model sees")
    parser.add_argument("--tau", type=float, default=0.99)
    parser.add_argument("--k-max", type=int, default=1024)
    parser.add_argument("--prompt-k-max", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = [args.train_data] if isinstance(args.train_data, str) else args.train_data
    settings = load_settings(
        None, [f'model.name="{args.model}"', f"data.train={json.dumps(names)}"]
    )
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(settings, Path(directory))
        plan = json.loads((prepared.partial / PLAN).read_text())
        examples = prepared.partial / EXAMPLES
        rows = random_rows(examples, plan["samples"], args.tokens, args.seed)
    recorder = CandidateRecorder(
        prepared.model_directory,
        tau=args.tau,
        k_min=2,
        k_max=args.k_max,
        prompt_k_max=args.prompt_k_max,
        threads=args.threads,
    )
    samples = recorder.record(rows)
    tau, same_mean = at_mean_size(samples, PUBLISHED_K)
    tables = {
        "as recorded": compare("as recorded, prompts included", samples),
        "supervised only": compare("supervised positions only", supervised_only(samples)),
        "k = 50": compare(
            f"exactly {PUBLISHED_K} candidates", supervised_only(samples, PUBLISHED_K)
        ),
    }
    name = f"K = {PUBLISHED_K} on average"
    tables[name] = compare(f"{PUBLISHED_K} candidates on average (tau {tau:.4f})", same_mean)
    on_average = tables[name]["variants"]["record"]["bytes_per_supervised_token"]
    ours = tables["k = 50"]["variants"]["record"]["bytes_per_candidate"] * PUBLISHED_K
    print(
        f"\nat k = {PUBLISHED_K}: {ours:.0f} bytes per token, lossless, ordered; published "
        f"{PUBLISHED_BYTES_PER_TOKEN:.0f} (lossy): {ours / PUBLISHED_BYTES_PER_TOKEN:.2f}x"
    )
    print(
        f"at {PUBLISHED_K} on average, the whole file: {on_average:.0f} bytes per supervised one: "
        f"{on_average / PUBLISHED_BYTES_PER_TOKEN:.2f}x"
    )
    print(
        json.dumps(
            {
                "benchmark": "record_size",
                "model": args.model,
                "tau": args.tau,
                "k_max": args.k_max,
                "prompt_k_max": args.prompt_k_max,
                "seed": args.seed,
                "pyarrow": pa.__version__,
                "tables": tables,
                "bytes_per_token_at_k_50": ours,
                "times_published": ours / PUBLISHED_BYTES_PER_TOKEN,
                "bytes_per_token_at_k_50_on_average": on_average,
            }
        )
    )


if __name__ == "__main__":
    main()
