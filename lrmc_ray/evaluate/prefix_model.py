"""A model that continues from keys and values which several sequences share.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrmc_ray.evaluate.prefix_batches import BatchLimits, ContextRow, Tokens, prefix_families
from lrmc_ray.evaluate.prefix_sharing import Sharing, forward
from lrmc_ray.method.head import OutputHead, head_logits


@dataclass(frozen=True)
class SharedBatch:
    """Rows that are run together, after the prefix that they share."""

    rows: list[ContextRow]
    prefix_length: int
    prefix_cache: Any
    """Keys and values of the prefix, as one sequence; None without a prefix."""
    is_left: bool = False
    """Whether padding stands before the rows, which then have no prefix."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, those of the prefix included."""
        return [len(row.tokens) for row in self.rows]

    @property
    def own_lengths(self) -> list[int]:
        """Tokens of each row after the prefix."""
        return [length - self.prefix_length for length in self.lengths]

    @property
    def kept(self) -> int:
        """Places of the cache once the rows have been run, padding included."""
        return max(self.lengths)

    @property
    def has_gaps(self) -> bool:
        """Whether padding stands between a row and what will follow it."""
        return not self.is_left and min(self.lengths) < self.kept

    @property
    def starts(self) -> list[int]:
        """Column of each row's first token after the prefix."""
        longest = max(self.own_lengths)
        return [longest - length if self.is_left else 0 for length in self.own_lengths]

    @property
    def ends(self) -> list[int]:
        """Column behind each row's last token."""
        return [start + own for start, own in zip(self.starts, self.own_lengths, strict=True)]

    def mask(self, device: torch.device) -> torch.Tensor:
        """1 where a place of the cache holds a token of the row, [B, T]."""
        starts_B = torch.tensor(self.starts, device=device)[:, None]
        ends_B = starts_B + torch.tensor(self.lengths, device=device)[:, None]
        columns_T = torch.arange(self.kept, device=device)
        return ((columns_T >= starts_B) & (columns_T < ends_B)).long()


class PrefixModel:
    """A causal LM, run in batches of rows with a shared prefix.

    Args:
        model: one whose sharing is possible.
        head: its output head.
        limits: how much is computed at once.
        sharing: what its cache may be used for.
    """

    def __init__(self, model: Any, head: OutputHead, limits: BatchLimits, sharing: Sharing) -> None:
        self.model = model
        self.limits = limits
        self.sharing = sharing
        self.device: torch.device = model.device
        self._head = head

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, float32 [N, V]."""
        return head_logits(hidden_ND, self._head)

    def shared_batches(self, rows: Iterable[ContextRow], *, room: int = 0) -> Iterator[SharedBatch]:
        """All ``rows``, in batches; each prefix is run once, before the batches that share it.

        Args:
            rows: in any order.
            room: positions that each will still add to the cache.
        """
        sharing = self.sharing
        sharers, others = [], []
        for row in rows:
            # A step for each token takes whole batches, and those of a prefix would be too small.
            fits = sharing.allows_gap if room else sharing.allows
            if fits(row.reach + room):
                sharers.append(row)
            else:
                others += row.apart()
        for prefix, family in prefix_families(sharers):
            cache = self._run_prefix(prefix)
            yield from self._batches(family, len(prefix), cache, room)
        for side in sorted({sharing.borders.side(row.reach) for row in others}):
            part = [row for row in others if sharing.borders.side(row.reach) == side]
            yield from self._batches(part, 0, None, room)

    def _batches(
        self, rows: Sequence[ContextRow], prefix_length: int, cache: Any, room: int
    ) -> Iterator[SharedBatch]:
        """Batches of one family: those that nothing follows, and those with gaps where they may be.

        Where they may not, rows without a prefix are padded on the left, and those with one must be
        of equal length.
        """
        for branches in (False, True):
            same = [row for row in rows if row.branches == branches]
            growth = room + max((row.growth for row in same), default=0)
            near: list[ContextRow] = []
            far: list[ContextRow] = []
            for row in same:
                is_near = not growth or self.sharing.allows_gap(len(row.tokens) + growth)
                (near if is_near else far).append(row)
            for batch in self.limits.batches(near, prefix_length, room=room):
                yield SharedBatch(batch, prefix_length, cache)
            is_left = not prefix_length
            for batch in self.limits.batches(far, prefix_length, room=room, equal=not is_left):
                yield SharedBatch(batch, prefix_length, cache, is_left=is_left)

    def _run_prefix(self, prefix: Tokens) -> Any:
        if not prefix:
            return None
        ids_BT = torch.tensor([prefix], device=self.device)
        return forward(self.model, ids_BT, use_cache=True).past_key_values

    def run(self, batch: SharedBatch, *, keep: bool) -> tuple[torch.Tensor, Any]:
        """Hidden states of the rows after the prefix, and their cache.

        Args:
            batch: what to run.
            keep: whether the cache is wanted.
        """
        own = [row.tokens[batch.prefix_length :] for row in batch.rows]
        ids_BT = self.pad(own, batch.starts)
        cache = mask_BT = positions_BT = None
        if batch.prefix_cache is not None:
            cache = copy.deepcopy(batch.prefix_cache)
            cache.batch_repeat_interleave(len(batch.rows))
        if batch.is_left:
            mask_BT = batch.mask(self.device)
            positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        output = forward(
            self.model,
            ids_BT,
            cache=cache,
            mask_BT=mask_BT,
            positions_BT=positions_BT,
            use_cache=keep,
        )
        return output.last_hidden_state, output.past_key_values

    def go_on(
        self, ids_BT: torch.Tensor, cache: Any, mask_BT: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Hidden states of further tokens of the sequences in ``cache``, and the grown cache.

        Args:
            ids_BT: the tokens.
            cache: used up.
            mask_BT: 1 where a place, cached or new, holds a token of the row.
            positions_BT: of the tokens in their sequences.
        """
        output = forward(
            self.model, ids_BT, cache=cache, mask_BT=mask_BT, positions_BT=positions_BT
        )
        return output.last_hidden_state, output.past_key_values

    def pad(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Token ids [B, T]; what stands in the padding is never seen.

        Args:
            rows: of unequal lengths.
            starts: column of the first token of each; 0 by default.
        """
        ids_BT = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        for index, row in enumerate(rows):
            start = starts[index] if starts is not None else 0
            ids_BT[index, start : start + len(row)] = torch.tensor(row)
        return ids_BT.to(self.device)
