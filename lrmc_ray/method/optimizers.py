"""Optimizers by name: MoClip and the two baselines that take its step apart."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.method.moclip import MoClip

NAMES = ("moclip", "adamw", "adam_atan2")


def make_optimizer(
    name: str,
    params: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    **moclip_options: Any,
) -> torch.optim.Optimizer:
    """The optimizer called ``name``.

    Args:
        name: ``"moclip"``; ``"adam_atan2"``, which is MoClip without a cap; or ``"adamw"``, torch's
            AdamW with fused kernels.
        params: Parameters to optimize.
        lr: Learning rate.
        betas: Decay of the two moments; None is (0.9, 0.999) for AdamW and (0.9, 0.99) for others.
        weight_decay: Decoupled, per unit of ``lr``.
        **moclip_options: Further arguments of ``MoClip``; AdamW has no use for them.

    Raises:
        ValueError: The name is unknown, or an option is out of range.
    """
    if name == "adamw":
        return torch.optim.AdamW(
            params, lr=lr, betas=betas or (0.9, 0.999), weight_decay=weight_decay, fused=True
        )
    if name == "adam_atan2":
        moclip_options = {**moclip_options, "clip": "none"}
    elif name != "moclip":
        raise ValueError(f"optimizer must be one of {', '.join(NAMES)}, got {name!r}")
    return MoClip(
        params, lr, betas=betas or (0.9, 0.99), weight_decay=weight_decay, **moclip_options
    )
