"""Which contexts share a prefix, and which of them are computed together."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tokens = tuple[int, ...]

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a pass of its own."""


MAX_KEPT_FACTOR = 8
"""Positions whose keys and values a batch may keep, in units of ``batch_tokens``."""


PADDING_WORTH_A_PASS = 96
"""Padded positions that cost about as much as another pass: it reads all weights."""


OVERLAP = 3
"""Tokens at the end of a context that a gold answer may begin with."""


@dataclass
class ContextRow:
    """One sequence to run: an item's context, or context and continuation in one."""

    tokens: Tokens
    context_length: int
    members: list[tuple[int, Tokens]] = field(default_factory=list)
    """Request and continuation; those of several tokens run after the row, from its cache."""

    @property
    def branches(self) -> bool:
        """Whether continuations of several tokens run after the row, from its cache."""
        return len(self.tokens) == self.context_length and any(
            len(continuation) > 1 for _, continuation in self.members
        )


@dataclass
class GeneratedContexts:
    """Contexts that were run to generate from; the gold answers are scored from them."""

    rows: dict[Tokens, int]
    """Row of each context."""
    lengths: list[int]
    kept: int
    """Positions of the cache, padding included."""
    own_lengths: list[int]
    """Tokens of each row after the shared prefix."""
    last_BOD: torch.Tensor
    """Hidden states of the last ``OVERLAP + 1`` tokens of each context."""
    cache: Any

    def find(self, context: Tokens, continuation: Tokens) -> tuple[int, int] | None:
        """The row to score ``continuation`` from, and how many of its tokens are in the row.

        lm-eval counts white space at the end of a context as part of the continuation.
        """
        for inside in range(min(OVERLAP + 1, len(continuation))):
            row = self.rows.get(context + continuation[:inside])
            if row is not None and inside < self.own_lengths[row]:
                return row, inside
        return None


@dataclass
class TokenQueries:
    """Tokens whose log-probability is wanted, and of which request they are part."""

    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    def add(self, row: int, position: int, tokens: Sequence[int], request: int) -> None:
        """The ``tokens`` that follow ``position`` and its successors."""
        count = len(tokens)
        self.rows += [row] * count
        self.positions += range(position, position + count)
        self.tokens += tokens
        self.requests += [request] * count


def context_rows(
    requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], max_length: int
) -> list[ContextRow]:
    """One row per context; a context with a single continuation runs together with it."""
    rows: dict[Tokens, ContextRow] = {}
    for index, (_, context, continuation) in enumerate(requests):
        # The last token is only predicted; what is too long loses its beginning.
        whole = (*context, *continuation)[-(max_length + 1) :]
        start = len(whole) - len(continuation)
        tokens = whole[:start]
        row = rows.setdefault(tokens, ContextRow(tokens, len(tokens)))
        row.members.append((index, whole[start:]))
    for row in rows.values():
        if len(row.members) == 1:
            row.tokens += row.members[0][1][:-1]
    return list(rows.values())


def prefix_families(rows: Iterable[ContextRow]) -> list[tuple[Tokens, list[ContextRow]]]:
    """Rows by their common beginning; those that have none share the empty one, which is last.

    Greedy in the order of the tokens: a row joins if at least half of the beginning stays common.
    Every row keeps one token of its own, and all of its scored positions.
    """
    families: list[tuple[Tokens, list[ContextRow]]] = []
    alone: list[ContextRow] = []
    group: list[ContextRow] = []
    shared: Tokens = ()

    def close() -> None:
        if len(group) > 1 and len(shared) >= MIN_SHARED_TOKENS:
            families.append((shared, list(group)))
        else:
            alone.extend(group)

    for row in sorted(rows, key=lambda row: row.tokens):
        own = row.tokens[: row.context_length - 1]
        common = _common_length(shared, own) if group else len(own)
        if group and 2 * common < len(shared):
            close()
            group, common = [], len(own)
        group.append(row)
        shared = own[:common]
    close()
    if alone:
        families.append(((), alone))
    return families


def _common_length(first: Tokens, second: Tokens) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
