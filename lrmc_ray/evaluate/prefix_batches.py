"""Which contexts share a prefix, and which of them are computed together."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Tokens = tuple[int, ...]

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a pass of its own."""

MAX_KEPT_FACTOR = 8
"""Positions whose keys and values a batch may keep, in units of ``batch_tokens``."""

PADDING_WORTH_A_PASS = 96
"""Padded positions that cost about as much as another pass: it reads all weights."""


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

    @property
    def growth(self) -> int:
        """Tokens that the longest of its continuations adds to its cache."""
        if not self.branches:
            return 0
        return max(len(continuation) for _, continuation in self.members) - 1

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence that is computed from it."""
        return len(self.tokens) + self.growth

    def apart(self) -> list["ContextRow"]:
        """The same requests with every continuation in a row of its own, so that none branches."""
        if not self.branches:
            return [self]
        rows: dict[Tokens, ContextRow] = {}
        for request, continuation in self.members:
            tokens = self.tokens + continuation[:-1]
            row = rows.setdefault(tokens, ContextRow(tokens, self.context_length))
            row.members.append((request, continuation))
        return list(rows.values())


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


@dataclass(frozen=True)
class BatchLimits:
    """How much is computed at once.

    Args:
        batch_tokens: most positions of one forward pass, padding included.
    """

    batch_tokens: int

    def may_keep(self, positions: int) -> bool:
        """Whether there is memory for the keys and values of so many positions."""
        return positions <= MAX_KEPT_FACTOR * self.batch_tokens

    def batches(
        self,
        rows: Sequence[ContextRow],
        prefix_length: int,
        *,
        room: int = 0,
        equal: bool = False,
    ) -> Iterator[list[ContextRow]]:
        """Rows of about equal length, longest first, as many as fit.

        Args:
            rows: all of one family.
            prefix_length: what they share.
            room: positions that each will still add to the cache.
            equal: whether their lengths must be equal.
        """
        ordered = sorted(rows, key=lambda row: (len(row.tokens), row.tokens), reverse=True)
        lengths = [len(row.tokens) - prefix_length for row in ordered]
        for part in self.slices(lengths, kept=prefix_length, room=room, equal=equal):
            yield ordered[part]

    def slices(
        self, lengths: Sequence[int], *, kept: int, room: int = 0, equal: bool = False
    ) -> Iterator[slice]:
        """Slices of sequences that are run together.

        A batch ends where it is full, or where padding would cost more than another pass.

        Args:
            lengths: of the sequences, longest first.
            kept: positions of the cache that each sequence starts with.
            room: positions that each will still add to the cache, one pass per position.
            equal: whether the lengths of a slice must be equal.
        """
        worth = PADDING_WORTH_A_PASS * (1 + room // 8)
        start = padding = 0
        for index, length in enumerate(lengths):
            longest = lengths[start]
            padding += longest - length
            num_rows = index + 1 - start
            if num_rows > 1 and (
                num_rows * longest > self.batch_tokens
                or not self.may_keep(num_rows * (kept + longest + room))
                or padding > (0 if equal else worth)
            ):
                yield slice(start, index)
                start, padding = index, 0
        if lengths:
            yield slice(start, len(lengths))
