"""Log-probabilities of continuations, from contexts that are run once.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lrmc_ray.evaluate.prefix_batches import ContextRow, Tokens
from lrmc_ray.evaluate.prefix_memory import OVERLAP, KeptContexts
from lrmc_ray.evaluate.prefix_model import PrefixModel, SharedBatch

HEAD_POSITIONS = 256
"""Positions at which the head is applied at once: 50 MB of logits at a vocabulary of 49,152."""


@dataclass
class WantedTokens:
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


@dataclass(frozen=True)
class _Child:
    """A continuation of several tokens, which runs after its context."""

    parent: int
    """Row of the context in the cache."""
    request: int
    continuation: Tokens
    """Its first token is scored with the context."""


class ContinuationScores:
    """The log-likelihoods of one call's requests, added up as their tokens are scored."""

    def __init__(self, model: PrefixModel, num_requests: int) -> None:
        self._model = model
        self._values = np.zeros(num_requests)
        self._is_greedy = np.ones(num_requests, dtype=bool)

    def answers(self) -> list[tuple[float, bool]]:
        """Of each request: log-likelihood, and whether greedy decoding writes it."""
        return [(float(v), bool(g)) for v, g in zip(self._values, self._is_greedy, strict=True)]

    def score(self, rows: Iterable[ContextRow]) -> None:
        """Score the continuations of ``rows``."""
        for batch in self._model.shared_batches(rows):
            self._score_batch(batch)

    def _score_batch(self, batch: SharedBatch) -> None:
        branching = any(row.branches for row in batch.rows)
        hidden_BTD, cache = self._model.run(batch, keep=branching)
        queries = WantedTokens()
        children: list[_Child] = []
        for index, (row, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
            position = start + row.context_length - 1 - batch.prefix_length
            for request, continuation in row.members:
                if row.branches and len(continuation) > 1:
                    queries.add(index, position, continuation[:1], request)
                    children.append(_Child(index, request, continuation))
                else:
                    queries.add(index, position, continuation, request)
        self._answer(queries, hidden_BTD)
        if children:
            mask_BT = batch.mask(self._model.device)
            self._score_children(children, batch.lengths, mask_BT, cache)

    def score_remembered(
        self, memory: Iterable[KeptContexts], rows: Sequence[ContextRow]
    ) -> Sequence[ContextRow]:
        """Score the rows whose contexts have just been generated from; the others come back."""
        for contexts in memory:
            queries = WantedTokens()
            children: list[_Child] = []
            left = []
            for row in rows:
                context = row.tokens[: row.context_length]
                starts = [contexts.find(context, answer) for _, answer in row.members]
                longest = max(len(answer) for _, answer in row.members)
                if None in starts or not self._may_follow(contexts, len(context), longest):
                    left.append(row)
                    continue
                for (request, answer), start in zip(row.members, starts, strict=True):
                    assert start is not None
                    parent, inside = start
                    queries.add(parent, OVERLAP - inside, answer[: inside + 1], request)
                    if len(answer) > inside + 1:
                        children.append(_Child(parent, request, answer[inside:]))
            rows = left
            if queries.rows:
                self._answer(queries, contexts.last_BOD)
            if children:
                self._score_children(children, contexts.lengths, contexts.mask_BT, contexts.cache)
        return rows

    def _may_follow(self, contexts: KeptContexts, context: int, answer: int) -> bool:
        """Whether an answer of so many tokens may continue from a context of so many."""
        sharing = self._model.sharing
        if contexts.has_gaps and not sharing.allows_gap(contexts.mask_BT.shape[1] + answer):
            return False
        return sharing.allows(context + answer)

    def _score_children(
        self,
        children: Sequence[_Child],
        lengths: Sequence[int],
        mask_BT: torch.Tensor,
        cache: Any,
    ) -> None:
        """Score what follows the first token of continuations, from their contexts' cache.

        Args:
            children: the continuations.
            lengths: tokens of each row of the cache.
            mask_BT: 1 where a place of the cache holds a token of its row.
            cache: used up.
        """
        model = self._model
        children = sorted(children, key=lambda child: len(child.continuation), reverse=True)
        longest_first = [len(child.continuation) - 1 for child in children]
        for where in model.limits.slices(longest_first, kept=mask_BT.shape[1]):
            part = children[where]
            parents_B = torch.tensor([child.parent for child in part], device=model.device)
            grown = copy.deepcopy(cache) if where.stop < len(children) else cache
            grown.batch_select_indices(parents_B)
            ids_BT = model.pad([child.continuation[:-1] for child in part])
            lengths_B = torch.tensor(lengths, device=model.device)[parents_B]
            hidden_BTD, _ = model.go_on(
                ids_BT,
                grown,
                mask_BT=torch.cat([mask_BT[parents_B], torch.ones_like(ids_BT)], dim=1),
                positions_BT=lengths_B[:, None]
                + torch.arange(ids_BT.shape[1], device=model.device),
            )
            queries = WantedTokens()
            for index, child in enumerate(part):
                queries.add(index, 0, child.continuation[1:], child.request)
            self._answer(queries, hidden_BTD)

    def _answer(self, queries: WantedTokens, hidden_BTD: torch.Tensor) -> None:
        """Add the log-probabilities of ``queries`` to their requests."""
        device = self._model.device
        cells, cell_of_Q = np.unique(
            np.array([queries.rows, queries.positions]), axis=1, return_inverse=True
        )
        hidden_ND = hidden_BTD[
            torch.tensor(cells[0], device=device), torch.tensor(cells[1], device=device)
        ]
        cell_of_Q = cell_of_Q.reshape(-1)
        tokens_Q = np.array(queries.tokens)
        requests_Q = np.array(queries.requests)
        for start in range(0, len(hidden_ND), HEAD_POSITIONS):
            logits_NV = self._model.logits(hidden_ND[start : start + HEAD_POSITIONS])
            chosen = np.flatnonzero((cell_of_Q >= start) & (cell_of_Q < start + HEAD_POSITIONS))
            cells_Q = torch.tensor(cell_of_Q[chosen] - start, device=device)
            wanted_Q = torch.tensor(tokens_Q[chosen], device=device)
            logprobs_Q = logits_NV[cells_Q, wanted_Q] - logits_NV.logsumexp(-1)[cells_Q]
            best_Q = logits_NV.argmax(-1)[cells_Q]
            requests = requests_Q[chosen]
            np.add.at(self._values, requests, logprobs_Q.double().cpu().numpy())
            np.logical_and.at(self._is_greedy, requests, (best_Q == wanted_Q).cpu().numpy())


def last_logprobs(
    model: PrefixModel, texts: Sequence[Sequence[int]], count: int, vocabulary_size: int
) -> np.ndarray:
    """Log-probabilities of the last ``count`` tokens' rivals, float32 [texts x count, V].

    Args:
        model: runs texts that begin alike from their shared prefix.
        texts: token ids, more than ``count`` each.
        count: the vocabulary's log-probabilities are given before each of the last tokens.
        vocabulary_size: V.
    """
    result_NV = np.empty((len(texts) * count, vocabulary_size), np.float32)
    rows: dict[Tokens, ContextRow] = {}
    for index, text in enumerate(texts):
        tokens = tuple(text[:-1])
        row = rows.setdefault(tokens, ContextRow(tokens, len(text) - count))
        row.members.append((index, ()))
    for batch in model.shared_batches(rows.values()):
        hidden_BTD, _ = model.run(batch, keep=False)
        for row, end, hidden_TD in zip(batch.rows, batch.own_lengths, hidden_BTD, strict=True):
            logits_NV = model.logits(hidden_TD[end - count : end])
            logprobs_NV = logits_NV.log_softmax(-1).cpu().numpy()
            for index, _ in row.members:
                result_NV[index * count : (index + 1) * count] = logprobs_NV
    return result_NV


def plain_last_logprobs(
    model: Any, texts: Sequence[Sequence[int]], count: int, vocabulary_size: int
) -> np.ndarray:
    """As :func:`last_logprobs`, of a causal LM that runs every text alone."""
    result_NV = np.empty((len(texts) * count, vocabulary_size), np.float32)
    for index, text in enumerate(texts):
        ids_BT = torch.tensor([list(text)], device=model.device)
        logits_NV = model(input_ids=ids_BT).logits[0, -count - 1 : -1].float()
        result_NV[index * count : (index + 1) * count] = logits_NV.log_softmax(-1).cpu()
    return result_NV
