"""What is asked of one scoring process, and what it answers."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Group = Literal["domain", "general"]
Split = Literal["dev", "test"]
"""Which items the domain tasks ask: ``dev``, the search items, that a search chooses by, or
``test``, those that are kept for the end."""


@dataclass(frozen=True)
class KeptApart:
    """Which items of a domain task are kept for the end."""

    share: float
    """Of the items, from 0 to 1; with 0 a task asks all of them at any time."""
    seed: int = 0


ALL_ITEMS = KeptApart(0.0)
"""No items are kept for the end."""


@dataclass(frozen=True)
class ScoreRequest:
    """What is to be scored."""

    tasks: tuple[tuple[str, Group], ...]
    """Names as in the settings, each with its group."""
    batch_tokens: int
    precision: Literal["fp32", "bf16"]
    limit: int | None
    split: Split
    drift_samples: dict[Group, int]
    """Texts of each task to measure drift on, by its group, unless ``drift_texts`` names them."""
    drift_texts: "dict[str, list[list[int]]] | None" = None
    """Token ids of the base model's texts by task; a tuned model is compared on the same ones."""
    kept: KeptApart = ALL_ITEMS
    """Which items of the domain tasks are kept for the end."""
    template_options: "dict[str, Any]" = field(default_factory=dict)
    """What the chat template is given besides the messages."""


@dataclass(frozen=True)
class ScoreResult:
    """What scoring gives back: plain data, small enough to send."""

    rows: list[dict[str, Any]]
    """Rows of ``items.parquet``."""
    texts: dict[str, list[list[int]]]
    """Token ids of the texts on which drift is measured, by task."""
    logprobs: dict[str, np.ndarray]
    """The model's log-probabilities there, float32 [texts x positions, vocabulary], by task."""
    questions: list[dict[str, Any]] = field(default_factory=list)
    """Rows of ``questions.parquet``."""
