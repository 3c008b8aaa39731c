"""What the kernels of a GPU want to know of candidate sets: made once per batch, on the host.

Its integers say which program of a kernel does what. They follow from the sets alone, so the sums
that the programs make have the same order, and the same bits, in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Entries of one token that a program adds up by itself; those of more are added in order."""


@dataclass(frozen=True, eq=False)
class LossPlan:
    """Positions and entries in the order in which the kernels take them; int32 but for one."""

    rows_N: Tensor
    """Positions, those of most candidates first: they take longest."""
    outside_N: Tensor
    """float32, the base's probability outside the candidates of each position."""
    entries_E: Tensor
    """Entries by token, those of one token in the order of their positions."""
    positions_E: Tensor
    """The position of each of ``entries_E``."""
    bounds_X: Tensor
    """Chunks of ``entries_E``, one longer than there are chunks; each is of one token."""
    partial_X: Tensor
    """The row of partial sums that each chunk fills; -1 if it is the only one of its token."""
    split_bounds: Tensor
    """Rows of partial sums of each token of several chunks, one longer than there are tokens."""
    split_entries: Tensor
    """An entry of each of these tokens."""
    num_partial: int
    """Rows of partial sums."""
    longest: int
    """Candidates of the position that has most."""

    @staticmethod
    def of(offsets: Tensor, token_ids: Tensor, outside_N: Tensor) -> LossPlan:
        """The plan for candidate sets on the CPU; see ``CandidateSets`` for the first two.

        Args:
            offsets: [N + 1].
            token_ids: [E].
            outside_N: The base's probability outside the candidates.
        """
        sizes_N = offsets.diff()
        rows_E = torch.arange(len(sizes_N)).repeat_interleave(sizes_N, output_size=len(token_ids))
        tokens_E, entries_E = token_ids.sort(stable=True)
        _, counts = torch.unique_consecutive(tokens_E, return_counts=True)
        num_chunks = (counts + CHUNK - 1) // CHUNK
        starts = F.pad(counts.cumsum(0), (1, 0))
        first = F.pad(num_chunks.cumsum(0), (1, 0))[:-1]
        which_X = torch.arange(len(num_chunks)).repeat_interleave(num_chunks)
        bounds_X = starts[which_X] + CHUNK * (torch.arange(len(which_X)) - first[which_X])
        is_split = num_chunks > 1
        is_partial_X = is_split[which_X]
        partial_X = torch.where(is_partial_X, is_partial_X.cumsum(0) - 1, -1)
        return LossPlan(
            sizes_N.argsort(descending=True, stable=True).int(),
            outside_N.float(),
            entries_E.int(),
            rows_E[entries_E].int(),
            torch.cat([bounds_X, bounds_X.new_tensor([len(token_ids)])]).int(),
            partial_X.int(),
            F.pad(num_chunks[is_split].cumsum(0), (1, 0)).int(),
            entries_E[starts[:-1][is_split]].int(),
            int(is_partial_X.sum()),
            int(sizes_N.max()) if len(sizes_N) else 0,
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> LossPlan:
        """The same with what ``move`` makes of each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: move(x) if isinstance(x, Tensor) else x for name, x in values.items()
        }
        return LossPlan(**moved)
