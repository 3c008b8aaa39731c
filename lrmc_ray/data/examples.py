"""From JSONL and Parquet to token ids and a label mask.

A row holds ``messages`` (chat), or ``prompt`` and ``completion``, or plain ``text``; looked for in
this order. Of a conversation only what the assistant says is supervised, up to and with its
end-of-turn token; of plain text every token but the first. Every rendered piece of a conversation
is tokenized by itself, as it is at inference, where the prompt's tokens are fixed before the first
answer token exists. ``id`` and ``domain`` are optional, other fields are left alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from lrmc_ray.data.sources import Source
from lrmc_ray.errors import DataError, IncompleteArtifactError

MAX_LISTED = 20
"""Bad rows that an error lists."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer line of JSONL is a bad row; it is not read into memory."""

_CONTENT = ("messages", "prompt", "completion", "text")
_COLUMNS = ("id", "domain", *_CONTENT)
_PARQUET_ROWS = 256  # that are Python objects at one time


@dataclass(frozen=True)
class Row:
    """One row of a file, as it stands there."""

    place: str
    """``file:line``, for messages."""
    content: Mapping[str, Any]
    domain: str = ""
    """Of the file; the row's own ``domain`` wins."""


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


class Rejects:
    """Rows that cannot be used: listed in one error, or skipped up to a limit.

    Args:
        file: where every rejected row is noted, one JSON object a line; None if a bad row is an
            error.
        max_share: largest share of all rows that may be skipped, in [0, 1].
    """

    def __init__(self, file: TextIO | None = None, *, max_share: float = 0.0):
        self.rows = 0
        """Rows that were looked at."""
        self.count = 0
        self._file, self._max_share = file, max_share
        self._first: list[str] = []

    def add(self, place: str, problem: str) -> None:
        """Reject the row at ``place``."""
        self.count += 1
        if len(self._first) < MAX_LISTED:
            self._first.append(f"{place}: {problem}")
        if self._file is not None:
            self._file.write(json.dumps({"place": place, "problem": problem}) + "\n")

    def settle(self) -> None:
        """Say how it ended.

        Raises:
            DataError: bad rows that may not be skipped; the first are listed, the rest counted.
        """
        if not self.count or (self._file is not None and self.count <= self._max_share * self.rows):
            return
        listed = "\n  ".join(self._first)
        rest = self.count - len(self._first)
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        rule = f"{self.count} unusable row(s); mend or remove them"
        if self._file is not None:
            rule = (
                f"at most {self._max_share:.2%} of the rows may be skipped "
                f"(data.max_rejected_share), {self.count} of {self.rows} are unusable; mend or "
                "remove them, or raise it"
            )
        raise DataError(f"{rule}:\n  {listed}{more}")


def read_rows(sources: Sequence[Source], rejects: Rejects) -> Iterator[Row]:
    """Every row of the JSONL and Parquet files; lines that are no JSON objects are rejected.

    Raises:
        IncompleteArtifactError: a file does not exist.
        DataError: a Parquet file is damaged or has other columns, or there are no rows at all.
    """
    for source in sources:
        if not source.path.is_file():
            raise IncompleteArtifactError(
                f"training data {source.path} does not exist; give an existing JSONL or Parquet "
                "file"
            )
        read = _parquet_rows if source.path.suffix == ".parquet" else _jsonl_rows
        yield from read(source, rejects)
    if rejects.rows == 0:
        names = ", ".join(str(source.path) for source in sources)
        raise DataError(f"{names}: no rows; training data need at least one")


def _jsonl_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    with source.path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            rejects.rows += 1
            place = f"{source.path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                rejects.add(place, f"longer than {MAX_LINE_BYTES} bytes")
                continue
            try:
                content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                # JSON can spell half a surrogate pair, which no text contains.
                json.dumps(content, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                rejects.add(place, f"not valid JSON in UTF-8: {error}")
                continue
            if isinstance(content, dict):
                yield Row(place, content, source.domain)
            else:
                rejects.add(place, "not a JSON object")


def _parquet_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in _COLUMNS if name in names]
            if not set(columns) & set(_CONTENT):
                raise DataError(
                    f"{source.path}: needs a column messages, or prompt and completion, or text; "
                    f"has {', '.join(names) or 'none'}"
                )
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                batch.validate(full=True)
                for content in batch.to_pylist():
                    number += 1
                    rejects.rows += 1
                    # A column is there for every row; what is null was not given.
                    given = {name: value for name, value in content.items() if value is not None}
                    yield Row(f"{source.path}:row {number}", given, source.domain)
    except DataError:
        raise
    except Exception as error:  # extension types that others registered raise whatever they like
        raise DataError(
            f"{source.path} is no readable Parquet file ({error}); save it again"
        ) from None


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row as chat messages.

    Raises:
        DataError: a field is missing, of the wrong type or empty.
    """
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError("'messages' must be a non-empty list")
        for message in messages:
            if (
                not isinstance(message, dict)
                or not isinstance(message.get("role"), str)
                or not isinstance(message.get("content"), str)
            ):
                raise DataError("each message needs the strings 'role' and 'content'")
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            raise DataError("no assistant message with text, so nothing to learn")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError("'prompt' and 'completion' must be strings")
        if not completion.strip():
            raise DataError("'completion' is empty, so there is nothing to learn")
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    raise DataError(
        "needs 'messages', or 'prompt' and 'completion', or 'text'; has "
        f"{', '.join(sorted(row)) or 'nothing'}"
    )


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether the row is no conversation but ``text``."""
    is_conversation = "messages" in row or {"prompt", "completion"} <= row.keys()
    return "text" in row and not is_conversation


def sample_id_of(row: Mapping[str, Any]) -> str:
    """The row's own ``id``, or the first 16 hex digits of its content's SHA-256.

    Raises:
        DataError: the ``id`` is neither text nor a whole number.
    """
    if "id" in row:
        if type(row["id"]) not in (str, int):
            raise DataError(f"'id' must be a string or an integer, got {row['id']!r}")
        return str(row["id"])
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


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
