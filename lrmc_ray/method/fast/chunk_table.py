"""Where the tensors of one launch lie on a GPU, and which part of which tensor each program takes.

A model has hundreds of tensors, most of them small. One launch takes them all: its programs take
chunks of one fixed size, so no sum depends on anything but the tensors' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**15
"""Elements that one program takes."""
_ALIGNMENT = 16
"""Bytes that a thread reads at a time where every tensor begins at a multiple of them."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on ``device``; for one of the host, this does not wait for a GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ChunkTable:
    """The chunks of some groups of tensors; those of a group have one size."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """Divide groups of these many elements."""
        sizes_G = torch.tensor(sizes, dtype=torch.int64)
        # An empty tensor has one as well: its program counts the angle of a shard without elements.
        chunks_G = ((sizes_G + CHUNK - 1) // CHUNK).clamp_min(1)
        bounds_G = F.pad(chunks_G.cumsum(0), (1, 0))
        owners_X = torch.arange(len(sizes)).repeat_interleave(chunks_G)
        starts_X = CHUNK * (torch.arange(len(owners_X)) - bounds_G[owners_X])
        self.device, self.chunk = device, CHUNK
        self.num_chunks = len(owners_X)
        self._chunks_of_group = chunks_G.tolist()
        self._spans: tuple[Tensor, list[int]] | None = None
        self.sizes_G, self.bounds_G = to_device(sizes_G, device), to_device(bounds_G, device)
        self.owners_X, self.starts_X = to_device(owners_X, device), to_device(starts_X, device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._addresses: list[int] = []
        self._table: Tensor | None = None
        self.is_aligned = False

    def spans(self, most: int, *, together: bool) -> tuple[Tensor, list[int]]:
        """Chunks in a row that one program adds up: ``most`` spans of a group, or of all together.

        Returns:
            Where each begins, one longer than there are spans, int64; and on the host the spans of
            each group, or of all, one longer than there are. Asked again, the same.
        """
        if self._spans is None:
            edges, bounds = [0], [0]
            numbers = [self.num_chunks] if together else self._chunks_of_group
            for number in numbers if self.num_chunks else []:
                begin, parts = edges[-1], min(number, most)
                edges += [begin + number * (part + 1) // parts for part in range(parts)]
                bounds.append(len(edges) - 1)
            self._spans = to_device(torch.tensor(edges), self.device), bounds
        return self._spans

    def indices(self, numbers: tuple[int, ...]) -> Tensor:
        """Some numbers for each group, int64, always the same."""
        if numbers not in self._indices:
            self._indices[numbers] = to_device(torch.tensor(numbers), self.device)
        return self._indices[numbers]

    def point_to(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """Addresses of all tensors, group by group, int64; sent only where they have changed."""
        addresses = [tensor.data_ptr() for group in groups for tensor in group]
        if self._table is None or addresses != self._addresses:
            self._addresses = addresses
            self.is_aligned = all(address % _ALIGNMENT == 0 for address in addresses)
            self._table = to_device(torch.tensor(addresses, dtype=torch.int64), self.device)
        return self._table
