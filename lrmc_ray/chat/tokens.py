"""The tokens of a prompt and of what follows it, as they are at inference.

A prompt's tokens are fixed before the first token of the answer exists. So a text is tokenized as a
whole, and its beginning must be the tokens of the prompt alone; where a token would straddle the
border, the prompt keeps its own, and the rest is tokenized as what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ANCHORS = ("\n", ".", "a", "1", " ", ":", "")
"""Texts that may stand before a rest so that it does not look like the beginning of a text."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized text."""

    ids: list[int]
    _text: str
    _tokenizer: Any
    _encoding: Any = None
    """Of the library ``tokenizers``; None where the tokenizer does not know its offsets."""

    def before(self, character: int) -> int:
        """Number of tokens that hold any of the first ``character`` characters."""
        if self._encoding is None:
            return len(bare_ids(self._tokenizer, self._text[:character]))
        for index in range(character - 1, -1, -1):
            token = self._encoding.char_to_token(index)
            if token is not None:
                return int(token) + 1
        return 0


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` and nothing around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Every text with its offsets, tokenized side by side where the tokenizer can."""
    backend = _backend(tokenizer)
    if backend is None:
        return [Encoded(bare_ids(tokenizer, text), text, tokenizer) for text in texts]
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [
        Encoded(encoding.ids, text, tokenizer, encoding)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def ids_of_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text, tokenized side by side where the tokenizer can."""
    backend = _backend(tokenizer)
    if backend is None:
        return [bare_ids(tokenizer, text) for text in texts]
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _backend(tokenizer: Any) -> Any:
    """The tokenizer of the library ``tokenizers``, set to cut and to pad nothing."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def continued(tokenizer: Any, text: str) -> tuple[Encoded, int, int]:
    """``text`` tokenized as what follows another one.

    Returns:
        What it stands in, and how many characters and tokens of that come before it.
    """
    found = None
    for anchor in _ANCHORS:
        (whole,) = encode_all(tokenizer, [anchor + text])
        before = bare_ids(tokenizer, anchor) if anchor else []
        found = whole, len(anchor), len(before)
        if whole.ids[: len(before)] == before:
            break
    assert found is not None
    return found


def split_ids(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the text behind it, as they are when the text is generated."""
    prompt_ids = bare_ids(tokenizer, prompt)
    whole = bare_ids(tokenizer, prompt + text)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    rest, _, skipped = continued(tokenizer, text)
    return prompt_ids, rest.ids[skipped:]
