"""The elements of a JSON array, one after the other: a large file needs little memory."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20
"""Characters that are read at a time; an element that is longer takes more."""

_BLANK = re.compile(r"[ \t\r\n]*")
_BEHIND = (",", "]", " ", "\t", "\r", "\n")
_DECODER = json.JSONDecoder()


def elements_of(file: BinaryIO, longest: int) -> Iterator[Any]:
    """The elements of the array that ``file`` holds.

    Args:
        file: UTF-8, perhaps with a byte order mark; is closed at the end.
        longest: characters that an element may have.

    Raises:
        ValueError: the file is no valid JSON in UTF-8, or an element is longer.
        RecursionError: an element is nested too deeply.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as reader:
        text = _Text(reader)
        text.take("[")
        if text.next() != "]":
            yield text.element(longest)
            while text.next() == ",":
                text.take(",")
                yield text.element(longest)
        text.take("]")
        if text.next():
            raise ValueError("something stands behind the end of the array")


class _Text:
    """What is read of a file and not used yet."""

    def __init__(self, reader: io.TextIOWrapper) -> None:
        self._reader = reader
        self._text = ""
        self._at = 0

    def _read(self, characters: int) -> bool:
        """Read on; whether there was more."""
        more = self._reader.read(characters)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)

    def next(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            found = _BLANK.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or not self._read(CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self, wanted: str) -> None:
        """Go behind the next character that is not blank.

        Raises:
            ValueError: it is not ``wanted``.
        """
        if (found := self.next()) != wanted:
            raise ValueError(f"expected {wanted!r}, found {found or 'the end of the file'!r}")
        self._at += 1

    def element(self, longest: int) -> Any:
        """The value that begins here; the text goes on behind it."""
        self.next()
        characters = CHUNK
        while True:
            problem, value, end = "", None, self._at
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = error.msg
            if not problem and self._text[end : end + 1] in _BEHIND:
                self._at = end
                return value
            # Perhaps the rest of it has not been read: of "1.5" the "1" is a value as well.
            if len(self._text) - self._at > longest:
                raise ValueError(f"an element is longer than {longest} characters")
            if not self._read(characters):
                raise ValueError(problem or "an element must be followed by ',' or ']'")
            characters *= 2
