"""What a message holds must be in what the chat template renders of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrmc_ray.chat.conversation import (
    REASONING,
    Conversation,
    Message,
    opened_block,
    split_reasoning,
)
from lrmc_ray.errors import DataError


def check_rendered(conversation: Conversation, whole: str, unknown: int | None = None) -> None:
    """Refuse a message that the template leaves out without a word.

    Args:
        conversation: it.
        whole: its rendering.
        unknown: see :func:`left_out`. Its text may be in ``whole`` since another message says it.

    Raises:
        DataError: ``whole`` does not have it.
    """
    for number, message in enumerate(conversation.messages, 1):
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str):
            continue
        if number - 1 == unknown or not _holds(whole, content):
            raise DataError(
                f"the chat template does not render message {number}, of the role "
                f"{message['role']!r}; use a model whose template does, or remove the message"
            )


def left_out(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> int | None:
    """Index of the first message whose text ``render`` leaves out, whatever it says.

    An answer is looked at where it is cut out of its rendering, not here. None is found where the
    template refuses the words that are put in place of the texts.
    """
    words = [
        f"lorem{i}ipsum" if m["role"] != "assistant" and m.get("content") else None
        for i, m in enumerate(messages)
    ]
    probes = [
        m if word is None else {**m, "content": word}
        for m, word in zip(messages, words, strict=True)
    ]
    try:
        text = render(probes)
    except DataError:
        return None
    return next((i for i, word in enumerate(words) if word and word not in text), None)


def unrendered_fields(
    messages: Sequence[Message], whole: str, render: Callable[[Sequence[Message]], str]
) -> set[str]:
    """Which of ``name`` and ``tool_call_id`` change nothing in ``whole``, the rendering.

    Raises:
        DataError: what such a field says is lost with it: who speaks, or which call a result
            belongs to where the results stand in another order than their calls.
    """
    found = {name for name in ("name", "tool_call_id") if any(name in m for m in messages)}
    unrendered = {name for name in found if _is_idle(name, messages, whole, render)}
    for number, message in enumerate(messages, 1):
        if "name" in unrendered and "name" in message and message["role"] != "tool":
            raise DataError(
                f"the chat template does not render 'name' of message {number} "
                f"({message['name']!r}); write it into its 'content', or remove the field"
            )
    if found and unrendered == found:
        _check_order(messages, " and ".join(map(repr, sorted(found))))
    return unrendered


def _is_idle(
    name: str, messages: Sequence[Message], whole: str, render: Callable[[Sequence[Message]], str]
) -> bool:
    without = [{k: v for k, v in message.items() if k != name} for message in messages]
    try:
        return render(without) == whole
    except DataError:
        return False


def _check_order(messages: Sequence[Message], fields: str) -> None:
    calls: list[Mapping[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            calls = list(message.get("tool_calls") or ())
        elif message["role"] == "tool" and calls:
            call = calls.pop(0)
            wanted = (call.get("id"), (call.get("function") or call).get("name"))
            given = (message.get("tool_call_id"), message.get("name"))
            by_id = None not in (wanted[0], given[0])
            if (by_id and wanted[0] != given[0]) or (
                not by_id and given[1] not in (None, wanted[1])
            ):
                raise DataError(
                    f"the chat template does not render {fields} of message {number}, so results "
                    f"must stand in the order of their calls; here {wanted[0 if by_id else 1]!r} "
                    f"comes before {given[0 if by_id else 1]!r}; put them in order"
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
