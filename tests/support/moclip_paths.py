"""Gradients and paths of the tests of MoClip, plain and fast."""

import torch
from torch import Tensor

from lrmc_ray.method.moclip import MoClip
from tests.support import reference

CLIPS = ["scale", "cautious", "momentum", "project", "rotate", "none"]


CAPS = CLIPS[:-1]


def random(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def leaning_gradients(*shape: int, num: int = 10, seed: int = 0, dtype=torch.float64):
    """Gradients with a common part, so that the angles lie on both sides of 45 degrees."""
    common = random(*shape, seed=seed)
    return [
        (random(*shape, seed=1000 * (seed + 1) + i) + 0.8 * common).to(dtype) for i in range(num)
    ]


def train(optimizer: MoClip, param: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


def run(start: Tensor, gradients: list[Tensor], *, kind=MoClip, **options) -> Tensor:
    """With the reference's cap of 45 degrees, which binds on ``leaning_gradients``."""
    param = torch.nn.Parameter(start.clone())
    options = {"lr": 0.01, "delta_max": 45.0, **options}
    return train(kind([param], **options), param, gradients)


def angle_deg(a: Tensor, b: Tensor) -> float:
    return reference.angle_deg(a.double().numpy(), b.double().numpy())
