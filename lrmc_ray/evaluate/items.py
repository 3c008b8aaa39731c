"""Scores per item: what evaluation writes, and what the search and the report compare.

One row of ``items.parquet`` is one metric of one item of one task. Keeping the items, not the
means, is what makes paired intervals and the list of forgotten items possible.

Kinds of task, their metrics, and the score that the objective uses:

- ``choice``: ``accuracy`` (0 or 1), ``probability`` of the right choice among the choices, for some
  ``letter_accuracy`` (the choices are shown, their letters compared); objective: ``probability``.
- ``generation``: ``accuracy``, if wanted ``gold_probability`` (mean token probability of the gold
  answer) and others; objective: ``score``, derived here: the mean of ``accuracy`` and
  ``gold_probability``, or ``accuracy`` where the task has no gold probability.
- ``text``: ``cross_entropy`` in nats per token, weighted by the number of tokens; objective: its
  relative change, 1 - after / before, so that more is better here too.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.statistics import (
    FloatArray,
    Interval,
    mean_interval,
    proportion_interval,
    weighted_standard_error,
)
from lrmc_ray.files.artifacts import write_atomically

ITEMS_FILE = "items.parquet"


SCHEMA_VERSION = "1"


ITEMS_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # "domain" or "general"
        pa.field("kind", pa.string(), nullable=False),  # "choice", "text" or "generation"
        pa.field("metric", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),  # tokens for texts, otherwise 1
        pa.field("output", pa.string()),  # the generated text, or the choice
    ],
    metadata={"lrmc.schema_version": SCHEMA_VERSION},
)

GROUPS = ("domain", "general")


REQUIRED_METRICS = {
    "choice": ("accuracy", "probability"),
    "generation": ("accuracy",),
    "text": ("cross_entropy",),
}


OBJECTIVE_METRIC = {"choice": "probability", "generation": "score", "text": "cross_entropy"}

# Softmax in float32 may leave [0, 1] by a rounding error.
_ROUNDING = 1e-6


_RANGES = {
    "accuracy": (0.0, 1.0),
    "probability": (0.0, 1.0),
    "gold_probability": (0.0, 1.0),
    "letter_accuracy": (0.0, 1.0),
    "score": (0.0, 1.0),
    "cross_entropy": (0.0, float("inf")),
}


@dataclass(frozen=True, eq=False)
class MetricItems:
    """One metric of one task, item by item, in the order of the item ids."""

    task: str
    group: str
    kind: str
    metric: str
    item_ids: tuple[str, ...]
    values: FloatArray
    """Shape [I]."""
    weights: FloatArray
    """Shape [I]."""
    outputs: tuple[str | None, ...]

    @cached_property
    def value(self) -> Interval:
        """Weighted mean over the items with its 95 % interval.

        Wilson's interval for plain 0/1 items, Student's t cut to the metric's range otherwise.
        """
        is_binary = bool(np.isin(self.values, (0.0, 1.0)).all())
        if is_binary and np.ptp(self.weights) == 0.0:
            return proportion_interval(int(self.values.sum()), len(self.values))
        interval = mean_interval(self.values, self.weights)
        lowest, highest = _RANGES.get(self.metric, (-np.inf, np.inf))
        return Interval(interval.value, max(interval.low, lowest), min(interval.high, highest))

    @cached_property
    def standard_error(self) -> float:
        """Standard error of ``value``."""
        return weighted_standard_error(self.values, self.weights)

    @property
    def num_items(self) -> int:
        """Number of scored items."""
        return len(self.item_ids)


@dataclass(frozen=True)
class Scores:
    """All items of one model's evaluation, checked against the contract."""

    items: pa.Table
    directory: Path | None = field(default=None, compare=False)
    """Where they were read; None where they were made from rows."""

    def __post_init__(self) -> None:
        _ = self.metrics  # Checks the rows; a broken table never becomes a Scores.

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Scores":
        """Scores from one mapping per row, with the columns of ``ITEMS_SCHEMA``."""
        return cls(pa.Table.from_pylist([dict(row) for row in rows], schema=ITEMS_SCHEMA))

    @classmethod
    def load(cls, directory: Path) -> "Scores":
        """Read ``items.parquet``, page checksums verified.

        Raises:
            IncompleteArtifactError: there is none.
            DataError: it is damaged, of another schema, or breaks a rule of the contract.
        """
        path = directory / ITEMS_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise IncompleteArtifactError(
                f"{directory} has no {ITEMS_FILE}: no evaluation has finished there; "
                "run `python -m lrmc_ray.evaluate` for this model"
            ) from None
        try:
            # From memory, so that an OSError here means damage and not the disk.
            source = pa.BufferReader(content)
            table = pq.ParquetFile(source, page_checksum_verification=True).read()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is damaged ({error}); remove it and evaluate the model again"
            ) from None
        try:
            return cls(table, directory)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def save(self, directory: Path) -> None:
        """Write ``items.parquet`` with page checksums, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(self.items, sink, write_page_checksum=True, compression="zstd")
        write_atomically(directory / ITEMS_FILE, sink.getvalue().to_pybytes())

    @cached_property
    def metrics(self) -> dict[tuple[str, str], MetricItems]:
        """Every metric under (task, metric), tasks in their order of first appearance.

        Generation tasks have their derived ``score`` here as well.
        """
        return _read_metrics(self.items)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in their order of first appearance."""
        return tuple(dict.fromkeys(task for task, _ in self.metrics))

    def metric(self, task: str, metric: str) -> MetricItems:
        """One metric of one task.

        Raises:
            DataError: these scores do not have it.
        """
        try:
            return self.metrics[task, metric]
        except KeyError:
            known = ", ".join(f"{task}/{metric}" for task, metric in self.metrics)
            raise DataError(f"no scores of {task}/{metric}; there are {known}") from None

    def objective(self, task: str) -> MetricItems:
        """The metric of ``task`` that the objective is made of."""
        kind = next(items.kind for (name, _), items in self.metrics.items() if name == task)
        return self.metric(task, OBJECTIVE_METRIC[kind])

    def asks_others(self, earlier: "Scores", task: str) -> bool:
        """Whether no item of ``task`` was asked in ``earlier``, an evaluation of the same model.

        Equal ids do not tell, since the files of a task may each count from 0; but the same items
        get the same scores.
        """
        if task not in earlier.tasks:
            return True
        own, other = (scores.objective(task) for scores in (self, earlier))
        of_other = dict(zip(other.item_ids, other.values, strict=True))
        common = [
            abs(value - of_other[item_id])
            for item_id, value in zip(own.item_ids, own.values, strict=True)
            if item_id in of_other
        ]
        # Another batch or another machine moves a score far less.
        return not common or bool(np.mean(common) > 0.005)


def _read_metrics(table: pa.Table) -> dict[tuple[str, str], MetricItems]:
    """Group and check the rows of ``items.parquet``."""
    version = (table.schema.metadata or {}).get(b"lrmc.schema_version", b"absent").decode()
    if version != SCHEMA_VERSION:
        raise DataError(
            f"item schema version {version}, this build reads {SCHEMA_VERSION}; "
            "evaluate the model again"
        )
    if not table.schema.equals(ITEMS_SCHEMA, check_metadata=False):
        raise DataError(
            f"columns differ from ITEMS_SCHEMA; expected\n{ITEMS_SCHEMA.to_string()}\n"
            f"got\n{table.schema.remove_metadata().to_string()}"
        )
    for column in ITEMS_SCHEMA:
        if not column.nullable and table[column.name].null_count:
            raise DataError(f"column {column.name} must not have nulls")
    if table.num_rows == 0:
        raise DataError("there are no items; evaluate at least one task")
    rows_of: dict[tuple[str, str], list[int]] = {}
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for row, key in enumerate(zip(columns["task"], columns["metric"], strict=True)):
        rows_of.setdefault(key, []).append(row)
    metrics: dict[tuple[str, str], MetricItems] = {}
    for (task, metric), rows in rows_of.items():
        # The order of the ids, not of the file: resampling must not depend on who wrote first.
        rows.sort(key=columns["item_id"].__getitem__)

        def take(name: str, rows: list[int] = rows) -> tuple[Any, ...]:
            column = columns[name]
            return tuple(column[row] for row in rows)

        metrics[task, metric] = MetricItems(
            task=task,
            group=_only(take("group"), f"{task}: group"),
            kind=_only(take("kind"), f"{task}: kind"),
            metric=metric,
            item_ids=take("item_id"),
            values=np.asarray(take("value")),
            weights=np.asarray(take("weight")),
            outputs=take("output"),
        )
        _check_items(metrics[task, metric])
    for task in dict.fromkeys(task for task, _ in rows_of):
        _check_task(task, [items for items in metrics.values() if items.task == task])
    return _with_derived_scores(metrics)


def _only(values: tuple[str, ...], what: str) -> str:
    """The one value that all rows share."""
    if len(set(values)) > 1:
        raise DataError(f"{what} must be the same in all rows, got {sorted(set(values))}")
    return values[0]


def _check_items(items: MetricItems) -> None:
    """Rules for one metric of one task."""
    where = f"{items.task}/{items.metric}"
    if items.group not in GROUPS:
        raise DataError(f"{items.task}: group must be one of {GROUPS}, got {items.group!r}")
    if items.kind not in REQUIRED_METRICS:
        raise DataError(
            f"{items.task}: kind must be one of {tuple(REQUIRED_METRICS)}, got {items.kind!r}"
        )
    if items.metric == "score":
        raise DataError(f"{where}: the score is derived when reading; store its parts only")
    if items.num_items < 2:
        raise DataError(
            f"{where}: an interval needs at least 2 items, got {items.num_items}; "
            "evaluate more items, or cut the text into more pieces"
        )
    for first, second in itertools.pairwise(items.item_ids):
        if first == second:
            raise DataError(f"{where}: item {first!r} occurs more than once")
    lowest, highest = _RANGES.get(items.metric, (-np.inf, np.inf))
    values_I, weights_I = items.values, items.weights
    is_valid_I = (values_I >= lowest - _ROUNDING) & (values_I <= highest + _ROUNDING)
    if items.metric == "cross_entropy":
        is_valid_I = values_I > 0.0  # The objective divides by it.
    for index in np.flatnonzero(~(is_valid_I & np.isfinite(values_I))):
        rule = "finite and positive" if items.kind == "text" else f"in [{lowest:g}, {highest:g}]"
        raise DataError(
            f"{where}: values must be {rule}, got {values_I[index]} for "
            f"item {items.item_ids[index]!r}; the model or the task is broken there"
        )
    for index in np.flatnonzero(~(np.isfinite(weights_I) & (weights_I > 0.0))):
        raise DataError(
            f"{where}: weights must be finite and positive, got {weights_I[index]} for "
            f"item {items.item_ids[index]!r}"
        )


def _check_task(task: str, metrics: list[MetricItems]) -> None:
    """Rules across the metrics of one task."""
    _only(tuple(items.group for items in metrics), f"{task}: group")
    kind = _only(tuple(items.kind for items in metrics), f"{task}: kind")
    present = {items.metric for items in metrics}
    if missing := [name for name in REQUIRED_METRICS[kind] if name not in present]:
        raise DataError(
            f"{task}: a {kind} task must have {' and '.join(REQUIRED_METRICS[kind])}, "
            f"but {missing[0]} is missing; it has {', '.join(sorted(present))}"
        )
    for items in metrics[1:]:
        check_same_items(metrics[0], items, f"{task}/{metrics[0].metric}", f"{task}/{items.metric}")


def check_same_items(first: MetricItems, second: MetricItems, name: str, other: str) -> None:
    """Both must have scored the same items with the same weights."""
    first_ids, second_ids = set(first.item_ids), set(second.item_ids)
    if differing := sorted(first_ids ^ second_ids):
        owner, lacking = (name, other) if differing[0] in first_ids else (other, name)
        raise DataError(
            f"{first.task}: both sides must score the same items, but item {differing[0]!r} is in "
            f"{owner} and not in {lacking} ({len(differing)} items differ); "
            "evaluate both with the same task files and limits"
        )
    if (unequal := np.flatnonzero(first.weights != second.weights)).size:
        index = unequal[0]
        raise DataError(
            f"{first.task}: item {first.item_ids[index]!r} weighs {first.weights[index]:g} in "
            f"{name} and {second.weights[index]:g} in {other}; "
            "evaluate both with the same tokenizer and settings"
        )


def _with_derived_scores(
    metrics: dict[tuple[str, str], MetricItems],
) -> dict[tuple[str, str], MetricItems]:
    """``metrics`` with the ``score`` of every generation task."""
    complete = dict(metrics)
    for (task, metric), accuracy in metrics.items():
        if accuracy.kind != "generation" or metric != "accuracy":
            continue
        gold = metrics.get((task, "gold_probability"))
        complete[task, "score"] = MetricItems(
            task=task,
            group=accuracy.group,
            kind=accuracy.kind,
            metric="score",
            item_ids=accuracy.item_ids,
            values=(accuracy.values if gold is None else (accuracy.values + gold.values) / 2.0),
            weights=accuracy.weights,
            outputs=accuracy.outputs,
        )
    return complete
