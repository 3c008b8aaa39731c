"""What changed from one model's scores to another's, item by item, with intervals."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.items import GROUPS, OBJECTIVE_METRIC, Scores, check_same_items
from lrmc_ray.evaluate.objective import combined_objective
from lrmc_ray.evaluate.statistics import (
    FloatArray,
    Interval,
    bootstrap_means,
    mean_of_independent,
    percentile_interval,
)


@dataclass(frozen=True)
class MetricChange:
    """One metric of one task, before and after tuning."""

    metric: str
    before: Interval
    after: Interval
    delta: Interval
    """after - before, paired over the items, in the metric's unit."""


@dataclass(frozen=True)
class TaskChange:
    """One task, before and after tuning."""

    task: str
    group: str
    kind: str
    num_items: int
    objective: Interval
    """Change of the task's objective score; positive is better for every kind."""
    metrics: tuple[MetricChange, ...]

    @property
    def objective_metric(self) -> str:
        """The metric that ``objective`` is made of."""
        return OBJECTIVE_METRIC[self.kind]

    def metric(self, name: str) -> MetricChange:
        """The change of one metric."""
        return next(change for change in self.metrics if change.metric == name)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A tuned model against its base. Scores are fractions: 0.01 is one point of 100."""

    tasks: tuple[TaskChange, ...]
    domain_gain: Interval
    """Mean over the domain tasks of objective after - before."""
    forgetting: Interval
    """Mean over the general tasks of objective before - after; negative: it improved."""
    combined: Interval
    """``domain_gain - forgetting_weight * forgetting``."""
    general_ce_delta: Interval | None
    """Mean over the general texts of cross-entropy after - before, nats per token, if any."""
    forgetting_weight: float
    seed: int
    domain_gain_replicates: FloatArray
    """Bootstrap replicates, shape [Z]; replicate z has the same resampled items in every comparison
    with the same tasks and seed, so two comparisons can be subtracted."""
    forgetting_replicates: FloatArray

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged, under their names in MLflow."""
        values: dict[str, float] = {}
        for name in ("domain_gain", "forgetting", "combined"):
            interval: Interval = getattr(self, name)
            values[f"eval/{name}"] = interval.value
            values[f"eval/{name}_low"] = interval.low
            values[f"eval/{name}_high"] = interval.high
        for task in self.tasks:
            for change in task.metrics:
                values[f"eval/{task.group}/{task.task}/{change.metric}"] = change.after.value
        if self.general_ce_delta is not None:
            values["eval/general_ce_delta"] = self.general_ce_delta.value
        return values

    def task(self, name: str) -> TaskChange:
        """The change of one task."""
        return next(task for task in self.tasks if task.task == name)

    def accuracy(self, group: str) -> Interval | None:
        """The tuned model's mean accuracy over the group's tasks that have one, as a fraction."""
        known = [
            change.after
            for task in self.tasks
            for change in task.metrics
            if task.group == group and change.metric == "accuracy"
        ]
        return mean_of_independent(known) if known else None


_Compared = tuple[TaskChange, FloatArray, dict[str, FloatArray]]
"""A task's change, the replicates of its objective's change, and those of each metric's."""


def compare(
    base: Scores,
    tuned: Scores,
    *,
    forgetting_weight: float,
    seed: int = 0,
    resamples: int = 2000,
) -> Comparison:
    """Score ``tuned`` against ``base`` with 95 % paired-bootstrap intervals over the items.

    Items are resampled within each task, tasks independently of each other, and the same drawn
    items serve both models and all metrics. The draw depends on the seed and the task's name
    only. The intervals speak of the items' luck, not of the training seed's.

    Raises:
        DataError: the two did not score the same items of the same tasks, or a group has no task.
    """
    if set(base.tasks) != set(tuned.tasks):
        differing = sorted(set(base.tasks) ^ set(tuned.tasks))[0]
        owner = "base" if differing in base.tasks else "tuned"
        raise DataError(
            f"both models must be scored on the same tasks, but {differing} is in the {owner} "
            "model's scores only; evaluate both with the same tasks"
        )
    compared = [_compare_task(task, base, tuned, seed, resamples) for task in base.tasks]
    gain: dict[str, float] = {}
    gain_Z: dict[str, FloatArray] = {}
    for group in GROUPS:
        own = [(change, task_Z) for change, task_Z, _ in compared if change.group == group]
        if not own:
            raise DataError(
                f"a comparison needs at least one task of each group, got no {group} task; "
                f"add one to {group}_tasks and evaluate again"
            )
        gain[group] = float(np.mean([change.objective.value for change, _ in own]))
        gain_Z[group] = np.mean([task_Z for _, task_Z in own], axis=0)
    forgetting_Z = -gain_Z["general"]
    combined = partial(combined_objective, forgetting_weight=forgetting_weight)
    return Comparison(
        tasks=tuple(change for change, _, _ in compared),
        domain_gain=percentile_interval(gain["domain"], gain_Z["domain"]),
        forgetting=percentile_interval(-gain["general"], forgetting_Z),
        combined=percentile_interval(
            combined(gain["domain"], -gain["general"]), combined(gain_Z["domain"], forgetting_Z)
        ),
        general_ce_delta=_general_ce_delta(compared),
        forgetting_weight=forgetting_weight,
        seed=seed,
        domain_gain_replicates=gain_Z["domain"],
        forgetting_replicates=forgetting_Z,
    )


def _general_ce_delta(compared: Sequence[_Compared]) -> Interval | None:
    """Mean change of the cross-entropy of general texts, nats per token, if there are any."""
    texts = [
        (change.metric("cross_entropy").delta.value, deltas_Z["cross_entropy"])
        for change, _, deltas_Z in compared
        if change.kind == "text" and change.group == "general"
    ]
    if not texts:
        return None
    value = float(np.mean([delta for delta, _ in texts]))
    return percentile_interval(value, np.mean([delta_Z for _, delta_Z in texts], axis=0))


def _compare_task(task: str, base: Scores, tuned: Scores, seed: int, resamples: int) -> _Compared:
    """The task's change, and the replicates of its objective's and of each metric's change."""
    before = {metric: items for (name, metric), items in base.metrics.items() if name == task}
    after = {metric: items for (name, metric), items in tuned.metrics.items() if name == task}
    for metric in sorted(before.keys() ^ after.keys()):
        owner = "base" if metric in before else "tuned"
        raise DataError(
            f"{task}: {metric} is in the {owner} model's scores only; "
            "evaluate both with the same task files"
        )
    for metric, items in before.items():
        check_same_items(
            items, after[metric], "the base model's scores", "the tuned model's scores"
        )
    first = next(iter(before.values()))
    # The name, not the position: adding a task must not change the others' draws.
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    values_AI = np.stack([side[metric].values for side in (before, after) for metric in before])
    means_AZ = bootstrap_means(values_AI, first.weights, resamples=resamples, rng=rng)
    before_Z = dict(zip(before, means_AZ[: len(before)], strict=True))
    after_Z = dict(zip(before, means_AZ[len(before) :], strict=True))
    deltas_Z = {metric: after_Z[metric] - before_Z[metric] for metric in before}
    changes = {
        metric: MetricChange(
            metric=metric,
            before=items.value,
            after=after[metric].value,
            delta=percentile_interval(
                after[metric].value.value - items.value.value, deltas_Z[metric]
            ),
        )
        for metric, items in before.items()
    }
    metric = OBJECTIVE_METRIC[first.kind]
    objective, objective_Z = changes[metric].delta, deltas_Z[metric]
    if first.kind == "text":
        objective_Z = 1.0 - after_Z[metric] / before_Z[metric]
        ratio = changes[metric].after.value / changes[metric].before.value
        objective = percentile_interval(1.0 - ratio, objective_Z)
    change = TaskChange(
        task=task,
        group=first.group,
        kind=first.kind,
        num_items=first.num_items,
        objective=objective,
        metrics=tuple(changes.values()),
    )
    return change, objective_Z, deltas_Z


@dataclass(frozen=True)
class Difference:
    """One tuned model minus another, both against the same base, paired over the items."""

    domain_gain: Interval
    forgetting: Interval
    combined: Interval


def difference(first: Comparison, second: Comparison) -> Difference:
    """``first`` - ``second`` in each headline number, with paired-bootstrap intervals.

    Raises:
        ValueError: they were not made with the same tasks, seed, resamples and weight.
    """
    if (
        [task.task for task in first.tasks] != [task.task for task in second.tasks]
        or first.seed != second.seed
        or first.forgetting_weight != second.forgetting_weight
        or len(first.domain_gain_replicates) != len(second.domain_gain_replicates)
    ):
        raise ValueError("both comparisons must have the same tasks, seed, resamples and weight")
    gain_Z = first.domain_gain_replicates - second.domain_gain_replicates
    forgetting_Z = first.forgetting_replicates - second.forgetting_replicates
    gain = first.domain_gain.value - second.domain_gain.value
    forgetting = first.forgetting.value - second.forgetting.value
    combined = partial(combined_objective, forgetting_weight=first.forgetting_weight)
    return Difference(
        domain_gain=percentile_interval(gain, gain_Z),
        forgetting=percentile_interval(forgetting, forgetting_Z),
        combined=percentile_interval(combined(gain, forgetting), combined(gain_Z, forgetting_Z)),
    )


RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("change", pa.string(), nullable=False),  # "lost" or "gained"
        pa.field("output_before", pa.string()),
        pa.field("output_after", pa.string()),
    ]
)


def receipt(base: Scores, tuned: Scores) -> pa.Table:
    """The forgetting receipt: items answered right before and wrong after, and the reverse.

    One row per item whose ``accuracy`` went from 1 to 0 (``lost``) or from 0 to 1 (``gained``), in
    the order of the tasks and the item ids; columns as in ``RECEIPT_SCHEMA``.

    Raises:
        DataError: the two did not score the same items.
    """
    rows = []
    for (task, metric), before in base.metrics.items():
        if metric != "accuracy":
            continue
        after = tuned.metric(task, metric)
        check_same_items(before, after, "the base model's scores", "the tuned model's scores")
        for index, item_id in enumerate(before.item_ids):
            change = after.values[index] - before.values[index]
            if abs(change) == 1.0:
                rows.append(
                    {
                        "task": task,
                        "group": before.group,
                        "item_id": item_id,
                        "change": "gained" if change > 0 else "lost",
                        "output_before": before.outputs[index],
                        "output_after": after.outputs[index],
                    }
                )
    return pa.Table.from_pylist(rows, schema=RECEIPT_SCHEMA)
