"""Contexts that answers were generated from, kept until their gold answers have been scored.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from lrmc_ray.evaluate.prefix_batches import BatchLimits, Tokens
from lrmc_ray.evaluate.prefix_model import SharedBatch

OVERLAP = 3
"""Tokens at the end of a context that a gold answer may begin with."""


@dataclass
class KeptContexts:
    """Contexts that were run to generate from; the gold answers are scored from them."""

    rows: dict[Tokens, int]
    """Row of each context."""
    lengths: list[int]
    mask_BT: torch.Tensor
    """1 where a place of the cache holds a token of its row."""
    has_gaps: bool
    """Whether padding stands between a context and what may follow it."""
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


class ContextMemory:
    """The contexts of the latest generation, as far as memory allows."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._contexts: list[KeptContexts] = []

    def take(self) -> list[KeptContexts]:
        """What was kept; it is forgotten here."""
        contexts, self._contexts = self._contexts, []
        return contexts

    def remember(self, batch: SharedBatch, hidden_BTD: torch.Tensor, cache: Any) -> None:
        """Keep the contexts of ``batch`` for their gold answers.

        Args:
            batch: that was run.
            hidden_BTD: hidden states after the prefix.
            cache: copied.
        """
        positions = sum(contexts.mask_BT.numel() for contexts in self._contexts)
        if not self._limits.may_keep(positions + len(batch.rows) * batch.kept):
            return
        device = hidden_BTD.device
        ends_BO = torch.tensor(batch.ends, device=device)[:, None]
        ends_BO = (ends_BO - OVERLAP - 1 + torch.arange(OVERLAP + 1, device=device)).clamp(0)
        rows_BO = torch.arange(len(batch.rows), device=device)[:, None]
        self._contexts.append(
            KeptContexts(
                rows={row.tokens: index for index, row in enumerate(batch.rows)},
                lengths=batch.lengths,
                mask_BT=batch.mask(device),
                has_gaps=batch.has_gaps,
                own_lengths=batch.own_lengths,
                last_BOD=hidden_BTD[rows_BO, ends_BO],
                cache=copy.deepcopy(cache),
            )
        )
