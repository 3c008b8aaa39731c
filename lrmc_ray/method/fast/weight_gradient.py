"""Where the gradient of a head's weight goes: straight into ``grad`` where that can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def accumulates(weight_VD: Tensor) -> bool | None:
    """Whether this backward pass adds to ``weight.grad``; None where it wants a gradient returned.

    That is so for a weight that is no leaf or has hooks, and for ``torch.autograd.grad``.
    """
    if not weight_VD.is_leaf or weight_VD._backward_hooks or weight_VD._post_accumulate_grad_hooks:
        return None
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(weight_VD).node)
    except RuntimeError:
        return None  # torch.autograd.grad


def gradient_target(weight_VD: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where to add rows of the weight's gradient, and what backward has to return for it.

    Both None where the gradient is not wanted; returned None where it goes to ``weight.grad``.
    """
    is_added = accumulates(weight_VD)
    if is_added is False:
        return None, None
    if is_added:
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        return weight_VD.grad, None
    gradient_VD = torch.zeros_like(weight_VD)
    return gradient_VD, gradient_VD
