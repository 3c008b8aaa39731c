"""All products of hidden states and a weight's rows on a GPU, of which the candidates' are picked.

What is rounded, where both factors are of one type of half precision:

- Forward nothing: products of two such numbers are exact in float32, their sums are float32, and
  what is picked is left so. (Torch before 2.8 has no such product; there it is rounded once to the
  factors' type, as in torch's own ``F.linear``.)
- Backward each derivative of a product once, to the factors' type. The sums of both matrix products
  are float32 (partial ones where torch's ``allow_bf16_reduced_precision_reduction`` and its like
  say otherwise, as everywhere), and each element is rounded once when it is left in a gradient. In
  float16, whose numbers below 6e-8 are zero, derivatives are first divided by the largest of them.

Factors of two types are multiplied in the wider one, and at least in float32. No [N, V] tensor but
the products and their derivatives is made, and neither is kept from forward to backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.fast.weight_gradient import gradient_target


def is_taken_on(device: torch.device) -> bool:
    """Whether ``dense`` goes this way there; on a CPU it multiplies in float32 by autograd."""
    return device.type == "cuda"


def picked_products(
    hidden_ND: Tensor, weight_VD: Tensor, rows_E: Tensor, tokens_E: Tensor
) -> Tensor:
    """Products of the hidden states ``rows_E`` and the weight's rows ``tokens_E``.

    Args:
        hidden_ND: Last hidden states.
        weight_VD: The head's weight.
        rows_E: Positions.
        tokens_E: Tokens, distinct within a position.

    Returns:
        [E], float32 (float64 if an input is float64).
    """
    products_E: Tensor = _PickedProducts.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, rows_E, tokens_E
    )
    return products_E


def factor_type(hidden_type: torch.dtype, weight_type: torch.dtype) -> torch.dtype:
    """The type in which hidden states and weight are multiplied."""
    if hidden_type == weight_type and hidden_type.itemsize == 2:
        return hidden_type
    return torch.promote_types(torch.promote_types(hidden_type, weight_type), torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of factors of one type, at least in float32."""
    if left.dtype.itemsize > 2:
        return left @ right
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.is_cuda:
        return (left @ right).float()
    return left.float() @ right.float()


class _PickedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows_E: Tensor, tokens_E: Tensor
    ) -> Tensor:
        # The leaf itself, beside the saved tensor: checkpointing may unpack a copy of that.
        ctx.weight_VD = weight_VD
        ctx.save_for_backward(hidden_ND, weight_VD, rows_E, tokens_E)
        kind = factor_type(hidden_ND.dtype, weight_VD.dtype)
        return wide_product(hidden_ND.to(kind), weight_VD.to(kind).T)[rows_E, tokens_E]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_E: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, rows_E, tokens_E = ctx.saved_tensors
        kind = factor_type(hidden_ND.dtype, weight_VD.dtype)
        largest = None
        if kind == torch.float16 and gradient_E.numel():
            largest = gradient_E.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            gradient_E = gradient_E / largest
        dlogits_NV = hidden_ND.new_zeros((len(hidden_ND), len(weight_VD)), dtype=kind)
        dlogits_NV[rows_E, tokens_E] = gradient_E.to(kind)
        gradient_ND = gradient_VD = None
        if ctx.needs_input_grad[0]:
            gradient_ND = _product(dlogits_NV, weight_VD.to(kind), largest, hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            target_VD, gradient_VD = gradient_target(ctx.weight_VD)
            if target_VD is not None and largest is None and target_VD.dtype == kind:
                target_VD.addmm_(dlogits_NV.T, hidden_ND.to(kind))
            elif target_VD is not None:
                wide = torch.promote_types(target_VD.dtype, torch.float32)
                target_VD.add_(_product(dlogits_NV.T, hidden_ND.to(kind), largest, wide))
        return gradient_ND, gradient_VD, None, None


def _product(left: Tensor, right: Tensor, factor: Tensor | None, kind: torch.dtype) -> Tensor:
    """``factor left @ right`` as ``kind``, rounded once."""
    if factor is not None:
        return wide_product(left, right).mul_(factor).to(kind)
    return (left @ right).to(kind)
