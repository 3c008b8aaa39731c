"""How far a tuned model's next-token distribution is from the base's, on the items' texts.

Shape suffixes: those of :mod:`lrmc_ray.method`; X = texts, or resamples of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrmc_ray.evaluate.names import DRIFT_LOGPROBS, DRIFT_TEXTS
from lrmc_ray.evaluate.statistics import Interval, bootstrap_means, percentile_interval
from lrmc_ray.files.artifacts import write_json

DRIFT_POSITIONS = 8
"""Positions of a text at which KL(base || tuned) is measured."""


def drift_metrics(
    before: Mapping[str, Any], after: Mapping[str, Any], groups: Mapping[str, str]
) -> dict[str, float]:
    """KL(base || tuned) of each group, with the ends of its interval, under the metrics' names."""
    drift: dict[str, float] = {}
    for group in ("domain", "general"):
        labels = [label for label, own in groups.items() if own == group and label in before]
        if not labels:
            continue
        divergence = mean_kl(
            np.concatenate([before[label] for label in labels]),
            np.concatenate([after[label] for label in labels]),
        )
        if divergence is not None:
            name = f"eval/kl_base_{group}"
            drift |= {
                name: divergence.value,
                f"{name}_low": divergence.low,
                f"{name}_high": divergence.high,
            }
    return drift


@dataclass(frozen=True)
class BaseTexts:
    """The texts that drift is measured on, and what the base model says there."""

    texts: dict[str, list[list[int]]]
    """Token ids, by task."""
    logprobs: dict[str, np.ndarray]
    """Of the base model, float32 [texts x positions, vocabulary], by task."""


def write_base_texts(directory: Path, base: BaseTexts) -> None:
    """Keep the base model's texts and log-probabilities beside its scores."""
    write_json(directory / DRIFT_TEXTS, base.texts)
    # numpy's annotation takes every keyword for allow_pickle's type.
    np.savez(directory / DRIFT_LOGPROBS, **base.logprobs)  # type: ignore[arg-type]


def read_base_texts(base: Path) -> BaseTexts:
    """What :func:`write_base_texts` wrote into the base model's scores."""
    texts = json.loads((base / DRIFT_TEXTS).read_text(encoding="utf-8"))
    with np.load(base / DRIFT_LOGPROBS, allow_pickle=False) as logprobs:
        return BaseTexts(texts, {label: logprobs[label] for label in texts})


def item_texts(samples: Mapping[str, list[dict[str, Any]]], tokenizer: Any) -> list[list[int]]:
    """Token ids of the items' texts: context, and continuation where the task gives one."""
    texts = []
    for items in samples.values():
        if items and items[0]["output_type"] == "generate_until":
            continue  # no answer is given, and its prompts are those of the gold task
        for item in items:
            parts = [part for part in item["arguments"][0] if isinstance(part, str)]
            ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
            if len(ids) > DRIFT_POSITIONS:
                texts.append(ids[:1024])
    return texts


def pick_evenly(texts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` of the texts, evenly spread."""
    if len(texts) <= count:
        return texts
    return [texts[index * len(texts) // count] for index in range(count)]


def mean_kl(base_NV: np.ndarray, tuned_NV: np.ndarray) -> Interval | None:
    """Mean over positions of KL(base || tuned), in nats, over the whole vocabulary.

    The interval is over the texts, which have ``DRIFT_POSITIONS`` positions each. None without
    positions.
    """
    divergence_N = np.array(
        [
            np.sum(np.exp(base_V.astype(np.float64)) * (base_V - tuned_V.astype(np.float64)))
            for base_V, tuned_V in zip(base_NV, tuned_NV, strict=True)
        ]
    )
    if not len(divergence_N):
        return None
    of_text_X = divergence_N.reshape(-1, DRIFT_POSITIONS).mean(axis=1)
    replicates_1X = bootstrap_means(of_text_X, resamples=2000, rng=np.random.default_rng(0))
    return percentile_interval(float(of_text_X.mean()), replicates_1X[0])
