"""From a row of training data to token ids and the positions that are learned."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lrmc_ray.chat.answers import Chat
from lrmc_ray.chat.conversation import Answer, Rendering
from lrmc_ray.chat.tokens import Encoded, bare_ids, continued, encode_all, ids_of_all
from lrmc_ray.errors import DataError
from lrmc_ray.record.formats import conversation_of, format_of, is_plain_text
from lrmc_ray.record.rows import Rejects, Row, sample_id_of

BATCH_ROWS = 256
"""Rows that are tokenized side by side."""


@dataclass(frozen=True)
class Example:
    """One tokenized sample."""

    sample_id: str
    input_ids: list[int]
    is_target: list[bool]
    """Whether the token is to be learned; [i] belongs to ``input_ids[i]``."""
    domain: str = ""
    text: str = field(default="", compare=False, repr=False)
    """What was tokenized."""


@dataclass
class EncodingSummary:
    """What became of the rows."""

    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    """Conversations that gave more than one sample: the template rewrites their earlier turns."""
    domains: Counter[str] = field(default_factory=Counter)
    """Samples of each domain."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows of each format that were used."""


@dataclass(frozen=True)
class _Rendered:
    """A row on its way: what has to be tokenized of it, or what is wrong with it."""

    row: Row
    sample_id: str = ""
    domain: str = ""
    text: str = ""
    """Of plain text."""
    renderings: tuple[Rendering, ...] = ()
    problem: str = ""


def _render(row: Row, chat: Chat) -> _Rendered:
    content = row.content
    if row.problem:
        return _Rendered(row, problem=row.problem)
    try:
        sample_id = sample_id_of(content)
        domain = content.get("domain")
        domain = row.domain if domain is None else domain
        if not isinstance(domain, str):
            raise DataError(f"'domain' must be a string, got {domain!r}")
        if is_plain_text(content):
            return _Rendered(row, sample_id, domain, text=_plain_text(content["text"]))
        renderings = tuple(chat.renderings(conversation_of(content)))
    except DataError as problem:
        return _Rendered(row, problem=str(problem))
    return _Rendered(row, sample_id, domain, renderings=renderings)


def _plain_text(text: Any) -> str:
    if not isinstance(text, str):
        raise DataError(f"'text' must be a string, got {text!r}")
    if not text.strip():
        raise DataError("'text' is empty, so there is nothing to learn")
    return text


def encode_batch(rows: Sequence[Row], chat: Chat) -> Iterator[tuple[Row, list[Example] | str]]:
    """Every row with its examples, or with what is wrong with it.

    Of a conversation the answers are learned, up to and with the end of the turn; of plain text
    every token but the first.
    """
    rendered = [_render(row, chat) for row in rows]
    all_renderings = [part for one in rendered for part in one.renderings]
    whole = iter(encode_all(chat.tokenizer, [part.text for part in all_renderings]))
    prompts = iter(
        ids_of_all(
            chat.tokenizer,
            [
                answer.prompt[chat.last_header(answer.prompt) if answer is not last else 0 :]
                for part in all_renderings
                for last in part.answers[-1:]
                for answer in part.answers
            ],
        )
    )
    for one in rendered:
        if one.problem:
            yield one.row, one.problem
        elif one.text:
            yield one.row, [_text_example(one, chat.tokenizer)]
        else:
            parts: list[tuple[list[int], list[bool], str]] = []
            for part in one.renderings:
                own = list(itertools.islice(prompts, len(part.answers)))
                parts += _samples(part, next(whole), own, chat)
            names = [one.sample_id]
            if len(parts) > 1:
                names = [f"{one.sample_id}/{number}" for number in range(1, len(parts) + 1)]
            yield (
                one.row,
                [
                    Example(name, ids, is_target, one.domain, text)
                    for name, (ids, is_target, text) in zip(names, parts, strict=True)
                ],
            )


def encode_row(row: Row, chat: Chat) -> list[Example]:
    """The examples of one row.

    Raises:
        DataError: the row cannot be used.
    """
    ((_, result),) = encode_batch([row], chat)
    if isinstance(result, str):
        raise DataError(result)
    return result


def _text_example(one: _Rendered, tokenizer: Any) -> Example:
    """Nothing is added but what the tokenizer itself puts around a text, such as a first token."""
    input_ids = list(tokenizer(one.text, add_special_tokens=True)["input_ids"])
    is_target = [i > 0 for i in range(len(input_ids))]
    return Example(one.sample_id, input_ids, is_target, one.domain, one.text)


def _samples(
    part: Rendering, whole: Encoded, prompts: Sequence[list[int]], chat: Chat
) -> Iterator[tuple[list[int], list[bool], str]]:
    """Token ids, mask and text of a rendering.

    Several where the tokens of an earlier prompt are others than those that it begins with: at
    inference the prompt comes alone, so that answer is a sample of its own.

    Args:
        part: the rendering.
        whole: its tokens.
        prompts: token ids of every answer's prompt; of all but the last only from its last special
            token on, before which the tokens are those of the whole.
        chat: renders and tokenizes.
    """
    tokenizer = chat.tokenizer
    shared: list[tuple[Answer, list[int]]] = []
    for answer, own_ids in zip(part.answers, prompts, strict=True):
        prompt_ids = own_ids
        if answer is not part.answers[-1] and (start := chat.last_header(answer.prompt)):
            before = whole.before(start)
            if whole.ids[before : before + len(own_ids)] == own_ids:
                prompt_ids = whole.ids[: before + len(own_ids)]
            else:
                prompt_ids = bare_ids(tokenizer, answer.prompt)
        if whole.ids[: len(prompt_ids)] == prompt_ids:
            shared.append((answer, prompt_ids))
        else:
            rest, characters, skipped = continued(tokenizer, answer.text)
            input_ids = prompt_ids + rest.ids[skipped:]
            shift = len(prompt_ids) - skipped
            is_target = [False] * len(input_ids)
            for start, stop in answer.learned:
                first = rest.before(characters + start) + shift if start else len(prompt_ids)
                last = rest.before(characters + stop) + shift
                is_target[first:last] = [True] * (last - first)
            yield input_ids, _from_second(is_target), answer.prompt + answer.text
    if shared:
        is_target = [False] * len(whole.ids)
        for answer, prompt_ids in shared:
            begin = len(answer.prompt)
            for start, stop in answer.learned:
                first = whole.before(begin + start) if start else len(prompt_ids)
                last = whole.before(begin + stop)
                is_target[first:last] = [True] * (last - first)
        yield whole.ids, _from_second(is_target), part.text


def _from_second(is_target: list[bool]) -> list[bool]:
    """Nothing precedes the first token, so nothing can predict it."""
    return [False, *is_target[1:]] if is_target else []


class _SampleIds:
    """The ids that were given so far; an id of the user's own must be the only one."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._copies: Counter[str] = Counter()

    def claim(self, sample_id: str, row: Row) -> str:
        """The id of a sample of ``row``: the same text twice is learned twice, under two ids.

        Raises:
            DataError: the row's own id was used before.
        """
        if sample_id in self._places:
            if row.content.get("id") is not None:
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
    chat: Chat,
    *,
    max_length: int,
    on_long: Literal["error", "drop", "truncate"],
    vocabulary_size: int,
    summary: EncodingSummary,
    rejects: Rejects,
) -> Iterator[Example]:
    """Every usable row as :class:`Example`; ``summary`` and ``rejects`` count as it goes.

    Raises:
        DataError: rows that cannot be used, unless they may be skipped; or no row is left.
    """
    ids = _SampleIds()
    waiting = iter(rows)
    while batch := list(itertools.islice(waiting, BATCH_ROWS)):
        for row, result in encode_batch(batch, chat):
            if isinstance(result, str):
                rejects.add(row.place, result)
                continue
            try:
                fitted = []
                for whole in result:
                    named = dataclasses.replace(whole, sample_id=ids.claim(whole.sample_id, row))
                    _check_vocabulary(named.input_ids, vocabulary_size)
                    fitted.append(_fitted(named, max_length, on_long))
            except DataError as error:
                rejects.add(row.place, str(error))
                continue
            summary.split += len(result) > 1
            summary.formats[format_of(row.content)] += 1
            for whole, example in zip(result, fitted, strict=True):
                if example is None:
                    summary.dropped += 1
                    continue
                summary.truncated += len(whole.input_ids) > max_length
                summary.samples += 1
                summary.tokens += len(example.input_ids)
                summary.supervised_tokens += sum(example.is_target)
                summary.domains[example.domain] += 1
                yield example
    rejects.settle()
    if summary.samples == 0:
        raise DataError(
            f"no sample is left ({summary.dropped} dropped as longer than data.max_length = "
            f"{max_length}, {rejects.count} unusable); raise data.max_length or mend the rows"
        )
