"""Where the gradient of a head's weight goes: straight into ``grad`` where that can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def gradient_target(weight_VD: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where to add rows of the weight's gradient, and what backward has to return for it.

    Both None where the gradient is not wanted; returned None where it goes to ``weight.grad``.
    """
    hooks = weight_VD._backward_hooks or weight_VD._post_accumulate_grad_hooks
    if weight_VD.is_leaf and not hooks:
        try:
            # Does this very backward pass accumulate into the leaf?
            if not torch._C._will_engine_execute_node(get_gradient_edge(weight_VD).node):
                return None, None
        except RuntimeError:
            pass  # torch.autograd.grad wants the gradient returned
        else:
            if weight_VD.grad is None:
                weight_VD.grad = torch.zeros_like(weight_VD)
            return weight_VD.grad, None
    gradient_VD = torch.zeros_like(weight_VD)
    return gradient_VD, gradient_VD
