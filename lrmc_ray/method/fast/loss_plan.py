"""What the kernels of a GPU want to know of candidate sets: made once per batch, on the host.

Its integers say which program of a kernel does what. They follow from the sets alone, so the sums
that the programs make have the same order, and the same bits, in every run.

A position is taken in one of three ways:

- As a rule one program does all of it: logits, loss, and the gradient of the hidden state.
- One of more than ``LONG`` candidates would keep the others waiting. Its candidates are divided
  into parts of ``PART``, whose sums are added in their order.
- ``TILE`` positions that share most of their candidates are a dense tile: a matrix product of their
  hidden states and of the distinct tokens' rows, which are read once. By the bytes that is worth it
  where there are at most half as many rows to read. All tiles of a batch together have to save
  ``FEWEST_SAVED`` rows: 60 us at 0.3 TB/s and 576 numbers in bf16, for three more launches of 10.
  The tiles are made in the order of sizes, since large sets are what has much in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Entries of one token that a program adds up by itself; those of more are added in order."""
LONG = 256
"""Candidates of the longest position that one program takes."""
PART = 64
"""Candidates of a part of a longer one."""
TILE = 16
"""Positions of a dense tile."""
COLUMNS = 64
"""Distinct tokens of a dense tile that one program takes."""
FEWEST_SAVED = 2**13
"""Rows of the weight that dense tiles must save."""


class TokenOrder(NamedTuple):
    """The entries of candidate sets by token, U distinct ones; int32."""

    entries_E: Tensor
    """Entries by token, those of one token in the order of their positions."""
    positions_E: Tensor
    """The position of each of ``entries_E``."""
    bounds_U: Tensor
    """Where the entries of each token begin, one longer than there are tokens."""

    @staticmethod
    def of(offsets: Tensor, token_ids: Tensor) -> TokenOrder:
        """The order of sets; see ``CandidateSets`` for both. On a GPU the host waits, once."""
        rows = torch.arange(len(offsets) - 1, dtype=torch.int32, device=offsets.device)
        rows_E = rows.repeat_interleave(offsets.diff(), output_size=len(token_ids))
        tokens_E, entries_E = token_ids.sort(stable=True)
        _, counts_U = torch.unique_consecutive(tokens_E, return_counts=True)
        bounds_U = F.pad(counts_U.cumsum(0), (1, 0))
        return TokenOrder(entries_E.int(), rows_E[entries_E], bounds_U.int())

    def tokens_U(self, token_ids: Tensor) -> Tensor:  # noqa: N802
        """The distinct tokens, rising, of which ``token_ids`` [E] has one per entry."""
        return token_ids[self.entries_E[self.bounds_U[:-1]]]

    def columns_E(self) -> Tensor:  # noqa: N802
        """Place of each entry's token among the distinct ones, int32; waits for no device."""
        number, device = len(self.bounds_U) - 1, self.entries_E.device
        columns = torch.arange(number, dtype=torch.int32, device=device)
        columns = columns.repeat_interleave(self.bounds_U.diff(), output_size=len(self.entries_E))
        return torch.empty_like(columns).index_copy_(0, self.entries_E.long(), columns)


class RowParts(NamedTuple):
    """Positions of more than ``LONG`` candidates, in parts; int32."""

    parts_P3: Tensor
    """Position, first entry, and the entry behind the last one of each part."""
    rows_L: Tensor
    """These positions."""
    bounds_L: Tensor
    """The parts of each of them, one longer than there are positions."""

    @staticmethod
    def of(offsets: Tensor, rows_L: Tensor) -> RowParts:
        """The parts of the positions ``rows_L``."""
        begins_L, ends_L = offsets[rows_L], offsets[rows_L + 1]
        counts_L = (ends_L - begins_L + PART - 1) // PART
        bounds_L = F.pad(counts_L.cumsum(0), (1, 0))
        which_P = torch.arange(len(rows_L)).repeat_interleave(counts_L)
        first_P = begins_L[which_P] + PART * (torch.arange(len(which_P)) - bounds_L[which_P])
        last_P = torch.minimum(first_P + PART, ends_L[which_P])
        parts_P3 = torch.stack((rows_L[which_P], first_P, last_P), dim=1)
        return RowParts(parts_P3.int(), rows_L.int(), bounds_L.int())


class DenseTiles(NamedTuple):
    """Positions that share most of their candidates; int32. Columns are the distinct tokens."""

    rows_S: Tensor
    """``TILE`` positions of each tile, one tile after the other, -1 where there are fewer."""
    bounds_t: Tensor
    """The columns of each tile, one longer than there are tiles."""
    entries_U: Tensor
    """An entry of the token of each column."""
    places_UT: Tensor
    """The entry of each column and position of its tile, -1 where it is no candidate."""
    blocks_B2: Tensor
    """Tile and first column of every ``COLUMNS`` columns."""

    @staticmethod
    def of(order_N: Tensor, rows_E: Tensor, token_ids: Tensor) -> DenseTiles:
        """The tiles of positions in this order that are worth it."""
        num_tiles = (len(order_N) + TILE - 1) // TILE
        places_N = torch.empty_like(order_N)
        places_N[order_N] = torch.arange(len(order_N))
        tile_E = places_N[rows_E] // TILE
        # Tokens of a tile, each once, in the order of tiles.
        base = int(token_ids.max()) + 1 if len(token_ids) else 1
        keys_U, column_E = torch.unique(tile_E * base + token_ids, return_inverse=True)
        tile_U = keys_U // base
        num_entries_t = torch.bincount(tile_E, minlength=num_tiles)
        num_columns_t = torch.bincount(tile_U, minlength=num_tiles)
        saved_t = num_entries_t - num_columns_t - TILE
        is_dense_t = 2 * saved_t >= num_entries_t
        if int(saved_t[is_dense_t].sum()) < FEWEST_SAVED:
            is_dense_t = torch.zeros_like(is_dense_t)
        is_kept_U = is_dense_t[tile_U]
        new_U = is_kept_U.cumsum(0) - 1
        kept_E = is_dense_t[tile_E].nonzero()[:, 0]
        columns = new_U[column_E[kept_E]]
        entries_U = torch.zeros(int(is_kept_U.sum()), dtype=torch.int32)
        entries_U[columns] = kept_E.int()
        places_UT = torch.full((len(entries_U), TILE), -1, dtype=torch.int32)
        places_UT[columns, places_N[rows_E[kept_E]] % TILE] = kept_E.int()
        rows_tT = F.pad(order_N, (0, num_tiles * TILE - len(order_N)), value=-1).view(-1, TILE)
        counts_t = num_columns_t[is_dense_t]
        bounds_t = F.pad(counts_t.cumsum(0), (1, 0))
        blocks_t = (counts_t + COLUMNS - 1) // COLUMNS
        which_B = torch.arange(len(blocks_t)).repeat_interleave(blocks_t)
        begin_B = F.pad(blocks_t.cumsum(0), (1, 0))[which_B]
        first_B = bounds_t[which_B] + COLUMNS * (torch.arange(len(which_B)) - begin_B)
        return DenseTiles(
            rows_tT[is_dense_t].flatten().int(),
            bounds_t.int(),
            entries_U,
            places_UT,
            torch.stack((which_B, first_B), dim=1).int(),
        )


@dataclass(frozen=True, eq=False)
class LossPlan:
    """Positions and entries in the order in which the kernels take them; int32 but for one."""

    rows_N: Tensor
    """Positions: first those in tiles or parts. Within both, those of most candidates come first,
    since they take longest."""
    outside_N: Tensor
    """float32, the base's probability outside the candidates of each position."""
    tokens_E: Tensor
    """The tokens of each position, rising."""
    logprobs_E: Tensor
    """float16, what the base said of them."""
    by_token: TokenOrder
    bounds_X: Tensor
    """Chunks of entries by token, one longer than there are chunks; each is of one token."""
    partial_X: Tensor
    """The row of partial sums that each chunk fills; -1 if it is the only one of its token."""
    split_bounds: Tensor
    """Rows of partial sums of each token of several chunks, one longer than there are tokens."""
    split_entries: Tensor
    """An entry of each of these tokens."""
    parts: RowParts
    tiles: DenseTiles
    num_apart: int
    """Positions in tiles or parts."""
    num_partial: int
    """Rows of partial sums."""
    longest: int
    """Candidates of the position that has most."""
    bounds: list[int]
    """On the host: where the entries of each position begin, and where the last one's end."""

    @staticmethod
    def of(offsets: Tensor, token_ids: Tensor, logprobs: Tensor, outside_N: Tensor) -> LossPlan:
        """The plan for candidate sets on the CPU; see ``CandidateSets`` for the first three.

        Args:
            offsets: [N + 1].
            token_ids: [E].
            logprobs: [E].
            outside_N: The base's probability outside the candidates.
        """
        sizes_N = offsets.diff()
        rows_E = torch.arange(len(sizes_N)).repeat_interleave(sizes_N, output_size=len(token_ids))
        order_N = sizes_N.argsort(descending=True, stable=True)
        tiles = DenseTiles.of(order_N, rows_E, token_ids)
        is_apart_N = torch.zeros(len(sizes_N), dtype=torch.bool)
        is_apart_N[tiles.rows_S[tiles.rows_S >= 0].long()] = True
        long_L = order_N[(sizes_N[order_N] > LONG) & ~is_apart_N[order_N]]
        is_apart_N[long_L] = True
        is_apart_N = is_apart_N[order_N]
        by_token = TokenOrder.of(offsets, token_ids)
        rising_E = by_token.entries_E[by_token.positions_E.argsort(stable=True)]
        starts = by_token.bounds_U.long()
        num_chunks = (starts.diff() + CHUNK - 1) // CHUNK
        first = F.pad(num_chunks.cumsum(0), (1, 0))[:-1]
        which_X = torch.arange(len(num_chunks)).repeat_interleave(num_chunks)
        bounds_X = starts[which_X] + CHUNK * (torch.arange(len(which_X)) - first[which_X])
        is_split = num_chunks > 1
        is_partial_X = is_split[which_X]
        partial_X = torch.where(is_partial_X, is_partial_X.cumsum(0) - 1, -1)
        return LossPlan(
            torch.cat((order_N[is_apart_N], order_N[~is_apart_N])).int(),
            outside_N.float(),
            token_ids[rising_E],
            logprobs[rising_E],
            by_token,
            torch.cat([bounds_X, bounds_X.new_tensor([len(token_ids)])]).int(),
            partial_X.int(),
            F.pad(num_chunks[is_split].cumsum(0), (1, 0)).int(),
            by_token.entries_E[starts[:-1][is_split]],
            RowParts.of(offsets, long_L),
            tiles,
            int(is_apart_N.sum()),
            int(is_partial_X.sum()),
            int(sizes_N.max()) if len(sizes_N) else 0,
            offsets.tolist(),
        )

    def renamed(self, rename: Callable[[Tensor], Tensor]) -> LossPlan:
        """The same for other names of the tokens, which rise with them."""
        return replace(self, tokens_E=rename(self.tokens_E))

    def moved(self, move: Callable[[Tensor], Tensor]) -> LossPlan:
        """The same with what ``move`` makes of each tensor."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = move(value)
            elif isinstance(value, tuple):
                value = type(value)(*map(move, value))
            moved[field.name] = value
        return LossPlan(**moved)
