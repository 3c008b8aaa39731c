"""Which special token ends a turn, found by rendering a conversation of known words."""

import re
from collections.abc import Iterator
from functools import cached_property

from lrmc_ray.chat.conversation import Message
from lrmc_ray.chat.template import PROBE, Template
from lrmc_ray.errors import DataError


class TurnEnds:
    """The ends of the turns that a template renders."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def borrowed(self, message: Message) -> str:
        """What ends the turn where only the next one's header does; "" if that is not so."""
        own = self._end_of_call if message.get("tool_calls") else ""
        return own or self._ends[2]

    @cached_property
    def _ends(self) -> tuple[str, str, str]:
        """Tokens that end a turn: before a further one, at the very end, borrowed from the next."""
        user, answer, further = (
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), PROBE, strict=True)
        )
        try:
            last = self._template.render([user, answer]).rpartition(PROBE[1])[2]
            turns = self._template.render([user, answer, further]).partition(PROBE[1])[2]
        except DataError:
            return "", "", ""
        inner = list(self._found(last[: shared_length(last, turns)]))
        final = list(self._found(last))
        following = turns.partition(PROBE[2])[0].lstrip()
        borrowed = next((t for t in self._template.special if following.startswith(t)), "")
        own = bool(inner or final)
        return (
            inner[-1] if inner else "",
            final[0] if final else "",
            "" if own or not self._template.has_template else borrowed,
        )

    @cached_property
    def _end_of_call(self) -> str:
        """What follows a tool call in a template whose turns end with the next one's header."""
        call = {"name": PROBE[1], "arguments": {}}
        messages: list[Message] = [
            {"role": "user", "content": PROBE[0]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        ]
        result = {"role": "tool", "name": PROBE[1], "content": PROBE[2]}
        try:
            before = self._template.render(messages)
            after = self._template.render([*messages, result])
        except DataError:
            return ""
        following = after.removeprefix(before).lstrip() if after.startswith(before) else ""
        return next((t for t in self._template.special if following.startswith(t)), "")

    @cached_property
    def _headers(self) -> frozenset[str]:
        """Special tokens that every conversation is rendered with."""
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), PROBE, strict=True)
        ]
        try:
            return frozenset(self._found(self._template.prompt(messages)))
        except DataError:
            return frozenset()

    def last_header(self, prompt: str) -> int:
        """Where the last special token of ``prompt`` begins; 0 without one.

        A tokenizer cuts at these first, so that what comes before has no part in the tokens behind.
        """
        return max([0, *(prompt.rfind(token) for token in self._headers)])

    def _found(self, text: str) -> Iterator[str]:
        """The special tokens in ``text``, in their order."""
        if self._template.special:
            yield from self._special.findall(text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self._template.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def end_of(self, text: str, message: Message) -> int | None:
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
        if any(stripped.endswith(token) for token in self._template.special):
            return len(stripped)
        return None


def shared_length(first: str, second: str) -> int:
    """Number of characters that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
