"""MoClip: AdamW with a cap on the angle between gradient and momentum, and an arctan2 step.

The optimizer of "Logits Replay + MoClip" (arXiv 2510.09152), as this project reads it. Per
parameter tensor, with gradient g, first moment m (``exp_avg`` *before* the step), second moment v
(``exp_avg_sq``), both zero at the start, and t = 1, 2, ... (``step``)::

    theta = angle(g, m)                            the tensors taken as vectors
    g'    = cap(g, m, delta_max)                   ``angle_cap``: the readings, their formulas
    m     = beta1 m + (1 - beta1) g'
    v     = beta2 v + (1 - beta2) g^2              g'^2 with second_moment="capped"
    w     = w (1 - lr weight_decay) - lr a atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t)))

The arctan2 step is that of Adam-atan2 (arXiv 2407.05872, where a = 1.27 and b = 1; here a = 1 by
default, since another a is no more than another learning rate). It needs no epsilon, does not
change when all gradients are scaled, and bounds what is added to the decayed weight:
|dw_i| <= lr a pi / 2.

This is the plain way, one tensor after the other; ``fast.moclip_update`` takes the same steps in
fewer passes over memory and fewer calls.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.method.angle_cap import CappedGradient, cap_angle
from lrmc_ray.method.dot_products import dot_products, dots_by_group
from lrmc_ray.method.measure import AngleCounts, AngleStatistics
from lrmc_ray.method.moments import MomentOptimizer
from lrmc_ray.method.names import Angle, Clip, SecondMoment, check_choice
from lrmc_ray.method.stochastic_rounding import random_bits, round_to_bf16


def arctan2_step(
    exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], step: float
) -> Tensor:
    """``atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t)))``, both moments corrected inside."""
    beta1, beta2 = betas
    root = (exp_avg_sq * (1 / (1 - beta2**step))).sqrt()
    return torch.atan2(exp_avg * (1 / (1 - beta1**step)), root)


def update_(
    param: Tensor,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    p: Tensor | None,
    q: Tensor | None,
    key: int,
) -> None:
    """Move one parameter, and its moments, by the capped gradient p g + q m (None: 1 and 0).

    Moments in bf16 are rounded by ``key``; the weight moves by what they were before that.

    With ``clip="cautious"`` a weight whose g and new m are opposed does not move in this step, but
    for its decay; m and v go on as ever. This is the cap once more weight by weight, where the
    angle is 0 or 180 degrees. The mask is that of "Cautious Optimizers" (arXiv 2411.16085), which
    lengthens the steps of the other weights by what it leaves out. Where only some rows of a tensor
    have a gradient (an embedding, with a restricted loss), that is many times the learning rate; it
    is not done here.
    """
    assert param.grad is not None
    beta1, beta2 = group["betas"]
    kept = state["exp_avg"], state["exp_avg_sq"]
    dtype = torch.promote_types(kept[0].dtype, torch.float32)
    exp_avg, exp_avg_sq = (moment.to(dtype) for moment in kept)  # themselves, but for bf16
    grad = param.grad.to(dtype)
    capped = grad if p is None else p.to(grad.dtype) * grad
    if q is not None:
        capped = capped + q.to(grad.dtype) * exp_avg
    seen = capped if group["second_moment"] == "capped" else grad
    exp_avg.lerp_(capped, 1 - beta1)
    exp_avg_sq.lerp_(seen * seen, 1 - beta2)
    direction = arctan2_step(exp_avg, exp_avg_sq, group["betas"], float(state["step"]))
    if is_cautious(group):
        # The product of both could be too small for float32, and would have no sign then.
        direction = direction.masked_fill(grad.sign() * exp_avg < 0, 0.0)
    decayed = param.to(exp_avg.dtype) * (1 - group["lr"] * group["weight_decay"])
    param.copy_(decayed.add_(direction, alpha=-group["lr"] * group["atan2_scale"]))
    if kept[0].dtype == torch.bfloat16:
        bits = random_bits(param.shape, key, param.device)
        kept[0].copy_(round_to_bf16(exp_avg, bits & 0xFFFF))
        kept[1].copy_(round_to_bf16(exp_avg_sq, bits >> 16))


def is_cautious(group: Mapping[str, Any]) -> bool:
    """Whether weights of the group stay where they would move against their gradient."""
    return bool(group["clip"] == "cautious" and group["delta_max"] < 180)


class MoClip(MomentOptimizer):
    """MoClip (see the module's docstring).

    All arguments from ``lr`` to ``atan2_scale`` can be set per parameter group. A half-precision
    parameter is rounded once per step, so an update below half its last bit is lost: keep float32
    parameters for small learning rates.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the first and the second moment, in [0, 1).
        weight_decay: Decoupled, as in AdamW: per step the weight shrinks by ``lr * weight_decay``.
        delta_max: Largest angle between gradient and momentum, in degrees, in (0, 180].
        clip: Reading of the cap.
        angle: ``"tensor"``: each tensor has its own angle. ``"global"``: the tensors of all groups
            that say so, and have a cap, are one long vector with one angle.
        second_moment: Whether v sees the ``"raw"`` or the ``"capped"`` gradient.
        atan2_scale: a, the factor of the arctan2 step.
        reduce_dots: For sharded parameters. Sums a float64 tensor of four numbers per parameter
            over the shards, in place, e.g. ``torch.distributed.all_reduce``. Every step calls it
            once, on every shard, before any weight moves. The parameters are the local shards.
        state_dtype: ``torch.bfloat16`` keeps both moments in half of the memory, rounded at random
            (``stochastic_rounding``); None in that of the parameter, at least float32.
        first_elements: For sharded parameters, in their order: place of the first element of each
            in its whole tensor, so that bf16 moments are rounded as those of the whole are.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        delta_max: float = 90.0,
        clip: Clip = "cautious",
        angle: Angle = "tensor",
        second_moment: SecondMoment = "raw",
        atan2_scale: float = 1.0,
        *,
        reduce_dots: Callable[[Tensor], object] | None = None,
        state_dtype: torch.dtype | None = None,
        first_elements: Sequence[int] = (),
    ) -> None:
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.bfloat16 or None, got {state_dtype}")
        self.reduce_dots = reduce_dots
        self.state_dtype = state_dtype
        self.first_elements = first_elements
        self._angles = AngleCounts()
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "delta_max": delta_max,
            "clip": clip,
            "angle": angle,
            "second_moment": second_moment,
            "atan2_scale": atan2_scale,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its values go before the constructor's."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def take_step(self) -> None:
        """Cap the angles of all groups, then move the weights."""
        caps = self._cap_angles()
        for param in self.params():
            if param.grad is not None:
                self.state[param]["step"] += 1
        for group, capped, keys in zip(self.param_groups, caps, self.rounding_keys(), strict=True):
            self.update_group(group, capped, keys)

    def dots_of(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """``dot_products`` of the gradient and the momentum of each parameter."""
        return [
            dot_products(param.grad.flatten(), self.state[param]["exp_avg"].flatten())
            for param in params
            if param.grad is not None
        ]

    def update_group(
        self, group: dict[str, Any], capped: CappedGradient | None, keys: Sequence[int]
    ) -> None:
        """Move the parameters of one group.

        Args:
            group: The group.
            capped: Its gradients; None where it has no cap.
            keys: By which the moments of each parameter are rounded, if they are.
        """
        for index, param in enumerate(group["params"]):
            if param.grad is not None:
                p, q = (None, None) if capped is None else capped.of(index, param.device)
                update_(param, self.state[param], group, p, q, keys[index])

    def angle_statistics(self) -> AngleStatistics:
        """Report the angles since the last call. Waits for the device, as ``step`` never does."""
        return self._angles.report()

    def __getstate__(self) -> dict[str, Any]:
        # torch would drop these from a deep copy or a pickle.
        kept = {
            "reduce_dots": self.reduce_dots,
            "state_dtype": self.state_dtype,
            "first_elements": self.first_elements,
            "_angles": AngleCounts(),
        }
        return {**super().__getstate__(), **kept}

    def _cap_angles(self) -> list[CappedGradient | None]:
        """One entry per group; None where its gradients are not capped."""
        if all(group["clip"] == "none" for group in self.param_groups):
            return [None] * len(self.param_groups)
        caps: list[CappedGradient | None] = []
        dots = dots_by_group(self.param_groups, self.dots_of, self.reduce_dots)
        for group, (dots_G4, numel_G) in zip(self.param_groups, dots, strict=True):
            if group["clip"] == "none":
                caps.append(None)
                continue
            options = {"delta_max": group["delta_max"], "clip": group["clip"]}
            capped = cap_angle(dots_G4[:, :3], dots_G4[:, 3], beta1=group["betas"][0], **options)
            self._angles.add(capped.theta_G, capped.is_changed(), numel_G)
            caps.append(capped)
        return caps


def _check_settings(settings: Mapping[str, Any]) -> None:
    betas, delta_max = settings["betas"], settings["delta_max"]
    if not 0.0 < delta_max <= 180.0:
        raise ValueError(
            f"delta_max must be in (0, 180] degrees, got {delta_max}; 180 switches the cap off"
        )
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    for name in ("lr", "weight_decay", "atan2_scale"):
        if not 0.0 <= settings[name] < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {settings[name]}")
    for name, names in (("clip", Clip), ("angle", Angle), ("second_moment", SecondMoment)):
        check_choice(name, settings[name], names)
