"""The report's HTML page: which sections it has, and what stands in each.

The sections' figures are in ``page_figures``, the table of tasks in ``task_table``, the costs in
``costs``; ``template`` turns all of it into one file.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.evaluate.numbers import (
    flatten,
    number,
    points,
    setting,
)
from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.files.study import STUDY_FILE
from lrmc_ray.report.blend_section import blend_section
from lrmc_ray.report.costs import cost_footnote, rows_of_costs, sentences_on_cost
from lrmc_ray.report.figures_html import (
    ROLE_NAMES,
    front_figure,
)
from lrmc_ray.report.figures_png import FIGURE_FILE, draw_front, front_point_of
from lrmc_ray.report.page_figures import (
    curve_drawings,
    importance_drawing,
    surface_drawing,
    trade_off_section,
)
from lrmc_ray.report.receipt_section import receipt_section
from lrmc_ray.report.study import RESAMPLES, Study, Trial, bootstrap_seed, load_study
from lrmc_ray.report.task_table import drift_text, rows_of_tasks
from lrmc_ray.report.template import drawing, render
from lrmc_ray.report.words import (
    OBJECTIVE_NOTES,
    accuracy_text,
    caution_sentences,
    chosen_settings,
    headline,
    headline_numbers,
    note_on_not_drawn,
    record_sentences,
    score_text,
    shown_role,
    tags_of,
    verdict_items_text,
)

REPORT_FILE = "report.html"

MOST_ROWS = 50
"""Of a table of trials; a longer one is folded."""


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


def _trials(study: Study) -> str:
    said = f"{len(study.trials)} trials"
    return said + (f", {len(study.problems)} of them without scores" if study.problems else "")


def _record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The record's figures; those by domain only where the data name any."""
    unnamed = set(summary.get("domains", ())) == {""}
    return {name: value for name, value in summary.items() if name != "domains" or not unnamed}


def _page(study: Study) -> dict[str, Any]:
    """Everything that the page shows, in the words of its template."""
    best, verdict = study.shown, study.verdict
    surface_names, ground = surface_drawing(study)
    curves, curve_notes = curve_drawings(study)
    blend, blend_notes = blend_section(study)
    weight = setting(study.file.forgetting_weight)
    roles = {shown_role(study, trial) for trial in study.compared}
    curve_roles = {shown_role(study, trial) for trial in study.trials if trial.entry.metrics_file}
    return {
        "name": study.file.name,
        "subtitle": f"{_trials(study)}. Started {study.file.created.replace('T', ' ')[:16]} UTC.",
        "headline": headline(study),
        "tiles": _tiles(study),
        "resamples": RESAMPLES,
        "items": verdict_items_text(verdict) if verdict is not None else "",
        "score_text": score_text(verdict.comparison) if verdict is not None else "",
        "objective_text": (
            f"Combined = domain gain - {weight} x forgetting; against plain fine-tuning it is the "
            "difference of both combined scores."
            + OBJECTIVE_NOTES[study.file.objective].format(budget=points(study.file.max_forgetting))
        ),
        "cautions": caution_sentences(study),
        "notes": (*study.notes, *record_sentences(study), *curve_notes, *blend_notes),
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
        "most_rows": MOST_ROWS,
        "best_name": best.name if best else "",
        "has_yardstick": verdict is not None and verdict.plain is not None,
        "tasks": rows_of_tasks(verdict) if verdict is not None else [],
        "drift": drift_text(best) if best is not None else "",
        "curves": curves,
        "curve_roles": [(role, ROLE_NAMES[role]) for role in ROLE_NAMES if role in curve_roles],
        "costs": rows_of_costs(study),
        "cost_sentences": sentences_on_cost(study),
        "cost_note": cost_footnote(study),
        "trade_off": trade_off_section(study),
        "blend": blend,
        "surface": ground,
        "surface_names": surface_names,
        "importance": importance_drawing(study),
        "record": flatten(_record(study.file.record)),
        **receipt_section(verdict),
        "tables": _tables(study),
        "footer": f"Written by lrmc_ray from {STUDY_FILE}; figures need no network.",
    }


def _tiles(study: Study) -> list[dict[str, Any]]:
    """The large numbers at the top: the best trial's scores, and against plain fine-tuning."""
    verdict = study.verdict
    if verdict is None:
        return []
    names = ("Domain gain", "Forgetting", "Combined")
    tiles = [
        {"name": name, "interval": interval}
        for name, interval in zip(names, headline_numbers(verdict.comparison), strict=True)
    ]
    if verdict.versus is not None and study.candidate is not None:
        subject = "" if study.candidate is study.shown else f"{study.candidate.name}, "
        name = f"{subject}against plain fine-tuning"
        tiles.append({"name": name[0].upper() + name[1:], "interval": verdict.versus.combined})
    return tiles


def _tables(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the study was made, in tables of names and values; what is not set is left out."""
    tables = (
        ("Search space", flatten(study.file.space)),
        ("Settings", flatten(study.file.settings)),
        ("Versions", flatten(study.file.versions)),
        ("Seeds", _seeds(study)),
    )
    said = [(title, [row for row in rows if row[1] != "None"]) for title, rows in tables]
    return [(title, rows) for title, rows in said if rows]


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


def _seeds(study: Study) -> list[tuple[str, str]]:
    rows = [
        row for row in flatten(study.file.settings) if row[0] == "seed" or row[0].endswith(".seed")
    ]
    return [*rows, ("bootstrap", f"{bootstrap_seed(study.file)}, {RESAMPLES} resamples")]
