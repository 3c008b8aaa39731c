"""Curves of gain and forgetting over the blend: a figure, and the rows beside it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrmc_ray.command_line import pasteable
from lrmc_ray.errors import LrmcError
from lrmc_ray.evaluate.numbers import points, points_range
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.report.blends import BlendCurve, BlendPlace, blend_curves
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
    blend: str
    """How far it is from the base."""
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
        "rows": rows_of(study, curves),
        "by_depth": any(curve.form == "depth" for curve in curves),
        "legend": list(dict.fromkeys((COLOURS[role], trial_text(c.trial)) for c, role in shown)),
    }
    return section, []


def trial_text(trial: Trial) -> str:
    """How a curve is called."""
    return "plain fine-tuning" if trial.entry.role == "yardstick" else trial.name


def rows_of(study: Study, curves: Sequence[BlendCurve]) -> list[BlendRow]:
    """The measured models of all curves, each from the base on; none twice."""
    rows = []
    for curve in curves:
        depth = ("--by-depth",) if curve.form == "depth" else ()
        for place in curve.places:
            is_trial = place.weight == 1.0
            blend = () if is_trial else ("--blend", f"{place.weight:g}", *depth)
            words = ("export", study.directory, "--trial", curve.trial.entry.number, *blend)
            rows.append(
                BlendRow(
                    trial_text(curve.trial),
                    blend_text(curve, place),
                    place.comparison.domain_gain,
                    place.comparison.forgetting,
                    pasteable("lrmc", *words, "--to", "my_model"),
                )
            )
    return list(dict.fromkeys(rows))


def blend_text(curve: BlendCurve, place: BlendPlace) -> str:
    """How far a model is from the base."""
    by_depth = curve.form == "depth" and place.weight < 1.0
    return f"{place.weight:g}" + (" by depth" if by_depth else "")


def blend_figure(curves: Sequence[tuple[BlendCurve, str]]) -> "Figure":
    """Domain gain over forgetting, a line from the base through the blends to each trial.

    A curve by depth is dotted; the base is not on it.

    Args:
        curves: each with the role that decides its colour.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for curve, role in curves:
        gains = [place.comparison.domain_gain for place in curve.places]
        losses = [place.comparison.forgetting for place in curve.places]
        base = [0.0] if curve.form == "even" else []
        texts = [blend_text(curve, place) for place in curve.places]
        figure.add_scatter(
            x=[*base, *(100 * one.value for one in losses)],
            y=[*base, *(100 * one.value for one in gains)],
            mode="lines+markers+text",
            text=[*("" for _ in base), *texts],
            textposition="top left" if role == "yardstick" else "bottom right",
            textfont={"color": COLOURS[role], "size": 12},
            line={"color": COLOURS[role], "width": 2, "dash": "solid" if base else "dot"},
            marker={"symbol": MARKERS[role][0], "size": 9, "color": COLOURS[role]},
            error_x=_bars(losses, COLOURS[role], base),
            error_y=_bars(gains, COLOURS[role], base),
            customdata=[
                *("base model, untuned" for _ in base),
                *(
                    f"{trial_text(curve.trial)}, blend {text}<br>"
                    f"gain {points(gain.value)} ({points_range(gain)})<br>"
                    f"forgetting {points(lost.value)} ({points_range(lost)})"
                    for text, gain, lost in zip(texts, gains, losses, strict=True)
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


def _bars(intervals: Sequence[Interval], colour: str, base: list[float]) -> dict[str, Any]:
    """Intervals of all points but the base, which has none where it is drawn: ``base`` is [0]."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [*base, *(100 * (one.high - one.value) for one in intervals)],
        "arrayminus": [*base, *(100 * (one.value - one.low) for one in intervals)],
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
    for _, of_trial in itertools.groupby(curves, lambda curve: curve.trial.entry.number):
        own = list(of_trial)
        for row in rows_of(study, own):
            texts = [f"{points(x.value)} ({points_range(x)})" for x in (row.gain, row.forgetting)]
            table.add_row(f"{own[0].trial.entry.number} {row.trial}", row.blend, *texts)
        table.add_section()
    return table
