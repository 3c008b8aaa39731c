"""What a record holds in figures: candidates, outside mass, bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.record.capped import capped_text

_PER_CANDIDATE = ("candidate_ids", "candidate_logprobs")
_PER_POSITION = ("positions", "is_supervised", "gold_ids", "candidate_offsets", "outside_mass")


def print_summary(summary: Mapping[str, Any], *, k_max: int | None = None) -> None:
    """The record in numbers, on stdout, what matters first.

    Args:
        summary: see :func:`summarize`.
        k_max: most candidates of a learned position, where it is known.
    """
    if "recorded_samples" in summary:
        print(
            f"Of {summary['recorded_samples']:,} samples, all that its search uses, there are "
            "candidates; the others have none."
        )
    left_out = [
        f"{summary[name]:,} {name}"
        for name in ("dropped", "truncated", "rejected")
        if summary.get(name)
    ]
    formats = [f"{count:,} rows of {name}" for name, count in summary.get("formats", {}).items()]
    print(
        f"{summary['samples']:,} samples ({', '.join([*formats, *left_out])}), "
        f"{summary['tokens']:,} tokens: {summary['supervised_positions']:,} are learned, "
        f"{summary['prompt_positions']:,} of the prompts recorded."
    )
    print(
        f"Candidates of a learned position: median {summary['k_median']}, mean "
        f"{summary['k_mean']}, 95 % have at most {summary['k_95']}. "
        f"{100 * summary['active_share']:.0f} % have one beside the right token, "
        f"{100 * summary['capped_share']:.1f} % are cut short by record.k_max."
    )
    print(
        f"{summary['bytes'] / 1e6:.1f} MB, {summary['bytes_per_supervised_position']:g} bytes a "
        "learned position."
    )
    if len(summary["domains"]) > 1:
        for domain, counts in summary["domains"].items():
            print(
                f"  {domain or '(no domain)'}: {counts['samples']:,} samples, "
                f"{counts['supervised_positions']:,} learned positions"
            )
    if k_max is not None and (warning := capped_text(summary["capped_share"], k_max)):
        print(f"Warning: {warning}")


def describe(path: Path, *, tokenizer_size: int) -> dict[str, Any]:
    """One finished file in a few numbers, however many tokens it holds.

    Args:
        path: the file; its checksums are verified.
        tokenizer_size: number of tokens of the tokenizer; the rows of the head behind them are
            padding that no text contains.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table, layout = file.read(), file.metadata
    tau = float(table.schema.metadata[b"lrmc.tau"])
    flat = {name: _flat(table, name) for name in (*_PER_CANDIDATE, *_PER_POSITION)}
    num_positions = _list_lengths(table, "positions")
    row_of_position = np.repeat(np.arange(table.num_rows), num_positions)
    is_supervised = flat["is_supervised"]
    first, sizes = _candidate_rows(flat["candidate_offsets"], num_positions)
    first += np.repeat(_starts(_list_lengths(table, "candidate_ids")), num_positions)
    mass = np.exp(flat["candidate_logprobs"][first].astype(float))
    # With a candidate beside gold, were the set as small as tau allows.
    is_active = (flat["candidate_ids"][first] != flat["gold_ids"]) | (mass < tau)
    histogram = np.bincount(sizes[is_supervised], minlength=1)
    used = histogram.nonzero()[0]
    supervised_of_row = np.bincount(row_of_position[is_supervised], minlength=table.num_rows)
    domains: dict[str, list[int]] = {}
    for domain, count in zip(table["domain"].to_pylist(), supervised_of_row, strict=True):
        seen = domains.setdefault(domain, [0, 0])
        seen[0] += 1
        seen[1] += int(count)
    return {
        "name": path.name,
        "rows": table.num_rows,
        "sha256": file_digest(path),
        "bytes": path.stat().st_size,
        "candidate_bytes": _column_bytes(layout, _PER_CANDIDATE),
        "position_bytes": _column_bytes(layout, _PER_POSITION),
        "supervised": int(is_supervised.sum()),
        "prompt": int((~is_supervised).sum()),
        "active": int(is_active[is_supervised].sum()),
        "capped": int((flat["outside_mass"][is_supervised] > 1 - tau + 1e-7).sum()),
        "supervised_candidates": int(sizes[is_supervised].sum()),
        "prompt_candidates": int(sizes[~is_supervised].sum()),
        "padding_candidates": int((flat["candidate_ids"] >= tokenizer_size).sum()),
        "k_values": used.tolist(),
        "k_counts": histogram[used].tolist(),
        "domains": domains,
    }


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """All entries of a list column, row after row."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].iterchunks()]
    return np.concatenate(parts)


def _list_lengths(table: pa.Table, name: str) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(table[name]).to_numpy()
    return lengths


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of the consecutive runs begins."""
    return np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])


def _candidate_rows(
    offsets: np.ndarray, num_positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Begin (within its sample) and size of every position's candidate set.

    Args:
        offsets: of all samples, each has one entry more than positions.
        num_positions: of each sample.
    """
    is_last = np.zeros(len(offsets), dtype=bool)
    is_last[_starts(num_positions + 1) + num_positions] = True
    sizes = np.diff(offsets, append=0)[~is_last]
    return offsets[~is_last].astype(np.int64), sizes


def _column_bytes(layout: Any, names: Sequence[str]) -> int:
    """Bytes on disk of the columns ``names``."""
    total = 0
    for group in range(layout.num_row_groups):
        for index in range(layout.num_columns):
            column = layout.row_group(group).column(index)
            if column.path_in_schema.split(".")[0] in names:
                total += column.total_compressed_size
    return total


class PartTotals:
    """What the files of a record hold together; the driver keeps no more of each than its name."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._domains: dict[str, list[int]] = {}

    def add(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Count what :func:`describe` says; returns what the manifest keeps."""
        for key, value in part.items():
            if isinstance(value, int):
                self._sums[key] += value
        self._sizes.update(dict(zip(part["k_values"], part["k_counts"], strict=True)))
        for name, counts in part["domains"].items():
            domain = self._domains.setdefault(name, [0, 0])
            domain[:] = [old + new for old, new in zip(domain, counts, strict=True)]
        return {key: part[key] for key in ("name", "rows", "sha256")}

    @property
    def sums(self) -> dict[str, Any]:
        """All files as if they were one."""
        return {
            **self._sums,
            "k_values": list(self._sizes),
            "k_counts": list(self._sizes.values()),
            "domains": self._domains,
        }


def summarize(plan: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record in numbers: positions, candidates per position, shares, bytes, domains.

    Bytes of the two kinds of positions are shares of their columns' bytes: of candidates by the
    number of candidates, of the rest by the number of positions.
    """

    def total(key: str) -> int:
        return sum(int(part[key]) for part in parts)

    histogram: Counter[int] = Counter()
    domains: dict[str, dict[str, int]] = {}
    for part in parts:
        histogram.update(dict(zip(part["k_values"], part["k_counts"], strict=True)))
        for name, (samples, positions) in part["domains"].items():
            domain = domains.setdefault(name, {"samples": 0, "supervised_positions": 0})
            domain["samples"] += samples
            domain["supervised_positions"] += positions
    supervised, prompt = total("supervised"), total("prompt")
    of_supervised, of_prompt = total("supervised_candidates"), total("prompt_candidates")
    supervised_bytes = _share(total("candidate_bytes"), of_supervised, of_prompt) + _share(
        total("position_bytes"), supervised, prompt
    )
    prompt_bytes = total("candidate_bytes") + total("position_bytes") - supervised_bytes

    def quantile(share: float) -> int:
        seen = 0
        for size in sorted(histogram):
            seen += histogram[size]
            if seen >= share * supervised:
                return size
        return 0

    return {
        "samples": plan["samples"],
        **({"recorded_samples": plan["recorded_samples"]} if "recorded_samples" in plan else {}),
        "tokens": plan["tokens"],
        "dropped": plan["dropped"],
        "truncated": plan["truncated"],
        "rejected": plan["rejected"],
        "split_conversations": plan["split_conversations"],
        "formats": plan["formats"],
        "supervised_positions": supervised,
        "prompt_positions": prompt,
        "k_mean": round(of_supervised / supervised, 2),
        "k_median": quantile(0.5),
        "k_95": quantile(0.95),
        "prompt_k_mean": round(of_prompt / max(1, prompt), 2),
        "active_share": round(total("active") / supervised, 4),
        "capped_share": round(total("capped") / supervised, 4),
        "padding_candidates": total("padding_candidates"),
        "bytes": total("bytes"),
        "supervised_bytes": supervised_bytes,
        "prompt_bytes": prompt_bytes,
        "bytes_per_supervised_position": round(supervised_bytes / supervised, 1),
        "domains": domains,
    }


def _share(amount: int, one: int, other: int) -> int:
    """What of ``amount`` falls to ``one`` of the two counts."""
    return round(amount * one / max(1, one + other))
