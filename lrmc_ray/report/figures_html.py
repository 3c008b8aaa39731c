"""The report's interactive figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.report.trade_off import Surface

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

from lrmc_ray.evaluate.numbers import points, points_range

# One colour per meaning, in the page and in the PNG.
COLOURS = {
    "best": "#0f766e",
    "yardstick": "#c2410c",
    "defaults": "#4f46e5",
    "search": "#94a3b8",
    "base": "#111827",
    "front": "#0f766e",
}
MARKERS = {  # Plotly's name, Matplotlib's name
    "best": ("star", "*"),
    "yardstick": ("diamond", "D"),
    "defaults": ("square", "s"),
    "search": ("circle", "o"),
    "base": ("x", "X"),
}
GAIN_LABEL = "Domain gain{items}(points of 100; up is better)"
FORGETTING_LABEL = "Forgetting{items}(points of 100; left is better)"
SEARCH_ITEMS = "search items"
BASE_LABEL = "base model (0, 0)"
_LABEL_POSITIONS = {
    "best": "top right",
    "yardstick": "bottom right",
    "defaults": "bottom left",
}
_FAINT_CURVE_POINTS = 300


# Figures


@dataclass(frozen=True)
class FrontPoint:
    """One trial in the figure; scores are fractions."""

    label: str
    role: str
    """A key of ``COLOURS``."""
    gain: Interval
    forgetting: Interval
    details: str
    """More lines for the hover box, separated by line breaks."""
    is_on_front: bool


@dataclass(frozen=True)
class Curve:
    """One trial's training curve of one metric."""

    label: str
    role: str
    steps: Sequence[int]
    values: Sequence[float]


ROLE_NAMES = {
    "best": "best trial",
    "yardstick": "plain fine-tuning",
    "defaults": "defaults",
    "search": "other trials",
}


def axis_label(label: str, items: str = "") -> str:
    """``GAIN_LABEL`` or ``FORGETTING_LABEL`` with the items that it is of, where they are known."""
    return label.format(items=f" on {items}\n" if items else " ")


@dataclass(frozen=True)
class Canvas:
    """What the figure shows: the marked trials with their intervals, the others' points."""

    forgetting: tuple[float, float]
    """Lowest and highest value across, in points of 100."""
    gain: tuple[float, float]

    @property
    def shows_base(self) -> bool:
        """Whether the base model, at 0, lies on it; else a mark at the edge says where it is."""
        return all(low <= 0.0 <= high for low, high in (self.forgetting, self.gain))

    @property
    def nearest_to_base(self) -> tuple[float, float]:
        """The point of the canvas that is nearest to the base model, forgetting first."""
        across, up = (min(max(0.0, low), high) for low, high in (self.forgetting, self.gain))
        return across, up


def canvas_of(trials: Sequence[FrontPoint]) -> Canvas:
    """The axes that the trials fill. The base model is kept on them where that costs little room.

    With a gain of 50 points, and trials within 10 of each other, axes from 0 would be mostly empty.
    """
    ranges = []
    for one in ("forgetting", "gain"):
        ends = [
            end
            for trial in trials
            for interval in [getattr(trial, one)]
            for end in (
                (interval.low, interval.high) if trial.role != "search" else (interval.value,) * 2
            )
        ]
        low, high = 100 * min(ends), 100 * max(ends)
        margin = 0.08 * ((high - low) or 1.0)
        ranges.append((low - margin, high + margin))
    wide = [(min(low, 0.0), max(high, 0.0)) for low, high in ranges]
    room = [(high - low) / (b - a) for (low, high), (a, b) in zip(wide, ranges, strict=True)]
    if room[0] * room[1] <= MOST_ROOM_FOR_BASE:
        pads = [0.06 * (high - low) for low, high in wide]
        ranges = [(low - pad, high + pad) for (low, high), pad in zip(wide, pads, strict=True)]
    return Canvas(*ranges)


MOST_ROOM_FOR_BASE = 1.5
"""Times the area of the figure without the base model."""


def front_figure(trials: Sequence[FrontPoint]) -> "Figure":
    """Domain gain over forgetting, with intervals and the Pareto front, in points of 100."""
    import plotly.graph_objects as go

    figure = go.Figure()
    front = sorted((p for p in trials if p.is_on_front), key=lambda p: p.forgetting.value)
    figure.add_scatter(
        x=[100 * p.forgetting.value for p in front],
        y=[100 * p.gain.value for p in front],
        mode="lines",
        # To the right of a point nothing better is known until the next one.
        line={"shape": "hv", "color": COLOURS["front"], "width": 1.5, "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )
    # The marked trials last, so that they lie on top.
    for role in ("search", "defaults", "yardstick", "best"):
        group = [p for p in trials if p.role == role]
        if not group:
            continue
        is_marked = role != "search"
        figure.add_scatter(
            x=[100 * p.forgetting.value for p in group],
            y=[100 * p.gain.value for p in group],
            # Those of the other trials are in their hover boxes.
            error_x=_error_bars([p.forgetting for p in group], role) if is_marked else None,
            error_y=_error_bars([p.gain for p in group], role) if is_marked else None,
            mode="markers+text" if is_marked else "markers",
            text=[p.label for p in group],
            textposition=_LABEL_POSITIONS.get(role),
            textfont={"color": COLOURS[role], "size": 12},
            marker={
                "symbol": MARKERS[role][0],
                "size": 15 if role == "best" else 10,
                "color": COLOURS[role],
                "line": {"color": "white", "width": 1},
            },
            name=ROLE_NAMES[role],
            customdata=[_hover_text(p) for p in group],
            hovertemplate="%{customdata}<extra></extra>",
        )
    canvas = canvas_of(trials)
    across, up = canvas.nearest_to_base
    figure.add_scatter(
        x=[across],
        y=[up],
        mode="markers" if canvas.shows_base else "markers+text",
        marker={"symbol": MARKERS["base"][0], "size": 11, "color": COLOURS["base"]},
        text=[f"{BASE_LABEL} lies this way"],
        textposition="top right" if across <= sum(canvas.forgetting) / 2 else "top left",
        textfont={"size": 11},
        cliponaxis=False,
        name="base model",
        hovertemplate="base model, untuned: 0, 0<extra></extra>",
    )
    figure.update_layout(
        **layout(460),
        showlegend=False,
        xaxis=axis(axis_label(FORGETTING_LABEL, SEARCH_ITEMS)) | {"range": list(canvas.forgetting)},
        yaxis=axis(axis_label(GAIN_LABEL, SEARCH_ITEMS)) | {"range": list(canvas.gain)},
    )
    return figure


def _error_bars(intervals: Sequence[Interval], role: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (one.high - one.value) for one in intervals],
        "arrayminus": [100 * (one.value - one.low) for one in intervals],
        "color": COLOURS[role],
        "thickness": 1.5,
        "width": 3,
    }


def _hover_text(point: FrontPoint) -> str:
    # The browser's figure library reads a little HTML in these boxes.
    from markupsafe import escape

    lines = [
        point.label,
        f"gain {points(point.gain.value)} ({points_range(point.gain)})",
        f"forgetting {points(point.forgetting.value)} ({points_range(point.forgetting)})",
        *point.details.splitlines(),
    ]
    return "<br>".join(str(escape(line)) for line in lines)


def curve_figure(curves: Sequence[Curve], unit: str) -> "Figure":
    """One metric over the training steps: marked trials in colour, the others in grey."""
    import plotly.graph_objects as go

    figure = go.Figure()
    order = ("search", "defaults", "yardstick", "best")
    for curve in sorted(curves, key=lambda curve: order.index(curve.role)):
        is_marked = curve.role != "search"
        # Grey curves are for comparison; a long run's need not make the file large.
        stride = 1 if is_marked else -(-len(curve.steps) // _FAINT_CURVE_POINTS)
        figure.add_scatter(
            x=list(curve.steps[::stride]),
            y=list(curve.values[::stride]),
            mode="lines" if len(curve.steps) > 1 else "markers",
            line={"color": COLOURS[curve.role], "width": 2 if is_marked else 1},
            opacity=1.0 if is_marked else 0.45,
            name=curve.label,
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.4g}<extra></extra>",
        )
    figure.update_layout(**layout(260), showlegend=False, xaxis=axis("step"), yaxis=axis(unit))
    return figure


def hypervolume_figure(areas: Sequence[Interval], labels: Sequence[str]) -> "Figure":
    """The area under the front over the trials, with its interval, in points x points."""
    import plotly.graph_objects as go

    figure = go.Figure()
    x = list(range(1, len(areas) + 1))
    scaled = [(1e4 * one.value, 1e4 * one.low, 1e4 * one.high) for one in areas]
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[high for _, _, high in scaled] + [low for _, low, _ in reversed(scaled)],
        fill="toself",
        fillcolor="rgba(15, 118, 110, 0.12)",
        line={"width": 0},
        hoverinfo="skip",
        mode="lines",
    )
    figure.add_scatter(
        x=x,
        y=[value for value, _, _ in scaled],
        mode="lines+markers",
        line={"color": COLOURS["front"], "width": 2, "shape": "hv"},
        customdata=list(labels),
        hovertemplate="up to %{customdata}<br>%{y:.3g}<extra></extra>",
    )
    figure.update_layout(
        **layout(260),
        showlegend=False,
        xaxis=axis("trials with scores"),
        yaxis=axis("points x points"),
    )
    return figure


def contour_figure(
    ground: Surface,
    trials: Sequence[tuple[float, float, float, str]],
    names: tuple[str, str],
) -> "Figure":
    """A score over two parameters: the surface, and on it the trials as (x, y, score, label)."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = [[None if value != value else 100 * value for value in row] for row in ground.z.tolist()]
    figure.add_contour(
        x=ground.x.tolist(),
        y=ground.y.tolist(),
        z=rows,
        colorscale=[[0, "#f1f5f9"], [1, "#0f766e"]],
        contours={"coloring": "heatmap", "showlines": False},
        colorbar={"title": {"text": "points"}, "thickness": 10, "outlinewidth": 0},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[x for x, _, _, _ in trials],
        y=[y for _, y, _, _ in trials],
        mode="markers",
        marker={
            "size": 10,
            "color": [100 * score for _, _, score, _ in trials],
            "colorscale": [[0, "#f1f5f9"], [1, "#0f766e"]],
            "cmin": min(100 * score for _, _, score, _ in trials),
            "cmax": max(100 * score for _, _, score, _ in trials),
            "line": {"color": "#1e293b", "width": 1},
        },
        customdata=[f"{label}: {points(score)}" for _, _, score, label in trials],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )
    figure.update_layout(
        **layout(360), showlegend=False, xaxis=axis(names[0]), yaxis=axis(names[1])
    )
    return figure


def importance_figure(shares: Mapping[str, Mapping[str, float]]) -> "Figure":
    """How much each parameter matters, one group of bars per score."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = sorted(
        {name for one in shares.values() for name in one},
        key=lambda name: max(one.get(name, 0.0) for one in shares.values()),
    )
    colours = {"domain gain": COLOURS["best"], "forgetting": COLOURS["yardstick"]}
    for score, one in reversed(list(shares.items())):
        figure.add_bar(
            y=names,
            x=[100 * one.get(name, 0.0) for name in names],
            orientation="h",
            name=score,
            marker={"color": colours.get(score, COLOURS["search"])},
            hovertemplate="%{y}: %{x:.0f} % of the differences in %{fullData.name}<extra></extra>",
        )
    common = layout(90 + 26 * len(names) * len(shares))
    figure.update_layout(
        **common | {"margin": {"l": 56, "r": 12, "t": 36, "b": 48}},
        barmode="group",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "reversed"},
        xaxis=axis("% of the differences explained"),
        yaxis=axis("") | {"gridcolor": "rgba(0,0,0,0)"},
    )
    return figure


def layout(height: int) -> dict[str, Any]:
    """What all figures have in common, at a height in pixels."""
    return {
        "template": {},  # The default one adds 7 kB to every figure.
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#334155"},
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#cbd5e1", "align": "left"},
        "dragmode": False,
    }


def axis(title: str) -> dict[str, Any]:
    """An axis of any figure."""
    return {
        "title": {"text": title.replace("\n", "<br>"), "font": {"size": 12}},
        "gridcolor": "#e2e8f0",
        "zerolinecolor": "#94a3b8",
        "linecolor": "#cbd5e1",
        "automargin": True,
    }
