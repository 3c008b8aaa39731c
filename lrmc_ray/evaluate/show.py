"""Scores, and what changed from a base to tuned models, on stdout."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lrmc_ray.command_line import pasteable
from lrmc_ray.config import EvaluateSettings, SearchSettings
from lrmc_ray.console import plain_console
from lrmc_ray.evaluate.changes import Comparison, compare, receipt
from lrmc_ray.evaluate.item_parts import IN_TWO_PARTS, is_divided
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.names import MADE_BY, RECEIPT
from lrmc_ray.evaluate.numbers import (
    delta_texts,
    is_share,
    number,
    percent,
    percent_range,
    points,
    points_range,
    value_texts,
)
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.evaluate.task_files import task_label
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.tasks.registry import expand


def items_text(scored: EvaluateSettings) -> str:
    """Which items the scores are of."""
    domain = expand(scored.domain_tasks)
    in_parts = [name for name in domain if is_divided(name, "domain", scored.test_share)]
    in_parts += [name for name in domain if name in IN_TWO_PARTS]
    if not in_parts:
        return "all items of every task"
    return f"the test items of {', '.join(map(task_label, in_parts))}, all items of other tasks"


def show_scores(directory: Path, *, items: str, as_json: bool) -> None:
    """One model's scores, each with its standard error and interval.

    Args:
        directory: of the scores.
        items: which they are of, in words.
        as_json: one JSON object in place of a table.
    """
    scores = Scores.load(directory)
    if as_json:
        values: dict[str, Any] = {"scores": str(directory)}
        for (task, metric), scored in scores.metrics.items():
            values[f"{task}/{metric}"] = scored.value.value
            values[f"{task}/{metric}_low"] = scored.value.low
            values[f"{task}/{metric}_high"] = scored.value.high
            values[f"{task}/{metric}_standard_error"] = scored.standard_error
        print(json.dumps(values))
        return
    table = Table(title="95 % intervals below the scores", box=box.SIMPLE_HEAD)
    table.add_column("task and metric", overflow="fold")
    for column in ("items", "score", "standard error"):
        table.add_column(column, justify="right", no_wrap=True)
    for (task, metric), scored in scores.metrics.items():
        value = scored.value
        cells = (f"{number(value.value, 3)}", f"{number(scored.standard_error, 3)}")
        ends = f"{number(value.low, 3)} to {number(value.high, 3)}"
        if is_share(metric, value.value):
            cells = (percent(value.value), points(scored.standard_error).removeprefix("+"))
            ends = percent_range(value)
        table.add_row(
            *(f"{task}\n  {metric.replace('_', ' ')}", str(scored.num_items)),
            *(f"{cells[0]}\n{ends}", cells[1]),
        )
    plain_console(highlight=True).print(table)
    print(f"Scored on {items}.")
    print(f"The scores are in {directory}. Next: {pasteable('lrmc', 'evaluate', '--tuned')} DIR")


def show_changes(
    search: SearchSettings, scored: Sequence[Path], *, items: str, as_json: bool
) -> None:
    """Each tuned model against the base, the first of ``scored``, on ``items``."""
    base = Scores.load(scored[0])
    console = plain_console(highlight=True)
    for directory in scored[1:]:
        tuned = Scores.load(directory)
        compared = compare(
            base, tuned, forgetting_weight=search.forgetting_weight, seed=search.seed
        )
        drift = read_manifest(directory, made_by=MADE_BY)["drift"]
        if as_json:
            paths = [str(scored[0]), str(directory)]
            print(json.dumps({"scores": paths, **compared.metrics(), **drift}))
            continue
        console.print(_changes_table(compared))
        console.print(f"Scored on {items}.")
        _print_headline(console, compared, drift)
        changes = receipt(base, tuned)["change"].to_pylist()
        console.print(
            f"{changes.count('lost')} items lost, {changes.count('gained')} gained: "
            f"{directory / RECEIPT}",
            highlight=False,
            soft_wrap=True,
        )


def _changes_table(compared: Comparison) -> Table:
    """Every metric of every task, before and after."""
    title = "Changes in points of 100, 95 % intervals below; grey: may be no change"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("task and metric", overflow="fold")
    for column in ("items", "base", "tuned", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in compared.tasks:
        for change in task.metrics:
            cells = (
                value_texts(change, change.before),
                value_texts(change, change.after),
                delta_texts(change),
            )
            table.add_row(
                f"{task.task}\n  {change.metric.replace('_', ' ')}",
                str(task.num_items),
                *("\n".join(cell) for cell in cells),
                style=None if change.delta.distinguishable else "bright_black",
            )
    return table


def _print_headline(console: Console, compared: Comparison, drift: Mapping[str, float]) -> None:
    """The numbers over all tasks."""
    for name, interval in (
        ("domain gain", compared.domain_gain),
        ("forgetting", compared.forgetting),
        ("combined", compared.combined),
    ):
        doubt = "" if interval.distinguishable else ", not distinguishable from 0"
        style = None if interval.distinguishable else "bright_black"
        text = f"{name} {points(interval.value)} points ({points_range(interval)}){doubt}"
        console.print(text, style=style, highlight=False)
    if (entropy := compared.general_ce_delta) is not None:
        text = f"cross-entropy of general text {entropy} nats per token"
        console.print(text, highlight=False)
    for group in ("domain", "general"):
        name = f"eval/kl_base_{group}"
        if name in drift:
            interval = Interval(drift[name], drift[f"{name}_low"], drift[f"{name}_high"])
            console.print(f"KL from the base on {group} text {interval} nats", highlight=False)
