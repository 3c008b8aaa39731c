"""Dot products of gradients and momenta: of tensors, of shards, of a model as one long vector."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.method.fast.chunk_table import to_device


def dot_products(grad: Tensor, momentum: Tensor) -> Tensor:
    """``[<g, g>, <g, m>, <m, m>]`` of two vectors, in float64.

    With a float32 cosine the angle would be off by up to 0.03 degrees near 0 and 180.
    """
    g, m = grad.double(), momentum.double()
    return torch.stack((g.dot(g), g.dot(m), m.dot(m)))


def dots_by_group(
    groups: Sequence[Mapping[str, Any]],
    dots_of: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    reduce_dots: Callable[[Tensor], object] | None,
) -> list[tuple[Tensor, Tensor]]:
    """What the cap of each group needs, and the sizes to count its angles by.

    Args:
        groups: Parameter groups, with ``clip`` and ``angle``.
        dots_of: ``dot_products`` of the gradient and the momentum of each of some parameters.
        reduce_dots: Sums a tensor over shards, in place; None where there are none.

    Returns:
        Of each group, dot products and number of elements of the vectors that are capped, [G, 4],
        and the number of elements of its tensors, [G]. With ``angle="global"`` all rows are those
        of one vector: all tensors of such groups. Zeros where there is nothing to cap.
    """
    params = [param for group in groups for param in group["params"]]
    clips = [group["clip"] for group in groups for _ in group["params"]]
    chosen = [
        index
        for index, (param, clip) in enumerate(zip(params, clips, strict=True))
        if param.grad is not None and clip != "none"
    ]
    # One row per parameter, with or without a gradient: all shards must sum the same shape.
    rows = [torch.zeros(3, dtype=torch.float64, device=params[0].device)] * len(params)
    numels = [0] * len(params)
    for index, row_3 in zip(chosen, dots_of([params[index] for index in chosen]), strict=True):
        rows[index], numels[index] = row_3.to(params[0].device), params[index].numel()
    numel_G = to_device(torch.tensor(numels, dtype=torch.float64), params[0].device)
    dots_G4 = torch.cat((torch.stack(rows), numel_G[:, None]), dim=1)
    if reduce_dots is not None:
        reduce_dots(dots_G4)
    by_group = torch.split(dots_G4, [len(group["params"]) for group in groups])
    global_4 = dots_G4.new_zeros(4)
    for group_G4, group in zip(by_group, groups, strict=True):
        if group["angle"] == "global":
            global_4 += group_G4.sum(0)
    return [
        (global_4.expand_as(group_G4) if group["angle"] == "global" else group_G4, group_G4[:, 3])
        for group_G4, group in zip(by_group, groups, strict=True)
    ]
