"""L2-SP: weights are held near those that training started from.

The baseline of Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
Convolutional Networks" (arXiv 1802.01483)::

    loss + (alpha / 2) sum over weights of (w - w_start)^2

so that alpha (w - w_start) is added to the gradient. As there, and unlike decoupled weight decay,
an adaptive optimizer sees it within the gradient and scales both alike. It costs one copy of the
trained weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class StartingPoint:
    """The weights at the start, and the pull towards them."""

    def __init__(self, parameters: Sequence[Tensor], alpha: float) -> None:
        """Remember ``parameters`` as they are now."""
        self._alpha = alpha
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to that of every parameter that has one."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._alpha)
