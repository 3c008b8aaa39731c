"""Optimizers by name: MoClip, the two that take its step apart, and baselines from elsewhere."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.method.masked_adamw import MaskedAdamW
from lrmc_ray.method.moclip import MoClip

NAMES = ("moclip", "adamw", "adam_atan2", "c_adamw", "mofo")


def make_optimizer(
    name: str,
    params: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    mofo_share: float = 0.15,
    **moclip_options: Any,
) -> torch.optim.Optimizer:
    """The optimizer called ``name``.

    Args:
        name: ``"moclip"``; ``"adam_atan2"``, which is MoClip without a cap; ``"adamw"``, torch's
            AdamW with fused kernels; ``"c_adamw"`` and ``"mofo"``, see ``masked_adamw``.
        params: Parameters to optimize.
        lr: Learning rate.
        betas: Decay of the two moments; None is (0.9, 0.99) for MoClip and ``"adam_atan2"``,
            (0.9, 0.999) for the others.
        weight_decay: Decoupled, per unit of ``lr``.
        mofo_share: Share of each tensor that ``"mofo"`` moves in a step.
        **moclip_options: Further arguments of ``MoClip``; the others have no use for them.

    Raises:
        ValueError: The name is unknown, or an option is out of range.
    """
    adamw_betas = betas or (0.9, 0.999)
    if name == "adamw":
        return torch.optim.AdamW(
            params, lr=lr, betas=adamw_betas, weight_decay=weight_decay, fused=True
        )
    if name == "c_adamw":
        return MaskedAdamW(
            params, lr, mask="cautious", betas=adamw_betas, weight_decay=weight_decay
        )
    if name == "mofo":
        return MaskedAdamW(
            params,
            lr,
            mask="momentum",
            betas=adamw_betas,
            weight_decay=weight_decay,
            share=mofo_share,
        )
    if name == "adam_atan2":
        moclip_options = {**moclip_options, "clip": "none"}
    elif name != "moclip":
        raise ValueError(f"optimizer must be one of {', '.join(NAMES)}, got {name!r}")
    return MoClip(
        params, lr, betas=betas or (0.9, 0.99), weight_decay=weight_decay, **moclip_options
    )
