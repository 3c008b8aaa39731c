"""Optimizers by name: MoClip, the two that take its step apart, and baselines from elsewhere.

And the learning rate of their steps.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.method.baselines.magma import Magma
from lrmc_ray.method.baselines.masked_adamw import MaskedAdamW
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.names import OptimizerName, Schedule, check_choice


def make_optimizer(
    name: OptimizerName,
    params: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    mofo_share: float = 0.15,
    seed: int = 0,
    reduce_sums: Callable[[Tensor], object] | None = None,
    **moclip_options: Any,
) -> torch.optim.Optimizer:
    """The optimizer called ``name``.

    Args:
        name: ``"moclip"``; ``"adam_atan2"``, which is MoClip without a cap; ``"adamw"``, torch's
            AdamW with fused kernels; ``"c_adamw"`` and ``"mofo"``, see ``masked_adamw``;
            ``"magma"``, see there.
        params: Parameters to optimize.
        lr: Learning rate.
        betas: Decay of the two moments; None is (0.9, 0.99) for MoClip and ``"adam_atan2"``,
            (0.9, 0.999) for the others.
        weight_decay: Decoupled, per unit of ``lr``.
        mofo_share: Share of each tensor that ``"mofo"`` moves in a step.
        seed: Of what ``"magma"`` draws.
        reduce_sums: For sharded parameters: sums a tensor over the shards, in place.
        **moclip_options: Further arguments of ``FastMoClip``; the others have no use for them.

    Raises:
        ValueError: The name is unknown, or an option is out of range.
    """
    check_choice("optimizer", name, OptimizerName)
    adamw_betas = betas or (0.9, 0.999)
    if name == "adamw":
        return torch.optim.AdamW(
            params, lr=lr, betas=adamw_betas, weight_decay=weight_decay, fused=True
        )
    if name == "c_adamw":
        return MaskedAdamW(
            params,
            lr,
            mask="cautious",
            betas=adamw_betas,
            weight_decay=weight_decay,
            reduce_sums=reduce_sums,
        )
    if name == "mofo":
        return MaskedAdamW(
            params,
            lr,
            mask="momentum",
            betas=adamw_betas,
            weight_decay=weight_decay,
            share=mofo_share,
            reduce_sums=reduce_sums,
        )
    if name == "magma":
        return Magma(
            params,
            lr,
            betas=adamw_betas,
            weight_decay=weight_decay,
            seed=seed,
            reduce_sums=reduce_sums,
        )
    if name == "adam_atan2":
        moclip_options = {**moclip_options, "clip": "none"}
    return FastMoClip(
        params,
        lr,
        betas=betas or (0.9, 0.99),
        weight_decay=weight_decay,
        reduce_dots=reduce_sums,
        **moclip_options,
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: int,
    schedule: Schedule,
) -> float:
    """The learning rate of ``step`` (from 0): a linear warm-up, then the schedule.

    Linear and cosine reach 0 at ``steps``, one after the last.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order never above the peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
