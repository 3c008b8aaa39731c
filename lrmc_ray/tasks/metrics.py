"""What lm-eval calls with the log-likelihoods of one item (a task's ``process_results``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def choice_probability(loglikelihoods: Sequence[float], answer: int) -> float:
    """The share of the right choice in the probability of all choices, 0 to 1.

    Args:
        loglikelihoods: One per choice, in nats.
        answer: Index of the right choice.
    """
    highest = max(loglikelihoods)
    weights = [math.exp(loglikelihood - highest) for loglikelihood in loglikelihoods]
    return weights[answer] / sum(weights)


def choice_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """``acc`` as lm-eval defines it, and ``choice_probability``, which is smooth.

    Args:
        doc: An item with the index of its right choice under ``answer``.
        results: Log-likelihood, in nats, and greediness of each choice.
    """
    loglikelihoods = [loglikelihood for loglikelihood, _ in results]
    best = loglikelihoods.index(max(loglikelihoods))
    return {
        "acc": float(best == doc["answer"]),
        "choice_probability": choice_probability(loglikelihoods, doc["answer"]),
    }


def gold_results(_: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Of the gold answer: ``acc`` (greedy decoding writes it) and ``loglikelihood`` in nats."""
    loglikelihood, is_greedy = results[0]
    return {"acc": float(is_greedy), "loglikelihood": loglikelihood}
