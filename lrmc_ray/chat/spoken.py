"""The answer in what a model writes: behind reasoning and headers, before the end of the turn."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from lrmc_ray.chat.conversation import THINK_TAGS, opened_block


@dataclass(frozen=True)
class Spoken:
    """The answer in a text that a model has written so far."""

    text: str
    """What is scored if nothing more is written."""
    has_begun: bool = True
    """Whether the answer has begun: a stop string within reasoning stops nothing."""
    has_ended: bool = False
    """Whether the end of the turn was written."""


@dataclass(frozen=True)
class AnswerForm:
    """What a chat template writes around an answer's own text, behind one generation prompt."""

    prompt: str
    opening: str
    """Between the prompt and the answer's own text: an empty think block, the name of a channel."""
    closing: str
    """Behind the answer's own text, up to and with the token that ends the turn."""
    special: tuple[str, ...]
    """Tokens that are no text."""
    markers: tuple[str, ...]
    """These, and the further tokens that the tokenizer names, such as tags."""

    def spoken(self, written: str) -> Spoken:
        """The answer in ``written``, decoded with its special tokens.

        Where the answer stands in a channel of its own, what other channels hold is no answer, and
        without that channel the answer is empty. Of a think block that is never closed all is
        scored, as lm-eval does.
        """
        tags = opened_block(self.prompt) or next(
            (tags for tags in THINK_TAGS if written.lstrip().startswith(tags[0])), None
        )
        if tags is not None:
            _, closed, behind = written.partition(tags[1])
            if not closed:
                return Spoken(self._text(written), has_begun=False)
            written = behind.lstrip()
        if self._header:
            found = re.search(self._header_pattern, written)
            if found:
                written = written[found.end() :]
            elif self._header.startswith(written.strip()) or _first_of(
                self._header_markers, written
            ):
                return Spoken("", has_begun=False)
        end = _first_of(self._closing_markers, written)
        return Spoken(self._text(written[: end[0]] if end else written), has_ended=end is not None)

    @cached_property
    def _header(self) -> str:
        """What of ``opening`` stands behind a think block."""
        opening = self.opening
        for opened, closed in THINK_TAGS:
            if closed in opening and (opened in opening or opened_block(self.prompt)):
                opening = opening.rpartition(closed)[2]
        return opening.strip()

    @cached_property
    def _header_pattern(self) -> str:
        """The header; something may stand before its last token, such as a kind of content."""
        last = next(reversed(self._header_markers), "")
        if not last or not self._header.endswith(last) or last == self._header:
            return re.escape(self._header)
        return rf"{re.escape(self._header.removesuffix(last))}[^\n]{{0,64}}?{re.escape(last)}"

    @cached_property
    def _header_markers(self) -> list[str]:
        return _in_order(self._header, self.markers)

    @cached_property
    def _closing_markers(self) -> list[str]:
        return _in_order(self.closing, self.markers)

    def _text(self, written: str) -> str:
        for token in self.special:
            written = written.replace(token, "")
        return written


def _in_order(text: str, tokens: Collection[str]) -> list[str]:
    """Those of ``tokens`` that are in ``text``, in the order of the text."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.findall(pattern, text) if pattern else []


def _first_of(tokens: Collection[str], text: str) -> tuple[int, str] | None:
    """Where the first of ``tokens`` stands in ``text``."""
    return min(((text.find(token), token) for token in tokens if token in text), default=None)
