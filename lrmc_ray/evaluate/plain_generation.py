"""Answers of models whose passes cannot be shared, and answers that are sampled.

``generate`` of transformers writes them. Stop strings count in the answer alone, not in reasoning.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from transformers import StoppingCriteria, StoppingCriteriaList

from lrmc_ray.chat.spoken import Spoken
from lrmc_ray.evaluate.prefix_batches import Tokens

Said = Callable[[Tokens, Sequence[int]], Spoken]
"""From a context, and the tokens written to it, to the answer in them."""


def has_stopped(said: Spoken, stops: Sequence[str]) -> bool:
    """Whether nothing that is written further belongs to the answer."""
    return said.has_ended or (said.has_begun and any(stop in said.text for stop in stops))


class _Stops(StoppingCriteria):
    def __init__(self, contexts: Sequence[Tokens], start: int, stops: Sequence[str], said: Said):
        self._contexts, self._start, self._stops, self._said = contexts, start, stops, said

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        done = [
            has_stopped(self._said(context, ids), self._stops)
            for context, ids in zip(
                self._contexts, input_ids[:, self._start :].tolist(), strict=True
            )
        ]
        return torch.tensor(done, device=input_ids.device)


class PlainGeneration:
    """Answers that ``generate`` writes.

    Args:
        model: a causal LM.
        said: finds the answer in what was written.
        padding: a token that stands before shorter prompts, and behind answers that have ended.
        batch_size: answers that are written at a time.
    """

    def __init__(self, model: Any, said: Said, *, padding: int, batch_size: int) -> None:
        self._model, self._said = model, said
        self._padding, self._batch_size = padding, batch_size

    def answers(
        self,
        contexts: Sequence[Tokens],
        stops: Sequence[str],
        most: int,
        options: Mapping[str, Any],
    ) -> list[str]:
        """The answer to each context.

        Args:
            contexts: token ids of the prompts.
            stops: strings that an answer is cut at.
            most: tokens of an answer.
            options: what else ``generate`` is given, as a task file says it.
        """
        answers: list[str] = []
        for start in range(0, len(contexts), self._batch_size):
            batch = contexts[start : start + self._batch_size]
            for context, ids in zip(batch, self._write(batch, stops, most, options), strict=True):
                text = self._said(context, ids).text
                answers.append(
                    postprocess_generated_text(
                        generation=text, stop=list(stops), think_end_token=None
                    )
                )
        return answers

    def _write(
        self,
        contexts: Sequence[Tokens],
        stops: Sequence[str],
        most: int,
        options: Mapping[str, Any],
    ) -> list[list[int]]:
        """The tokens that are written to each context of a batch, padded to one length."""
        device = self._model.device
        longest = max(map(len, contexts))
        ids_BT = torch.full((len(contexts), longest), self._padding, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        for row, context in enumerate(contexts):
            ids_BT[row, longest - len(context) :] = torch.tensor(context, device=device)
            mask_BT[row, longest - len(context) :] = 1
        written_BT = self._model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=most,
            stopping_criteria=StoppingCriteriaList([_Stops(contexts, longest, stops, self._said)]),
            pad_token_id=self._padding,
            use_cache=True,
            **sampling(options),
        )
        written: list[list[int]] = written_BT[:, longest:].tolist()
        return written


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of lm-eval as ``generate`` takes them: without a temperature it is greedy."""
    given = dict(options)
    given["do_sample"] = bool(given.get("temperature")) and given.get("do_sample") is not False
    if not given["do_sample"]:
        given.pop("temperature", None)
    return given
