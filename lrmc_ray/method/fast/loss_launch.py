"""Starts the kernels of ``head_triton``, ``parts_triton``, ``tile_triton`` and ``tail_triton``.

Sizes of blocks, stages and warps follow from the hidden size and the types alone; nothing is tried
at run time. ``benchmarks/launch_plan.py`` says what each kernel takes of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.loss_plan import COLUMNS, TILE, LossPlan
from lrmc_ray.method.fast.triton_support import is_interpreted
from lrmc_ray.method.head import OutputHead

_TILE_BYTES = 2**14
"""Of the rows of candidates that a program reads at a time, while it waits for the next."""
ROWS_TILE = {"BLOCK_D": 128, "BLOCK_E": 16, "NUM_STAGES": 2, "num_warps": 4}
"""Of ``add_token_rows``: columns of the weight's gradient, and entries taken at a time."""
READY_TILE = {"BLOCK_D": 16, "BLOCK_K": 1024, "BLOCK_R": 1024, "NUM_STAGES": 1, "num_warps": 4}
"""Of ``candidate_loss`` where the logits are there already: it sees no hidden size."""
_TILE = 64
"""Positions, sampled tokens and columns of a tile of the tail's products."""


class SharedTail(NamedTuple):
    """The sampled tail as the kernels take it; equal tokens stand together."""

    ids_R: Tensor
    """int32, rising."""
    logweights_R: Tensor
    """float32, of all equal tokens together at the first of them, -inf at the others."""
    wide_logweights_R: Tensor
    """float64, the same before they are rounded."""
    places_V: Tensor
    """int32, the first place of each token of the vocabulary, -1 where it has none."""


@dataclass(frozen=True)
class LossTask:
    """What has no gradient."""

    head: OutputHead
    sets: CandidateSets
    tail: SharedTail | None
    is_anchor: bool

    @property
    def plan(self) -> LossPlan:
        """Of the sets, which are planned."""
        assert self.sets.plan is not None
        return self.sets.plan

    @property
    def shape(self) -> dict[str, Any]:
        """How products become logits, as the kernels' arguments."""
        softcap = self.head.softcap
        return {
            "logit_scale": float(self.head.logit_scale),
            "softcap": 1.0 if softcap is None else float(softcap),
            "HAS_CAP": softcap is not None,
            "HAS_BIAS": self.head.bias_V is not None,
        }


class WeightRows(NamedTuple):
    """What the gradients of head and bias are added to."""

    target_VD: Tensor | None
    bias_V: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments; what is not wanted has a stand-in that is not written to."""
        some = self.target_VD if self.target_VD is not None else self.bias_V
        assert some is not None
        return {
            "target": some if self.target_VD is None else self.target_VD,
            "bias_target": some if self.bias_V is None else self.bias_V,
            "target_stride": 0 if self.target_VD is None else self.target_VD.stride(0),
            "HAS_WEIGHT": self.target_VD is not None,
            "HAS_BIAS": self.bias_V is not None,
        }


def power_of_2(number: int) -> int:
    """The least power of 2 that is not below ``number``, at least 16."""
    return max(16, 1 << (number - 1).bit_length())


def blocks(number: int, size: int) -> int:
    """How many blocks of ``size`` hold ``number``."""
    return -(-number // size)


def candidate_tile(num_hidden: int, itemsize: int) -> dict[str, int]:
    """Sizes of ``candidate_loss`` for a hidden size and the bytes of a weight."""
    block = power_of_2(num_hidden)
    entries = min(64, max(1, _TILE_BYTES // (block * itemsize)))
    return {
        "BLOCK_D": block,
        "BLOCK_K": entries,
        "BLOCK_R": 1024,
        "NUM_STAGES": 3 if block * itemsize <= _TILE_BYTES else 2,
        "num_warps": 4 if block <= 2048 else 8,
    }


def part_tile(num_hidden: int, itemsize: int) -> dict[str, int]:
    """Sizes of the kernels of parts: those of ``candidate_loss``, whose rows they gather."""
    return {k: v for k, v in candidate_tile(num_hidden, itemsize).items() if k != "BLOCK_R"}


def candidate_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    task: LossTask,
    tail_NR: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], and what ``head_triton.candidate_loss`` leaves: derivatives [E] and [N, D]."""
    plan = task.plan
    rows, columns = hidden_ND.shape
    loss_N = hidden_ND.new_empty(rows, dtype=torch.float32)
    dlogits_E = hidden_ND.new_empty(len(task.sets.token_ids), dtype=torch.float32)
    dhidden_ND = hidden_ND.new_empty(
        hidden_ND.shape if wants_gradient else (0, columns), dtype=torch.float32
    )
    found = loss_N, dlogits_E, dhidden_ND
    inputs = hidden_ND, weight_VD, bias_V, task
    if plan.num_apart:
        _apart_products(*inputs, dlogits_E)
        _losses(*inputs, tail_NR, wants_gradient, plan.rows_N[: plan.num_apart], False, found)
        if wants_gradient:
            _apart_gradients(weight_VD, task, dlogits_E, dhidden_ND)
    if rows > plan.num_apart:
        _losses(*inputs, tail_NR, wants_gradient, plan.rows_N[plan.num_apart :], True, found)
    return found


def _losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    task: LossTask,
    tail_NR: Tensor | None,
    wants_gradient: bool,
    rows_n: Tensor,
    gathers: bool,
    found: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The losses of some positions; with ``gathers`` logits and gradients as well."""
    from lrmc_ray.method.fast import head_triton

    sets, tail = task.sets, task.tail
    loss_N, dlogits_E, dhidden_ND = found
    num_hidden = hidden_ND.shape[1]
    tile = candidate_tile(num_hidden, weight_VD.element_size()) if gathers else READY_TILE
    head_triton.candidate_loss[(len(rows_n),)](
        hidden_ND,
        weight_VD,
        hidden_ND if bias_V is None else bias_V,
        sets.offsets,
        sets.token_ids,
        sets.gold_ids,
        sets.logprobs,
        rows_n,
        task.plan.outside_N,
        loss_N if tail_NR is None else tail_NR,
        loss_N if tail is None else tail.logweights_R,
        sets.token_ids if tail is None else tail.places_V,
        loss_N,
        dlogits_E,
        dhidden_ND,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        num_hidden,
        0 if tail is None else len(tail.ids_R),
        IS_ANCHOR=task.is_anchor,
        HAS_TAIL=tail is not None,
        WANTS_GRADIENT=wants_gradient,
        GATHERS=gathers,
        **task.shape,
        **tile,
    )


def _apart_products(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    task: LossTask,
    dlogits_E: Tensor,
) -> None:
    """Logits of the positions in parts and in tiles."""
    from lrmc_ray.method.fast import parts_triton, tile_triton

    parts, tiles = task.plan.parts, task.plan.tiles
    columns = hidden_ND.shape[1]
    inputs = hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V
    strides = hidden_ND.stride(0), weight_VD.stride(0), columns
    if len(parts.parts_P3):
        parts_triton.part_products[(len(parts.parts_P3),)](
            *inputs,
            parts.parts_P3,
            task.sets.token_ids,
            dlogits_E,
            *strides,
            **task.shape,
            **part_tile(columns, weight_VD.element_size()),
        )
    if len(tiles.blocks_B2):
        tile_triton.tile_products[(len(tiles.blocks_B2),)](
            *inputs,
            tiles.rows_S,
            tiles.bounds_t,
            tiles.entries_U,
            tiles.places_UT,
            tiles.blocks_B2,
            task.sets.token_ids,
            dlogits_E,
            *strides,
            **task.shape,
            **dense_tile(hidden_ND.dtype, weight_VD.dtype),
        )


def _apart_gradients(
    weight_VD: Tensor, task: LossTask, dlogits_E: Tensor, dhidden_ND: Tensor
) -> None:
    """Gradients of the hidden states of the positions in parts and in tiles."""
    from lrmc_ray.method.fast import parts_triton, tile_triton

    parts, tiles = task.plan.parts, task.plan.tiles
    columns, token_ids = dhidden_ND.shape[1], task.sets.token_ids
    num_parts, num_tiles = len(parts.parts_P3), len(tiles.rows_S) // TILE
    if num_parts:
        partial_PD = dhidden_ND.new_empty((num_parts, columns))
        parts_triton.part_gradients[(num_parts,)](
            weight_VD,
            parts.parts_P3,
            token_ids,
            dlogits_E,
            partial_PD,
            weight_VD.stride(0),
            columns,
            **part_tile(columns, weight_VD.element_size()),
        )
        stretch = ROWS_TILE["BLOCK_D"]
        parts_triton.add_parts[(len(parts.rows_L), blocks(columns, stretch))](
            partial_PD,
            parts.rows_L,
            parts.bounds_L,
            dhidden_ND,
            columns,
            BLOCK_D=stretch,
            num_warps=ROWS_TILE["num_warps"],
        )
    if num_tiles:
        tile = dense_tile(weight_VD.dtype, is_gradient=True)
        tile_triton.tile_gradients[(num_tiles, blocks(columns, tile["BLOCK_D"]))](
            weight_VD,
            tiles.rows_S,
            tiles.bounds_t,
            tiles.entries_U,
            tiles.places_UT,
            token_ids,
            dlogits_E,
            dhidden_ND,
            weight_VD.stride(0),
            columns,
            **tile,
        )


def dense_tile(*types: torch.dtype, is_gradient: bool = False) -> dict[str, Any]:
    """Sizes of the kernels of dense tiles, whose factors are of ``types``."""
    tile = tail_tile(*types, is_gradient=is_gradient)
    del tile["BLOCK_N"], tile["BLOCK_R"]
    return {**tile, "TILE": TILE, "BLOCK_U": COLUMNS}


def tail_products(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, task: LossTask
) -> Tensor:
    """Logits [N, R] of the sampled tail."""
    from lrmc_ray.method.fast import tail_triton

    assert task.tail is not None
    ids_R = task.tail.ids_R
    tail_NR = hidden_ND.new_empty((len(hidden_ND), len(ids_R)), dtype=torch.float32)
    if tail_NR.numel():
        tail_triton.tail_products[(blocks(len(hidden_ND), _TILE), blocks(len(ids_R), _TILE))](
            hidden_ND,
            weight_VD,
            hidden_ND if bias_V is None else bias_V,
            ids_R,
            tail_NR,
            len(hidden_ND),
            len(ids_R),
            hidden_ND.shape[1],
            hidden_ND.stride(0),
            weight_VD.stride(0),
            **task.shape,
            **tail_tile(hidden_ND.dtype, weight_VD.dtype),
        )
    return tail_NR


def tail_tile(*types: torch.dtype, is_gradient: bool = False) -> dict[str, Any]:
    """Sizes of a kernel of the tail, whose factors are of ``types``."""
    halves = (torch.bfloat16,) if is_gradient else (torch.bfloat16, torch.float16)
    is_wide = is_interpreted() or len(set(types)) > 1 or types[0] not in halves
    # float32 factors take twice the room, and are multiplied without tensor cores.
    size = _TILE // 2 if is_wide and not is_interpreted() else _TILE
    return {"BLOCK_N": _TILE, "BLOCK_R": _TILE, "BLOCK_D": size, "WIDE": is_wide, "num_warps": 4}


def add_tail_to_hidden(
    tail_NR: Tensor, weight_VD: Tensor, task: LossTask, dhidden_ND: Tensor
) -> None:
    """Add the tail's part to the gradients of the hidden states."""
    from lrmc_ray.method.fast import tail_triton

    assert task.tail is not None
    tile = tail_tile(weight_VD.dtype, is_gradient=True)
    rows, columns = dhidden_ND.shape
    if tail_NR.numel():
        tail_triton.add_tail_to_hidden[(blocks(rows, _TILE), blocks(columns, tile["BLOCK_D"]))](
            tail_NR,
            weight_VD,
            task.tail.ids_R,
            dhidden_ND,
            rows,
            tail_NR.shape[1],
            columns,
            weight_VD.stride(0),
            **tile,
        )


def add_candidates_to_weight(
    hidden_ND: Tensor, dlogits_E: Tensor, upstream_N: Tensor, task: LossTask, rows: WeightRows
) -> None:
    """Add the candidates' part to the gradients of head and bias."""
    from lrmc_ray.method.fast import head_triton

    plan, columns = task.plan, hidden_ND.shape[1]
    partial_XD = hidden_ND.new_empty((plan.num_partial, columns), dtype=torch.float32)
    partial_X = hidden_ND.new_empty(plan.num_partial, dtype=torch.float32)
    stretches = blocks(columns, ROWS_TILE["BLOCK_D"])
    if len(plan.partial_X):
        head_triton.add_token_rows[(len(plan.partial_X), stretches)](
            hidden_ND,
            dlogits_E,
            upstream_N,
            plan.by_token.entries_E,
            plan.by_token.positions_E,
            plan.bounds_X,
            plan.partial_X,
            task.sets.token_ids,
            partial=partial_XD,
            partial_bias=partial_X,
            hidden_stride=hidden_ND.stride(0),
            upstream_stride=upstream_N.stride(0),
            num_hidden=columns,
            **ROWS_TILE,
            **rows.arguments(),
        )
    if len(plan.split_entries):
        head_triton.add_partial_rows[(len(plan.split_entries), stretches)](
            partial_XD,
            partial_X,
            plan.split_bounds,
            plan.split_entries,
            task.sets.token_ids,
            num_hidden=columns,
            BLOCK_D=ROWS_TILE["BLOCK_D"],
            num_warps=ROWS_TILE["num_warps"],
            **rows.arguments(),
        )


def add_tail_to_weight(
    hidden_ND: Tensor, tail_NR: Tensor, upstream_N: Tensor, task: LossTask, rows: WeightRows
) -> None:
    """Add the tail's part to the gradients of head and bias."""
    from lrmc_ray.method.fast import tail_triton

    assert task.tail is not None
    tile = tail_tile(hidden_ND.dtype, is_gradient=True)
    count, columns = hidden_ND.shape
    if tail_NR.numel():
        samples = tail_NR.shape[1]
        tail_triton.add_tail_to_weight[(blocks(samples, _TILE), blocks(columns, tile["BLOCK_D"]))](
            tail_NR,
            hidden_ND,
            upstream_N,
            task.tail.ids_R,
            num_rows=count,
            num_tail=samples,
            num_hidden=columns,
            hidden_stride=hidden_ND.stride(0),
            upstream_stride=upstream_N.stride(0),
            **rows.arguments(),
            **tile,
        )
