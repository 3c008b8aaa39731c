"""The study as a terminal table and as one JSON object."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lrmc_ray.evaluate.front import HYPERVOLUME_REFERENCE
from lrmc_ray.evaluate.numbers import (
    points,
    points_range,
)

if TYPE_CHECKING:
    from rich.table import Table

from lrmc_ray.report.study import Study
from lrmc_ray.report.words import (
    accuracy_text,
    chosen_settings,
    headline,
    headline_numbers,
    settings_text,
    tags_of,
)

# Terminal


def summary_table(study: Study) -> "Table":
    """All trials with their intervals, for a terminal of 80 columns or more; failed ones too."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{study.file.name}: search items, points of 100, 95 % intervals; grey: may be zero",
        box=box.SIMPLE_HEAD,
        show_lines=False,
    )
    table.add_column("trial")
    for column in ("domain gain", "forgetting", "combined"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial in study.trials:
        tags = tags_of(study, trial)
        if trial.is_on_front:
            tags.append("on the front")
        cell = Text(f"{trial.entry.number} {', '.join(tags)}".strip(), style="bold")
        if parameters := chosen_settings(study, trial):
            cell.append(f"\n{settings_text(parameters)}", style="not bold")
        if trial.comparison is None:
            is_early = trial.entry.state == "PRUNED"
            cell.append(f"\n{trial.problem}", style="not bold" if is_early else "not bold red")
            table.add_row(cell, "-", "-", "-")
            continue
        accuracies = (trial.accuracy("domain"), trial.accuracy("general"), None)
        numbers = [
            Text(
                f"{points(interval.value)}\n{points_range(interval)}"
                + ("" if accuracy is None else "\n" + accuracy_text(accuracy, separator="\n")),
                style="" if interval.distinguishable else "bright_black",
            )
            for interval, accuracy in zip(
                headline_numbers(trial.comparison), accuracies, strict=True
            )
        ]
        table.add_row(cell, *numbers)
    return table


def as_json(study: Study) -> dict[str, Any]:
    """The summary for other programs; fractions, with the ends of their 95 % intervals."""
    verdict = study.verdict
    versus = None
    if verdict is not None and verdict.versus is not None and study.candidate is not None:
        versus = {"trial": study.candidate.entry.number, **asdict(verdict.versus)}
    return {
        "study": study.file.name,
        "directory": str(study.directory),
        "objective": study.file.objective,
        "best": study.best.entry.number if study.best else None,
        "closest": study.closest.entry.number if study.closest else None,
        "trade_off": _trade_off_json(study),
        "best_results": verdict.comparison.metrics() if verdict else None,
        "fresh_tasks": list(verdict.fresh_tasks) if verdict else [],
        "yardstick": study.yardstick.entry.number if study.yardstick else None,
        "versus_yardstick": versus,
        "headline": [sentence.text for sentence in headline(study)],
        "notes": list(study.notes),
        "trials": [
            {
                "number": trial.entry.number,
                "role": trial.entry.role,
                "state": trial.entry.state,
                "problem": trial.problem,
                "rung": trial.entry.rung,
                "params": trial.entry.params,
                "settings": trial.entry.settings,
                "on_front": trial.is_on_front,
                "front_probability": trial.front_probability,
                "knee_probability": trial.knee_probability,
                "budget_probability": trial.budget_probability,
                "results": (
                    {**trial.entry.results, **trial.comparison.metrics()}
                    if trial.comparison
                    else None
                ),
            }
            for trial in study.trials
        ],
    }


def _trade_off_json(study: Study) -> dict[str, Any] | None:
    traded = study.trade_off
    if traded is None:
        return None
    numbers = [trial.entry.number for trial in study.compared]
    return {
        "front": [numbers[index] for index in traded.front],
        "knee": numbers[traded.knee],
        "knee_gain": asdict(traded.knee_gain),
        "knee_forgetting": asdict(traded.knee_forgetting),
        "hypervolume": asdict(traded.hypervolume[-1]),
        "hypervolume_reference": list(HYPERVOLUME_REFERENCE),
    }
