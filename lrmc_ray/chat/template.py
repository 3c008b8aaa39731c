"""A tokenizer's chat template, or the plain format that stands in for one."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from lrmc_ray.chat.conversation import Message, in_parts
from lrmc_ray.errors import DataError

PLAIN_FORMAT = (
    "{{ first_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""What stands in for a chat template that a tokenizer lacks; ``first_token`` is the tokenizer's."""

REFUSES = "the chat template refuses this conversation"
"""How a message begins that tells what the template itself raised."""

PROBE = ("Lorem", "ipsum", "dolor")
"""Texts that no template writes by itself."""


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are no text: those with a role, such as eos, and those marked as special."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    roles = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**dict(roles), **{i: str(token) for i, token in added.items() if token.special}}


class Template:
    """Renders conversations.

    Args:
        tokenizer: of transformers.
        options: what the chat template is given besides the messages, such as ``enable_thinking``.

    Raises:
        DataError: the template does not know an option.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self.special = tuple(sorted(set(special_tokens(tokenizer).values()) - {""}))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.markers = tuple(sorted({*self.special, *map(str, added)} - {""}))
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
            messages = [in_parts(message) for message in messages]
        return self._rendered(messages, tools, ask=ask)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template takes a content as a list of parts only, as those for images do."""
        message = {"role": "user", "content": PROBE[0]}
        for form, answer in ((message, False), (in_parts(message), True)):
            try:
                if PROBE[0] in self._rendered([form], (), ask=True):
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
            raise DataError(f"{REFUSES}: {told}") from None
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The generation prompt behind ``messages``: the context of the next answer.

        Raises:
            DataError: see :meth:`render`.
        """
        return self.render(messages, tools, ask=True)

    @cached_property
    def writes_date(self) -> bool:
        """Whether the day's date is in what is rendered, as with gpt-oss and Llama 3.2."""
        found = re.findall(r"strftime_now\(\s*(['\"])(.+?)\1", str(self.tokenizer.chat_template))
        try:
            text = self.render([{"role": "user", "content": PROBE[0]}]) if found else ""
        except DataError:
            return False
        return any(datetime.now().strftime(form) in text for _, form in found)

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        template = self.tokenizer.chat_template
        return isinstance(template, str) and bool(
            re.search(r"\{%-?\s*generation\s*-?%\}", template)
        )

    def marked(
        self, messages: Sequence[Message], tools: Sequence[Any], start: int, stop: int
    ) -> tuple[tuple[int, int], ...]:
        """What the template marks as generated in [start, stop), from ``start`` on.

        Raises:
            DataError: it marks nothing there.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._wants_parts:
            messages = [in_parts(message) for message in messages]
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


def first_token(tokenizer: Any) -> str:
    """What the tokenizer itself puts before a text, such as its bos token; "" if nothing."""
    with_it = list(tokenizer(PROBE[0], add_special_tokens=True)["input_ids"])
    bare = list(tokenizer(PROBE[0], add_special_tokens=False)["input_ids"])
    if not bare or bare[0] not in with_it:
        return ""
    text: str = tokenizer.decode(with_it[: with_it.index(bare[0])])
    return text
