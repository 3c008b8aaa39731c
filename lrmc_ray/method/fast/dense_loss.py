"""The losses on the candidates from all logits, by kernels: no more to do than cross-entropy has.

Torch's matrix products make all [N, V] products of hidden states and weight, and both gradients.
Between them stand two kernels of ``dense_triton``: the losses of the positions, and the derivatives
of all products. Sampled tokens are read from the same products.

Beside all logits and ``F.cross_entropy``, forward and backward, this takes fewer launches and moves
fewer bytes, whatever the sizes; ``benchmarks/README.md`` counts both. What is rounded is said in
``dense_product``: factors stay in their type, products and losses are float32, derivatives are
rounded once to the factors' type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.dense_product import factor_type, wide_product
from lrmc_ray.method.fast.fused_loss import checked_task
from lrmc_ray.method.fast.loss_launch import LossTask, SharedTail
from lrmc_ray.method.fast.triton_support import at_device_of
from lrmc_ray.method.fast.weight_gradient import accumulates
from lrmc_ray.method.head import OutputHead

TILE = {"BLOCK": 1024, "num_warps": 4}
"""Tokens that a program takes at a time."""


def dense_loss(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    *,
    tail: SharedTail | None = None,
    is_anchor: bool = False,
) -> Tensor:
    """``fused_loss.fused_loss`` in this way; arguments, result and errors as there."""
    task = checked_task(hidden_ND, head, candidates, tail, is_anchor=is_anchor, gathers=False)
    loss_N: Tensor = _DenseLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, task.head.bias_V, task
    )
    return loss_N


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, task: LossTask
    ) -> Tensor:
        hidden_ND = hidden_ND.contiguous()
        # The leaf itself, beside the saved tensor: checkpointing may unpack a copy of that.
        ctx.weight_VD, ctx.task = weight_VD, task
        kind = factor_type(hidden_ND.dtype, weight_VD.dtype)
        logits_NV = wide_product(hidden_ND.to(kind), weight_VD.to(kind).T)
        loss_N, state_N4 = _losses(logits_NV, bias_V, task)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, logits_NV, state_N4)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, logits_NV, state_N4 = ctx.saved_tensors
        kind = factor_type(hidden_ND.dtype, weight_VD.dtype)
        hidden_ND = hidden_ND.to(kind)
        dlogits_NV, scaled_ND, rest_N = _derivatives(
            logits_NV, bias_V, ctx.task, state_N4, upstream_N, hidden_ND
        )
        gradient_ND = gradient_VD = gradient_V = None
        if ctx.needs_input_grad[0]:
            gradient_ND = _hidden_gradient(dlogits_NV, weight_VD.to(kind), rest_N)
            gradient_ND = gradient_ND.to(ctx.saved_tensors[0].dtype)
        if ctx.needs_input_grad[1]:
            gradient_VD = _weight_gradient(dlogits_NV, scaled_ND, ctx.weight_VD)
        if bias_V is not None and ctx.needs_input_grad[2]:
            if rest_N is not None:
                dlogits_NV = dlogits_NV * rest_N[:, None]
            gradient_V = dlogits_NV.sum(0, dtype=bias_V.dtype)
        return gradient_ND, gradient_VD, gradient_V, None


def _losses(logits_NV: Tensor, bias_V: Tensor | None, task: LossTask) -> tuple[Tensor, Tensor]:
    from lrmc_ray.method.fast import dense_triton

    loss_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    state_N4 = logits_NV.new_empty((len(logits_NV), 4), dtype=torch.float32)
    if len(loss_N):
        with at_device_of(logits_NV):
            dense_triton.row_losses[(len(loss_N),)](
                **_inputs(logits_NV, bias_V, task), loss=loss_N, state=state_N4
            )
    return loss_N, state_N4


def _derivatives(
    logits_NV: Tensor,
    bias_V: Tensor | None,
    task: LossTask,
    state_N4: Tensor,
    upstream_N: Tensor,
    hidden_ND: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives [N, V] as ``hidden_ND``, the hidden states to multiply, and what is left out."""
    from lrmc_ray.method.fast import dense_triton

    dlogits_NV = torch.empty_like(logits_NV, dtype=hidden_ND.dtype)
    divides = hidden_ND.dtype == torch.float16
    scaled_ND, rest_N = hidden_ND, None
    if divides:
        scaled_ND, rest_N = torch.empty_like(hidden_ND), torch.empty_like(state_N4[:, 0])
    if len(dlogits_NV):
        with at_device_of(logits_NV):
            dense_triton.row_derivatives[(len(dlogits_NV),)](
                **_inputs(logits_NV, bias_V, task),
                state=state_N4,
                upstream=upstream_N,
                hidden=hidden_ND,
                dlogits=dlogits_NV,
                scaled=scaled_ND,
                rests=state_N4 if rest_N is None else rest_N,
                num_hidden=hidden_ND.shape[1],
                hidden_stride=hidden_ND.stride(0),
                upstream_stride=upstream_N.stride(0),
                DIVIDES=divides,
            )
    return dlogits_NV, scaled_ND, rest_N


def _inputs(logits_NV: Tensor, bias_V: Tensor | None, task: LossTask) -> dict[str, Any]:
    """The arguments of both kernels; what there is not has a stand-in."""
    sets, plan, tail = task.sets, task.plan, task.tail
    return {
        "logits": logits_NV,
        "bias": logits_NV if bias_V is None else bias_V,
        "offsets": sets.offsets,
        "tokens": plan.tokens_E,
        "logprobs": plan.logprobs_E,
        "gold_ids": sets.gold_ids,
        "rows": plan.rows_N,
        "outside": plan.outside_N,
        "tail_ids": sets.gold_ids if tail is None else tail.ids_R,
        "tail_logweights": plan.outside_N if tail is None else tail.logweights_R,
        "num_tokens": logits_NV.shape[1],
        "num_tail": 0 if tail is None else len(tail.ids_R),
        "IS_ANCHOR": task.is_anchor,
        "HAS_TAIL": tail is not None,
        **task.shape,
        **TILE,
    }


def _hidden_gradient(dlogits_NV: Tensor, weight_VD: Tensor, rest_N: Tensor | None) -> Tensor:
    """Rounded once, to the factors' type."""
    if rest_N is None:
        return dlogits_NV @ weight_VD
    product_ND = wide_product(dlogits_NV, weight_VD)
    rounded_ND = torch.empty_like(product_ND, dtype=weight_VD.dtype)
    return torch.mul(product_ND, rest_N[:, None], out=rounded_ND)


def _weight_gradient(dlogits_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor | None:
    """Added to the weight's ``grad`` where that is there, else returned; None then, too."""
    is_added = accumulates(weight_VD)
    if is_added is False:
        return None
    if not is_added or weight_VD.grad is None:
        return (dlogits_NV.T @ hidden_ND).to(weight_VD.dtype)
    if weight_VD.grad.dtype == hidden_ND.dtype:
        weight_VD.grad.addmm_(dlogits_NV.T, hidden_ND)
    else:
        weight_VD.grad.add_(dlogits_NV.T @ hidden_ND)
    return None
