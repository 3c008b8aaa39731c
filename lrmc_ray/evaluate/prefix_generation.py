"""Greedy answers to contexts that share prefixes; an answer that has ended leaves its batch.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text

from lrmc_ray.evaluate.plain_generation import Said, has_stopped
from lrmc_ray.evaluate.prefix_batches import ContextRow, Tokens
from lrmc_ray.evaluate.prefix_memory import ContextMemory
from lrmc_ray.evaluate.prefix_model import PrefixModel, SharedBatch


def is_greedy(settings: Mapping[str, Any], config: Any) -> bool:
    """Whether the next token is the most probable one, and nothing else has a say.

    Args:
        settings: lm-eval's, of a task.
        config: the model's own, of generation.
    """
    own = {"until", "do_sample", "temperature", "max_gen_toks"}
    if settings.get("do_sample") or set(settings) - own:
        return False
    neutral: dict[str, tuple[Any, ...]] = {
        "num_beams": (None, 1),
        "repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "bad_words_ids": (None,),
        "suppress_tokens": (None,),
        "forced_bos_token_id": (None,),
        "min_length": (None, 0),
    }
    return all(getattr(config, name, None) in allowed for name, allowed in neutral.items())


class GreedyGeneration:
    """Writes the most probable token, until an answer ends.

    Args:
        model: writes.
        said: finds the answer in what was written to a context.
        ends: tokens that end an answer and are no part of it.
        memory: keeps the contexts, whose gold answers are often scored next.
    """

    def __init__(
        self, model: PrefixModel, said: Said, ends: set[int], memory: ContextMemory
    ) -> None:
        self._model, self._said, self._ends, self._memory = model, said, ends, memory

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
        written = _Answers(contexts, self._said, self._ends, stops)
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
            for text in written.texts()
        ]


class _Answers:
    """What has been written of the answers of one batch, and which of them go on."""

    def __init__(
        self, contexts: Sequence[Tokens], said: Said, ends: set[int], stops: Sequence[str]
    ) -> None:
        self._answers = [said(context, []) for context in contexts]
        self._tokens: list[list[int]] = [[] for _ in contexts]
        self._going = list(range(len(contexts)))  # which answer each row of the cache is
        self._contexts, self._said, self._ends, self._stops = contexts, said, ends, stops

    def texts(self) -> list[str]:
        """The answers."""
        return [answer.text for answer in self._answers]

    def add(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to every answer that goes on; returns the rows of those that still do."""
        rows = []
        for row, (index, token) in enumerate(zip(self._going, tokens, strict=True)):
            if token in self._ends:
                continue
            self._tokens[index].append(token)
            answer = self._said(self._contexts[index], self._tokens[index])
            self._answers[index] = answer
            if not has_stopped(answer, self._stops):
                rows.append(row)
        self._going = [self._going[row] for row in rows]
        return rows
