"""Optimizers by name."""

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
    """The optimizer called ``name``."""
    if name == "moclip":
        return MoClip(
            params, lr, betas=betas or (0.9, 0.99), weight_decay=weight_decay, **moclip_options
        )
    if name == "adam_atan2":
        options = {**moclip_options, "clip": "none"}
        return MoClip(params, lr, betas=betas or (0.9, 0.99), weight_decay=weight_decay, **options)
    if name == "adamw":
        return torch.optim.AdamW(
            params, lr=lr, betas=betas or (0.9, 0.999), weight_decay=weight_decay, fused=True
        )
    raise ValueError(f"optimizer must be one of {', '.join(NAMES)}, got {name!r}")
