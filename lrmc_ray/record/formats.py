"""The forms that rows of training data have: chats, prompts with completions, plain text.

Every form but plain text becomes a :class:`Conversation`. A field that holds something to learn or
to be asked, and that has no place in a conversation, is refused by its name; fields that say
nothing of the sort are left alone.
"""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lrmc_ray.chat.conversation import REASONING, Conversation
from lrmc_ray.errors import DataError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
"""What ``from`` says, and the role that it stands for; a function_call is the assistant's."""

_ROLES = ("system", "user", "assistant", "tool", "developer", "function")

_LOST = ("audio", "refusal", "image", "images", "video", "videos", "documents", "attachments")
"""Fields of a message whose content no text holds."""


def has_form(names: Collection[str]) -> bool:
    """Whether columns of these names can be rows of a known form."""
    return any(set(fields) & set(names) for _, fields, _ in _FORMATS)


def format_of(row: Mapping[str, Any]) -> str:
    """The name of the row's form; "" if it has none that is known."""
    return next((name for name, fields, _ in _FORMATS if set(fields) <= row.keys()), "")


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether the row is no conversation but ``text``."""
    return format_of(row) == "text"


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """The row as a conversation.

    Raises:
        DataError: a field is missing, of the wrong type or empty, or says that the row is not to
            be learned as it stands.
    """
    _check_is_no_comparison(row)
    read = next((read for _, fields, read in _FORMATS if set(fields) <= row.keys()), None)
    if read is None:
        raise DataError(
            "needs 'messages', or 'prompt' and 'completion', or 'text', or the fields of ShareGPT, "
            f"Alpaca or a question with its answer; has {', '.join(sorted(row)) or 'nothing'}"
        )
    messages = _with_system(row, read(row))
    learned = [m for m in messages if m["role"] == "assistant" and _says_something(m)]
    if not learned:
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise DataError(
            f"no assistant message with text, so nothing to learn; its roles are {roles}"
        )
    is_learned = [_is_learned(message) for message in messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    unlearned = frozenset(i for i in answers if not is_learned[i])
    if len(unlearned) == len(answers):
        raise DataError(
            "every answer has 'weight' 0 or 'train' false, so there is nothing to learn; remove "
            "the row, or one of these marks"
        )
    for index in answers:
        if index not in unlearned and not _says_something(messages[index]):
            raise DataError(
                f"message {index + 1} is an answer without text, so the model would learn to say "
                "nothing; remove it, or mark it with 'train' false"
            )
    return Conversation(tuple(map(_cleaned, messages)), _tools_of(row), unlearned)


def _check_is_no_comparison(row: Mapping[str, Any]) -> None:
    """Refuse rows that are made for learning from what is worse."""
    if "chosen" in row or "rejected" in row:
        raise DataError(
            "'chosen' and 'rejected' compare two answers, and one alone is learned here; give the "
            "better one as 'completion' or 'messages'"
        )
    label = row.get("label")
    if label is not None and str(label).strip().lower() in ("false", "0", "0.0"):
        raise DataError(
            f"'label' is {label!r}, so the completion is one that must not be learned; remove the "
            "row, or the field if it means something else"
        )
    if row.get("chat_template_kwargs"):
        raise DataError(
            "'chat_template_kwargs' cannot differ by row; set model.template_options and remove "
            "the field"
        )


def _chat(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _messages(row["messages"], "messages")


def _messages(messages: Any, field: str) -> list[dict[str, Any]]:
    """A list of messages, each with a role, and with text or what stands in for it."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{field!r} must be a non-empty list")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError("each message needs the strings 'role' and 'content'")
    read = dict(message)
    for name in _LOST:
        if read.get(name):
            raise DataError(f"'{name}' of a message cannot be learned from; remove the row")
    for name in REASONING:
        if not isinstance(read.get(name, ""), str):
            raise DataError(f"{name!r} must be a string, got {read[name]!r}")
    if isinstance(read.get("content"), list):
        read["content"] = _text_of_parts(read["content"])
    if (call := read.pop("function_call", None)) is not None:
        read["tool_calls"] = [{"type": "function", "function": call}]
    _check_role(read["role"])
    if read["role"] == "function":
        read["role"] = "tool"
    if read.get("tool_calls"):
        read["tool_calls"] = _tool_calls(read["tool_calls"])
    stands_in = read.get("tool_calls") or any(read.get(name) for name in REASONING)
    if "content" not in read and read["role"] == "assistant" and stands_in:
        read["content"] = ""
    if not isinstance(read.get("content"), str):
        raise DataError("each message needs the strings 'role' and 'content'")
    return read


def _check_role(role: str) -> None:
    """Refuse what can only be a mistyped role; a template may know other ones."""
    if role not in _ROLES and (meant := difflib.get_close_matches(role, _ROLES, 1, 0.8)):
        raise DataError(f"there is no role {role!r}. Did you mean {meant[0]!r}?")


def _text_of_parts(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise DataError(
                f"a part of 'content' must be of the type 'text', got {kind!r}; remove the row, or "
                "its other parts"
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = _parsed(calls)
    if not isinstance(calls, list):
        raise DataError(f"'tool_calls' must be a list, got {calls!r}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"each of 'tool_calls' needs a function with a name, got {call!r}")
        arguments = _parsed(function.get("arguments", function.get("parameters", {})))
        called = {"name": function["name"], "arguments": arguments}
        own = {name: call[name] for name in ("id",) if name in call}
        read.append({**own, "type": "function", "function": called})
    return read


def _parsed(value: Any) -> Any:
    """What a string of JSON says; another value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, str | list) or not isinstance(completion, str | list):
        raise DataError("'prompt' and 'completion' must be strings, or lists of messages")
    if not completion or (isinstance(completion, str) and not completion.strip()):
        raise DataError("'completion' is empty, so there is nothing to learn")
    before = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else _messages(prompt, "prompt")
    )
    if any(m.get("train") is True for m in before):
        raise DataError(
            "'train' of a message in 'prompt' is true, and of such a row only the completion is "
            "learned; remove the mark, or write the row as 'messages'"
        )
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
    if isinstance(completion, str):
        return [*before, {"role": "assistant", "content": completion}]
    return [*before, *_messages(completion, "completion")]


def _sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' must be a non-empty list")
    messages = []
    for turn in turns:
        if isinstance(turn, Mapping) and "role" in turn:
            messages.append(_message(turn))
            continue
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise DataError("each of 'conversations' needs the strings 'from' and 'value'")
        role = SHAREGPT_ROLES.get(turn.get("from", ""))
        if role is None:
            raise DataError(
                f"'from' must be one of {', '.join(SHAREGPT_ROLES)}, got {turn.get('from')!r}"
            )
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        if role == "function_call":
            call = _parsed(turn["value"])
            calls = call if isinstance(call, list) else [call]
            messages.append(_message({**rest, "role": "assistant", "tool_calls": calls}))
        else:
            messages.append(_message({**rest, "role": role, "content": turn["value"]}))
    return messages


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = row.get("input", "")
    if not all(isinstance(row[name], str) for name in ("instruction", "output")) or not isinstance(
        given, str
    ):
        raise DataError("'instruction', 'input' and 'output' must be strings")
    if row.get("history"):
        raise DataError("'history' is not read; write such a row as 'messages'")
    question = f"{row['instruction']}\n\n{given}" if given.strip() else row["instruction"]
    return _question_and_answer(question, row["output"], "output")


def _question(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    question, answer = row["question"], row["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError("'question' and 'answer' must be strings")
    return _question_and_answer(question, answer, "answer")


def _question_and_answer(question: str, answer: str, name: str) -> list[dict[str, Any]]:
    if not answer.strip():
        raise DataError(f"{name!r} is empty, so there is nothing to learn")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _nothing(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    raise AssertionError("plain text is no conversation")


_FORMATS: tuple[
    tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], list[dict[str, Any]]]], ...
] = (
    ("messages", ("messages",), _chat),
    ("prompt and completion", ("prompt", "completion"), _prompt),
    ("ShareGPT", ("conversations",), _sharegpt),
    ("Alpaca", ("instruction", "output"), _alpaca),
    ("question and answer", ("question", "answer"), _question),
    ("text", ("text",), _nothing),
)
"""Name, fields and reader of each form; looked for in this order."""

FIELDS = (
    *("id", "domain"),
    *dict.fromkeys(name for _, fields, _ in _FORMATS for name in fields),
    *("system", "tools", "functions", "input", "history"),
    *("chosen", "rejected", "label", "chat_template_kwargs"),
)
"""Fields of a row that are read; of tables no others are loaded."""


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = row.get("system", "")
    if not isinstance(system, str):
        raise DataError(f"'system' must be a string, got {system!r}")
    if not system.strip():
        return messages
    if messages[0]["role"] == "system":
        raise DataError("'system' stands beside a system message; keep one of the two")
    return [{"role": "system", "content": system}, *messages]


def _tools_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = _parsed(row.get("tools", []))
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"'tools' must be a list of objects, got {tools!r}")
    functions = _parsed(row.get("functions", []))
    if not isinstance(functions, list):
        raise DataError(f"'functions' must be a list of objects, got {functions!r}")
    return (*tools, *({"type": "function", "function": function} for function in functions))


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _is_learned(message: Mapping[str, Any]) -> bool:
    """What ``weight`` and ``train`` say.

    Raises:
        DataError: they say neither yes nor no.
    """
    weight, train = message.get("weight", 1), message.get("train", True)
    if message["role"] != "assistant" and message.get("train") is True:
        raise DataError(
            f"'train' of a message of the role {message['role']!r} is true, and only what the "
            "assistant says is learned; remove the mark, or give it the role 'assistant'"
        )
    if weight not in (0, 1) or not isinstance(weight, int | float):
        raise DataError(f"'weight' of a message must be 0 or 1, got {weight!r}")
    if not isinstance(train, bool):
        raise DataError(f"'train' of a message must be true or false, got {train!r}")
    return bool(weight) and train


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that chat templates read, those that say nothing left out."""
    cleaned = {"role": message["role"], "content": message["content"]}
    for name in ("tool_calls", *REASONING, "name"):
        if message.get(name):
            cleaned[name] = message[name]
    if message["role"] == "tool" and message.get("tool_call_id"):
        cleaned["tool_call_id"] = message["tool_call_id"]
    return cleaned


def without_nulls(value: Any) -> Any:
    """``value`` without what is null in its objects: in a column it was not given."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value
