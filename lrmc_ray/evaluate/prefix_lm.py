"""lm-eval's Hugging Face model, computing what requests have in common once.

A benchmark repeats itself: all questions begin with the same instructions, all choices of an item
with the same question. lm-eval's own ``HFLM`` runs every request from its first token; here

- requests are sorted into families with a common beginning, whose keys and values are computed
  once and shared (a database schema, five solved examples);
- the choices of an item continue from one pass over its question;
- batches are filled up to a number of tokens, from sequences of about equal length;
- the output head is applied only where something is scored or generated;
- an answer that has ended leaves the batch, and a batch ends with its last answer.

What is scored stays the same, and so do the scores, up to rounding. Sampled generation, and models
whose cache or head does not fit (:func:`supports`), are left to ``HFLM`` itself.

Shape suffixes: those of :mod:`lrmc_ray.method`; O = the last ``OVERLAP + 1`` tokens of a context.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.prefix_batches import (
    MAX_KEPT_FACTOR,
    OVERLAP,
    PADDING_WORTH_A_PASS,
    ContextRow,
    GeneratedContexts,
    TokenQueries,
    Tokens,
    context_rows,
    prefix_families,
)
from lrmc_ray.method.head import head_logits
from lrmc_ray.models import head_of

_log = logging.getLogger(__name__)


HEAD_POSITIONS = 256
"""Positions at which the head is applied at once: 50 MB of logits at a vocabulary of 49,152."""


def supports(model: Any) -> bool:
    """Whether ``PrefixLM`` can run ``model``: its cache and its masks do what they promise.

    Compares a few tokens that are run from a shared prefix, after a gap that is masked, with the
    same tokens in one pass.
    """
    try:
        head = head_of(model)
    except DataError:
        return False
    tokens_T = torch.arange(3, 27, device=model.device) % head.weight_VD.shape[0]
    try:
        with torch.inference_mode():
            whole_TD = _forward(model, tokens_T[None]).last_hidden_state[0]
            first = _forward(model, tokens_T[None, :12], use_cache=True)
            cache = first.past_key_values
            cache.batch_select_indices(torch.tensor([0, 0], device=model.device))
            # A row of 8 tokens, and one of 5 with a gap of 3, as padding leaves it.
            ids_BT = torch.stack([tokens_T[12:20], tokens_T[12:20]])
            ids_BT[1, 5:] = 0
            second = _forward(model, ids_BT, cache=cache, use_cache=True)
            mask_BT = torch.ones((2, 24), dtype=torch.long, device=model.device)
            mask_BT[1, 17:20] = 0
            positions_BT = torch.arange(4, device=model.device) + torch.tensor(
                [[20], [17]], device=model.device
            )
            third = _forward(
                model,
                torch.stack([tokens_T[20:24], tokens_T[17:21]]),
                cache=second.past_key_values,
                mask_BT=mask_BT,
                positions_BT=positions_BT,
            )
    except Exception as failure:
        # Whatever a foreign architecture raises here, it says that it does not fit.
        _log.debug("%s does not support shared prefixes: %r", type(model).__name__, failure)
        return False
    actual_TD = torch.cat([third.last_hidden_state[0], third.last_hidden_state[1]])
    expected_TD = torch.cat([whole_TD[20:24], whole_TD[17:21]])
    tolerance = 1e-3 if actual_TD.dtype == torch.float32 else 5e-2
    error = (actual_TD - expected_TD).norm() / expected_TD.norm()
    return bool(error < tolerance)


def _forward(
    model: Any,
    ids_BT: torch.Tensor,
    *,
    cache: Any = None,
    mask_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
    use_cache: bool = False,
) -> Any:
    """The model's body on ``ids_BT``, which follow what ``cache`` holds."""
    return model.base_model(
        input_ids=ids_BT,
        past_key_values=cache,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        use_cache=use_cache or cache is not None,
    )


class PrefixLM(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """``HFLM`` that shares common beginnings; see the module.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        batch_tokens: most positions of one forward pass, padding included.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=8, device=str(model.device)
        )
        self._batch_tokens = batch_tokens
        self._head = head_of(model) if supports(model) else None
        if self._head is None:
            _log.warning(
                "%s does not share keys and values between sequences; it is scored without",
                type(model).__name__,
            )
        ends = model.generation_config.eos_token_id
        self._contexts: list[GeneratedContexts] = []
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    # Log-likelihoods

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        if self._head is None:
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
        if self._head is None:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return answers
        values = np.zeros(len(requests))
        is_greedy = np.ones(len(requests), dtype=bool)
        rows = self._score_remembered(context_rows(requests, self.max_length), values, is_greedy)
        for prefix, family in prefix_families(rows):
            cache = self._run_prefix(prefix)
            for batch in self._batches(family, len(prefix)):
                self._score_batch(batch, len(prefix), cache, values, is_greedy)
        return [(float(v), bool(g)) for v, g in zip(values, is_greedy, strict=True)]

    def _score_batch(
        self,
        batch: list[ContextRow],
        prefix_length: int,
        prefix_cache: Any,
        values: np.ndarray,
        is_greedy: np.ndarray,
    ) -> None:
        branching = any(row.branches for row in batch)
        hidden_BTD, cache = self._run_rows(batch, prefix_length, prefix_cache, keep=branching)
        queries = TokenQueries()
        children: list[tuple[int, int, Tokens]] = []
        for index, row in enumerate(batch):
            position = row.context_length - 1 - prefix_length
            for request, continuation in row.members:
                if row.branches and len(continuation) > 1:
                    queries.add(index, position, continuation[:1], request)
                    children.append((index, request, continuation))
                else:
                    queries.add(index, position, continuation, request)
        self._answer(queries, hidden_BTD, values, is_greedy)
        if children:
            lengths = [len(row.tokens) for row in batch]
            kept = prefix_length + hidden_BTD.shape[1]
            self._score_children(children, lengths, kept, cache, values, is_greedy)

    def _score_remembered(
        self, rows: list[ContextRow], values: np.ndarray, is_greedy: np.ndarray
    ) -> list[ContextRow]:
        """Score the rows whose contexts have just been generated from; the others come back."""
        for contexts in self._contexts:
            queries = TokenQueries()
            children: list[tuple[int, int, Tokens]] = []
            left = []
            for row in rows:
                context = row.tokens[: row.context_length]
                starts = [contexts.find(context, answer) for _, answer in row.members]
                if None in starts:
                    left.append(row)
                    continue
                for (request, answer), start in zip(row.members, starts, strict=True):
                    assert start is not None
                    parent, inside = start
                    queries.add(parent, OVERLAP - inside, answer[: inside + 1], request)
                    if len(answer) > inside + 1:
                        children.append((parent, request, answer[inside:]))
            rows = left
            if queries.rows:
                self._answer(queries, contexts.last_BOD, values, is_greedy)
            if children:
                self._score_children(
                    children, contexts.lengths, contexts.kept, contexts.cache, values, is_greedy
                )
        self._contexts = []
        return rows

    def _score_children(
        self,
        children: list[tuple[int, int, Tokens]],
        lengths: Sequence[int],
        kept: int,
        cache: Any,
        values: np.ndarray,
        is_greedy: np.ndarray,
    ) -> None:
        """Score what follows the first token of continuations, from their contexts' cache.

        Args:
            children: row of the cache, request, continuation.
            lengths: tokens of each row of the cache.
            kept: positions of the cache, padding included.
            cache: used up.
            values: log-likelihoods, added to.
            is_greedy: changed with them.
        """
        children = sorted(children, key=lambda child: len(child[2]), reverse=True)
        for where in self._parts([len(child[2]) - 1 for child in children], kept=kept):
            part = children[where]
            parents_B = torch.tensor([parent for parent, _, _ in part], device=self.device)
            grown = copy.deepcopy(cache) if where.stop < len(children) else cache
            grown.batch_select_indices(parents_B)
            ids_BT = self._pad([continuation[:-1] for _, _, continuation in part])
            lengths_B = torch.tensor(lengths, device=self.device)[parents_B]
            output = _forward(
                self.model,
                ids_BT,
                cache=grown,
                mask_BT=self._mask(lengths_B, kept, ids_BT.shape[1]),
                positions_BT=lengths_B[:, None] + torch.arange(ids_BT.shape[1], device=self.device),
            )
            queries = TokenQueries()
            for index, (_, request, continuation) in enumerate(part):
                queries.add(index, 0, continuation[1:], request)
            self._answer(queries, output.last_hidden_state, values, is_greedy)

    def _answer(
        self,
        queries: TokenQueries,
        hidden_BTD: torch.Tensor,
        values: np.ndarray,
        is_greedy: np.ndarray,
    ) -> None:
        """Add the log-probabilities of ``queries`` to their requests."""
        cells, cell_of_Q = np.unique(
            np.array([queries.rows, queries.positions]), axis=1, return_inverse=True
        )
        hidden_ND = hidden_BTD[
            torch.tensor(cells[0], device=self.device), torch.tensor(cells[1], device=self.device)
        ]
        cell_of_Q = cell_of_Q.reshape(-1)
        tokens_Q = np.array(queries.tokens)
        requests_Q = np.array(queries.requests)
        for start in range(0, len(hidden_ND), HEAD_POSITIONS):
            logits_NV = self._logits(hidden_ND[start : start + HEAD_POSITIONS])
            chosen = np.flatnonzero((cell_of_Q >= start) & (cell_of_Q < start + HEAD_POSITIONS))
            cells_Q = torch.tensor(cell_of_Q[chosen] - start, device=self.device)
            wanted_Q = torch.tensor(tokens_Q[chosen], device=self.device)
            logprobs_Q = logits_NV[cells_Q, wanted_Q] - logits_NV.logsumexp(-1)[cells_Q]
            best_Q = logits_NV.argmax(-1)[cells_Q]
            np.add.at(values, requests_Q[chosen], logprobs_Q.double().cpu().numpy())
            np.logical_and.at(is_greedy, requests_Q[chosen], (best_Q == wanted_Q).cpu().numpy())

    @torch.inference_mode()
    def last_logprobs(self, texts: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """Log-probabilities of the last ``count`` tokens' rivals, float32 [texts x count, V].

        Args:
            texts: token ids, more than ``count`` each.
            count: the vocabulary's log-probabilities are given before each of the last tokens.
        """
        vocabulary_size = self.model.config.get_text_config().vocab_size
        result_NV = np.empty((len(texts) * count, vocabulary_size), np.float32)
        if self._head is None:
            for index, text in enumerate(texts):
                ids_BT = torch.tensor([list(text)], device=self.device)
                logits_NV = self.model(input_ids=ids_BT).logits[0, -count - 1 : -1].float()
                result_NV[index * count : (index + 1) * count] = logits_NV.log_softmax(-1).cpu()
            return result_NV
        rows: dict[Tokens, ContextRow] = {}
        for index, text in enumerate(texts):
            tokens = tuple(text[:-1])
            row = rows.setdefault(tokens, ContextRow(tokens, len(text) - count))
            row.members.append((index, ()))
        for prefix, family in prefix_families(rows.values()):
            cache = self._run_prefix(prefix)
            for batch in self._batches(family, len(prefix)):
                hidden_BTD, _ = self._run_rows(batch, len(prefix), cache, keep=False)
                for row, hidden_TD in zip(batch, hidden_BTD, strict=True):
                    end = len(row.tokens) - len(prefix)
                    logits_NV = self._logits(hidden_TD[end - count : end])
                    logprobs_NV = logits_NV.log_softmax(-1).cpu().numpy()
                    for index, _ in row.members:
                        result_NV[index * count : (index + 1) * count] = logprobs_NV
        return result_NV

    # Running rows

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        assert self._head is not None
        return head_logits(hidden_ND, self._head)

    def _run_prefix(self, prefix: Tokens) -> Any:
        if not prefix:
            return None
        ids_BT = torch.tensor([prefix], device=self.device)
        return _forward(self.model, ids_BT, use_cache=True).past_key_values

    def _run_rows(
        self, batch: Sequence[ContextRow], prefix_length: int, prefix_cache: Any, *, keep: bool
    ) -> tuple[torch.Tensor, Any]:
        """Hidden states of the rows after the prefix, padded on the right, and their cache."""
        ids_BT = self._pad([row.tokens[prefix_length:] for row in batch])
        cache = None
        if prefix_cache is not None:
            cache = copy.deepcopy(prefix_cache)
            cache.batch_repeat_interleave(len(batch))
        output = _forward(self.model, ids_BT, cache=cache, use_cache=keep)
        return output.last_hidden_state, output.past_key_values

    def _batches(
        self, rows: Sequence[ContextRow], prefix_length: int, *, room: int = 0
    ) -> Iterator[list[ContextRow]]:
        """Rows of about equal length, longest first, as many as fit; branching rows apart.

        Args:
            rows: all of one family.
            prefix_length: what they share.
            room: positions that each will still add to the cache.
        """
        for branches in (False, True):
            same = [row for row in rows if row.branches == branches]
            same.sort(key=lambda row: (len(row.tokens), row.tokens), reverse=True)
            lengths = [len(row.tokens) - prefix_length for row in same]
            for part in self._parts(lengths, kept=prefix_length, room=room):
                yield same[part]

    def _parts(self, lengths: Sequence[int], *, kept: int, room: int = 0) -> Iterator[slice]:
        """Slices of sequences that are run together.

        A batch ends where it is full, or where padding would cost more than another pass.

        Args:
            lengths: of the sequences, longest first.
            kept: positions of the cache that each sequence starts with.
            room: positions that each will still add to the cache, one pass per position.
        """
        worth = PADDING_WORTH_A_PASS * (1 + room // 8)
        start = padding = 0
        for index, length in enumerate(lengths):
            longest = lengths[start]
            padding += longest - length
            num_rows = index + 1 - start
            if num_rows > 1 and (
                num_rows * longest > self._batch_tokens
                or num_rows * (kept + longest + room) > MAX_KEPT_FACTOR * self._batch_tokens
                or padding > worth
            ):
                yield slice(start, index)
                start, padding = index, 0
        if lengths:
            yield slice(start, len(lengths))

    def _pad(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids [B, T]; what stands in the padding on the right is never seen."""
        ids_BT = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row)] = torch.tensor(row)
        return ids_BT.to(self.device)

    def _mask(self, lengths_B: torch.Tensor, kept: int, new: int) -> torch.Tensor:
        """1 where a cached position holds a token of the row, and for all new ones."""
        cached_BT = torch.arange(kept, device=self.device) < lengths_B[:, None]
        ones_BT = torch.ones((len(lengths_B), new), dtype=torch.bool, device=self.device)
        return torch.cat([cached_BT, ones_BT], dim=1).long()

    # Generation

    @torch.inference_mode()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, cut at the first stop string."""
        answers: list[str | None] = [None] * len(requests)
        greedy: dict[str, list[int]] = {}
        others: list[int] = []
        for index, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if self._is_greedy(settings):
                greedy.setdefault(repr(sorted(settings.items())), []).append(index)
            else:
                others.append(index)
        for indices in greedy.values():
            written = self._generate([requests[index].args for index in indices])
            for index, text in zip(indices, written, strict=True):
                answers[index] = text
        if others:
            texts = super().generate_until([requests[index] for index in others], disable_tqdm)
            for index, text in zip(others, texts, strict=True):
                answers[index] = text
        return [answer for answer in answers if answer is not None]

    def _is_greedy(self, settings: dict[str, Any]) -> bool:
        """Whether the next token is the most probable one, and nothing else has a say."""
        own = {"until", "do_sample", "temperature", "max_gen_toks"}
        if self._head is None:
            return False
        if settings.get("do_sample") or set(settings) - own or self.think_end_token is not None:
            return False
        config = self.model.generation_config
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

    def _generate(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
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
        rows: dict[Tokens, ContextRow] = {}
        for index, (context, _) in enumerate(arguments):
            tokens = tuple(self.tok_encode(context, left_truncate_len=longest))
            row = rows.setdefault(tokens, ContextRow(tokens, len(tokens)))
            row.members.append((index, ()))
        answers = [""] * len(arguments)
        self._contexts = []
        for prefix, family in prefix_families(rows.values()):
            cache = self._run_prefix(prefix)
            for batch in self._batches(family, len(prefix), room=most):
                written = self._decode(batch, len(prefix), cache, stops, most)
                for row, text in zip(batch, written, strict=True):
                    for index, _ in row.members:
                        answers[index] = text
        return answers

    def _remember(
        self, batch: Sequence[ContextRow], prefix_length: int, hidden_BTD: torch.Tensor, cache: Any
    ) -> None:
        """Keep the contexts of ``batch`` for their gold answers, as far as memory allows."""
        kept = prefix_length + hidden_BTD.shape[1]
        positions = sum(len(contexts.lengths) * contexts.kept for contexts in self._contexts)
        if positions + len(batch) * kept > MAX_KEPT_FACTOR * self._batch_tokens:
            return
        lengths = [len(row.tokens) for row in batch]
        own_lengths = [length - prefix_length for length in lengths]
        ends_BO = torch.tensor(own_lengths, device=self.device)[:, None]
        ends_BO = (ends_BO - OVERLAP - 1 + torch.arange(OVERLAP + 1, device=self.device)).clamp(0)
        rows_BO = torch.arange(len(batch), device=self.device)[:, None]
        self._contexts.append(
            GeneratedContexts(
                rows={row.tokens: index for index, row in enumerate(batch)},
                lengths=lengths,
                kept=kept,
                own_lengths=own_lengths,
                last_BOD=hidden_BTD[rows_BO, ends_BO],
                cache=copy.deepcopy(cache),
            )
        )

    def _decode(
        self,
        batch: list[ContextRow],
        prefix_length: int,
        prefix_cache: Any,
        stops: list[str],
        most: int,
    ) -> list[str]:
        hidden_BTD, cache = self._run_rows(batch, prefix_length, prefix_cache, keep=True)
        kept = prefix_length + hidden_BTD.shape[1]
        lengths_B = torch.tensor([len(row.tokens) for row in batch], device=self.device)
        mask_BT = self._mask(lengths_B, kept, 0)
        last_B = lengths_B - prefix_length - 1
        hidden_BD = hidden_BTD[torch.arange(len(batch), device=self.device), last_B]
        self._remember(batch, prefix_length, hidden_BTD, cache)
        written: list[list[int]] = [[] for _ in batch]
        texts = [""] * len(batch)
        active = list(range(len(batch)))  # which answer each row of the cache is
        for step in range(most):
            token_B = self._logits(hidden_BD).argmax(-1)
            going = []
            for row, (answer, token) in enumerate(zip(active, token_B.tolist(), strict=True)):
                if token in self._ends:
                    continue
                written[answer].append(token)
                texts[answer] = self.tok_decode(written[answer])
                if not any(stop in texts[answer] for stop in stops):
                    going.append(row)
            if not going or step == most - 1:
                break
            if len(going) < len(active):
                rows_B = torch.tensor(going, device=self.device)
                cache.batch_select_indices(rows_B)
                mask_BT, lengths_B = mask_BT[rows_B], lengths_B[rows_B]
                token_B = token_B[rows_B]
                active = [active[row] for row in going]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(active), 1))], dim=1)
            output = _forward(
                self.model,
                token_B[:, None],
                cache=cache,
                mask_BT=mask_BT,
                positions_BT=(lengths_B + step)[:, None],
            )
            hidden_BD, cache = output.last_hidden_state[:, -1], output.past_key_values
        return [
            postprocess_generated_text(generation=text, stop=stops, think_end_token=None)
            for text in texts
        ]
