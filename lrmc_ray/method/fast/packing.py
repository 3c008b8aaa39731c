"""Prefixes that sequences share, computed once.

In a causal model the hidden states of a prefix that sequences share are the same in all of them.
*Packed*, the sequences are one row: a tree of tokens, in which each sees its ancestors alone. There
is no padding, and a prompt that all samples begin with is there once. The loss and its gradient are
the same up to rounding. The plain counterpart is ``layout.pad``; long sequences without a common
prefix are cheaper that way, since attention within one row costs the square of its length.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrmc_ray.method.layout import Layout, pad


def lay_out(
    sequences: Sequence[Tensor], attention_cost: float, longest: float = math.inf
) -> Layout:
    """The cheaper of the two layouts.

    Args:
        sequences: Token ids of each, int64 [T].
        attention_cost: What it costs a token to see one more, in units of what else it costs;
            infinity always pads.
        longest: Tokens of the longest sequence that may be packed: beyond a window of the model's
            attention a token sees less than its ancestors.
    """
    padded = pad(sequences)
    if not math.isfinite(attention_cost) or any(len(ids_T) > longest for ids_T in sequences):
        return padded
    packed = pack(sequences)
    cheaper = _cost(packed, attention_cost) < _cost(padded, attention_cost)
    return packed if cheaper else padded


def pack(sequences: Sequence[Tensor]) -> Layout:
    """A tree: in lexicographic order, a sequence shares most with the one before it."""
    ids = [ids_T.tolist() for ids_T in sequences]
    columns: list[list[int]] = [[] for _ in ids]
    tokens: list[int] = []
    depths: list[int] = []
    before: list[int] = []
    path: list[int] = []
    for index in sorted(range(len(ids)), key=lambda i: (ids[i], i)):
        common = 0
        for ours, theirs in zip(ids[index], before, strict=False):
            if ours != theirs:
                break
            common += 1
        new = ids[index][common:]
        path = path[:common] + list(range(len(tokens), len(tokens) + len(new)))
        depths += range(common, len(ids[index]))
        tokens += new
        before, columns[index] = ids[index], path
    is_visible_TT = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    places = [torch.tensor(path) for path in columns]
    for path_T in places:
        is_visible_TT[path_T[:, None], path_T[None, :]] |= path_T[:, None] >= path_T[None, :]
    return Layout(
        torch.tensor([tokens], dtype=torch.int64),
        torch.tensor([depths], dtype=torch.int64),
        is_visible_TT,
        [0] * len(ids),
        places,
        sum(map(len, ids)) - len(tokens),
    )


def _cost(layout: Layout, attention_cost: float) -> float:
    rows, length = layout.input_ids_BT.shape
    return rows * length * (1 + attention_cost * length)
