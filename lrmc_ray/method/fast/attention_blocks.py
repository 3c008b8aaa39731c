"""Attention of a packed row in blocks, without the pairs of tokens that do not see each other.

A packed row is a tree: behind a common beginning every sequence sees that and itself. With a mask
attention computes all pairs of the row, and most of them for nothing. Here the row is cut where a
sequence begins, and each block of tokens meets the tokens alone that one of them sees. Hidden pairs
have a weight of exactly zero, so the result is the same up to rounding.

The blocks belong to a mask: whoever is handed that very tensor finds them, also where activations
are computed a second time.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PAIRS_OF_A_CALL = 512
"""Pairs that take about as long as one more block does, forward and backward."""
LARGEST_SHARE = 0.7
"""Of all pairs. Beyond it the row is left whole."""


class Block(NamedTuple):
    """Consecutive tokens, and what they see."""

    start: int
    stop: int
    columns_X: Tensor
    """Ascending places of the tokens that one of them sees."""


class Blocks(NamedTuple):
    """A mask in blocks."""

    blocks: Sequence[Block]
    columns_X: Tensor
    """Of all blocks, one after the other."""
    masks: Sequence[Tensor]
    """The part [1, 1, q, X] of the mask for each block."""
    shape: torch.Size
    """[Q, T]"""


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Given queries [B, X, q, d] of X heads, keys, values, a mask: what they see, [B, q, X, d]."""

_KNOWN: MutableMapping[Tensor, Blocks] = WeakTensorKeyDictionary()


def blocks_of(is_visible_QT: Tensor) -> list[Block]:
    """The blocks of the last Q of T tokens; one for all where more would not spare enough."""
    num_queries, num_tokens = is_visible_QT.shape
    # A token that does not see the one before it begins a sequence, or what one does not share.
    before_Q = torch.arange(num_queries) + (num_tokens - num_queries) - 1
    follows_Q = is_visible_QT[torch.arange(num_queries), before_Q.clamp_min(0)]
    follows_Q[:1] = False
    starts = (~follows_Q).nonzero()[:, 0].tolist()
    found: list[tuple[int, int, Tensor]] = []
    for start, stop in zip(starts, [*starts[1:], num_queries], strict=True):
        seen_T = is_visible_QT[start:stop].any(0)
        if found:
            first, middle, before_T = found[-1]
            together_T = before_T | seen_T
            apart = (middle - first) * int(before_T.sum()) + (stop - start) * int(seen_T.sum())
            if (stop - first) * int(together_T.sum()) <= apart + PAIRS_OF_A_CALL:
                found[-1] = (first, stop, together_T)
                continue
        found.append((start, stop, seen_T))
    return [Block(start, stop, seen_T.nonzero()[:, 0]) for start, stop, seen_T in found]


def divide(mask_11QT: Tensor, is_visible_QT: Tensor) -> None:
    """Let attention with this mask go in blocks, where that spares enough; on a CPU alone."""
    if not mask_11QT.is_cpu:
        return  # a call costs more on a GPU than these pairs
    blocks = blocks_of(is_visible_QT)
    pairs = sum((block.stop - block.start) * len(block.columns_X) for block in blocks)
    if pairs + PAIRS_OF_A_CALL * len(blocks) > LARGEST_SHARE * is_visible_QT.numel():
        return
    masks = [mask_11QT[:, :, start:stop, columns_X] for start, stop, columns_X in blocks]
    columns_X = torch.cat([block.columns_X for block in blocks])
    _KNOWN[mask_11QT] = Blocks(blocks, columns_X, masks, is_visible_QT.shape)


def divided(mask: Tensor) -> Blocks | None:
    """The blocks of a mask; None where it has none."""
    return _KNOWN.get(mask)


def attend_in_blocks(
    attend: Attend, query_BXQd: Tensor, key_BXTd: Tensor, value_BXTd: Tensor, found: Blocks
) -> Tensor:
    """What ``attend`` returns for the whole row, block by block."""
    sizes = [len(block.columns_X) for block in found.blocks]
    keys = torch.split(key_BXTd.index_select(2, found.columns_X), sizes, dim=2)
    values = torch.split(value_BXTd.index_select(2, found.columns_X), sizes, dim=2)
    queries = torch.split(query_BXQd, [one.stop - one.start for one in found.blocks], dim=2)
    parts = map(attend, queries, keys, values, found.masks)
    return torch.cat(list(parts), dim=1)
