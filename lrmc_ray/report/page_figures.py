"""The page's figures beside the main one: curves, trade-off, surface, importance."""

from collections.abc import Mapping
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.front import HYPERVOLUME_REFERENCE
from lrmc_ray.evaluate.numbers import (
    number,
    percent,
    points,
    points_range,
)
from lrmc_ray.files.metrics_log import StepMetrics, read_metrics
from lrmc_ray.report.figures_html import (
    Curve,
    contour_figure,
    curve_figure,
    hypervolume_figure,
    importance_figure,
)
from lrmc_ray.report.study import Study, Trial
from lrmc_ray.report.template import drawing
from lrmc_ray.report.trade_off import surface
from lrmc_ray.report.words import knee_advice, shown_role

CURVES = {
    "train/loss": ("Training loss", "nats per supervised position"),
    "subset/rho": ("Outside mass (rho)", "probability"),
    "moclip/angle_deg": ("Angle of gradient and momentum", "degrees"),
}


def trade_off_section(study: Study) -> dict[str, Any] | None:
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
            f"{points(traded.knee_forgetting.value)} ({points_range(traded.knee_forgetting)}).",
            *filter(None, [knee_advice(study)]),
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


def surface_drawing(study: Study) -> tuple[tuple[str, str], Any]:
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


def importance_drawing(study: Study) -> Any:
    """How much of the differences between trials each parameter explains; None if unknown."""
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


def curve_drawings(study: Study) -> tuple[list[tuple[str, Any]], list[str]]:
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
