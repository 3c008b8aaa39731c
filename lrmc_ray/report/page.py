"""The report's HTML page: which sections it has, and what stands in each."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.changes import (
    MetricChange,
    TaskChange,
    receipt,
)
from lrmc_ray.evaluate.statistics import HYPERVOLUME_REFERENCE, Interval
from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.files.metrics_log import StepMetrics, read_metrics
from lrmc_ray.files.study import STUDY_FILE
from lrmc_ray.report.costs import cost_footnote, rows_of_costs, sentences_on_cost
from lrmc_ray.report.figures_html import (
    ROLE_NAMES,
    Curve,
    contour_figure,
    curve_figure,
    front_figure,
    hypervolume_figure,
    importance_figure,
)
from lrmc_ray.report.figures_png import FIGURE_FILE, draw_front, front_point_of
from lrmc_ray.report.numbers import (
    flatten,
    number,
    percent,
    percent_range,
    points,
    points_range,
    setting,
)
from lrmc_ray.report.study import RESAMPLES, Study, Trial, Verdict, bootstrap_seed, load_study
from lrmc_ray.report.template import drawing, render, whisker
from lrmc_ray.report.trade_off import surface
from lrmc_ray.report.words import (
    OBJECTIVE_NOTES,
    accuracy_text,
    caution_sentences,
    chosen_settings,
    headline,
    headline_numbers,
    note_on_not_drawn,
    shown_role,
    tags_of,
)

REPORT_FILE = "report.html"


CURVES = {
    "train/loss": ("Training loss", "nats per supervised position"),
    "subset/rho": ("Outside mass (rho)", "probability"),
    "moclip/angle_deg": ("Angle of gradient and momentum", "degrees"),
}


_MAX_EXAMPLES = 6


# Page


def write_report(study_dir: Path) -> Path:
    """Write ``gain_vs_forgetting.png`` and ``report.html`` into a study's directory.

    Returns:
        The path of ``report.html``.

    Raises:
        IncompleteArtifactError: no ``study.json`` or no base scores; names the remedy.
        DataError: one of them is damaged.
    """
    return write_study_report(load_study(study_dir))


def write_study_report(study: Study) -> Path:
    """Write the figure and the page of a study that is read; returns the page's path."""
    png = io.BytesIO()
    draw_front(study).savefig(png, format="png", bbox_inches="tight", facecolor="white")
    write_atomically(study.directory / FIGURE_FILE, png.getvalue())
    path = study.directory / REPORT_FILE
    write_atomically(path, render(_page(study)).encode())
    return path


def _page(study: Study) -> dict[str, Any]:
    """Everything that the page shows, in the words of its template."""
    best, verdict = study.shown, study.verdict
    surface_names, ground = _surface(study)
    curves, curve_notes = _curves(study)
    tiles = []
    if verdict is not None:
        names = ("Domain gain", "Forgetting", "Combined")
        tiles = [
            {"name": name, "interval": interval}
            for name, interval in zip(names, headline_numbers(verdict.comparison), strict=True)
        ]
        if verdict.versus is not None and study.candidate is not None:
            subject = "" if study.candidate is best else f"{study.candidate.name}, "
            name = f"{subject}against plain fine-tuning"
            tiles.append({"name": name[0].upper() + name[1:], "interval": verdict.versus.combined})
    weight = setting(study.file.forgetting_weight)
    roles = {shown_role(study, trial) for trial in study.compared}
    curve_roles = {shown_role(study, trial) for trial in study.trials if trial.entry.metrics_file}
    return {
        "name": study.file.name,
        "subtitle": f"{len(study.trials)} trials, {len(study.problems)} of them without scores. "
        f"Started {study.file.created}.",
        "headline": headline(study),
        "tiles": tiles,
        "resamples": RESAMPLES,
        "objective_text": (
            f"Combined = domain gain - {weight} x forgetting; against plain fine-tuning it is the "
            "difference of both combined scores."
            + OBJECTIVE_NOTES[study.file.objective].format(budget=points(study.file.max_forgetting))
        ),
        "cautions": caution_sentences(study),
        "notes": (*study.notes, *curve_notes),
        "parameters": chosen_settings(study, best) if best is not None else [],
        "front": (
            drawing(
                front_figure([front_point_of(study, trial) for trial in study.compared]), "front"
            )
            if study.compared
            else None
        ),
        "front_note": note_on_not_drawn(study),
        "roles": [
            *((role, ROLE_NAMES[role]) for role in ROLE_NAMES if role in roles),
            ("base", "base model"),
        ],
        "trials": [_trial_row(study, trial) for trial in study.trials],
        "best_name": best.name if best else "",
        "has_yardstick": verdict is not None and verdict.plain is not None,
        "tasks": _task_rows(verdict) if verdict is not None else [],
        "drift": _drift(best) if best is not None else "",
        "curves": curves,
        "curve_roles": [(role, ROLE_NAMES[role]) for role in ROLE_NAMES if role in curve_roles],
        "costs": rows_of_costs(study),
        "cost_sentences": sentences_on_cost(study),
        "cost_note": cost_footnote(study),
        "trade_off": _trade_off_section(study),
        "surface": ground,
        "surface_names": surface_names,
        "importance": _importance(study),
        "record": flatten(study.file.record),
        **_receipt(verdict),
        "tables": [
            (title, rows)
            for title, rows in (
                ("Search space", flatten(study.file.space)),
                ("Settings", flatten(study.file.settings)),
                ("Versions", flatten(study.file.versions)),
                ("Seeds", _seeds(study)),
            )
            if rows
        ],
        "footer": f"Written by lrmc_ray from {STUDY_FILE}; figures need no network.",
    }


def _trade_off_section(study: Study) -> dict[str, Any] | None:
    """The front, its knee and its hypervolume, for every objective."""
    traded = study.trade_off
    if traded is None:
        return None
    compared = study.compared
    bend = compared[traded.knee]
    area = traded.hypervolume[-1]
    gain, forgetting = (points(value) for value in HYPERVOLUME_REFERENCE)
    rows = []
    for index in traded.front:
        trial = compared[index]
        assert trial.comparison is not None  # compared
        rows.append(
            {
                "name": trial.name,
                "gain": trial.comparison.domain_gain,
                "forgetting": trial.comparison.forgetting,
                "on_front": number(trial.front_probability, 2),
                "knee": number(trial.knee_probability, 2),
                "budget": number(trial.budget_probability, 2),
            }
        )
    return {
        "sentences": [
            f"{len(traded.front)} of {len(compared)} trials are on the front. Its knee is "
            f"{bend.name}, in {percent(traded.knee_probability[traded.knee])} of the resamples; "
            f"wherever the knee falls, its gain is {points(traded.knee_gain.value)} "
            f"({points_range(traded.knee_gain)}) and its forgetting "
            f"{points(traded.knee_forgetting.value)} ({points_range(traded.knee_forgetting)})."
        ],
        "rows": rows,
        "figure": drawing(
            hypervolume_figure(traded.hypervolume, [trial.name for trial in compared]),
            "hypervolume",
        ),
        "caption": (
            f"Hypervolume: the area between the front and the point (gain {gain}, forgetting "
            f"{forgetting}), now {1e4 * area.value:.0f} points x points (95 % interval "
            f"{1e4 * area.low:.0f} to {1e4 * area.high:.0f}). It grows as the front does; the "
            "band leans upwards, since a front picks lucky trials. The three shares on the right "
            f"are of the resamples; the budget is {points(study.file.max_forgetting)} points of "
            "forgetting."
        ),
    }


def _surface(study: Study) -> tuple[tuple[str, str], Any]:
    """The combined score over the two thresholds, or over the first two numbers searched."""
    searched = [
        name
        for name, space in study.file.space.items()
        if isinstance(space, Mapping) and space.get("choices") is None
    ]
    searched.sort(key=lambda name: name not in ("tau", "delta_max"))
    if len(searched) < 2:
        return ("", ""), None
    names = (searched[0], searched[1])
    placed = [
        (
            float(trial.entry.params[names[0]]),
            float(trial.entry.params[names[1]]),
            trial.comparison.combined.value,
            trial.name,
        )
        for trial in study.compared
        if trial.comparison is not None and all(name in trial.entry.params for name in names)
    ]
    ground = surface(
        [one[0] for one in placed], [one[1] for one in placed], [one[2] for one in placed]
    )
    return names, drawing(contour_figure(ground, placed, names), "surface") if ground else None


def _importance(study: Study) -> Any:
    names = {
        "eval/domain_gain": "domain gain",
        "eval/forgetting": "forgetting",
        "eval/combined": "combined",
    }
    shares = {
        text: study.file.importance[key]
        for key, text in names.items()
        if study.file.importance.get(key)
    }
    return drawing(importance_figure(shares), "importance") if shares else None


def _trial_row(study: Study, trial: Trial) -> dict[str, Any]:
    kinds = {
        "best": "best",
        "closest to the budget": "closest",
        "plain fine-tuning": "yardstick",
        "defaults": "defaults",
    }
    tags = [{"kind": kinds[text], "text": text} for text in tags_of(study, trial)]
    row: dict[str, Any] = {
        "number": trial.entry.number,
        "tags": tags,
        "parameters": chosen_settings(study, trial),
        "problem": trial.problem,
    }
    if trial.comparison is None:
        if trial.entry.state in ("COMPLETE", "FAIL"):
            tags.append({"kind": "fail", "text": "failed"})
        elif trial.entry.state == "PRUNED":
            tags.append({"kind": "early", "text": "stopped early"})
        return row
    accuracies = [
        "" if value is None else accuracy_text(value)
        for value in (trial.accuracy("domain"), trial.accuracy("general"))
    ]
    row["numbers"] = list(
        zip(
            ("domain gain", "forgetting", "combined"),
            headline_numbers(trial.comparison),
            (*accuracies, ""),
            strict=True,
        )
    )
    row["front_probability"] = number(trial.front_probability, 2)
    row["is_on_front"] = trial.is_on_front
    return row


def _drift(best: Trial) -> str:
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


def _task_rows(verdict: Verdict) -> list[dict[str, Any]]:
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


def _curves(study: Study) -> tuple[list[tuple[str, Any]], list[str]]:
    """Figures of the training metrics, and what could not be read."""
    logs: list[tuple[Trial, list[StepMetrics]]] = []
    notes = []
    for trial in study.trials:
        if trial.entry.metrics_file is None:
            continue
        try:
            logs.append((trial, read_metrics(study.directory / trial.entry.metrics_file)))
        except DataError as error:
            notes.append(f"The training curves of {trial.name} cannot be shown: {error}")
    figures = []
    for metric, (title, unit) in CURVES.items():
        curves = [
            Curve(
                label=trial.name,
                role=shown_role(study, trial),
                steps=[line.step for line in lines],
                values=[line.metrics[metric] for line in lines],
            )
            for trial, log in logs
            if (lines := [line for line in log if metric in line.metrics])
        ]
        if curves:
            name = metric.replace("/", "-")
            figures.append((title, drawing(curve_figure(curves, unit), name)))
    return figures, notes


def _receipt(verdict: Verdict | None) -> dict[str, Any]:
    """Lost and gained items of the best trial: counts per task, and a few examples."""
    if verdict is None:
        return {"receipts": [], "examples": []}
    rows = receipt(verdict.base, verdict.scores).to_pylist()
    counts = [
        {
            "task": f"{task.task} ({task.group})",
            "num_items": task.num_items,
            "lost": _count(rows, task.task, "lost"),
            "gained": _count(rows, task.task, "gained"),
        }
        for task in verdict.comparison.tasks
        if any(change.metric == "accuracy" for change in task.metrics)
    ]
    examples = []
    for change, group in (("lost", "general"), ("gained", "domain")):
        items = [row for row in rows if row["change"] == change]
        # What the search is about comes first: forgotten general items, learned domain items.
        items.sort(key=lambda row: row["group"] != group)
        if items:
            shown = [
                {
                    "task": row["task"],
                    "item_id": row["item_id"],
                    "before": row["output_before"],
                    "after": row["output_after"],
                }
                for row in items[:_MAX_EXAMPLES]
            ]
            more = max(0, len(items) - _MAX_EXAMPLES)
            examples.append((f"{change.capitalize()}: {len(items)} items", shown, more))
    return {"receipts": counts, "examples": examples}


def _count(rows: Sequence[Mapping[str, Any]], task: str, change: str) -> int:
    return sum(row["task"] == task and row["change"] == change for row in rows)


def _seeds(study: Study) -> list[tuple[str, str]]:
    rows = [
        row for row in flatten(study.file.settings) if row[0] == "seed" or row[0].endswith(".seed")
    ]
    return [*rows, ("bootstrap", f"{bootstrap_seed(study.file)}, {RESAMPLES} resamples")]
