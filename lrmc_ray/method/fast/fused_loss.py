"""The losses on the candidates by the kernels of ``head_triton`` and ``tail_triton``.

Loss and gradient of the hidden states come from one launch; backward makes the weight's gradient
in another, or in two where a token has many entries. The plain counterpart is ``restricted_loss``
with ``candidate_logits``; where the weight's gradient goes is said there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.candidate_logits import gradient_target
from lrmc_ray.method.fast.loss_plan import LossPlan
from lrmc_ray.method.fast.triton_support import (
    at_device_of,
    is_installed,
    is_interpreted,
    works_on_gpu,
)
from lrmc_ray.method.head import OutputHead

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HIDDEN = 2**14
"""Of a hidden state that one program holds in its registers."""
_TILE_BYTES = 2**14
"""Of the rows of candidates that a program reads at a time, while it waits for the next."""
ROWS_TILE = {"BLOCK_D": 128, "BLOCK_E": 16, "NUM_STAGES": 2, "num_warps": 4}
"""Of ``add_token_rows``: columns of the weight's gradient, and entries taken at a time."""
_TILE = 64
"""Positions, sampled tokens and columns of a tile of the tail's products."""


def refusal(hidden_ND: Tensor, head: OutputHead) -> str | None:
    """Why the kernels cannot take these, as the end of a sentence; None where they can."""
    weight_VD, bias_V = head.weight_VD, head.bias_V
    tensors = [hidden_ND, weight_VD, *([] if bias_V is None else [bias_V])]
    if not is_installed():
        return "the package triton is not installed"
    if hidden_ND.device.type != "cuda" and not is_interpreted():
        return f"the hidden states are on {hidden_ND.device.type}"
    if hidden_ND.is_cuda and not is_interpreted() and not works_on_gpu():
        return "Triton cannot compile here, see the log"
    if wrong := [tensor.dtype for tensor in tensors if tensor.dtype not in _TYPES]:
        return f"an input is {wrong[0]}"
    if weight_VD.stride(1) != 1:
        return "the rows of the weight are not contiguous"
    if hidden_ND.shape[1] > WIDEST_HIDDEN:
        return f"the hidden size is {hidden_ND.shape[1]}"
    return None


class SharedTail(NamedTuple):
    """The sampled tail as the kernels take it; equal tokens stand together."""

    ids_R: Tensor
    """int32, rising."""
    logweights_R: Tensor
    """float32, of all equal tokens together at the first of them, -inf at the others."""
    places_V: Tensor
    """int32, the first place of each token of the vocabulary, -1 where it has none."""


def share_tail(ids_R: Tensor, logweights_R: Tensor, num_rows: int) -> SharedTail:
    """The tail for a weight of ``num_rows`` rows. Waits for no device."""
    ids_R, order = ids_R.sort(stable=True)
    first_R = torch.searchsorted(ids_R, ids_R)
    last_R = torch.searchsorted(ids_R, ids_R, right=True) - 1
    weights_R = logweights_R[order].double().exp()
    until_R = weights_R.cumsum(0)
    # A token drawn once keeps its own weight: no difference of sums can be as exact.
    together_R = until_R[last_R] - until_R[first_R] + weights_R[first_R]
    merged_R = torch.where(first_R == last_R, weights_R, together_R).log()
    is_first_R = first_R == torch.arange(len(ids_R), device=ids_R.device)
    places_V = torch.full((num_rows,), -1, dtype=torch.int32, device=ids_R.device)
    places_V[ids_R] = first_R.int()
    merged_R = merged_R.masked_fill(~is_first_R, -torch.inf)
    return SharedTail(ids_R.int(), merged_R.float(), places_V)


def fused_loss(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    *,
    tail: SharedTail | None = None,
    is_anchor: bool = False,
) -> Tensor:
    """The restricted loss of every position, or with ``is_anchor`` its KL(base || model).

    A position without candidates, which ``CandidateSets.check`` refuses, has loss 0.

    Args:
        hidden_ND: Last hidden states.
        head: The output head.
        candidates: N candidate sets on the same device, planned for speed.
        tail: The sampled tail.
        is_anchor: See ``restricted_loss.anchor_kl``.

    Returns:
        [N] float32, in nats.

    Raises:
        ValueError: The kernels cannot take these.
    """
    reason = refusal(hidden_ND, head)
    if reason is not None:
        raise ValueError(
            "the backend kernel needs Triton, a GPU, and contiguous rows of float32, bfloat16 or "
            f"float16 of at most {WIDEST_HIDDEN} elements, but {reason}; take backend='auto'"
        )
    loss_N: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, head.bias_V, _Task(head, candidates.planned(), tail, is_anchor)
    )
    return loss_N


@dataclass(frozen=True)
class _Task:
    """What has no gradient."""

    head: OutputHead
    sets: CandidateSets
    tail: SharedTail | None
    is_anchor: bool

    @property
    def plan(self) -> LossPlan:
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


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, task: _Task
    ) -> Tensor:
        hidden_ND = hidden_ND.contiguous()
        # The leaf itself, beside the saved tensor: checkpointing may unpack a copy of that.
        ctx.weight_VD, ctx.task = weight_VD, task
        wants_gradient = any(ctx.needs_input_grad)
        with at_device_of(hidden_ND):
            tail_NR = None
            if task.tail is not None:
                tail_NR = _tail_products(hidden_ND, weight_VD, bias_V, task)
            loss_N, dlogits_E, dhidden_ND = _candidate_loss(
                hidden_ND, weight_VD, bias_V, task, tail_NR, wants_gradient
            )
            if ctx.needs_input_grad[0] and tail_NR is not None:
                _add_tail_to_hidden(tail_NR, weight_VD, task, dhidden_ND)
        ctx.save_for_backward(hidden_ND, bias_V, dlogits_E, dhidden_ND, tail_NR)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, bias_V, dlogits_E, dhidden_ND, tail_NR = ctx.saved_tensors
        gradient_ND = gradient_VD = gradient_V = target_VD = None
        if ctx.needs_input_grad[0]:
            gradient_ND = (dhidden_ND * upstream_N[:, None]).to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            target_VD, gradient_VD = gradient_target(ctx.weight_VD)
        if ctx.needs_input_grad[2]:
            gradient_V = torch.zeros_like(bias_V, dtype=torch.float32)
        if target_VD is not None or gradient_V is not None:
            # A kernel adds to rows that are contiguous; any other ``grad`` gets them by torch.
            apart_VD = None
            if target_VD is not None and target_VD.stride(1) != 1:
                apart_VD = torch.zeros_like(target_VD, memory_format=torch.contiguous_format)
            rows = _Rows(target_VD if apart_VD is None else apart_VD, gradient_V)
            with at_device_of(hidden_ND):
                _add_candidates_to_weight(hidden_ND, dlogits_E, upstream_N, ctx.task, rows)
                if tail_NR is not None:
                    _add_tail_to_weight(hidden_ND, tail_NR, upstream_N, ctx.task, rows)
            if target_VD is not None and apart_VD is not None:
                target_VD.add_(apart_VD)
            if gradient_V is not None:
                gradient_V = gradient_V.to(bias_V.dtype)
        return gradient_ND, gradient_VD, gradient_V, None


class _Rows(NamedTuple):
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


def _candidate_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    task: _Task,
    tail_NR: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from lrmc_ray.method.fast import head_triton

    sets, plan, tail = task.sets, task.plan, task.tail
    rows, columns = hidden_ND.shape
    loss_N = hidden_ND.new_empty(rows, dtype=torch.float32)
    dlogits_E = hidden_ND.new_empty(len(sets.token_ids), dtype=torch.float32)
    dhidden_ND = hidden_ND.new_empty(
        hidden_ND.shape if wants_gradient else (0, columns), dtype=torch.float32
    )
    if rows:
        head_triton.candidate_loss[(rows,)](
            hidden_ND,
            weight_VD,
            hidden_ND if bias_V is None else bias_V,
            sets.offsets,
            sets.token_ids,
            sets.gold_ids,
            sets.logprobs,
            plan.rows_N,
            plan.outside_N,
            loss_N if tail_NR is None else tail_NR,
            loss_N if tail is None else tail.logweights_R,
            sets.token_ids if tail is None else tail.places_V,
            loss_N,
            dlogits_E,
            dhidden_ND,
            hidden_ND.stride(0),
            weight_VD.stride(0),
            columns,
            0 if tail is None else len(tail.ids_R),
            IS_ANCHOR=task.is_anchor,
            HAS_TAIL=tail is not None,
            WANTS_GRADIENT=wants_gradient,
            **task.shape,
            **candidate_tile(columns, weight_VD.element_size()),
        )
    return loss_N, dlogits_E, dhidden_ND


def _tail_products(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, task: _Task
) -> Tensor:
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


def _add_tail_to_hidden(
    tail_NR: Tensor, weight_VD: Tensor, task: _Task, dhidden_ND: Tensor
) -> None:
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


def _add_candidates_to_weight(
    hidden_ND: Tensor, dlogits_E: Tensor, upstream_N: Tensor, task: _Task, rows: _Rows
) -> None:
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
            plan.entries_E,
            plan.positions_E,
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


def _add_tail_to_weight(
    hidden_ND: Tensor, tail_NR: Tensor, upstream_N: Tensor, task: _Task, rows: _Rows
) -> None:
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
