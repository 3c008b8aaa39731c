"""MoClip's step by the kernels of ``moclip_triton``: a launch for all tensors of like types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrmc_ray.method.angle_cap import CappedGradient
from lrmc_ray.method.fast.chunk_table import ChunkTable, to_device
from lrmc_ray.method.fast.moclip_kernel import StepScalars
from lrmc_ray.method.fast.triton_support import (
    at_device_of,
    is_interpreted,
    is_wanted,
    works_on_gpu,
)

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights and gradients; ``moclip_triton.TYPES`` has Triton's names of them."""
_MOST_TABLES = 16
"""That are kept; one for the dot products and one for each group of parameters is usual."""
BLOCK = 1024
"""Elements that a program takes at a time, of each tensor."""
TOGETHER = 64
"""Chunks whose sums are read at a time."""


def runs_on(device: torch.device) -> bool:
    """Whether steps are by kernels there."""
    return device.type == "cuda" and is_wanted() and not is_interpreted() and works_on_gpu()


def can_take(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether the kernels take this parameter, its gradient and its moments."""
    grad = param.grad
    if grad is None or not runs_on(param.device):
        return False
    tensors = param, grad, exp_avg, exp_avg_sq
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.is_contiguous() for x in tensors)
        and all(x.device == param.device for x in tensors)
        and {param.dtype, grad.dtype}.issubset(_TYPES)
        and exp_avg.dtype == exp_avg_sq.dtype
        and exp_avg.dtype in (torch.float32, torch.bfloat16)
    )


class Update(NamedTuple):
    """The update of one parameter of a group."""

    place: int
    """Of the parameter in its group."""
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Weight, gradient, first and second moment."""
    scalars: StepScalars
    key: int
    """By which moments in bf16 are rounded."""


class Launches:
    """Takes the steps of one optimizer, and keeps the tables of its tensors."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, ChunkTable] = {}

    def dots(self, grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
        """[3] each, the ``dot_products`` of pairs of contiguous tensors."""
        from lrmc_ray.method.fast import moclip_triton

        found: dict[int, Tensor] = {}
        for (device, *types), places in _alike(list(zip(grads, momenta, strict=True))).items():
            pairs = [(grads[place], momenta[place]) for place in places]
            table = self._table(("dots", *types), [grad.numel() for grad, _ in pairs], device)
            partial_X3 = torch.empty(table.num_chunks, 3, dtype=torch.float64, device=device)
            dots_G3 = torch.zeros(len(pairs), 3, dtype=torch.float64, device=device)
            addresses = table.point_to(pairs)
            if table.num_chunks:
                with at_device_of(dots_G3):
                    moclip_triton.chunk_dots[(table.num_chunks,)](
                        addresses,
                        table.sizes_G,
                        table.owners_X,
                        table.starts_X,
                        partial_X3,
                        *(moclip_triton.TYPES[dtype] for dtype in types),
                        ALIGNED=table.is_aligned,
                        CHUNK=table.chunk,
                        BLOCK=BLOCK,
                        num_warps=4,
                    )
                    moclip_triton.add_chunks[(len(pairs),)](
                        partial_X3, table.bounds_G, dots_G3, BLOCK=TOGETHER, num_warps=4
                    )
            found |= zip(places, dots_G3.unbind(), strict=True)
        return [found[place] for place in range(len(grads))]

    def update(
        self,
        updates: Sequence[Update],
        capped: CappedGradient | None,
        *,
        sees_capped: bool,
        is_cautious: bool,
    ) -> None:
        """Move parameters of one group, as ``moclip.update_`` does."""
        from lrmc_ray.method.fast import moclip_triton

        for (device, *types), places in _alike([update.tensors for update in updates]).items():
            chosen = [updates[place] for place in places]
            indices = tuple(update.place for update in chosen)
            sizes = [update.tensors[0].numel() for update in chosen]
            table = self._table(("update", *types, indices), sizes, device)
            addresses = table.point_to([update.tensors for update in chosen])
            scales = [(x.scalars.first_scale, x.scalars.second_scale) for x in chosen]
            scalars = chosen[0].scalars
            p_G = q_G = keys = None
            if types[2] == torch.bfloat16:
                keys = to_device(torch.tensor([x.key for x in chosen]), device)
            if capped is not None:
                p_G = capped.p_G.to(device)
                q_G = None if capped.q_G is None else capped.q_G.to(device)
            if not table.num_chunks:
                continue
            with at_device_of(addresses):
                moclip_triton.chunk_update[(table.num_chunks,)](
                    addresses,
                    table.sizes_G,
                    table.owners_X,
                    table.starts_X,
                    table.indices(indices),
                    addresses if keys is None else keys,
                    addresses if p_G is None else p_G,
                    addresses if q_G is None else q_G,
                    to_device(torch.tensor(scales, dtype=torch.float32), device),
                    scalars.first_rate,
                    scalars.second_rate,
                    scalars.decay,
                    scalars.step_size,
                    *(moclip_triton.TYPES[dtype] for dtype in types[:3]),
                    HAS_P=p_G is not None,
                    HAS_Q=q_G is not None,
                    SEES_CAPPED=sees_capped,
                    IS_CAUTIOUS=is_cautious,
                    ALIGNED=table.is_aligned,
                    CHUNK=table.chunk,
                    BLOCK=BLOCK,
                    num_warps=4,
                )
            for update in chosen:
                for tensor in update.tensors[0], *update.tensors[2:]:
                    # A kernel's writes are unknown to torch.
                    torch.autograd.graph.increment_version(tensor)

    def _table(self, kind: Hashable, sizes: Sequence[int], device: torch.device) -> ChunkTable:
        key = kind, tuple(sizes), device
        if key not in self._tables:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[key] = ChunkTable(sizes, device)
        return self._tables[key]


def _alike(groups: Sequence[Sequence[Tensor]]) -> dict[tuple[Any, ...], list[int]]:
    """Places of the groups whose tensors have the same device and the same types."""
    places: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, tensors in enumerate(groups):
        places[tensors[0].device, *(tensor.dtype for tensor in tensors)].append(place)
    return places
