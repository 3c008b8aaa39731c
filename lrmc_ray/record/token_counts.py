"""How many tokens training will compute, from a part of its data; without Ray.

What the samples of a micro-batch begin with is computed once where that is cheaper
(:mod:`lrmc_ray.method.fast.packing`), and data whose prompts begin alike cost half of what their
length says, or less. So tokens are counted as a step computes them, in random batches of real rows.
"""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.model_borders import longest_packed
from lrmc_ray.models import load_config, load_tokenizer
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import Source

ROWS = 256
"""Rows that are tokenized, at random among the first ``ROWS_SEEN``."""
ROWS_SEEN = 4096

BATCHES = 32
"""Random batches in which tokens are counted."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one sample, on average."""

    alone: float
    """Of the sample itself."""
    computed: float
    """That a training step computes for it."""


def count_sample_tokens(
    sources: Sequence[Source],
    model_directory: Path,
    *,
    max_length: int,
    batch_size: int,
    micro_batches: int,
    packing: bool,
    parameters: int,
    template_options: Mapping[str, Any] | None = None,
) -> TokenCounts:
    """Tokenize some rows of ``sources`` as recording does, and count.

    Args:
        sources: the training data.
        model_directory: with the tokenizer and ``config.json``.
        max_length: of a sample, in tokens.
        batch_size: samples of a step.
        micro_batches: that a step is divided into.
        packing: whether common beginnings are shared.
        parameters: of the model.
        template_options: ``model.template_options``.

    Raises:
        DataError: tokenizer or configuration cannot be loaded, or no row can be read.
    """
    chat = Chat(load_tokenizer(model_directory), template_options)
    rows = list(itertools.islice(read_rows(sources, Rejects(max_share=1.0)), ROWS_SEEN))
    rng = random.Random(0)
    sequences: list[list[int]] = []
    for row in rng.sample(rows, min(ROWS, len(rows))):
        try:
            sequences += [example.input_ids[:max_length] for example in encode_row(row, chat)]
        except DataError:
            continue  # recording names the rows that it refuses
    if not sequences:
        raise DataError("none of the first rows of the training data can be used")
    computed = 0
    # Every row once before any row again, as an epoch has it.
    order = itertools.chain.from_iterable(
        rng.sample(sequences, len(sequences)) for _ in itertools.count()
    )
    cost = attention_cost(model_directory, parameters) if packing else None
    longest = longest_packed(load_config(model_directory))
    for _ in range(BATCHES):
        batch = sorted(itertools.islice(order, batch_size), key=len)
        for part in deal(batch, micro_batches):
            computed += computed_tokens(part, cost, longest)
    return TokenCounts(
        alone=sum(map(len, sequences)) / len(sequences),
        computed=computed / (BATCHES * batch_size),
    )


def computed_tokens(
    sequences: Sequence[Tokens], cost: float | None, longest: float = math.inf
) -> int:
    """Tokens of one micro-batch, in the cheaper of the two layouts.

    Args:
        sequences: token ids of its samples.
        cost: what it costs a token to see one more, in units of what else it costs; None pads.
        longest: tokens of the longest sequence that may be packed; one that is longer pads all.
    """
    if not sequences:
        return 0
    width = max(map(len, sequences))
    padded = len(sequences) * width
    if cost is None or width > longest:
        return padded
    packed = packed_tokens(sequences)
    return min((packed * (1 + cost * packed), packed), (padded * (1 + cost * width), padded))[1]


def packed_tokens(sequences: Sequence[Tokens]) -> int:
    """Tokens of the tree of all sequences: each of their beginnings counts once."""
    total = 0
    before: Tokens = ()
    for ids in sorted(map(tuple, sequences)):
        common = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)
        )
        total += len(ids) - sum(1 for _ in common)
        before = ids
    return total


def attention_cost(model_directory: Path, parameters: int) -> float:
    """As :func:`lrmc_ray.models.attention_cost`, from the model's files alone; 0 if unknown."""
    content: dict[str, Any] = json.loads((model_directory / "config.json").read_text("utf-8"))
    config = content.get("text_config") or content
    try:
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        embeddings = config["vocab_size"] * hidden
    except KeyError:
        return 0.0
    tied = config.get("tie_word_embeddings", content.get("tie_word_embeddings", True))
    weights = parameters - embeddings * (1 if tied else 2)
    return 2 * layers * hidden / weights if weights > 0 else 0.0


def deal(batch: Sequence[Tokens], count: int) -> list[Sequence[Tokens]]:
    """The batch in its order, dealt to micro-batches as :func:`microbatch.deal` does."""
    size, extra = divmod(len(batch), count)
    ends = [size * (part + 1) + min(part + 1, extra) for part in range(count)]
    return [batch[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
