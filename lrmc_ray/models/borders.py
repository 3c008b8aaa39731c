"""Lengths of a sequence at which a model begins to compute otherwise, read from its configuration.

Up to :attr:`Borders.whole` tokens every layer sees the whole sequence. Beyond it a layer sees a
window, a chunk or a selection, and then it matters where in the cache or in a packed row a token
stands, not its position alone. Beyond :attr:`Borders.rope_border` the rotary frequencies of *all*
tokens depend on how long the sequence is, so that sequences of different :meth:`Borders.side` never
share a batch, a cache or a packed row.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "local_attention",
    "local_attention_window_len",
)
_CHUNKS = ("attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length")
_SELECTIONS = ("index_topk", "indexer_budget", "keep_window_size")
_COMPRESSIONS = ("compress_rates", "indexer_compress_ratio")


@dataclasses.dataclass(frozen=True)
class Borders:
    """The lengths, in tokens; every tuple ascending and without repetition."""

    windows: tuple[int, ...] = ()
    """A token sees so many tokens, itself included, in some layers."""
    chunks: tuple[int, ...] = ()
    """A token sees those of its own chunk of so many, in some layers."""
    selections: tuple[int, ...] = ()
    """A token sees so many that sparse attention has selected, in some layers."""
    compressions: tuple[int, ...] = ()
    """Some layers put so many tokens into one key."""
    rope_switch: int | None = None
    """LongRoPE: longer sequences have other rotary frequencies; None without."""
    is_dynamic_ntk: bool = False
    """The model keeps the frequencies of the longest sequence that it has seen."""
    dynamic_length: int | None = None
    """Dynamic NTK scaling: those of a longer sequence depend on its length; None without."""

    @property
    def whole(self) -> int | None:
        """Tokens of the longest sequence that every layer sees whole; None if all are."""
        found = (*self.windows, *self.chunks, *self.selections, *self.compressions)
        return min(found, default=None)

    @property
    def rope_border(self) -> int | None:
        """Tokens of the longest sequence with the rotary frequencies of a short one, if any."""
        found = [n for n in (self.rope_switch, self.dynamic_length) if n is not None]
        return min(found, default=None)

    def side(self, length: int) -> int:
        """Equal for sequences that may share a batch, as far as rotary frequencies go."""
        if self.dynamic_length is not None and length > self.dynamic_length:
            return length
        return int(self.rope_switch is not None and length > self.rope_switch)


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model; itself where it is one."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # no configuration of transformers, or several decoders
        return config


def attention_borders(config: Any) -> Borders:
    """The borders of a model with this configuration, composite or not.

    A window counts unless the configuration says that no layer uses it, since some models apply it
    to layers that they call full.
    """
    config = text_config(config)
    windows: set[int] = set()
    chunks: set[int] = set()
    selections: set[int] = set()
    compressions: set[int] = set()
    switches: set[int] = set()
    dynamic: set[int] = set()
    for layer in _layers(config):
        if _uses_window(layer):
            windows |= _numbers(layer, _WINDOWS)
        chunks |= _numbers(layer, _CHUNKS)
        selections |= _numbers(layer, _SELECTIONS)
        compressions |= _numbers(layer, _COMPRESSIONS)
        blocks, size = _get(layer, "index_topk_blocks"), _get(layer, "index_block_size")
        if blocks and size:
            selections.add(blocks * size)
        for part in _rotary(layer):
            kind = part.get("rope_type", part.get("type"))
            if kind in ("longrope", "su"):
                own = part.get("original_max_position_embeddings")
                length = own or _get(layer, "original_max_position_embeddings")
                switches.add(int(length or layer.max_position_embeddings))
            elif isinstance(kind, str) and "dynamic" in kind:
                dynamic.add(int(layer.max_position_embeddings))
    return Borders(
        windows=tuple(sorted(windows)),
        chunks=tuple(sorted(chunks)),
        selections=tuple(sorted(selections)),
        compressions=tuple(sorted(compressions)),
        rope_switch=min(switches, default=None),
        is_dynamic_ntk=bool(dynamic),
        dynamic_length=min(dynamic, default=None),
    )


def longest_packed(config: Any) -> float:
    """Tokens of the longest sequence that can be packed into one row with others; infinity for any.

    Up to there a token sees all that come before it in its sequence, and nothing depends on how
    long the row is.
    """
    borders = attention_borders(config)
    found = [n for n in (borders.whole, borders.rope_border) if n is not None]
    return float(min(found, default=float("inf")))


def _layers(config: Any) -> Iterator[Any]:
    """The configuration of every layer; once where they are all alike."""
    if getattr(config, "is_heterogeneous", False):
        yield from config.per_layer_config
    else:
        yield config


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _numbers(config: Any, names: tuple[str, ...]) -> set[int]:
    """The positive numbers under ``names``, those in lists and dictionaries included."""
    found: set[int] = set()
    values = [_get(config, name) for name in names]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, int) and value > 0:
            found.add(value)
    return found


def _uses_window(config: Any) -> bool:
    if _get(config, "use_sliding_window") is False:
        return False
    kinds = _get(config, "attention_layers") or _get(config, "layer_types")
    return not kinds or not set(kinds) <= {"full_attention", "global"}


def _rotary(config: Any) -> list[Mapping[str, Any]]:
    """Parameters of the rotary frequencies: of all layers, and of each kind of layer."""
    parameters = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    return [parameters, *(part for part in parameters.values() if isinstance(part, Mapping))]
