"""Every choice that goes by a name, said once. No torch here, so the settings load at once."""

from collections.abc import Sequence
from typing import Literal, get_args

Loss = Literal[
    "restricted",
    "frozen_tail",
    "full",
    "soft",
    "active_only",
    "dft",
    "asft",
    "eaft",
    "flow",
    "kl_to_base",
]
"""``restricted`` is the paper's, ``frozen_tail`` the same with the base's mass outside, ``full``
ordinary fine-tuning, the others baselines."""
NEED_BASE: frozenset[Loss] = frozenset({"frozen_tail", "kl_to_base"})
"""Losses that compare with the logits of the base model, which is held beside the trained one."""
ON_CANDIDATES: frozenset[Loss] = frozenset({"restricted", "soft"})
"""Losses that read the logits of candidates and of the sampled tail alone."""
OptimizerName = Literal["moclip", "adamw", "adam_atan2", "c_adamw", "mofo", "magma"]
"""``moclip`` is the paper's, ``adam_atan2`` the same without the cap, the others baselines."""
Clip = Literal["scale", "cautious", "momentum", "project", "rotate", "none"]
"""Readings of MoClip's cap on the angle; :mod:`lrmc_ray.method.moclip` has their formulas."""
Angle = Literal["tensor", "global"]
"""One angle per tensor, or one for the whole model."""
SecondMoment = Literal["raw", "capped"]
"""Whether the second moment sees the gradient before or after the cap."""
Schedule = Literal["constant", "linear", "cosine"]
"""The learning rate after the warm-up."""
Reduction = Literal["strict", "fast"]
"""How workers add their gradients; :mod:`lrmc_ray.method.training_loop` says what each is for."""
Parallel = Literal["replicate", "shard"]
"""Whether every worker holds the whole model, or its shard; see :mod:`lrmc_ray.method.shards`."""
LossReduction = Literal["sum", "mean", "none"]
"""What becomes of the losses of the positions."""
Backend = Literal["auto", "kernel", "dense_kernel", "sparse", "gather", "dense"]
"""How the losses on candidates are computed, see :mod:`lrmc_ray.method.fast.backend_choice`."""
KernelBackend = Literal["kernel", "dense_kernel"]
"""Those of them by kernels of a GPU."""
LogitsBackend = Literal["sparse", "gather", "dense"]
"""How their logits are, see :mod:`lrmc_ray.method.fast.candidate_logits`."""
Blend = Literal["even", "depth"]
"""How a model between two others is made, see :mod:`lrmc_ray.method.baselines.interpolation`."""
Mask = Literal["cautious", "momentum"]
"""Which elements :class:`lrmc_ray.method.baselines.masked_adamw.MaskedAdamW` moves."""
HOST_AND_GPU = "cpu:gloo,cuda:nccl"
"""torch's backends for workers who exchange tensors of the host and of GPUs."""


def choices(names: object) -> Sequence[str]:
    """The names of one of the above, in order."""
    return get_args(names)


def check_choice(setting: str, value: str, names: object) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``names``."""
    if value not in choices(names):
        raise ValueError(f"{setting} must be one of {', '.join(choices(names))}, got {value!r}")
