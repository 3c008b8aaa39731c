"""Stage 0: record the candidate tokens of every position of the training data.

    python -m lrmc_ray.record --output runs

One teacher-forced forward pass of the base model, in an actor pool of Ray Data. The examples are
tokenized once and cut into shards of similar length; an actor writes each shard as one Parquet
file, under a name that the shard alone decides. So a shard that is done twice, because an actor
or a node died, replaces itself, and a command that was killed goes on with the missing shards.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import (
    PARTIAL,
    file_digest,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_json,
)
from lrmc_ray.config import CT, DEMO, RunSettings
from lrmc_ray.console import progress, run_command, setup_logging
from lrmc_ray.errors import DataError
from lrmc_ray.ray_session import RAY_LOG, ray_session

_log = logging.getLogger(__name__)

SORT_WINDOW = 4096
"""Examples that are sorted by length together, one row group; bounds the driver's memory."""
BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""
SMALLEST_SHARD_TOKENS = 4096
SHARDS = 64
"""Shards of a large data set; a small one has fewer."""
EXAMPLES = "examples.parquet"


def record(settings: RunSettings, output: Path) -> Path:
    """The finished record of ``settings``, made now unless it is there already.

    Needs a running Ray session. Calls with the same model, data and record settings find the same
    directory; a call that was interrupted goes on with the shards that are missing.

    Raises:
        DataError: training data that cannot be used.
        IncompleteArtifactError: the model or the training data do not exist.
    """
    from lrmc_ray.models import local_directory, model_fingerprint, tokenizer_fingerprint

    model_directory = local_directory(settings.model)
    data_files = training_files(settings)
    identity = {
        "model": model_fingerprint(model_directory),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "data": fingerprint([file_digest(path) for path in data_files]),
        "max_length": settings.data.max_length,
        "on_long": settings.data.on_long,
        "tau": settings.recorded_tau(),
        "k_min": settings.record.k_min,
        "k_max": settings.record.k_max,
        "prompt_k_max": settings.record.prompt_k_max,
        "schema": _schema_version(),
    }
    final = output / "records" / fingerprint(identity)
    if is_finished(final):
        _log.info("the record %s is there already", final)
        return final
    partial = final.with_name(final.name + PARTIAL)
    with lock_directory(partial):
        if not is_finished(final):
            _record(settings, identity, model_directory, data_files, partial, final)
    return final


def training_files(settings: RunSettings) -> list[Path]:
    """The JSONL files that ``data.train`` names, the demo's made where they are asked for.

    Raises:
        IncompleteArtifactError: a file does not exist.
    """
    from lrmc_ray.errors import IncompleteArtifactError

    files = []
    for name in settings.data.train:
        if name == DEMO:
            from lrmc_ray.demo.files import demo_files
            from lrmc_ray.models import cache_directory

            files.append(demo_files(cache_directory()).train)
        elif name == CT and not Path(CT).exists():
            from lrmc_ray.models import cache_directory
            from lrmc_ray.tasks.built import ct_files

            files.append(ct_files(cache_directory()).train)
        elif Path(name).is_file():
            files.append(Path(name))
        else:
            raise IncompleteArtifactError(
                f"training data {name} does not exist; give an existing JSONL file"
            )
    return files


def _schema_version() -> str:
    from lrmc_ray.data.records import SCHEMA_VERSION

    return SCHEMA_VERSION


def _record(
    settings: RunSettings,
    identity: Mapping[str, Any],
    model_directory: Path,
    data_files: Sequence[Path],
    partial: Path,
    final: Path,
) -> None:
    start = time.monotonic()
    examples_path = partial / EXAMPLES
    plan_path = partial / "plan.json"
    if not plan_path.is_file():
        plan = _prepare(settings, model_directory, data_files, examples_path)
        write_json(plan_path, plan)
    plan = json.loads(plan_path.read_text())
    provenance = {
        "lrmc.model": str(identity["model"]),
        "lrmc.tokenizer": str(identity["tokenizer"]),
        "lrmc.data": str(identity["data"]),
        "lrmc.record": final.name,
    }
    shards = plan["shards"]
    done = _finished_parts(partial, shards, provenance)
    missing = [shard for shard in shards if shard["name"] not in done]
    rows_done = sum(shard["stop"] - shard["start"] for shard in shards if shard["name"] in done)
    with progress("Recording", total=plan["samples"], unit="samples", completed=rows_done) as bar:
        for part in _run_actors(settings, model_directory, partial, missing, provenance):
            done[part["name"]] = part
            bar.advance(part["rows"])
    parts = [done[shard["name"]] for shard in shards]
    manifest = {
        "kind": "records",
        "identity": dict(identity),
        "provenance": provenance,
        "vocabulary_size": plan["vocabulary_size"],
        "files": [{key: part[key] for key in ("name", "rows", "sha256")} for part in parts],
        "summary": summarize(plan, parts),
        "seconds": round(time.monotonic() - start, 2),
    }
    for name in os.listdir(partial):
        if name not in done and name != ".lock":
            (partial / name).unlink()
    publish(partial, final, manifest)


def _prepare(
    settings: RunSettings, model_directory: Path, data_files: Sequence[Path], path: Path
) -> dict[str, Any]:
    """Tokenize every example into ``path``, sorted by length, and cut them into shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrmc_ray.data.examples import EncodingSummary, Example, encode_rows, read_rows
    from lrmc_ray.models import load_tokenizer

    tokenizer = load_tokenizer(model_directory)
    vocabulary_size = json.loads((model_directory / "config.json").read_text())["vocab_size"]
    if len(tokenizer) > vocabulary_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's head only {vocabulary_size}; "
            "use the tokenizer that belongs to the model"
        )
    schema = pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("is_target", pa.list_(pa.bool_()), nullable=False),
        ]
    )
    summary = EncodingSummary()
    lengths: list[int] = []
    window: list[Example] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            window.sort(key=lambda example: (len(example.input_ids), example.sample_id))
            lengths.extend(len(example.input_ids) for example in window)
            columns = {
                "sample_id": [example.sample_id for example in window],
                "input_ids": [example.input_ids for example in window],
                "is_target": [example.is_target for example in window],
            }
            writer.write_table(pa.table(columns, schema=schema))
            window.clear()

        for example in encode_rows(
            read_rows(data_files),
            tokenizer,
            max_length=settings.data.max_length,
            on_long=settings.data.on_long,
            summary=summary,
        ):
            window.append(example)
            if len(window) == SORT_WINDOW:
                flush()
        flush()
    return {
        "samples": summary.samples,
        "tokens": summary.tokens,
        "supervised_tokens": summary.supervised_tokens,
        "dropped": summary.dropped,
        "truncated": summary.truncated,
        "vocabulary_size": vocabulary_size,
        "shards": _shards(lengths),
    }


def _shards(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Consecutive ranges of about equally many tokens."""
    target = max(SMALLEST_SHARD_TOKENS, sum(lengths) // SHARDS)
    shards: list[dict[str, Any]] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens >= target or index == len(lengths) - 1:
            name = f"part-{len(shards):05d}.parquet"
            shards.append({"name": name, "start": start, "stop": index + 1})
            start, tokens = index + 1, 0
    return shards


def _finished_parts(
    partial: Path, shards: Sequence[Mapping[str, Any]], provenance: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What an interrupted run left behind, verified; whatever is damaged is made again."""
    from lrmc_ray.data.records import read_part

    done: dict[str, dict[str, Any]] = {}
    for shard in shards:
        path = partial / str(shard["name"])
        if not path.is_file():
            continue
        try:
            table = read_part(path, provenance)
        except DataError as error:
            _log.warning("%s; recording that part again", error)
            path.unlink()
            continue
        if table.num_rows == shard["stop"] - shard["start"]:
            done[path.name] = _describe(path, table)
    return done


def _describe(path: Path, table: Any) -> dict[str, Any]:
    """What the driver keeps of one finished file: a few numbers, however many tokens it holds."""
    import numpy as np

    counts = {"supervised": 0, "prompt": 0, "active": 0, "capped": 0}
    histogram = np.zeros(1 << 16, dtype=np.int64)
    tau = float(table.schema.metadata[b"lrmc.tau"])
    candidates = {True: 0, False: 0}
    for row in range(table.num_rows):
        row_of = {
            name: table[name][row].values for name in table.column_names if name != "sample_id"
        }
        is_supervised = row_of["is_supervised"].to_numpy(zero_copy_only=False)
        sizes = np.diff(row_of["candidate_offsets"].to_numpy())
        outside = row_of["outside_mass"].to_numpy()
        counts["supervised"] += int(is_supervised.sum())
        counts["prompt"] += int((~is_supervised).sum())
        counts["active"] += int(_is_active(row_of, tau)[is_supervised].sum())
        counts["capped"] += int((outside[is_supervised] > 1 - tau + 1e-7).sum())
        candidates[True] += int(sizes[is_supervised].sum())
        candidates[False] += int(sizes[~is_supervised].sum())
        np.add.at(histogram, np.minimum(sizes[is_supervised], len(histogram) - 1), 1)
    used = histogram.nonzero()[0]
    return {
        "name": path.name,
        "rows": table.num_rows,
        "sha256": file_digest(path),
        "bytes": path.stat().st_size,
        "supervised_candidates": candidates[True],
        "prompt_candidates": candidates[False],
        "k_values": used.tolist(),
        "k_counts": histogram[used].tolist(),
        **counts,
    }


def _is_active(row: Mapping[str, Any], tau: float) -> Any:
    """Positions with a candidate beside gold, were the set as small as ``tau`` allows."""
    import numpy as np

    first = row["candidate_offsets"].to_numpy()[:-1]
    ids = row["candidate_ids"].to_numpy()[first]
    mass = np.exp(row["candidate_logprobs"].to_numpy(zero_copy_only=False)[first].astype(float))
    return (ids != row["gold_ids"].to_numpy()) | (mass < tau)


def summarize(plan: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record in numbers: positions, candidates per position, shares, bytes."""
    from collections import Counter

    def total(key: str) -> int:
        return sum(int(part[key]) for part in parts)

    histogram: Counter[int] = Counter()
    for part in parts:
        histogram.update(dict(zip(part["k_values"], part["k_counts"], strict=True)))
    supervised = total("supervised")

    def quantile(share: float) -> int:
        seen = 0
        for size in sorted(histogram):
            seen += histogram[size]
            if seen >= share * supervised:
                return size
        return 0

    return {
        "samples": plan["samples"],
        "tokens": plan["tokens"],
        "dropped": plan["dropped"],
        "truncated": plan["truncated"],
        "supervised_positions": supervised,
        "prompt_positions": total("prompt"),
        "k_mean": round(total("supervised_candidates") / supervised, 2),
        "k_median": quantile(0.5),
        "k_95": quantile(0.95),
        "prompt_k_mean": round(total("prompt_candidates") / max(1, total("prompt")), 2),
        "active_share": round(total("active") / supervised, 4),
        "capped_share": round(total("capped") / supervised, 4),
        "bytes": total("bytes"),
        "bytes_per_supervised_position": round(total("bytes") / supervised, 1),
    }


def _run_actors(
    settings: RunSettings,
    model_directory: Path,
    partial: Path,
    shards: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Record ``shards`` in an actor pool; yields what each finished file holds."""
    if not shards:
        return
    import ray

    resources = settings.resources
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    total = ray.cluster_resources()
    fitting = int(total.get("GPU", 0) // gpus) if gpus else int(total.get("CPU", 1) // cpus)
    least, most = resources.actors or (1, max(1, min(fitting, len(shards))))
    dataset = ray.data.from_items(list(shards), override_num_blocks=len(shards)).map_batches(
        Recorder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=max(least, most)),
        num_cpus=cpus,
        num_gpus=gpus or None,
        fn_constructor_kwargs={
            "model_directory": str(model_directory),
            "partial": str(partial),
            "tau": settings.recorded_tau(),
            "k_min": settings.record.k_min,
            "k_max": settings.record.k_max,
            "prompt_k_max": settings.record.prompt_k_max,
            "provenance": dict(provenance),
            "threads": cpus,
        },
    )
    for row in dataset.iter_rows():
        yield json.loads(row["part"])


class Recorder:
    """An actor of the pool: holds the base model and writes one file per shard."""

    def __init__(
        self,
        *,
        model_directory: str,
        partial: str,
        tau: float,
        k_min: int,
        k_max: int,
        prompt_k_max: int,
        provenance: dict[str, str],
        threads: int,
    ) -> None:
        import torch

        from lrmc_ray.models import head_of, load_model

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(Path(model_directory)).to(self._device)
        self._head = head_of(self._model)
        self._partial = Path(partial)
        self._tau, self._k_min, self._k_max = tau, k_min, k_max
        self._prompt_k_max = prompt_k_max
        self._provenance = {**provenance, "lrmc.tau": repr(tau)}

    def __call__(self, batch: Any) -> Any:
        """Record the shards of ``batch`` and describe the files that hold them."""
        import pyarrow as pa

        described = [self._record(shard) for shard in batch.to_pylist()]
        return pa.table({"part": [json.dumps(part) for part in described]})

    def _record(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        import pyarrow.parquet as pq

        from lrmc_ray.data.records import write_part

        start, stop = shard["start"], shard["stop"]
        groups = range(start // SORT_WINDOW, (stop - 1) // SORT_WINDOW + 1)
        table = pq.ParquetFile(self._partial / EXAMPLES).read_row_groups(groups)
        rows = table.slice(start - groups[0] * SORT_WINDOW, stop - start).to_pylist()
        samples = [sample for batch in batches(rows) for sample in self._forward(batch)]
        path = self._partial / str(shard["name"])
        write_part(path, samples, self._provenance)
        return _describe(path, pq.read_table(path))

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Candidate sets of one padded batch of examples."""
        import torch

        from lrmc_ray.method.microbatch import Sample
        from lrmc_ray.method.subsets import select_candidates
        from lrmc_ray.models import hidden_states, logits

        longest = max(len(row["input_ids"]) for row in rows)
        input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids_BT[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        samples = []
        with torch.inference_mode():
            hidden_BTD = hidden_states(self._model, input_ids_BT.to(self._device))
            for index, row in enumerate(rows):
                ids_T = torch.tensor(row["input_ids"], dtype=torch.int64)
                is_supervised_P = torch.tensor(row["is_target"][1:], dtype=torch.bool)
                positions_P = torch.arange(len(ids_T) - 1)
                if not self._prompt_k_max:
                    positions_P = positions_P[is_supervised_P]
                    is_supervised_P = is_supervised_P[is_supervised_P]
                k_max_P = torch.where(is_supervised_P, self._k_max, self._prompt_k_max)
                gold_P = ids_T[positions_P + 1]
                candidates = select_candidates(
                    logits(hidden_BTD[index, positions_P.to(self._device)], self._head),
                    gold_P.to(self._device),
                    tau=self._tau,
                    k_min=self._k_min,
                    k_max=k_max_P.to(self._device),
                ).to("cpu")
                samples.append(
                    Sample(row["sample_id"], ids_T, positions_P, is_supervised_P, candidates)
                )
        return samples


def batches(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Consecutive rows, as many as fit into ``BATCH_TOKENS`` once padded; at least one."""
    batch: list[Mapping[str, Any]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(row["input_ids"])
        batch.append(row)
    if batch:
        yield batch


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.record``."""
    from lrmc_ray.cli import add_run_arguments, settings_from

    parser = argparse.ArgumentParser(
        prog="python -m lrmc_ray.record",
        description="Stage 0: record the candidate tokens of every position of the training data.",
    )
    add_run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    settings = settings_from(arguments)
    training_files(settings)
    with ray_session(arguments.address, log=arguments.output / RAY_LOG, verbose=arguments.verbose):
        directory = record(settings, arguments.output)
    manifest = read_manifest(directory, made_by="python -m lrmc_ray.record")
    if arguments.json:
        print(json.dumps({"directory": str(directory), **manifest["summary"]}))
    else:
        for name, value in manifest["summary"].items():
            print(f"{name:>30}  {value}")
        print(f"The record is in {directory}. Next: python -m lrmc_ray.train {' '.join(argv)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
