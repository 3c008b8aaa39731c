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


def write_answers(
    model: Any,
    contexts: Sequence[Tokens],
    stops: Sequence[str],
    most: int,
    said: Said,
    *,
    padding: int,
    options: Mapping[str, Any],
) -> list[str]:
    """One batch of answers.

    Args:
        model: a causal LM.
        contexts: token ids of the prompts.
        stops: strings that an answer is cut at.
        most: tokens of an answer.
        said: finds the answer in what was written.
        padding: a token that stands before shorter prompts, and behind answers that have ended.
        options: what else ``generate`` is given, as a task file says it.
    """
    longest = max(map(len, contexts))
    ids_BT = torch.full((len(contexts), longest), padding, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, context in enumerate(contexts):
        ids_BT[row, longest - len(context) :] = torch.tensor(context, device=model.device)
        mask_BT[row, longest - len(context) :] = 1
    written_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=most,
        stopping_criteria=StoppingCriteriaList([_Stops(contexts, longest, stops, said)]),
        pad_token_id=padding,
        use_cache=True,
        **sampling(options),
    )
    answers = []
    for context, ids in zip(contexts, written_BT[:, longest:].tolist(), strict=True):
        text = said(context, ids).text
        answers.append(
            postprocess_generated_text(generation=text, stop=list(stops), think_end_token=None)
        )
    return answers


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of lm-eval as ``generate`` takes them: without a temperature it is greedy."""
    given = dict(options)
    given["do_sample"] = bool(given.get("temperature")) and given.get("do_sample") is not False
    if not given["do_sample"]:
        given.pop("temperature", None)
    return given
