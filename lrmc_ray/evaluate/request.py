"""What is asked of one scoring process, and what it answers."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Group = Literal["domain", "general"]
Split = Literal["dev", "test"]
"""Which questions our own domain tasks ask: for choices during a search, or for the end."""


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
