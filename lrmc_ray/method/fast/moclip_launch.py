"""MoClip's step by the kernels of ``moclip_triton``: two launches for all tensors of like types."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrmc_ray.method.fast.chunk_table import ChunkTable, to_device
from lrmc_ray.method.fast.moclip_kernel import StepScalars
from lrmc_ray.method.fast.triton_support import (
    at_device_of,
    is_interpreted,
    is_wanted,
    works_on_gpu,
)
from lrmc_ray.method.measure import NUM_ANGLE_BINS
from lrmc_ray.method.names import Clip

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights and gradients; ``moclip_triton.TYPES`` has Triton's names of them."""
_MOST_TABLES = 16
"""That are kept; one for the dot products and one for each group of parameters is usual."""
BLOCK = 1024
"""Elements that a program takes at a time, of each tensor."""
TOGETHER = 256
"""Rows of sums that are read at a time."""
MOST_SPANS = 512
"""Rows of sums that a vector has at most: four programs of the first launch for each processor of
an H100, and 16 KiB that each program of the last one reads."""


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
    """The update of one parameter."""

    row: int
    """Of the parameter among those of all groups; those with the one angle of all come first."""
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Weight, gradient, first and second moment."""
    scalars: StepScalars
    key: int
    """By which moments in bf16 are rounded."""
    clip: Clip
    delta: float
    """The cap, in radians."""
    beta1: float
    is_global: bool
    """Whether its angle is the one of all such tensors."""
    sees_capped: bool
    """Whether its second moment sees the capped gradient."""
    is_cautious: bool

    @property
    def numbers(self) -> tuple[float, ...]:
        """As ``chunk_update`` takes them, ``NUMBERS`` in float64."""
        sine = math.sin(self.delta)
        turned = self.beta1 * sine / (1 - self.beta1)
        return (*self.scalars, self.key, self.delta, math.cos(self.delta), sine, turned)


NUMBERS = 11


class _Partial(NamedTuple):
    """Sums of all vectors that have an angle, in parts."""

    sums_P4: Tensor
    bounds: dict[int, tuple[int, int]]
    """The parts of each parameter's vector, by its row."""
    is_reduced: bool
    """There is one part per row, summed over workers."""


class Launches:
    """Takes the steps of one optimizer, and keeps the tables of its tensors.

    Two launches for all tensors of like types and like settings: sums, then the rest. Without a cap
    it is one. Where the sums go through one over workers they have to be compact, so that there is
    a third between both.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, ChunkTable] = {}

    def step(
        self,
        updates: Sequence[Update],
        num_rows: int,
        num_global: int,
        counts_T: Tensor,
        reduce_dots: Callable[[Tensor], object] | None,
    ) -> None:
        """Move parameters of one device, as ``moclip.MoClip`` does.

        Args:
            updates: Of all groups.
            num_rows: Parameters of all groups, those without a gradient included.
            num_global: How many of them, the first ones, have one angle.
            counts_T: What ``AngleCounts.rows`` gives for as many.
            reduce_dots: Sums [num_rows, 4] over workers, in place.
        """
        partial = self._partial(updates, counts_T.device, is_reduced=reduce_dots is not None)
        if reduce_dots is not None:
            partial = self._reduced(updates, partial, num_rows, num_global, reduce_dots)
        alike: dict[tuple[Any, ...], list[Update]] = defaultdict(list)
        for update in updates:
            types = tuple(x.dtype for x in update.tensors)
            settings = update.clip, update.sees_capped, update.is_cautious
            alike[types, settings].append(update)
        for (types, settings), chosen in alike.items():
            self._update(chosen, types, settings, partial, counts_T)

    def _partial(
        self, updates: Sequence[Update], device: torch.device, *, is_reduced: bool
    ) -> _Partial:
        """The first launch; parts of each tensor alone where they are to be reduced."""
        from lrmc_ray.method.fast import moclip_triton

        capped = [update for update in updates if update.clip != "none"]
        bounds: dict[int, tuple[int, int]] = {}
        launches, number = [], 0
        for is_global in (True, False):
            chosen = [x for x in capped if (x.is_global and not is_reduced) == is_global]
            pairs = [update.tensors[1:3] for update in chosen]
            for (_, *types), places in _alike(pairs).items():
                of_types = [pairs[place] for place in places]
                kind = "dots", is_global, *types
                table = self._table(kind, [grad.numel() for grad, _ in of_types], device)
                spans, ends = table.spans(MOST_SPANS, together=is_global)
                launches.append((table, of_types, types, spans, number))
                for place, (begin, end) in zip(places, itertools.pairwise(ends), strict=False):
                    bounds[chosen[place].row] = number + begin, number + end
                number += ends[-1]
            if is_global:
                bounds = {update.row: (0, number) for update in chosen}
        sums_P4 = torch.empty(number, 4, dtype=torch.float64, device=device)
        for table, of_types, types, spans, first in launches:
            addresses = table.point_to(of_types)
            with at_device_of(addresses):
                moclip_triton.chunk_dots[(len(spans) - 1,)](
                    addresses,
                    table.sizes_G,
                    table.owners_X,
                    table.starts_X,
                    spans,
                    sums_P4[first:],
                    *(moclip_triton.TYPES[dtype] for dtype in types),
                    ALIGNED=table.is_aligned,
                    CHUNK=table.chunk,
                    BLOCK=BLOCK,
                    num_warps=4,
                )
        return _Partial(sums_P4, bounds, is_reduced=False)

    def _reduced(
        self,
        updates: Sequence[Update],
        partial: _Partial,
        num_rows: int,
        num_global: int,
        reduce_dots: Callable[[Tensor], object],
    ) -> _Partial:
        """The launch between, and the sum over workers."""
        from lrmc_ray.method.fast import moclip_triton

        device = partial.sums_P4.device
        dots_T4 = torch.zeros(num_rows, 4, dtype=torch.float64, device=device)
        if partial.bounds:
            flat = tuple(itertools.chain(*partial.bounds.values()))
            table = self._table("rows", [1] * len(partial.bounds), device)
            with at_device_of(dots_T4):
                moclip_triton.add_spans[(len(partial.bounds),)](
                    partial.sums_P4,
                    table.indices(flat),
                    table.indices(tuple(partial.bounds)),
                    dots_T4,
                    TOGETHER=TOGETHER,
                    num_warps=4,
                )
        reduce_dots(dots_T4)
        bounds = {x.row: (0, num_global) if x.is_global else (x.row, x.row + 1) for x in updates}
        return _Partial(dots_T4, bounds, is_reduced=True)

    def _update(
        self,
        updates: Sequence[Update],
        types: tuple[torch.dtype, ...],
        settings: tuple[Clip, bool, bool],
        partial: _Partial,
        counts_T: Tensor,
    ) -> None:
        """The last launch."""
        from lrmc_ray.method.fast import moclip_triton

        clip, sees_capped, is_cautious = settings
        sizes = [update.tensors[0].numel() for update in updates]
        table = self._table(("update", *types, *settings), sizes, counts_T.device)
        addresses = table.point_to([update.tensors for update in updates])
        bounds = itertools.chain(*(partial.bounds.get(x.row, (0, 0)) for x in updates))
        numbers = torch.tensor([update.numbers for update in updates], dtype=torch.float64)
        with at_device_of(addresses):
            moclip_triton.chunk_update[(table.num_chunks,)](
                addresses,
                table.sizes_G,
                table.owners_X,
                table.starts_X,
                table.indices(tuple(update.row for update in updates)),
                table.indices(tuple(bounds)),
                partial.sums_P4,
                to_device(numbers, counts_T.device),
                counts_T,
                *(moclip_triton.TYPES[dtype] for dtype in types[:3]),
                CLIP=clip,
                SEES_CAPPED=sees_capped,
                IS_CAUTIOUS=is_cautious,
                IS_REDUCED=partial.is_reduced,
                ALIGNED=table.is_aligned,
                CHUNK=table.chunk,
                BLOCK=BLOCK,
                TOGETHER=TOGETHER,
                NUMBERS=NUMBERS,
                BINS=NUM_ANGLE_BINS,
                num_warps=4,
            )
        for update in updates:
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
