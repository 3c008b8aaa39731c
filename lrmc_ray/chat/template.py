"""Prompt and answer as a model's chat template renders them, the same for learning and scoring.

What a model is asked is the template's generation prompt; what it learns to say is what the
template writes behind that prompt, up to and with the token that ends the turn. Where a template
renders an earlier answer differently once a later turn follows, each answer is rendered with the
conversation up to it alone, as it is when the model has to give it.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lrmc_ray.errors import DataError

RENDERING = 2
"""Changes whenever prompts or answers are rendered, or told from each other, in another way."""

Message = Mapping[str, Any]

PLAIN_FORMAT = (
    "{{ first_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""What stands in for a chat template that a tokenizer lacks; ``first_token`` is the tokenizer's."""

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

_REFUSES = "the chat template refuses this conversation"
_PROBE = ("Lorem", "ipsum", "dolor")


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


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are no text: those with a role, such as eos, and those marked as special."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    roles = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**dict(roles), **{i: str(token) for i, token in added.items() if token.special}}


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


def spoken_answer(prompt: str, text: str) -> str | None:
    """What is said behind the think block that ``text`` begins with; None while it is open.

    The block may have been opened by the prompt.
    """
    tags = opened_block(prompt) or next(
        (tags for tags in THINK_TAGS if text.lstrip().startswith(tags[0])), None
    )
    if tags is None:
        return text
    _, closed, spoken = text.partition(tags[1])
    return spoken.lstrip() if closed else None


class Chat:
    """How one tokenizer renders conversations.

    Args:
        tokenizer: of transformers.
        options: what the chat template is given besides the messages, such as ``enable_thinking``.

    Raises:
        DataError: the template does not know an option.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self._special = tuple(sorted(set(special_tokens(tokenizer).values()) - {""}))
        self._arguments = dict(self.options)
        if not self.has_template:
            self._arguments |= {
                "chat_template": PLAIN_FORMAT,
                "first_token": first_token(tokenizer),
                "eos_token": tokenizer.eos_token or "",
            }
        text = json.dumps(tokenizer.chat_template or PLAIN_FORMAT)
        for name in self.options:
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise DataError(
                    f"model.template_options must be known to the chat template, got {name!r}, "
                    "which does not occur in it; correct the name or remove it"
                )

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template of its own; else ``PLAIN_FORMAT`` is used."""
        return bool(self.tokenizer.chat_template)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, ask: bool = False
    ) -> str:
        """The conversation as text, with the generation prompt behind it if ``ask``.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        return self._rendered(messages, tools, ask=ask)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template takes a content as a list of parts only, as those for images do."""
        message = {"role": "user", "content": _PROBE[0]}
        for form, answer in ((message, False), (_in_parts(message), True)):
            try:
                if _PROBE[0] in self._rendered([form], (), ask=True):
                    return answer
            except DataError:
                continue
        return False

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any], *, ask: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=ask,
                **self._arguments,
            )
        except Exception as error:  # a template is a program: it raises whatever it likes
            kind = type(error).__name__
            told = str(error) if kind == "TemplateError" else f"{kind}: {error}"
            raise DataError(f"{_REFUSES}: {told}") from None
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The generation prompt behind ``messages``: the context of the next answer.

        Raises:
            DataError: see :meth:`render`.
        """
        return self.render(messages, tools, ask=True)

    def opening(self, messages: Sequence[Message]) -> str:
        """What the template writes between the generation prompt and the answer's own text.

        Raises:
            DataError: see :meth:`render`.
        """
        answer = self.answer([*messages, {"role": "assistant", "content": _PROBE[1]}])
        return answer.text[: answer.text.index(_PROBE[1])]

    def answer(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Answer:
        """The last message, which is the assistant's, in the context of those before it.

        Raises:
            DataError: the template does not render it behind its own generation prompt, or leaves
                out some of it, or see :meth:`render`.
        """
        after = self.render(messages, tools)
        prompt, text = self._cut(messages, tools, after)
        end = self._end(text, messages[-1])
        if end is None:
            borrowed = self._ends[2]
            if messages[-1].get("tool_calls"):
                borrowed = self._end_of_call or borrowed
            if borrowed:
                text, end = text + borrowed, len(text) + len(borrowed)
        if end is None:
            raise DataError(
                "an answer must end with a special token, this one ends with "
                f"{text[-20:]!r}: the model would not learn to stop; use a chat template that "
                "writes one, or a tokenizer with an eos token"
            )
        learned: tuple[tuple[int, int], ...] = ((0, end),)
        if self._marks_answers and after.startswith(prompt):
            learned = self._marked(messages, tools, len(prompt), len(prompt) + end)
        return Answer(prompt, text, end, learned)

    def _cut(
        self, messages: Sequence[Message], tools: Sequence[Any], after: str
    ) -> tuple[str, str]:
        """Generation prompt and answer; ``after`` is the rendering of both."""
        if len(messages) == 1:
            return self._cut_first(messages[0], tools, after)
        prompt = self.prompt(messages[:-1], tools)
        if after.startswith(prompt):
            return prompt, after[len(prompt) :]
        tags = opened_block(prompt)
        if tags is not None:
            head, _, blank = prompt.rpartition(tags[0])
            if after.startswith(head):
                return prompt, _closed(after[len(head) :], messages[-1], tags, blank)
        common = _shared(prompt, after)
        raise DataError(
            "the chat template must render an answer behind its generation prompt; the prompt ends "
            f"with {prompt[common:][-40:]!r}, where the answer is rendered behind "
            f"{after[common : common + 40]!r}; set model.template_options, or use a chat template "
            "that agrees with itself"
        )

    def _cut_first(self, message: Message, tools: Sequence[Any], after: str) -> tuple[str, str]:
        """The same where nothing precedes the answer: no template renders an empty conversation."""
        content = message.get("content")
        at = after.find(content.strip()) if isinstance(content, str) and content.strip() else -1
        question = [{"role": "user", "content": _PROBE[0]}]
        try:
            asked = self.prompt(question, tools)
            header = asked.removeprefix(self.render(question, tools))
        except DataError:
            header = ""
        start = after.find(header) + len(header) if header and header in after else at
        if start < 0 or (at >= 0 and start > at):
            start = at
        if start < 0:
            raise DataError(
                "an answer that comes first must be rendered with its text, this one is not; put a "
                "user message before it"
            )
        return after[:start], after[start:]

    @cached_property
    def _ends(self) -> tuple[str, str, str]:
        """Tokens that end a turn: before a further one, at the very end, borrowed from the next."""
        user, answer, further = (
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), _PROBE, strict=True)
        )
        try:
            last = self.render([user, answer]).rpartition(_PROBE[1])[2]
            turns = self.render([user, answer, further]).partition(_PROBE[1])[2]
        except DataError:
            return "", "", ""
        inner = list(self._found(last[: _shared(last, turns)]))
        final = list(self._found(last))
        following = turns.partition(_PROBE[2])[0].lstrip()
        borrowed = next((t for t in self._special if following.startswith(t)), "")
        own = bool(inner or final)
        return (
            inner[-1] if inner else "",
            final[0] if final else "",
            "" if own or not self.has_template else borrowed,
        )

    @cached_property
    def _end_of_call(self) -> str:
        """What follows a tool call in a template whose turns end with the next one's header."""
        call = {"name": _PROBE[1], "arguments": {}}
        messages: list[Message] = [
            {"role": "user", "content": _PROBE[0]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        ]
        result = {"role": "tool", "name": _PROBE[1], "content": _PROBE[2]}
        try:
            before = self.render(messages)
            after = self.render([*messages, result])
        except DataError:
            return ""
        following = after.removeprefix(before).lstrip() if after.startswith(before) else ""
        return next((t for t in self._special if following.startswith(t)), "")

    @cached_property
    def _headers(self) -> frozenset[str]:
        """Special tokens that every conversation is rendered with."""
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), _PROBE, strict=True)
        ]
        try:
            return frozenset(self._found(self.prompt(messages)))
        except DataError:
            return frozenset()

    def last_header(self, prompt: str) -> int:
        """Where the last special token of ``prompt`` begins; 0 without one.

        A tokenizer cuts at these first, so that what comes before has no part in the tokens behind.
        """
        return max([0, *(prompt.rfind(token) for token in self._headers)])

    def _found(self, text: str) -> Iterator[str]:
        """The special tokens in ``text``, in their order."""
        pattern = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        if pattern:
            yield from re.findall(pattern, text)

    def _end(self, text: str, message: Message) -> int | None:
        """Where the turn ends in ``text``; None where nothing ends it."""
        content = message.get("content")
        quoted = content.rstrip() if isinstance(content, str) else ""
        for marker in self._ends[:2]:
            at = text.rfind(marker) if marker else -1
            if at >= 0 and at + len(marker) >= text.rfind(quoted) + len(quoted):
                behind = text[at + len(marker) :]
                for token in self._found(behind):
                    behind = behind.replace(token, "")
                if not behind.strip():
                    return at + len(marker)
        stripped = text.rstrip()
        if quoted and stripped.endswith(quoted):
            return None
        # A turn of another kind, such as a tool call, may end with a token of its own.
        if any(stripped.endswith(token) for token in self._special):
            return len(stripped)
        return None

    @cached_property
    def _marks_answers(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        template = self.tokenizer.chat_template
        return isinstance(template, str) and bool(
            re.search(r"\{%-?\s*generation\s*-?%\}", template)
        )

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any], start: int, stop: int
    ) -> tuple[tuple[int, int], ...]:
        """What the template marks as generated in [start, stop), from ``start`` on.

        Raises:
            DataError: it marks nothing there.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        rendered: Any = render_jinja_template(
            conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
            tools=list(tools) or None,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self._arguments},
        )
        # What the prompt holds, and what stands behind the end of the turn, no model has to say.
        inside = [
            (max(first, start) - start, min(last, stop) - start)
            for first, last in rendered[1][0]
            if first < stop and last > start
        ]
        if not inside:
            raise DataError(
                "a chat template with {% generation %} must mark every answer, it marks nothing of "
                "this one; correct the template, or remove its marks"
            )
        return tuple(inside)

    def renderings(self, conversation: Conversation) -> list[Rendering]:
        """The samples that a conversation is learned as, each answer once, in their order.

        One, unless the template renders an earlier answer differently once a later turn follows.

        Raises:
            DataError: the template does not render all that the messages hold, or see
                :meth:`answer`.
        """
        problems = []
        # Templates differ in what they take for a call's arguments and its lack of text.
        for form in (conversation, *_forms_of_calls(conversation)):
            try:
                return self._renderings(form)
            except DataError as problem:
                problems.append(problem)
        raise next((p for p in problems if _REFUSES not in str(p)), problems[0])

    def _renderings(self, conversation: Conversation) -> list[Rendering]:
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        self._check_rendered(conversation, whole)
        open_answers: list[Answer] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index in conversation.unlearned:
                continue
            answer = self.answer(messages[: index + 1], tools)
            self._check_answer(message, answer.prompt, answer.text)
            open_answers.append(answer)
        renderings: list[Rendering] = []
        while open_answers:
            last = open_answers[-1]
            text = last.prompt + last.text
            if whole.startswith(last.prompt + last.text[: last.end]):
                text = whole
            inside = [a for a in open_answers if text.startswith(a.prompt + a.text[: a.end])]
            open_answers = [a for a in open_answers if a not in inside]
            renderings.insert(0, Rendering(text, tuple(inside)))
        return renderings

    def _check_rendered(self, conversation: Conversation, whole: str) -> None:
        """Refuse what the template leaves out without a word."""
        for number, message in enumerate(conversation.messages, 1):
            content = message.get("content")
            if message["role"] == "assistant" or not isinstance(content, str):
                continue
            if not _holds(whole, content):
                raise DataError(
                    f"the chat template does not render message {number}, of the role "
                    f"{message['role']!r}; use a model whose template does, or remove the message"
                )
        if conversation.tools and whole == self.render(conversation.messages):
            raise DataError(
                "the chat template does not render 'tools'; use a model whose template does, or "
                "remove the field"
            )

    def _check_answer(self, message: Message, prompt: str, text: str) -> None:
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


def first_token(tokenizer: Any) -> str:
    """What the tokenizer itself puts before a text, such as its bos token; "" if nothing."""
    with_it = list(tokenizer(_PROBE[0], add_special_tokens=True)["input_ids"])
    bare = list(tokenizer(_PROBE[0], add_special_tokens=False)["input_ids"])
    if not bare or bare[0] not in with_it:
        return ""
    text: str = tokenizer.decode(with_it[: with_it.index(bare[0])])
    return text


def _closed(tail: str, message: Message, tags: tuple[str, str], blank: str) -> str:
    """``tail``, the rendered answer, continued from a think block that is already open."""
    opened, closed = tags
    if tail.startswith(opened):
        rest = tail[len(opened) :]
        return rest.lstrip() if blank else rest
    reasoning = next((str(message[name]) for name in REASONING if message.get(name)), "")
    reasoning = reasoning or split_reasoning(message.get("content") or "")[0]
    between = f"{reasoning.strip()}\n" if reasoning else "\n"
    return f"{between}{closed}\n\n{tail.removeprefix(closed).lstrip()}"


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _forms_of_calls(conversation: Conversation) -> Iterator[Conversation]:
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


def _shared(first: str, second: str) -> int:
    """Number of characters that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _holds(text: str, part: str) -> bool:
    """Whether ``text`` has ``part``, perhaps stripped, or written as in JSON."""
    part = part.strip()
    return part in text or any(
        json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False)
    )
