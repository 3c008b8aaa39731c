"""From a row of training data to token ids and the positions that are learned."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    places: dict[str, str] = {}
    copies: Counter[str] = Counter()
    special = special_ids(tokenizer)
    for row in rows:
        place = row.place
        try:
            example = encode_row(row, tokenizer)
        except DataError as error:
            rejects.add(place, str(error))
            continue
        sample_id = example.sample_id
        if sample_id in places:
            if "id" in row.content:
                rejects.add(place, f"id {sample_id!r} was used before, at {places[sample_id]}")
                continue
            copies[sample_id] += 1
            sample_id = f"{sample_id}#{copies[sample_id]}"  # the same text twice is learned twice
        places[sample_id] = place
        ids, is_target = example.input_ids, example.is_target
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary_size:
            rejects.add(
                place,
                f"the tokenizer gives token {max(ids)}, the model's head has only "
                f"{vocabulary_size}; use the tokenizer that belongs to the model",
            )
            continue
        ends = [] if is_plain_text(row.content) else list(_last_targets(example))
        if len(ids) > max_length:
            if on_long == "error":
                rejects.add(
                    place,
                    f"{len(ids)} tokens, more than data.max_length = {max_length}; raise it, or "
                    "set data.on_long to drop or truncate",
                )
                continue
            if on_long == "drop":
                summary.dropped += 1
                continue
            ids, is_target = ids[:max_length], is_target[:max_length]
        if not any(is_target):
            rejects.add(
                place,
                f"none of its first {len(ids)} tokens is to be learned; raise data.max_length, or "
                "put a prompt before the answer",
            )
            continue
        summary.truncated += len(example.input_ids) > max_length
        summary.samples += 1
        summary.tokens += len(ids)
        summary.supervised_tokens += sum(is_target)
        summary.answers += len(ends)
        summary.endless_answers += sum(token not in special for token in ends)
        summary.domains[example.domain] += 1
        yield Example(sample_id, ids, is_target, example.domain)
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
