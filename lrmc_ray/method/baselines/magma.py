r"""Magma: AdamW whose step shrinks with the angle between gradient and momentum, and is drawn.

"On Surprising Effectiveness of Masking Updates in Adaptive Optimizers" (arXiv 2602.15322). For each
block, here each tensor, with the gradient g, the momentum m that has g in it, and the update u =
m^ / (sqrt(v^) + eps) of AdamW::

    s~ = sigmoid(cos(m, g) / T)          T = 2
    s  = 0.9 s + 0.1 s~                  s starts at 1
    w  = w - lr z s u                    z is 1 with probability 0.5, otherwise 0

The moments see every gradient, also where the block is left out. What is drawn depends on the seed
and the step alone. It is the published neighbour of MoClip, which caps the gradient by that angle
before it enters the momentum.

Where our reading could differ: the start of s is not in what of the paper we could read (public
implementations take 1, and so it matters in short runs); embeddings are said to be left out of it
there, while here every tensor is a block; weight decay is decoupled and neither scaled nor drawn.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_SMOOTHING = 0.9


class Magma(Optimizer):
    """AdamW with masked, scaled updates (see the module); state as in ``torch.optim.AdamW``.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, per unit of ``lr``.
        temperature: T, above 0.
        kept_share: Probability that a block moves, in (0, 1].
        seed: Of what is drawn.
        reduce_sums: For sharded parameters. Sums a tensor over the shards, in place; called equally
            often on every shard. The parameters are the local shards.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        temperature: float = 2.0,
        kept_share: float = 0.5,
        seed: int = 0,
        reduce_sums: Callable[[Tensor], object] | None = None,
    ) -> None:
        if not 0.0 < kept_share <= 1.0:
            raise ValueError(f"kept_share must be in (0, 1], got {kept_share}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "temperature": temperature,
            "kept_share": kept_share,
            "seed": seed,
            "num_steps": 0,
        }
        super().__init__(params, defaults)
        self._reduce_sums = reduce_sums

    def __getstate__(self) -> dict[str, Any]:
        # torch would drop it from a deep copy or a pickle.
        return {**super().__getstate__(), "_reduce_sums": self._reduce_sums}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            group["num_steps"] += 1
            drawn = _drawn(len(group["params"]), group["seed"], number, group["num_steps"])
            for param, place in zip(group["params"], drawn, strict=True):
                if param.grad is not None:
                    self._update(param, param.grad, group, is_kept=place < group["kept_share"])
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], *, is_kept: bool) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            state["alignment"] = param.new_ones(())
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"].lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        aligned = torch.sigmoid(_cosine(momentum, grad, self._reduce_sums) / group["temperature"])
        alignment = state["alignment"].lerp_(aligned, 1 - _SMOOTHING)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        if is_kept:
            root = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
            update = (momentum / root).mul_(alignment)
            param.add_(update, alpha=-group["lr"] / (1 - beta1**step))


def _drawn(count: int, seed: int, group: int, step: int) -> list[float]:
    """Numbers in [0, 1), one per block."""
    mixed = ((seed * 1_009 + group) * 1_000_003 + step) % 2**63
    draws: list[float] = torch.rand(count, generator=torch.Generator().manual_seed(mixed)).tolist()
    return draws


def _cosine(
    first: Tensor, second: Tensor, reduce_sums: Callable[[Tensor], object] | None
) -> Tensor:
    """The cosine of the angle between two tensors; 0 where one of them is zero."""
    if reduce_sums is not None:
        x, y = first.double(), second.double()
        sums = torch.stack([(x * x).sum(), (x * y).sum(), (y * y).sum()])
        reduce_sums(sums)
        length = (sums[0] * sums[2]).sqrt()
        return torch.where(length > 0, sums[1] / length, 0.0).to(first.dtype)
    length = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    return torch.where(length > 0, (first * second).sum() / length, 0.0)
