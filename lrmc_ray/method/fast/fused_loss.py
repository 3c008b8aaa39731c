"""The losses on the candidates by the kernels that ``loss_launch`` starts.

Loss and gradient of the hidden states come from one launch, and a few more where positions have
very many candidates or share most of them (``loss_plan``). Backward makes the weight's gradient
in another, or in two where a token has many entries. The plain counterpart is ``restricted_loss``
with ``candidate_logits``; where the weight's gradient goes is said there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.loss_launch import (
    LossTask,
    SharedTail,
    WeightRows,
    add_candidates_to_weight,
    add_tail_to_hidden,
    add_tail_to_weight,
    candidate_loss,
    tail_products,
)
from lrmc_ray.method.fast.triton_support import (
    at_device_of,
    is_installed,
    is_interpreted,
    works_on_gpu,
)
from lrmc_ray.method.fast.weight_gradient import gradient_target
from lrmc_ray.method.head import OutputHead

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HIDDEN = 2**14
"""Of a hidden state that one program holds in its registers."""


def refusal(hidden_ND: Tensor, head: OutputHead, *, gathers: bool = True) -> str | None:
    """Why the kernels cannot take these, as the end of a sentence; None where they can.

    Args:
        hidden_ND: Last hidden states.
        head: The output head.
        gathers: The kernels read rows of the weight themselves; otherwise torch multiplies.
    """
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
    if apart := [tensor.device for tensor in tensors if tensor.device != hidden_ND.device]:
        return f"the hidden states are on {hidden_ND.device}, the head on {apart[0]}"
    if gathers and weight_VD.stride(1) != 1:
        return "the rows of the weight are not contiguous"
    if gathers and hidden_ND.shape[1] > WIDEST_HIDDEN:
        return f"the hidden size is {hidden_ND.shape[1]}"
    return None


def share_tail(ids_R: Tensor, logweights_R: Tensor, num_rows: int) -> SharedTail:
    """The tail for a weight of ``num_rows`` rows. Waits for no device."""
    ids_R, order = ids_R.sort(stable=True)
    first_R = torch.searchsorted(ids_R, ids_R)
    last_R = torch.searchsorted(ids_R, ids_R, right=True) - 1
    weights_R = logweights_R[order].double().exp()
    is_first_R = first_R == torch.arange(len(ids_R), device=ids_R.device)
    # Each token's weights as one segment, at its first place; a running sum would add them up in an
    # order that a GPU chooses anew in every run.
    begin_R = torch.where(is_first_R, first_R, last_R + 1)
    offsets = F.pad(begin_R, (0, 1), value=len(ids_R))
    together_R = torch.segment_reduce(weights_R, "sum", offsets=offsets, unsafe=True)
    places_V = torch.full((num_rows,), -1, dtype=torch.int32, device=ids_R.device)
    places_V[ids_R] = first_R.int()
    merged_R = together_R.log().masked_fill(~is_first_R, -torch.inf)
    return SharedTail(ids_R.int(), merged_R.float(), merged_R, places_V)


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
    task = checked_task(hidden_ND, head, candidates, tail, is_anchor=is_anchor)
    loss_N: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, task.head.bias_V, task, torch.is_grad_enabled()
    )
    return loss_N


def checked_task(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    tail: SharedTail | None,
    *,
    is_anchor: bool,
    gathers: bool = True,
) -> LossTask:
    """What the kernels do, of arguments as above.

    Raises:
        ValueError: The kernels cannot take these.
    """
    reason = refusal(hidden_ND, head, gathers=gathers)
    if reason is not None:
        raise ValueError(
            f"the backend {'kernel' if gathers else 'dense_kernel'} needs Triton, a GPU, and "
            f"{f'contiguous rows of at most {WIDEST_HIDDEN} elements' if gathers else 'inputs'} "
            f"of float32, bfloat16 or float16, but {reason}; take backend='auto'"
        )
    if candidates.offsets.device != hidden_ND.device:
        raise ValueError(
            f"the candidate sets must be on {hidden_ND.device} as the hidden states are, got "
            f"{candidates.offsets.device}; move them there"
        )
    head = dataclasses.replace(
        head, bias_V=None if head.bias_V is None else head.bias_V.contiguous()
    )
    return LossTask(head, candidates.planned().contiguous(), tail, is_anchor)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        task: LossTask,
        is_grad_enabled: bool,
    ) -> Tensor:
        hidden_ND = hidden_ND.contiguous()
        # The leaf itself, beside the saved tensor: checkpointing may unpack a copy of that.
        ctx.weight_VD, ctx.task = weight_VD, task
        # What needs a gradient is asked of the inputs, whether one is computed or not.
        wants_gradient = is_grad_enabled and any(ctx.needs_input_grad)
        with at_device_of(hidden_ND):
            tail_NR = None
            if task.tail is not None:
                tail_NR = tail_products(hidden_ND, weight_VD, bias_V, task)
            loss_N, dlogits_E, dhidden_ND = candidate_loss(
                hidden_ND, weight_VD, bias_V, task, tail_NR, wants_gradient
            )
            if wants_gradient and ctx.needs_input_grad[0] and tail_NR is not None:
                add_tail_to_hidden(tail_NR, weight_VD, task, dhidden_ND)
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
            rows = WeightRows(target_VD if apart_VD is None else apart_VD, gradient_V)
            with at_device_of(hidden_ND):
                add_candidates_to_weight(hidden_ND, dlogits_E, upstream_N, ctx.task, rows)
                if tail_NR is not None:
                    add_tail_to_weight(hidden_ND, tail_NR, upstream_N, ctx.task, rows)
            if target_VD is not None and apart_VD is not None:
                target_VD.add_(apart_VD)
            if gradient_V is not None:
                gradient_V = gradient_V.to(bias_V.dtype)
        return gradient_ND, gradient_VD, gradient_V, None, None
