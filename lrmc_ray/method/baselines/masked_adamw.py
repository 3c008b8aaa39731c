"""AdamW that leaves out some elements of each update: two baselines.

With gradient g, moments m and v as in AdamW, and the update u = m^ / (sqrt(v^) + eps) of torch's::

    "cautious"   u = u * mask / max(mean(mask), 0.001),  mask = [m g > 0]
    "momentum"   u = u * mask,  mask = [|m| is among the largest ``share`` of its tensor]

``"cautious"`` is C-AdamW of "Cautious Optimizers" (arXiv 2411.16085): no step against the gradient
of the moment. ``"momentum"`` is MoFO (arXiv 2407.20999): in each step only the weights whose
momentum is largest move, so the model stays near where it started. As in its authors' code, tensors
of one dimension (norms, biases) move as a whole. Weight decay is decoupled and not masked in both.

Finding the threshold of ``"momentum"`` takes about 25 ns per weight and step on a CPU, some three
times as long as an AdamW step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrmc_ray.method.names import Mask, check_choice

_LEAST_MEAN = 1e-3


class MaskedAdamW(Optimizer):
    """AdamW with masked updates (see the module); state as in ``torch.optim.AdamW``.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        mask: Which elements move.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, per unit of ``lr``.
        share: Share of each tensor's elements that ``"momentum"`` moves, in (0, 1].
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
        mask: Mask,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        share: float = 0.15,
        reduce_sums: Callable[[Tensor], object] | None = None,
    ) -> None:
        check_choice("mask", mask, Mask)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "mask": mask,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "share": share,
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
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"].lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        if group["mask"] == "cautious":
            moved = _agreeing(momentum, grad, self._reduce_sums)
        else:
            moved = _largest(momentum, group["share"], self._reduce_sums)
        param.addcdiv_(moved, root, value=-group["lr"] / (1 - beta1**step))


def _agreeing(
    momentum: Tensor, grad: Tensor, reduce_sums: Callable[[Tensor], object] | None
) -> Tensor:
    """``momentum`` where it has the gradient's sign, scaled up for what is left out."""
    is_kept = (momentum * grad > 0).to(momentum.dtype)
    if reduce_sums is None:
        return momentum * is_kept.div_(is_kept.mean().clamp_(min=_LEAST_MEAN))
    counts = torch.stack([is_kept.double().sum(), is_kept.new_tensor(is_kept.numel()).double()])
    reduce_sums(counts)
    mean = (counts[0] / counts[1]).to(is_kept.dtype)
    return momentum * is_kept.div_(mean.clamp_(min=_LEAST_MEAN))


def _largest(
    momentum: Tensor, share: float, reduce_sums: Callable[[Tensor], object] | None
) -> Tensor:
    """``momentum`` where it is among the largest ``share`` of its tensor, 0 elsewhere."""
    if momentum.dim() < 2:
        return momentum
    size = momentum.abs()
    if reduce_sums is not None:
        return torch.where(size >= _threshold(size, share, reduce_sums), momentum, 0.0)
    num_kept = max(1, int(share * size.numel()))
    threshold = size.flatten().kthvalue(size.numel() - num_kept + 1).values
    return torch.where(size >= threshold, momentum, 0.0)


def _threshold(size: Tensor, share: float, reduce_sums: Callable[[Tensor], object]) -> Tensor:
    """The smallest of the largest ``share`` of all elements of ``size``, here and elsewhere.

    Numbers that are not negative are in the order of their bits. So the threshold is found bit by
    bit: the largest number that enough elements reach.
    """
    whole, width = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}[size.dtype]
    bits = size.contiguous().view(whole)
    total = torch.tensor([float(bits.numel())], dtype=torch.float64, device=size.device)
    reduce_sums(total)
    num_kept = max(1, int(share * float(total)))
    found = 0
    for place in reversed(range(width)):
        count = (bits >= (found | 1 << place)).sum(dtype=torch.float64)[None]
        reduce_sums(count)
        found |= (float(count) >= num_kept) << place
    return torch.tensor([found], dtype=whole, device=size.device).view(size.dtype)
