"""The base model's forward pass, and the candidates that are kept of every position. No Ray here.

Shape suffixes: those of :mod:`lrmc_ray.method`; X = places of a batch, B * T of them; N = places
whose candidates are wanted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lrmc_ray.errors import DataError
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.microbatch import NO_CANDIDATES, Sample
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.models.loading import load_model
from lrmc_ray.models.packing import attention_cost
from lrmc_ray.record.spread import LOGITS_ELEMENTS, Device, spread

BATCH_TOKENS = 2048
"""Tokens of one forward pass, were they padded."""


class CandidateRecorder:
    """The base model, and what of its distribution is kept at every position.

    Args:
        model_directory: the base model.
        tau: probability that the candidates of a position reach.
        k_min: fewest candidates.
        k_max: most candidates of a supervised position.
        prompt_k_max: most candidates of a prompt position; 0 records none.
        precision: of the weights.
        devices: that the model is on; several share its layers.
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
        precision: Literal["fp32", "bf16"] = "fp32",
        devices: Sequence[Device] | None = None,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        devices = own_devices() if devices is None else devices
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if len(devices) == 1:
            self._model = load_model(model_directory, dtype=dtype).to(devices[0])
        else:
            device_map = spread(model_directory, devices, precision).device_map
            self._model = load_model(model_directory, dtype=dtype, device_map=device_map)
        self._device = torch.device(devices[0])
        self._head = _in_float32(head_of(self._model))
        self._attention_cost = attention_cost(self._model)
        self._pack_up_to = longest_packed(self._model.config)
        self._tau, self._k_min, self._k_max = tau, k_min, k_max
        self._prompt_k_max = prompt_k_max

    def record(
        self, rows: Sequence[Mapping[str, Any]], only: Sequence[int] | None = None
    ) -> list[Sample]:
        """Every row (``sample_id``, ``domain``, ``input_ids``, ``is_target``) with its sets.

        Args:
            rows: the rows.
            only: places of those that the model sees; others have no positions. None for all.
        """
        seen = rows if only is None else [rows[place] for place in only]
        samples = [sample for batch in batches(seen) for sample in self._forward(batch)]
        if only is None:
            return samples
        at = dict(zip(only, samples, strict=True))
        return [
            at[place] if place in at else _without_positions(row) for place, row in enumerate(rows)
        ]

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Candidate sets of one batch.

        A prefix that rows share is computed once (see method/fast/packing.py), and so are the
        candidates of its positions: a set depends on the prefix, the gold token and the cap alone.
        """
        ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        positions, supervised, wanted = [], [], []
        with torch.inference_mode():
            layout = lay_out(ids, self._attention_cost, self._pack_up_to)
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
        self, hidden_XD: Tensor, place_N: Tensor, gold_N: Tensor, k_max_N: Tensor
    ) -> CandidateSets:
        """Candidate sets at the places ``place_N`` of ``hidden_XD``, on the CPU."""
        device = self._head.weight_VD.device
        size = max(1, LOGITS_ELEMENTS // self._head.weight_VD.shape[0])
        return CandidateSets.concatenate(
            [
                select_candidates(
                    head_logits(hidden_XD[place_n.to(hidden_XD.device)].to(device), self._head),
                    gold_n.to(device),
                    tau=self._tau,
                    k_min=self._k_min,
                    k_max=k_max_n.to(device),
                ).to("cpu")
                for place_n, gold_n, k_max_n in zip(
                    *(torch.split(of_N, size) for of_N in (place_N, gold_N, k_max_N)), strict=True
                )
            ]
        )


def own_devices(number: int = 1) -> list[Device]:
    """The ``number`` devices of this process; the processor if it has no GPU.

    Raises:
        DataError: several are asked for, and torch sees fewer.
    """
    if number > 1 and torch.cuda.device_count() < number:
        raise DataError(
            f"an actor of {number} GPUs must see them all, torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}; install torch for the driver of this node, or lower "
            "resources.gpus_per_actor"
        )
    return list(range(number)) if torch.cuda.is_available() else ["cpu"]


def _in_float32(head: OutputHead) -> OutputHead:
    """The same head, made float32 once: products with a bf16 weight would be rounded to 8 bits."""
    bias_V = None if head.bias_V is None else head.bias_V.float()
    return replace(head, weight_VD=head.weight_VD.float(), bias_V=bias_V)


def _without_positions(row: Mapping[str, Any]) -> Sample:
    """The tokens of a row, and no candidates."""
    none = torch.zeros(0, dtype=torch.int64)
    return Sample(
        sample_id=row["sample_id"],
        input_ids_T=torch.tensor(row["input_ids"], dtype=torch.int64),
        positions_P=none,
        is_supervised_P=none.bool(),
        candidates=NO_CANDIDATES,
        domain=row["domain"],
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
