"""What a message holds must be in what the chat template renders of it."""

import json
from collections.abc import Mapping

from lrmc_ray.chat.conversation import (
    REASONING,
    Conversation,
    Message,
    opened_block,
    split_reasoning,
)
from lrmc_ray.errors import DataError


def check_rendered(conversation: Conversation, whole: str) -> None:
    """Refuse a message that the template leaves out without a word.

    Raises:
        DataError: ``whole``, the rendering, does not have it.
    """
    for number, message in enumerate(conversation.messages, 1):
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str):
            continue
        if not _holds(whole, content):
            raise DataError(
                f"the chat template does not render message {number}, of the role "
                f"{message['role']!r}; use a model whose template does, or remove the message"
            )


def check_answer(message: Message, prompt: str, text: str) -> None:
    """Refuse an answer of which the template leaves out something without a word.

    Raises:
        DataError: ``text``, rendered behind ``prompt``, does not have all of ``message``.
    """
    content = message.get("content") or ""
    reasoning, spoken = split_reasoning(content)
    tags = opened_block(prompt)
    if tags is not None and text.count(tags[1]) > content.count(tags[1]) > 0:
        raise DataError(
            "the generation prompt opens a think block, and the chat template does not take "
            "the one in 'content' for it; put the reasoning into 'reasoning_content'"
        )
    if not _holds(text, spoken):
        raise DataError(
            "the chat template does not render 'content' of an answer as it is "
            f"({spoken.strip()[:40]!r}); change the text, or use another template"
        )
    field = next((name for name in REASONING if message.get(name)), None)
    if field is not None:
        reasoning = str(message[field])
    if reasoning and not _holds(text, reasoning):
        raise DataError(
            f"the chat template does not render {field or 'the think block'!r} of an answer; "
            "write the reasoning into 'content' as the model is to say it, or remove it"
        )
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        name, arguments = function.get("name", ""), function.get("arguments")
        quoted = repr(arguments)
        if isinstance(arguments, Mapping) and "'" in quoted and quoted in text:
            raise DataError(f"the chat template does not render the arguments of {name!r}")
        if name not in text:
            raise DataError(
                f"the chat template does not render 'tool_calls' (of {name!r}); use a model "
                "whose template does, or remove the field"
            )


def _holds(text: str, part: str) -> bool:
    """Whether ``text`` has ``part``, perhaps stripped, or written as in JSON."""
    part = part.strip()
    return part in text or any(
        json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False)
    )
