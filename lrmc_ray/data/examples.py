"""From JSONL to token ids and a label mask.

A row holds ``messages`` (chat) or ``prompt`` and ``completion``. Only what the assistant says is
supervised, up to and with its end-of-turn token. Every rendered piece is tokenized by itself, as
it is at inference, where the prompt's tokens are fixed before the first answer token exists.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrmc_ray.errors import DataError, IncompleteArtifactError

MAX_LISTED = 20
"""Bad rows that an error lists."""


@dataclass(frozen=True)
class Example:
    """One tokenized sample."""

    sample_id: str
    input_ids: list[int]
    is_target: list[bool]
    """Whether the token is to be learned; [i] belongs to ``input_ids[i]``."""


@dataclass
class EncodingSummary:
    """What became of the rows."""

    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: int = 0
    truncated: int = 0


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every row of the JSONL files with its place, ``file:line``.

    Raises:
        IncompleteArtifactError: a file does not exist.
        DataError: lines that are no JSON objects (all of them, the first 20 listed), or no rows.
    """
    problems: list[str] = []
    count = 0
    for path in paths:
        if not path.is_file():
            raise IncompleteArtifactError(
                f"training data {path} does not exist; give an existing JSONL file"
            )
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                count += 1
                place = f"{path}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    # JSON can spell half a surrogate pair, which no text contains.
                    json.dumps(row, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    problems.append(f"{place}: not valid JSON in UTF-8: {error}")
                    continue
                if not isinstance(row, dict):
                    problems.append(f"{place}: not a JSON object")
                    continue
                yield place, row
    raise_problems(problems)
    if count == 0:
        names = ", ".join(str(path) for path in paths)
        raise DataError(f"{names}: no rows; a training file needs at least one JSON object a line")


def raise_problems(problems: list[str]) -> None:
    """Raise one DataError that lists the first problems and counts the rest."""
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        rest = len(problems) - MAX_LISTED
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise DataError(f"{len(problems)} unusable row(s); mend or remove them:\n  {listed}{more}")


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
        f"needs 'messages', or 'prompt' and 'completion'; has {', '.join(sorted(row)) or 'nothing'}"
    )


def sample_id_of(row: Mapping[str, Any]) -> str:
    """The row's own ``id``, or the first 16 hex digits of its content's SHA-256.

    Raises:
        DataError: the ``id`` is neither text nor a whole number.
    """
    if "id" in row:
        if type(row["id"]) not in (str, int):
            raise DataError(f"'id' must be a string or an integer, got {row['id']!r}")
        return str(row["id"])
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def encode(sample_id: str, messages: list[dict[str, str]], tokenizer: Any) -> Example:
    """Token ids and label mask of a conversation.

    Raises:
        DataError: the chat template refuses the conversation, or rewrites earlier turns, so no
            mask would be right.
    """
    segments = _chat_segments(messages, tokenizer)
    input_ids: list[int] = []
    is_target: list[bool] = []
    special = set(tokenizer.all_special_ids)
    for text, is_answer in segments:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A template may put a newline behind the end-of-turn token: not part of the answer.
        last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
        input_ids += ids
        is_target += [is_answer and i <= last for i in range(len(ids))]
    if input_ids:
        is_target[0] = False  # nothing precedes the first token, so nothing can predict it
    return Example(sample_id, input_ids, is_target)


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
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    *,
    max_length: int,
    on_long: Literal["error", "drop", "truncate"],
    summary: EncodingSummary,
) -> Iterator[Example]:
    """Every row as an :class:`Example`; ``summary`` counts as it goes.

    Raises:
        DataError: rows that cannot be used, listed with file and line.
    """
    problems: list[str] = []
    places: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for place, row in rows:
        try:
            example = encode(sample_id_of(row), messages_of(row), tokenizer)
        except DataError as error:
            problems.append(f"{place}: {error}")
            continue
        sample_id = example.sample_id
        if sample_id in places:
            if "id" in row:
                problems.append(
                    f"{place}: id {sample_id!r} was used before, at {places[sample_id]}"
                )
                continue
            copies[sample_id] += 1
            sample_id = f"{sample_id}#{copies[sample_id]}"  # the same text twice is learned twice
        places[sample_id] = place
        ids, is_target = example.input_ids, example.is_target
        if len(ids) > max_length:
            if on_long == "error":
                problems.append(
                    f"{place}: {len(ids)} tokens, more than data.max_length = {max_length}; raise "
                    "it, or set data.on_long to drop or truncate"
                )
                continue
            if on_long == "drop":
                summary.dropped += 1
                continue
            summary.truncated += 1
            ids, is_target = ids[:max_length], is_target[:max_length]
        if not any(is_target):
            problems.append(
                f"{place}: none of its first {len(ids)} tokens is to be learned; raise "
                "data.max_length, or put a prompt before the answer"
            )
            continue
        summary.samples += 1
        summary.tokens += len(ids)
        summary.supervised_tokens += sum(is_target)
        yield Example(sample_id, ids, is_target)
    raise_problems(problems)
    if summary.samples == 0:
        raise DataError(
            f"no sample is left ({summary.dropped} dropped as longer than data.max_length = "
            f"{max_length}); raise data.max_length"
        )
