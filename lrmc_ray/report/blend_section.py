"""Curves of gain and forgetting over the blend: a figure, and the rows beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrmc_ray.command_line import pasteable
from lrmc_ray.errors import LrmcError
from lrmc_ray.evaluate.numbers import points, points_range
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.report.blends import BlendCurve, blend_curves
from lrmc_ray.report.figures_html import (
    COLOURS,
    FORGETTING_LABEL,
    GAIN_LABEL,
    MARKERS,
    axis,
    axis_label,
    layout,
)
from lrmc_ray.report.study import Study, Trial
from lrmc_ray.report.template import drawing
from lrmc_ray.report.words import shown_role

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class BlendRow:
    """One model of a curve, as the page and the terminal show it."""

    trial: str
    weight: float
    gain: Interval
    forgetting: Interval
    command: str
    """Makes its directory."""


def blend_section(study: Study) -> tuple[dict[str, Any] | None, list[str]]:
    """What the page shows of the curves, None where none was measured; and what is wrong."""
    try:
        curves = blend_curves(study)
    except LrmcError as error:
        return None, [f"The curves over the blend cannot be shown: {error}"]
    if not curves:
        return None, []
    curves.sort(key=lambda curve: curve.trial.entry.role == "yardstick")
    shown = [(curve, shown_role(study, curve.trial)) for curve in curves]
    section = {
        "figure": drawing(blend_figure(shown), "blend"),
        "rows": [row for curve in curves for row in rows_of(study, curve)],
        "legend": [(COLOURS[role], trial_text(curve.trial)) for curve, role in shown],
    }
    return section, []


def trial_text(trial: Trial) -> str:
    """How a curve is called."""
    return "plain fine-tuning" if trial.entry.role == "yardstick" else trial.name


def rows_of(study: Study, curve: BlendCurve) -> list[BlendRow]:
    """The measured models of one curve, from the base on."""
    number = curve.trial.entry.number
    rows = []
    for place in curve.places:
        blend = () if place.weight == 1.0 else ("--blend", f"{place.weight:g}")
        command = ("export", study.directory, "--trial", number, *blend, "--to", "my_model")
        rows.append(
            BlendRow(
                trial_text(curve.trial),
                place.weight,
                place.comparison.domain_gain,
                place.comparison.forgetting,
                pasteable("lrmc", *command),
            )
        )
    return rows


def blend_figure(curves: Sequence[tuple[BlendCurve, str]]) -> "Figure":
    """Domain gain over forgetting, a line from the base through the blends to each trial.

    Args:
        curves: each with the role that decides its colour.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for curve, role in curves:
        gains = [place.comparison.domain_gain for place in curve.places]
        losses = [place.comparison.forgetting for place in curve.places]
        weights = [0.0, *(place.weight for place in curve.places)]
        figure.add_scatter(
            x=[0.0, *(100 * one.value for one in losses)],
            y=[0.0, *(100 * one.value for one in gains)],
            mode="lines+markers+text",
            text=["" if weight == 0.0 else f"{weight:g}" for weight in weights],
            textposition="top left" if role == "yardstick" else "bottom right",
            textfont={"color": COLOURS[role], "size": 12},
            line={"color": COLOURS[role], "width": 2},
            marker={"symbol": MARKERS[role][0], "size": 9, "color": COLOURS[role]},
            error_x=_bars(losses, COLOURS[role]),
            error_y=_bars(gains, COLOURS[role]),
            customdata=[
                "base model, untuned",
                *(
                    f"{trial_text(curve.trial)}, blend {place.weight:g}<br>"
                    f"gain {points(gain.value)} ({points_range(gain)})<br>"
                    f"forgetting {points(lost.value)} ({points_range(lost)})"
                    for place, gain, lost in zip(curve.places, gains, losses, strict=True)
                ),
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(
        **layout(420),
        showlegend=False,
        xaxis=axis(axis_label(FORGETTING_LABEL)),
        yaxis=axis(axis_label(GAIN_LABEL)),
    )
    return figure


def _bars(intervals: Sequence[Interval], colour: str) -> dict[str, Any]:
    """Intervals of all points but the base, which has none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0, *(100 * (one.high - one.value) for one in intervals)],
        "arrayminus": [0.0, *(100 * (one.value - one.low) for one in intervals)],
        "color": colour,
        "thickness": 0.7,
        "width": 2,
    }


def curves_table(study: Study, curves: Sequence[BlendCurve]) -> "Table":
    """The measured models of all curves, for a terminal of 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="Search items, points of 100, with 95 % intervals", box=box.SIMPLE_HEAD, min_width=70
    )
    table.add_column("trial")
    table.add_column("blend", justify="right")
    for name in ("domain gain", "forgetting"):
        table.add_column(name, justify="right", no_wrap=True)
    for curve in curves:
        for row in rows_of(study, curve):
            texts = [f"{points(x.value)} ({points_range(x)})" for x in (row.gain, row.forgetting)]
            table.add_row(f"{curve.trial.entry.number} {row.trial}", f"{row.weight:g}", *texts)
        table.add_section()
    return table
