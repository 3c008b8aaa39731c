"""The report's table of tasks: before, after, change, and plain fine-tuning beside it."""

from typing import Any

from lrmc_ray.evaluate.changes import (
    MetricChange,
    TaskChange,
)
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.report.numbers import (
    number,
    percent,
    percent_range,
    points,
    points_range,
)
from lrmc_ray.report.study import Trial, Verdict
from lrmc_ray.report.template import whisker


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
    comparison, plain = verdict.comparison, verdict.plain
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
            is_fraction = _is_fraction(change)
            value, value_range = (percent, percent_range) if is_fraction else (_raw, _raw_range)
            delta, delta_range = (
                (points, points_range) if is_fraction else (_raw_delta, _raw_delta_range)
            )
            better = _better(task, change)
            row = {
                "heading": "",
                "task": f"{task.task} ({task.num_items} items)",
                "metric": change.metric.replace("_", " "),
                "is_objective": change.metric == task.objective_metric,
                "before": value(change.before.value),
                "before_range": value_range(change.before),
                "after": value(change.after.value),
                "after_range": value_range(change.after),
                "delta": delta(change.delta.value),
                "delta_range": delta_range(change.delta),
                "distinguishable": change.delta.distinguishable,
                "whisker": whisker(better, low, high) if better else "",
            }
            if plain is not None:
                other = plain.task(task.task).metric(change.metric).after
                row["yardstick"] = value(other.value)
                row["yardstick_range"] = value_range(other)
            rows.append(row)
    return rows


def _ordered(task: TaskChange) -> list[MetricChange]:
    """The objective's metric, then accuracy, then the others."""
    return sorted(
        task.metrics,
        key=lambda change: (change.metric != task.objective_metric, change.metric != "accuracy"),
    )


def _is_fraction(change: MetricChange) -> bool:
    values = (change.before.value, change.after.value)
    return change.metric != "cross_entropy" and all(0.0 <= value <= 1.0 for value in values)


def _better(task: TaskChange, change: MetricChange) -> Interval | None:
    """The change with the better side positive; None where the metric's direction is unknown."""
    if change.metric == task.objective_metric:
        return task.objective
    return change.delta if _is_fraction(change) else None


def _raw(value: float) -> str:
    return number(value, 3)


def _raw_range(interval: Interval) -> str:
    return f"{_raw(interval.low)} to {_raw(interval.high)}"


def _raw_delta(value: float) -> str:
    return f"+{_raw(value)}" if float(f"{value:.3f}") > 0.0 else _raw(value)


def _raw_delta_range(interval: Interval) -> str:
    return f"{_raw_delta(interval.low)} to {_raw_delta(interval.high)}"
