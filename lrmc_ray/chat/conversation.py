"""A conversation, its answers in their contexts, and the think blocks and tool calls in them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

THINK_TAGS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|channel>thought", "<channel|>"),
)
"""Where reasoning begins and ends, as models write it."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold reasoning; transformers gives a template all three."""


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that they may call, and which of the answers are to be learned."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    unlearned: frozenset[int] = frozenset()
    """Indices of the assistant's messages that are not to be learned."""


@dataclass(frozen=True)
class Answer:
    """One answer in the context that it has at inference."""

    prompt: str
    """The generation prompt."""
    text: str
    """What the template renders behind it."""
    end: int
    """Characters of ``text`` up to the end of the turn, its token included."""
    learned: tuple[tuple[int, int], ...]
    """Ranges of ``text`` that are learned."""


@dataclass(frozen=True)
class Rendering:
    """One sample before it is tokenized: a text, and the answers that are learned in it.

    ``text`` begins with the prompt and the ended text of every one of ``answers``.
    """

    text: str
    answers: tuple[Answer, ...]


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning in a think block at the beginning of ``text``, and what follows it."""
    for opened, closed in THINK_TAGS:
        before, found, after = text.rpartition(closed)
        if found:
            return before.rpartition(opened)[2].strip(), after.lstrip()
    return "", text


def opened_block(text: str) -> tuple[str, str] | None:
    """The tags of a think block that is open at the end of ``text``."""
    for opened, closed in THINK_TAGS:
        if text.rfind(opened) > text.rfind(closed):
            return opened, closed
    return None


def continue_block(tail: str, message: Message, tags: tuple[str, str], blank: str) -> str:
    """``tail``, the rendered answer, continued from a think block that is already open.

    Args:
        tail: the answer.
        message: it.
        tags: of the block.
        blank: what the prompt has behind the tag; where there is nothing, nothing stands around
            the closing tag either.
    """
    opened, closed = tags
    if tail.startswith(opened):
        rest = tail[len(opened) :]
        return rest.lstrip() if blank else rest
    reasoning = next((str(message[name]) for name in REASONING if message.get(name)), "")
    reasoning = reasoning or split_reasoning(message.get("content") or "")[0]
    if not blank:
        return f"{reasoning.strip()}{closed}{tail.removeprefix(closed)}"
    between = f"{reasoning.strip()}\n" if reasoning else "\n"
    return f"{between}{closed}\n\n{tail.removeprefix(closed).lstrip()}"


def in_parts(message: Message) -> Message:
    """The message with its text as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def forms_of_calls(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation with its tool calls in the other forms that templates take."""
    if not any(message.get("tool_calls") for message in conversation.messages):
        return

    def function_of(call: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
        function = dict(call.get("function") or call)
        if as_text and not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        return {**call, "function": function}

    for as_text in (False, True):
        for empty in ("", None):
            messages = tuple(
                {
                    **message,
                    "content": message.get("content") or empty,
                    "tool_calls": [function_of(call, as_text) for call in message["tool_calls"]],
                }
                if message.get("tool_calls")
                else message
                for message in conversation.messages
            )
            yield dataclasses.replace(conversation, messages=messages)
