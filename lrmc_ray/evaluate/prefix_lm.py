"""lm-eval's Hugging Face model, computing what requests have in common once.

A benchmark repeats itself: all questions begin with the same instructions, all choices of an item
with the same question. lm-eval's own ``HFLM`` runs every request from its first token; here

- requests are sorted into families with a common beginning, whose keys and values are computed
  once and shared (a database schema, five solved examples);
- the choices of an item continue from one pass over its question;
- batches are filled up to a number of tokens, from sequences of about equal length;
- the output head is applied only where something is scored or generated;
- an answer that has ended leaves the batch, and a batch ends with its last answer.

What is scored stays the same, and so do the scores, up to rounding: ``prefix_sharing`` says how far
a model's windows, chunks and rotary frequencies let rows share. Sampled generation, and models
whose cache or head does not fit, are left to ``HFLM`` itself.

This module is the interface that lm-eval calls; ``prefix_model`` runs batches, ``prefix_scores``
and ``prefix_generation`` ask for them.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lrmc_ray.chat.answers import Chat
from lrmc_ray.chat.spoken import AnswerForm, Spoken
from lrmc_ray.chat.template import special_tokens
from lrmc_ray.chat.tokens import bare_ids, split_ids
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.plain_generation import PlainGeneration
from lrmc_ray.evaluate.prefix_batches import BatchLimits, ContextRow, Tokens, context_rows
from lrmc_ray.evaluate.prefix_generation import GreedyGeneration, is_greedy
from lrmc_ray.evaluate.prefix_memory import ContextMemory
from lrmc_ray.evaluate.prefix_model import PrefixModel
from lrmc_ray.evaluate.prefix_scores import ContinuationScores, last_logprobs, plain_last_logprobs
from lrmc_ray.evaluate.prefix_sharing import Sharing, generates_in_batches
from lrmc_ray.method.head import OutputHead
from lrmc_ray.models.borders import text_config
from lrmc_ray.models.causal import check_causal
from lrmc_ray.models.head import head_of

_log = logging.getLogger(__name__)


def _head_or_none(model: Any) -> OutputHead | None:
    """The output head, if hidden states times head give the model's logits."""
    try:
        return head_of(model)
    except DataError:
        return None


class PrefixLM(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """``HFLM`` that shares common beginnings; see the module.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        batch_tokens: most positions of one forward pass, padding included.
        template_options: what the chat template is given besides the messages.
    """

    batch_size_per_gpu: Any
    """lm-eval's, of what is left to it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_causal(model)
        super().__init__(
            pretrained=model,
            # lm-eval would take the decoder of BART for the whole of it.
            backend="causal",
            tokenizer=tokenizer,
            batch_size=8,
            device=str(model.device),
        )
        self.batch_tokens = batch_tokens
        limits = BatchLimits(batch_tokens)
        self._memory = ContextMemory(limits)
        self._shared: PrefixModel | None = None
        self._sharing = Sharing(model)
        if (head := _head_or_none(model)) is not None and self._sharing.is_possible:
            self._shared = PrefixModel(model, head, limits, self._sharing)
        else:
            _log.warning(
                "%s does not share keys and values between sequences; it is scored without",
                type(model).__name__,
            )
        self._takes_padding: bool | None = None  # of prompts, once it has been asked for
        self._chat = Chat(tokenizer, template_options)
        self.chat_template_args = dict(template_options or {})
        # What the template writes around the answers to the generation prompts that were asked
        # for, and to the tokens that were generated from.
        self._forms: dict[str, AnswerForm] = {}
        self._asked: dict[Tokens, AnswerForm] = {}
        self._special = set(special_tokens(tokenizer))
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt as recording renders it; what a task begins to answer itself, as lm-eval."""
        if not add_generation_prompt and self._chat.has_template:
            begun: str = super().apply_chat_template(chat_history, add_generation_prompt)
            return begun
        history = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            prompt = self._chat.prompt(history)
        except DataError:
            history = [message for message in history if message["role"] != "system"]
            prompt = self._chat.prompt(history)
        self._forms[prompt] = self._chat.form(history)
        return prompt if add_generation_prompt else prompt + chat_history[-1]["content"]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, which is rendered as an answer is learned."""
        for request in requests:
            context, continuation = request.args
            if form := self._forms.get(context):
                # The items keep what was scored, whose tokens are counted later.
                request.arguments = (context, form.opening + continuation)
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scored

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._forms:
            return split_ids(self.tokenizer, context, continuation)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _said(self, context: Tokens, ids: Sequence[int]) -> Spoken:
        """The answer in the tokens that were written to ``context``."""
        form = self._asked.get(context)
        if form is None:
            return Spoken(self.tok_decode(ids))
        # Special tokens say where reasoning and channels begin and end.
        return form.spoken(self.tok_decode(ids, self._special.isdisjoint(ids)))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        if self._shared is None:
            values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return values
        windows = []
        owners = []
        for index, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood, and whether greedy decoding writes it, of each continuation."""
        if self._shared is None:
            return self._plain_loglikelihoods(requests, disable_tqdm)
        scores = ContinuationScores(self._shared, len(requests))
        rows = context_rows(requests, self.max_length)
        scores.score(scores.score_remembered(self._memory.take(), rows))
        return scores.answers()

    def _plain_loglikelihoods(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """lm-eval's own; rows of other rotary frequencies share no batch."""
        sides: dict[int, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            length = min(len(context) + len(continuation) - 1, self.max_length)
            sides.setdefault(self._sharing.borders.side(length), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for indices in sides.values():
            found = super()._loglikelihood_tokens([requests[i] for i in indices], disable_tqdm)
            answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def last_logprobs(self, texts: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """Log-probabilities of the last ``count`` tokens' rivals, float32 [texts x count, V].

        Args:
            texts: token ids, more than ``count`` each.
            count: the vocabulary's log-probabilities are given before each of the last tokens.
        """
        vocabulary_size = text_config(self.model.config).vocab_size
        if self._shared is not None:
            return last_logprobs(self._shared, texts, count, vocabulary_size)
        return plain_last_logprobs(self.model, texts, count, vocabulary_size)

    @torch.inference_mode()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What is said to each context, cut at the first stop string."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[str, bool], list[int]] = {}
        others: list[int] = []
        crossing: list[int] = []
        for index, request in enumerate(requests):
            context, arguments = request.args
            settings = normalize_gen_kwargs(arguments, self.max_gen_toks)
            crosses = self._crosses_rope(context, settings["max_gen_toks"])
            if context in self._forms or (self._is_greedy(settings) and not crosses):
                groups.setdefault((repr(sorted(settings.items())), crosses), []).append(index)
            else:
                (crossing if crosses else others).append(index)
        for (_, crosses), indices in groups.items():
            written = self._generate([requests[index].args for index in indices], alone=crosses)
            for index, text in zip(indices, written, strict=True):
                answers[index] = text
        usual = self.batch_size_per_gpu
        for indices, alone in ((others, False), (crossing, True)):
            if not indices:
                continue
            self.batch_size_per_gpu = self._plain_batch_size(alone=alone)
            texts = super().generate_until([requests[index] for index in indices], disable_tqdm)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        self.batch_size_per_gpu = usual
        return answers

    def _plain_batch_size(self, *, alone: bool) -> int:
        """Prompts that transformers generates from at a time.

        Args:
            alone: whether it must be one, whatever the model does with padding.
        """
        if alone:
            return 1
        if self._takes_padding is None:
            self._takes_padding = generates_in_batches(self.model)
        return int(self.batch_size) if self._takes_padding else 1

    def _crosses_rope(self, context: str, most: int) -> bool:
        """Whether an answer may end where rotary frequencies are others than at its beginning."""
        if self._sharing.borders.rope_border is None:
            return False
        longest = max(1, self.max_length - most)
        return self._sharing.crosses_rope(len(self._context_tokens(context, longest)) + most)

    def _is_greedy(self, settings: dict[str, Any]) -> bool:
        """Whether answers are written from shared passes."""
        if self._shared is None or self.think_end_token is not None:
            return False
        return is_greedy(settings, self.model.generation_config)

    def _generate(
        self, arguments: Sequence[tuple[str, dict[str, Any]]], *, alone: bool
    ) -> list[str]:
        """Answers to contexts that all have the same settings, one by one if ``alone``."""
        settings = normalize_gen_kwargs(arguments[0][1], self.max_gen_toks)
        # lm-eval adds the end of the turn as a string; here it is known by its id.
        stops = [stop for stop in handle_stop_sequences(settings["until"], eos=None) if stop]
        most = settings["max_gen_toks"]
        longest = self.max_length - most
        if longest < 1:
            raise DataError(
                f"max_gen_toks must leave room for a prompt, got {most} of the model's "
                f"{self.max_length} positions; lower it in the task file"
            )
        contexts = [self._context_tokens(context, longest) for context, _ in arguments]
        if alone or self._shared is None or not self._is_greedy(settings):
            options = {k: v for k, v in settings.items() if k not in ("until", "max_gen_toks")}
            padding = self.tokenizer.pad_token_id
            generation = PlainGeneration(
                self.model,
                self._said,
                padding=self.tokenizer.eos_token_id if padding is None else padding,
                batch_size=self._plain_batch_size(alone=alone),
            )
            return generation.answers(contexts, stops, most, options)
        rows: dict[Tokens, ContextRow] = {}
        for index, tokens in enumerate(contexts):
            row = rows.setdefault(tokens, ContextRow(tokens, len(tokens)))
            row.members.append((index, ()))
        self._memory.take()
        greedy = GreedyGeneration(self._shared, self._said, self._ends, self._memory)
        answers = dict(greedy.answers(rows.values(), stops, most))
        return [answers[index] for index in range(len(arguments))]

    def _context_tokens(self, context: str, longest: int) -> Tokens:
        """The last tokens of a context, ``longest`` at most."""
        form = self._forms.get(context)
        if form is None:
            return tuple(self.tok_encode(context, left_truncate_len=longest))
        tokens = tuple(bare_ids(self.tokenizer, context)[-longest:])
        self._asked[tokens] = form
        return tokens
