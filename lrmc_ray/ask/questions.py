"""Questions from a file: plain text, one a line, or JSON lines with or without expected answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.chat.conversation import Message
from lrmc_ray.errors import DataError, IncompleteArtifactError

JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of files whose lines are JSON; every other file is plain text."""

_PAIRS = (("prompt", "completion"), ("question", "answer"))
"""Fields of a row: the question, and the answer that it may have."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what should be answered where that is known."""

    messages: tuple[Message, ...]
    """Up to the answer; the last one is the question."""
    expected: str | None = None

    @property
    def text(self) -> str:
        """The question itself."""
        return str(self.messages[-1]["content"])


def question_of(text: str) -> Question:
    """A question without a conversation before it."""
    return Question(({"role": "user", "content": text},))


def with_system(question: Question, system: str | None) -> Question:
    """The question behind a system message; one with a conversation before it stays as it is."""
    if not system or len(question.messages) > 1:
        return question
    return Question(({"role": "system", "content": system}, *question.messages), question.expected)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order; empty lines are passed over.

    Raises:
        IncompleteArtifactError: there is no such file.
        DataError: it holds no question, or a line is none; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"--questions must be a file, there is no {path}; write one question a line"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text ({error}); save it so") from None
    is_json = path.suffix in JSON_LINES
    found = [
        _of_line(line, f"{path}:{number}") if is_json else question_of(line.strip())
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path} must hold questions, it is empty; write one a line")
    return found


def _of_line(line: str, place: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} must be JSON ({error}); correct the line") from None
    if isinstance(row, str):
        return question_of(row)
    if isinstance(row, dict):
        if isinstance(messages := row.get("messages"), list):
            return _of_messages(messages, place)
        for asked, answered in _PAIRS:
            if isinstance(text := row.get(asked), str):
                return Question(question_of(text).messages, _text(row.get(answered)))
    raise DataError(
        f"{place} must be a text, or have messages, prompt or question, got {line[:60]}; "
        "correct the line"
    )


def _of_messages(messages: Sequence[Any], place: str) -> Question:
    if not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise DataError(f"{place}: every message must have role and content; correct the line")
    expected = None
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        expected = _text(last["content"])
    if not messages or not isinstance(messages[-1]["content"], str):
        raise DataError(f"{place}: messages must end with a question as text; correct the line")
    return Question(tuple(messages), expected)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
