"""What one recording actor does, and what a record is in numbers. No Ray here."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.artifacts import file_digest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

    from lrmc_ray.method.microbatch import Sample
    from lrmc_ray.method.subsets import CandidateSets

BATCH_TOKENS = 2048
"""Tokens of one forward pass, were they padded."""
LOGITS_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""

_PER_CANDIDATE = ("candidate_ids", "candidate_logprobs")
_PER_POSITION = ("positions", "is_supervised", "gold_ids", "candidate_offsets", "outside_mass")


class CandidateRecorder:
    """The base model, and what of its distribution is kept at every position.

    Args:
        model_directory: the base model.
        tau: probability that the candidates of a position reach.
        k_min: fewest candidates.
        k_max: most candidates of a supervised position.
        prompt_k_max: most candidates of a prompt position; 0 records none.
        threads: torch threads of this process.
    """

    def __init__(
        self,
        model_directory: Path,
        *,
        tau: float,
        k_min: int,
        k_max: int,
        prompt_k_max: int,
        threads: int,
    ) -> None:
        import torch

        from lrmc_ray.models import attention_cost, head_of, load_model

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(model_directory).to(self._device)
        self._head = head_of(self._model)
        self._attention_cost = attention_cost(self._model)
        self._tau, self._k_min, self._k_max = tau, k_min, k_max
        self._prompt_k_max = prompt_k_max

    def record(self, rows: Sequence[Mapping[str, Any]]) -> "list[Sample]":
        """Every row (``sample_id``, ``domain``, ``input_ids``, ``is_target``) with its sets."""
        return [sample for batch in batches(rows) for sample in self._forward(batch)]

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> "list[Sample]":
        """Candidate sets of one batch.

        A prefix that rows share is computed once (see method/microbatch.py), and so are the
        candidates of its positions: a set depends on the prefix, the gold token and the cap alone.
        """
        import torch

        from lrmc_ray.method.microbatch import Sample, lay_out
        from lrmc_ray.models import batch_hidden_states

        ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        positions, supervised, wanted = [], [], []
        with torch.inference_mode():
            layout = lay_out(ids, self._attention_cost)
            hidden_BTD = batch_hidden_states(self._model, layout.to(self._device))
            hidden_XD = hidden_BTD.flatten(0, 1)
            for row, ids_T, line, columns_T in zip(
                rows, ids, layout.rows, layout.columns, strict=True
            ):
                is_supervised_P = torch.tensor(row["is_target"][1:], dtype=torch.bool)
                positions_P = torch.arange(len(ids_T) - 1)
                if not self._prompt_k_max:
                    positions_P = positions_P[is_supervised_P]
                    is_supervised_P = is_supervised_P[is_supervised_P]
                positions.append(positions_P)
                supervised.append(is_supervised_P)
                place_P = line * hidden_BTD.shape[1] + columns_T[positions_P]
                k_max_P = torch.where(is_supervised_P, self._k_max, self._prompt_k_max)
                wanted.append(torch.stack([place_P, ids_T[positions_P + 1], k_max_P]))
            wanted_3N, row_of_P = torch.unique(torch.cat(wanted, dim=1), dim=1, return_inverse=True)
            candidates_N = self._select(hidden_XD, *wanted_3N)
        ends = torch.tensor([len(positions_P) for positions_P in positions]).cumsum(0).tolist()
        return [
            Sample(
                sample_id=row["sample_id"],
                input_ids_T=ids_T,
                positions_P=positions_P,
                is_supervised_P=is_supervised_P,
                candidates=candidates_N.rows(row_of_P[end - len(positions_P) : end]),
                domain=row["domain"],
            )
            for row, ids_T, positions_P, is_supervised_P, end in zip(
                rows, ids, positions, supervised, ends, strict=True
            )
        ]

    def _select(
        self, hidden_XD: "Tensor", place_N: "Tensor", gold_N: "Tensor", k_max_N: "Tensor"
    ) -> "CandidateSets":
        """Candidate sets at the places ``place_N`` of ``hidden_XD``, on the CPU."""
        import torch

        from lrmc_ray.method.subsets import CandidateSets, select_candidates
        from lrmc_ray.models import logits

        size = max(1, LOGITS_ELEMENTS // self._head.weight_VD.shape[0])
        return CandidateSets.concatenate(
            [
                select_candidates(
                    logits(hidden_XD[place_n.to(self._device)], self._head),
                    gold_n.to(self._device),
                    tau=self._tau,
                    k_min=self._k_min,
                    k_max=k_max_n.to(self._device),
                ).to("cpu")
                for place_n, gold_n, k_max_n in zip(
                    *(torch.split(of_N, size) for of_N in (place_N, gold_N, k_max_N)), strict=True
                )
            ]
        )


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


def describe(path: Path, *, tokenizer_size: int) -> dict[str, Any]:
    """One finished file in a few numbers, however many tokens it holds.

    Args:
        path: the file; its checksums are verified.
        tokenizer_size: number of tokens of the tokenizer; the rows of the head behind them are
            padding that no text contains.
    """
    import numpy as np
    import pyarrow.parquet as pq

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


def _flat(table: "pa.Table", name: str) -> "np.ndarray":
    """All entries of a list column, row after row."""
    import numpy as np

    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].iterchunks()]
    return np.concatenate(parts)


def _list_lengths(table: "pa.Table", name: str) -> "np.ndarray":
    import pyarrow.compute as pc

    lengths: np.ndarray = pc.list_value_length(table[name]).to_numpy()
    return lengths


def _starts(lengths: "np.ndarray") -> "np.ndarray":
    """Where each of the consecutive runs begins."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])


def _candidate_rows(
    offsets: "np.ndarray", num_positions: "np.ndarray"
) -> "tuple[np.ndarray, np.ndarray]":
    """Begin (within its sample) and size of every position's candidate set.

    Args:
        offsets: of all samples, each has one entry more than positions.
        num_positions: of each sample.
    """
    import numpy as np

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
        "tokens": plan["tokens"],
        "dropped": plan["dropped"],
        "truncated": plan["truncated"],
        "rejected": plan["rejected"],
        "endless_answers": plan["endless_answers"],
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
