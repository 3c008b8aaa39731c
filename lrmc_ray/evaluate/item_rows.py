"""From lm-eval's samples to rows of ``items.parquet``: every item's metrics.

Beside the accuracy that lm-eval computes, the smooth scores that the objective needs are taken from
the log-likelihoods that it already has: no forward pass is added.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.request import Group

GOLD = "_gold"
"""How the name of a task ends that scores the gold answers of a generation task."""


def task_rows(
    name: str, group: Group, samples: Mapping[str, list[dict[str, Any]]], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The rows of one requested task; a group's subtasks become its items."""
    own = [task for task in samples if task.startswith("lrmc_")]
    companions = {task + suffix for task in own for suffix in _COMPANIONS} & samples.keys()
    for task, items in samples.items():
        if task in companions:
            continue
        further: dict[int, dict[str, float]] = {}
        for suffix, (metric, measure) in _COMPANIONS.items():
            for item in samples[task + suffix] if task + suffix in companions else ():
                further.setdefault(item["doc_id"], {})[metric] = measure(item, tokenizer)
        first_filter = items[0]["filter"] if items else None
        for item in items:
            if item["filter"] != first_filter:
                continue
            kind, metrics, weight = _metrics(task, item, tokenizer)
            metrics |= further.get(item["doc_id"], {})
            prefix = "" if len(samples) - len(companions) == 1 else f"{task}/"
            for metric, value in metrics.items():
                yield {
                    "task": name,
                    "group": group,
                    "kind": kind,
                    "metric": metric,
                    "item_id": f"{prefix}{item['doc'].get('id', item['doc_id'])}",
                    "value": float(value),
                    "weight": weight,
                    "output": _output(item) if metric == "accuracy" else None,
                }


def _metrics(
    task: str, item: Mapping[str, Any], tokenizer: Any
) -> tuple[str, dict[str, float], float]:
    """Kind of task, metrics and weight of one item."""
    output_type = item["output_type"]
    if output_type == "multiple_choice":
        likelihoods = np.array([float(answer[0]) for answer in item["filtered_resps"]])
        gold = item["target"]
        if not isinstance(gold, int) or not 0 <= gold < len(likelihoods):
            raise DataError(f"task {task}: the right choice must be one index, got {gold!r}")
        shares = np.exp(likelihoods - likelihoods.max())
        shares /= shares.sum()
        accuracy = float(item.get("acc", likelihoods.argmax() == gold))
        return "choice", {"accuracy": accuracy, "probability": float(shares[gold])}, 1.0
    if output_type == "loglikelihood_rolling":
        text = item["arguments"][0][0]
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        likelihood = _number(item["filtered_resps"][0])
        return "text", {"cross_entropy": -likelihood / tokens}, float(tokens)
    if output_type == "loglikelihood" and task.startswith("lrmc_") and task.endswith(GOLD):
        # On its own, of a slice: its answers are not generated.
        return "generation", {"gold_probability": _mean_token_probability(item, tokenizer)}, 1.0
    if output_type == "loglikelihood":
        likelihood, is_greedy = item["filtered_resps"][0]
        return (
            "choice",
            {"accuracy": float(is_greedy), "probability": math.exp(float(likelihood))},
            1.0,
        )
    values = {
        metric: float(item[metric])
        for metric in item["metrics"]
        if isinstance(item.get(metric), int | float | bool | np.generic)
    }
    for metric in ("execution_accuracy", "acc", "exact_match", *item["metric_names"], *values):
        if metric in values and 0 <= values[metric] <= 1:
            others = {name: v for name, v in values.items() if name != metric}
            return "generation", {"accuracy": values[metric], **others}, 1.0
    raise DataError(
        f"task {task} has no metric between 0 and 1 per item (it has {', '.join(values) or 'none'})"
        "; choose another task"
    )


def _number(answer: Any) -> float:
    return float(answer[0]) if isinstance(answer, tuple | list) else float(answer)


def _mean_token_probability(item: Mapping[str, Any], tokenizer: Any) -> float:
    """Geometric mean of the gold answer's token probabilities."""
    likelihood, _ = item["filtered_resps"][0]
    answer = item["arguments"][0][1]
    tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return math.exp(float(likelihood) / max(1, tokens))


_COMPANIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Any], float]]] = {
    GOLD: ("gold_probability", _mean_token_probability),
    "_letter": ("letter_accuracy", lambda item, _: float(item["acc"])),
}
"""Tasks on the same items as the one that they are named after: the metric that each adds to it."""


def _output(item: Mapping[str, Any]) -> str | None:
    """What the model said, where it said something."""
    answer = item["filtered_resps"][0]
    return answer if isinstance(answer, str) else None
