"""The report's table of tasks: before, after, change, and plain fine-tuning beside it."""

from typing import Any

from lrmc_ray.evaluate.changes import (
    MetricChange,
    TaskChange,
)
from lrmc_ray.evaluate.numbers import delta_texts, is_fraction, number, value_texts
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.report.study import Trial, Verdict
from lrmc_ray.report.template import whisker
from lrmc_ray.report.words import items_text


def drift_text(best: Trial) -> str:
    """How far the tuned model's predictions have moved, where that was measured."""
    parts = []
    for group in ("domain", "general"):
        ends = [
            best.entry.results.get(f"eval/kl_base_{group}{end}") for end in ("", "_low", "_high")
        ]
        value, low, high = (number(end, 3) if isinstance(end, float) else None for end in ends)
        if value is not None:
            interval = f" ({low} to {high})" if low is not None and high is not None else ""
            parts.append(f"{value}{interval} on {group} texts")
    return f"KL(base || {best.name}): {', '.join(parts)}, nats per position." if parts else ""


def rows_of_tasks(verdict: Verdict) -> list[dict[str, Any]]:
    """The best trial's metrics, the objective's first within each task."""
    comparison, plain, fresh = verdict.comparison, verdict.plain, verdict.fresh_tasks
    rows: list[dict[str, Any]] = []
    for group, heading in (("domain", "Domain tasks"), ("general", "General tasks")):
        rows.append({"heading": heading})
        changes = [
            (task, change)
            for task in comparison.tasks
            if task.group == group
            for change in _ordered(task)
        ]
        drawn = [interval for one in changes if (interval := _better(*one))]
        low = min([0.0, *(interval.low for interval in drawn)])
        high = max([0.0, *(interval.high for interval in drawn)])
        for task, change in changes:
            before, before_range = value_texts(change, change.before)
            after, after_range = value_texts(change, change.after)
            delta, delta_range = delta_texts(change)
            better = _better(task, change)
            row = {
                "heading": "",
                "task": f"{task.task} ({task.num_items} {items_text([task.task], fresh)})",
                "metric": change.metric.replace("_", " "),
                "is_objective": change.metric == task.objective_metric,
                "before": before,
                "before_range": before_range,
                "after": after,
                "after_range": after_range,
                "delta": delta,
                "delta_range": delta_range,
                "distinguishable": change.delta.distinguishable,
                "whisker": whisker(better, low, high) if better else "",
            }
            if plain is not None:
                other = plain.task(task.task).metric(change.metric).after
                row["yardstick"], row["yardstick_range"] = value_texts(change, other)
            rows.append(row)
    return rows


def _ordered(task: TaskChange) -> list[MetricChange]:
    """The objective's metric, then accuracy, then the others."""
    return sorted(
        task.metrics,
        key=lambda change: (change.metric != task.objective_metric, change.metric != "accuracy"),
    )


def _better(task: TaskChange, change: MetricChange) -> Interval | None:
    """The change with the better side positive; None where the metric's direction is unknown."""
    if change.metric == task.objective_metric:
        return task.objective
    return change.delta if is_fraction(change) else None
