"""From a row of training data to token ids and the positions that are learned."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lrmc_ray.errors import DataError
from lrmc_ray.record.rows import Rejects, Row, is_plain_text, messages_of, sample_id_of


@dataclass(frozen=True)
class Example:
    """One tokenized sample."""

    sample_id: str
    input_ids: list[int]
    is_target: list[bool]
    """Whether the token is to be learned; [i] belongs to ``input_ids[i]``."""
    domain: str = ""


@dataclass
class EncodingSummary:
    """What became of the rows."""

    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    answers: int = 0
    """Answers of conversations, before any truncation."""
    endless_answers: int = 0
    """Those whose last supervised token is no end-of-turn token."""
    domains: Counter[str] = field(default_factory=Counter)
    """Samples of each domain."""


def encode_row(row: Row, tokenizer: Any) -> Example:
    """Token ids, label mask and domain of a row.

    Raises:
        DataError: a field is missing, of the wrong type or empty, or see :func:`encode`.
    """
    content = row.content
    sample_id = sample_id_of(content)
    domain = content.get("domain", row.domain)
    if not isinstance(domain, str):
        raise DataError(f"'domain' must be a string, got {domain!r}")
    if is_plain_text(content):
        return encode_text(sample_id, content["text"], tokenizer, domain=domain)
    return encode(sample_id, messages_of(content), tokenizer, domain=domain)


def encode_text(sample_id: str, text: Any, tokenizer: Any, *, domain: str = "") -> Example:
    """Token ids of plain text, all but the first to be learned.

    Nothing is added but what the tokenizer itself puts around a text, such as a first token.

    Raises:
        DataError: it is no string, or empty.
    """
    if not isinstance(text, str):
        raise DataError(f"'text' must be a string, got {text!r}")
    if not text.strip():
        raise DataError("'text' is empty, so there is nothing to learn")
    input_ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    return Example(sample_id, input_ids, [i > 0 for i in range(len(input_ids))], domain)


def encode(
    sample_id: str, messages: list[dict[str, str]], tokenizer: Any, *, domain: str = ""
) -> Example:
    """Token ids and label mask of a conversation.

    Raises:
        DataError: the chat template refuses the conversation, or rewrites earlier turns, so no
            mask would be right.
    """
    segments = _chat_segments(messages, tokenizer)
    input_ids: list[int] = []
    is_target: list[bool] = []
    special = special_ids(tokenizer)
    for text, is_answer in segments:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A template may put a newline behind the end-of-turn token: not part of the answer.
        last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
        input_ids += ids
        is_target += [is_answer and i <= last for i in range(len(ids))]
    if input_ids:
        is_target[0] = False  # nothing precedes the first token, so nothing can predict it
    return Example(sample_id, input_ids, is_target, domain)


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that are no text: those with a role, such as eos, and those marked as special."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _last_targets(example: Example) -> Iterator[int]:
    """The last token of every run of supervised tokens."""
    following = [*example.is_target[1:], False]
    for token, is_target, is_next in zip(
        example.input_ids, example.is_target, following, strict=True
    ):
        if is_target and not is_next:
            yield token


def _chat_segments(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered conversation, cut where an answer begins or ends."""
    if not tokenizer.chat_template:
        eos = tokenizer.eos_token or ""
        return [
            (m["content"] + (eos if m["role"] == "assistant" else ""), m["role"] == "assistant")
            for m in messages
        ]

    from jinja2 import TemplateError

    def render(part: list[dict[str, str]], *, ask: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                part, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from None
        return text

    whole = render(messages, ask=False)
    segments: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(messages[: index + 1], ask=False)
        if index:
            before = render(messages[:index], ask=True)
        else:
            # Nothing was asked: the answer begins behind the header that follows a question.
            question = [{"role": "user", "content": ""}]
            header = render(question, ask=True).removeprefix(render(question, ask=False))
            before = header and "".join(after.partition(header)[:2])
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise DataError(
                "the chat template renders an earlier turn differently once a later one follows, "
                "so the answer cannot be told from the prompt; split the conversation into rows "
                "with one answer each"
            )
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    if done < len(whole):
        segments.append((whole[done:], False))
    return segments


class _SampleIds:
    """The ids that were given so far; an id of the user's own must be the only one."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._copies: Counter[str] = Counter()

    def claim(self, sample_id: str, row: Row) -> str:
        """The id of ``row``: the same text twice is learned twice, under two ids.

        Raises:
            DataError: the row's own id was used before.
        """
        if sample_id in self._places:
            if "id" in row.content:
                raise DataError(f"id {sample_id!r} was used before, at {self._places[sample_id]}")
            self._copies[sample_id] += 1
            sample_id = f"{sample_id}#{self._copies[sample_id]}"
        self._places[sample_id] = row.place
        return sample_id


def _check_vocabulary(input_ids: Sequence[int], vocabulary_size: int) -> None:
    """Refuse tokens that the model has no logits for."""
    if input_ids and not 0 <= min(input_ids) <= max(input_ids) < vocabulary_size:
        raise DataError(
            f"the tokenizer gives token {max(input_ids)}, the model's head has only "
            f"{vocabulary_size}; use the tokenizer that belongs to the model"
        )


def _fitted(
    example: Example, max_length: int, on_long: Literal["error", "drop", "truncate"]
) -> Example | None:
    """The example in ``max_length`` tokens; None if it is to be dropped.

    Raises:
        DataError: it is longer and may not be, or nothing of it is to be learned.
    """
    length = len(example.input_ids)
    if length > max_length:
        if on_long == "error":
            raise DataError(
                f"{length} tokens, more than data.max_length = {max_length}; raise it, or "
                "set data.on_long to drop or truncate"
            )
        if on_long == "drop":
            return None
        example = dataclasses.replace(
            example,
            input_ids=example.input_ids[:max_length],
            is_target=example.is_target[:max_length],
        )
    if not any(example.is_target):
        raise DataError(
            f"none of its first {len(example.input_ids)} tokens is to be learned; raise "
            "data.max_length, or put a prompt before the answer"
        )
    return example


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    on_long: Literal["error", "drop", "truncate"],
    vocabulary_size: int,
    summary: EncodingSummary,
    rejects: Rejects,
) -> Iterator[Example]:
    """Every usable row as an :class:`Example`; ``summary`` and ``rejects`` count as it goes.

    Raises:
        DataError: rows that cannot be used, unless they may be skipped; no row is left; or no
            answer ends with an end-of-turn token, so the model would never learn to stop.
    """
    ids = _SampleIds()
    special = special_ids(tokenizer)
    for row in rows:
        try:
            whole = encode_row(row, tokenizer)
            whole = dataclasses.replace(whole, sample_id=ids.claim(whole.sample_id, row))
            _check_vocabulary(whole.input_ids, vocabulary_size)
            example = _fitted(whole, max_length, on_long)
        except DataError as error:
            rejects.add(row.place, str(error))
            continue
        if example is None:
            summary.dropped += 1
            continue
        last_targets = [] if is_plain_text(row.content) else list(_last_targets(whole))
        summary.truncated += len(whole.input_ids) > max_length
        summary.samples += 1
        summary.tokens += len(example.input_ids)
        summary.supervised_tokens += sum(example.is_target)
        summary.answers += len(last_targets)
        summary.endless_answers += sum(token not in special for token in last_targets)
        summary.domains[example.domain] += 1
        yield example
    rejects.settle()
    if summary.samples == 0:
        raise DataError(
            f"no sample is left ({summary.dropped} dropped as longer than data.max_length = "
            f"{max_length}, {rejects.count} unusable); raise data.max_length or mend the rows"
        )
    if 0 < summary.answers == summary.endless_answers:
        raise DataError(
            "the last token of an answer must be a special token that ends the turn, but not one "
            f"of {summary.answers} answers has one: the model would not learn to stop; use a chat "
            "template that writes it, or a tokenizer with an eos token"
        )
