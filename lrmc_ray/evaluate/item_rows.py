"""From lm-eval's samples to rows of ``items.parquet``: every item's metrics.

Beside the accuracy that lm-eval computes, the smooth scores that the objective needs are taken from
the log-likelihoods that it already has: no forward pass is added.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    companions = _companions(samples)
    for task, first, prefix in items_of(samples):
        items = samples[task]
        further: dict[int, dict[str, float]] = {}
        for suffix, (metric, measure) in _COMPANIONS.items():
            for item in samples[task + suffix] if task + suffix in companions else ():
                further.setdefault(item["doc_id"], {})[metric] = measure(item, tokenizer)
        judged_by = _accuracy_metric(task, first)
        for item in items:
            # Of the other filters, which lm-eval reports beside the first one.
            if item["filter"] != items[0]["filter"] and judged_by in item["metrics"]:
                filtered = f"{judged_by}:{item['filter']}"
                further.setdefault(item["doc_id"], {})[filtered] = float(item[judged_by])
        for item in first:
            kind, metrics, weight = _metrics(task, item, tokenizer, judged_by)
            metrics |= further.get(item["doc_id"], {})
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


def items_of(
    samples: Mapping[str, list[dict[str, Any]]],
) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """The items of every task that is scored by itself, each once, and what precedes their ids."""
    companions = _companions(samples)
    for task, items in samples.items():
        if task not in companions and items:
            prefix = "" if len(samples) - len(companions) == 1 else f"{task}/"
            yield task, [item for item in items if item["filter"] == items[0]["filter"]], prefix


def _companions(samples: Mapping[str, Any]) -> set[str]:
    """Tasks that only add a metric to another one's items."""
    own = [task for task in samples if task.startswith("lrmc_")]
    return {task + suffix for task in own for suffix in _COMPANIONS} & samples.keys()


def _accuracy_metric(task: str, items: Sequence[Mapping[str, Any]]) -> str:
    """The metric that a generation task is judged by: one that is between 0 and 1 in every item.

    Raises:
        DataError: there is none.
    """
    if items[0]["output_type"] != "generate_until":
        return ""
    known = [name for name in items[0]["metrics"] if all(_is_number(i.get(name)) for i in items)]
    named: list[str] = items[0]["metric_names"]
    wanted: tuple[str, ...] = ("execution_accuracy", "acc", "exact_match", *named, *known)
    for metric in wanted:
        if metric in known and all(0 <= item[metric] <= 1 for item in items):
            return metric
    raise DataError(
        f"task {task} has no metric between 0 and 1 per item (it has {', '.join(known) or 'none'})"
        "; choose another task"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | bool | np.generic)


def _metrics(
    task: str, item: Mapping[str, Any], tokenizer: Any, judged_by: str
) -> tuple[str, dict[str, float], float]:
    """Kind of task, metrics and weight of one item."""
    output_type = item["output_type"]
    if output_type == "multiple_choice":
        return "choice", _choice_metrics(task, item), 1.0
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
        metrics = {"accuracy": float(is_greedy), "probability": math.exp(float(likelihood))}
        # lm-eval's perplexity is exp of minus the mean of these.
        return "choice", {**metrics, "loglikelihood": float(likelihood)}, 1.0
    values = {name: float(item[name]) for name in item["metrics"] if _is_number(item.get(name))}
    return "generation", {"accuracy": values.pop(judged_by), **values}, 1.0


def _choice_metrics(task: str, item: Mapping[str, Any]) -> dict[str, float]:
    """What is kept of an item with choices: its accuracy, and lm-eval's other metrics as they are.

    Raises:
        DataError: the right choice is none of them.
    """
    right, count = item["right"], item["num_choices"]
    if not right or not all(0 <= index < count for index in right):
        raise DataError(
            f"task {task}: the right choice must be the index or the text of one, got "
            f"{item['target']!r}"
        )
    # Behind those of the choices may be those of the choices without their question.
    likelihoods = np.array([float(answer[0]) for answer in item["filtered_resps"][:count]])
    shares = np.exp(likelihoods - likelihoods.max())
    shares /= shares.sum()
    metrics = {
        "accuracy": float(item.get("acc", likelihoods.argmax() in right)),
        "probability": min(1.0, float(shares[sorted(set(right))].sum())),
    }
    for name in item["metrics"]:
        if name == "brier_score":
            _, probabilities = item[name]
            is_right = np.isin(np.arange(count), right)
            metrics[name] = float(np.sum((np.asarray(probabilities) - is_right) ** 2))
        elif name not in ("acc", "choice_probability") and _is_number(item.get(name)):
            metrics[name] = float(item[name])
    return metrics


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
    """What the model said, or the choice that it finds most likely."""
    if choices := item.get("choices"):
        likelihoods = [float(answer[0]) for answer in item["filtered_resps"][: len(choices)]]
        return str(choices[int(np.argmax(likelihoods))])
    answer = item["filtered_resps"][0]
    return answer if isinstance(answer, str) else None
