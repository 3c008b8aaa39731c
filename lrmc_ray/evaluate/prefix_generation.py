"""Greedy answers to contexts that share prefixes; an answer that has ended leaves its batch.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lm_eval.models.utils import postprocess_generated_text

from lrmc_ray.evaluate.prefix_batches import ContextRow, Tokens
from lrmc_ray.evaluate.prefix_memory import ContextMemory
from lrmc_ray.evaluate.prefix_model import PrefixModel, SharedBatch


class GreedyGeneration:
    """Writes the most probable token, until an answer ends.

    Args:
        model: writes.
        decode: from token ids to text.
        ends: tokens that end an answer and are no part of it.
        memory: keeps the contexts, whose gold answers are often scored next.
        spoken: from what is written to a context to the answer in it, behind a closed think block;
            None while the block is open.
    """

    def __init__(
        self,
        model: PrefixModel,
        decode: Callable[[list[int]], str],
        ends: set[int],
        memory: ContextMemory,
        spoken: Callable[[Tokens, str], str | None] = lambda context, text: text,
    ) -> None:
        self._model, self._decode, self._ends, self._memory = model, decode, ends, memory
        self._spoken = spoken

    def answers(
        self, rows: Iterable[ContextRow], stops: Sequence[str], most: int
    ) -> Iterator[tuple[int, str]]:
        """Every request of ``rows`` with its answer.

        Args:
            rows: the contexts.
            stops: strings that an answer is cut at.
            most: tokens of an answer.
        """
        for batch in self._model.shared_batches(rows, room=most):
            for row, text in zip(batch.rows, self._write(batch, stops, most), strict=True):
                for request, _ in row.members:
                    yield request, text

    def _write(self, batch: SharedBatch, stops: Sequence[str], most: int) -> list[str]:
        model = self._model
        hidden_BTD, cache = model.run(batch, keep=True)
        self._memory.remember(batch, hidden_BTD, cache)
        lengths_B = torch.tensor(batch.lengths, device=model.device)
        mask_BT = batch.mask(model.device)
        last_B = torch.tensor(batch.ends, device=model.device) - 1
        hidden_BD = hidden_BTD[torch.arange(len(last_B), device=model.device), last_B]
        contexts = [row.tokens for row in batch.rows]
        written = _Answers(contexts, self._decode, self._ends, stops, self._spoken)
        for step in range(most):
            token_B = model.logits(hidden_BD).argmax(-1)
            going = written.add(token_B.tolist())
            if not going or step == most - 1:
                break
            if len(going) < len(token_B):
                rows_B = torch.tensor(going, device=model.device)
                cache.batch_select_indices(rows_B)
                mask_BT, lengths_B = mask_BT[rows_B], lengths_B[rows_B]
                token_B = token_B[rows_B]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(going), 1))], dim=1)
            hidden_BTD, cache = model.go_on(
                token_B[:, None], cache, mask_BT, positions_BT=(lengths_B + step)[:, None]
            )
            hidden_BD = hidden_BTD[:, -1]
        return [
            postprocess_generated_text(generation=text, stop=stops, think_end_token=None)
            for text in written.spoken()
        ]


class _Answers:
    """What has been written of the answers of one batch, and which of them go on."""

    def __init__(
        self,
        contexts: Sequence[Tokens],
        decode: Callable[[list[int]], str],
        ends: set[int],
        stops: Sequence[str],
        spoken: Callable[[Tokens, str], str | None],
    ) -> None:
        self._texts = [""] * len(contexts)
        self._tokens: list[list[int]] = [[] for _ in contexts]
        self._going = list(range(len(contexts)))  # which answer each row of the cache is
        self._decode, self._ends, self._stops = decode, ends, stops
        self._contexts, self._spoken = contexts, spoken

    def spoken(self) -> list[str]:
        """The answers, without the think block before them; all of one whose block is open."""
        answers = []
        for context, text in zip(self._contexts, self._texts, strict=True):
            answer = self._spoken(context, text)
            answers.append(text if answer is None else answer)
        return answers

    def add(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to every answer that goes on; returns the rows of those that still do."""
        rows = []
        for row, (answer, token) in enumerate(zip(self._going, tokens, strict=True)):
            if token in self._ends:
                continue
            self._tokens[answer].append(token)
            text = self._texts[answer] = self._decode(self._tokens[answer])
            spoken = self._spoken(self._contexts[answer], text)
            if spoken is None or not any(stop in spoken for stop in self._stops):
                rows.append(row)
        self._going = [self._going[row] for row in rows]
        return rows
