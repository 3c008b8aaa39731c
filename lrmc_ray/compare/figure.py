"""A comparison as figures: gain against forgetting, all methods, and what each part of them does.

All are narrow and upright, so that their text can be read on a phone as well.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrmc_ray.compare.measure import Estimate
from lrmc_ray.compare.table import ComparisonTable, MethodRow
from lrmc_ray.evaluate.front import pareto_front
from lrmc_ray.report.figures_html import COLOURS, FORGETTING_LABEL, GAIN_LABEL, axis_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Inches.
WIDTH = 6.2
LEFT, RIGHT, GAP = 0.62, 0.14, 0.14
LINE, SCATTER, LABELS, TITLES, ROW, TICKS = 0.17, 3.9, 0.5, 0.25, 0.36, 0.3
DROP = 0.2
"""How far a row's intervals are below its middle, in rows: its name stands above them."""

GREY, INK = "#94a3b8", "#1e293b"
BETTER, WORSE = COLOURS["best"], COLOURS["yardstick"]
NAMED_COLOURS = (COLOURS["defaults"], "#be185d", "#0369a1", "#7c3aed", "#a16207", "#65a30d")

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
"""Behind a text: lines that pass below it do not cross its letters."""
_SIDES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_DISTANCES = (8, 20, 32, 46, 60)
"""Of a label from its point, in points of 1/72 inch; beyond the first a line leads to it."""


# Which methods are in colour


@dataclass(frozen=True)
class Named:
    """How a method looks that the figure names."""

    label: str
    colour: str


def named_methods(table: ComparisonTable) -> dict[str, Named]:
    """The methods in colour: the reference, the best, and those with a label in the settings.

    All others are grey: forty colours tell nobody which method is which.
    """
    scored = [row for row in table.rows if row.trade is not None]
    if not scored:
        return {}
    best = max(scored, key=table.advantage).name
    labels = {m["name"]: m.get("label") for m in table.description["methods"]}
    colours = itertools.cycle(NAMED_COLOURS)
    found = {}
    for row in scored:
        if row.name == table.reference:
            colour = COLOURS["yardstick"]
        elif row.name == best:
            colour = COLOURS["best"]
        elif labels[row.name]:
            colour = next(colours)
        else:
            continue
        label = labels[row.name] or row.title
        found[row.name] = Named(f"{label} (best)" if row.name == best else label, colour)
    return found


# Gain against forgetting


def draw_scatter(table: ComparisonTable) -> "Figure":
    """Gain against forgetting, one point a method, and the Pareto front.

    Every method is at its chosen learning rate, on the items that are reported.
    """
    rows = [row for row in table.rows if row.trade is not None]
    page = _Page(
        [
            f"Every method at its chosen learning rate, mean of its seeds, {table.items}.",
            "Crosses: 95 % intervals over the items.",
        ],
        SCATTER + LABELS,
    )
    axes = page.axes(LEFT, 0.0, WIDTH - LEFT - RIGHT, SCATTER)
    _draw_points(axes, rows, named_methods(table))
    return page.figure


def _draw_points(axes: "Axes", rows: Sequence[MethodRow], named: dict[str, Named]) -> None:
    axes.set_xlabel(axis_label(FORGETTING_LABEL), fontsize=9)
    axes.set_ylabel(axis_label(GAIN_LABEL), fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#eef2f6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    places = []
    labels = [(0.0, 0.0, "base model", COLOURS["base"])]
    for row in rows:
        assert row.trade is not None
        x, y = 100 * row.trade.forgetting.value, 100 * row.trade.domain_gain.value
        places.append((x, y))
        look = named.get(row.name)
        colour, size, layer = (GREY, 4.5, 3) if look is None else (look.colour, 7.5, 5)
        axes.plot(
            x, y, "o", color=colour, markersize=size, markeredgecolor="white",
            markeredgewidth=0.6, zorder=layer, gid=row.name,
        )  # fmt: skip
        if look is not None:
            labels.append((x, y, look.label, look.colour))
            _draw_cross(axes, row, look.colour)
    axes.plot(0, 0, "X", color=COLOURS["base"], markersize=7, zorder=4, gid="base model")
    front = [places[index] for index in pareto_front([(y, x) for x, y in places])]
    if front:
        axes.step(
            [x for x, _ in front], [y for _, y in front], where="post", color="#64748b",
            linewidth=1.1, linestyle=(0, (4, 2)), zorder=2, gid="front",
        )  # fmt: skip
        labels.append((*front[0], "Pareto front", "#64748b"))
    axes.margins(0.06)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # labels need limits that stay
    _write_labels(axes, places, labels)


def _draw_cross(axes: "Axes", row: MethodRow, colour: str) -> None:
    """The intervals over the items, along both axes."""
    assert row.trade is not None
    x, y = row.trade.forgetting, row.trade.domain_gain
    if x.over_items is None or y.over_items is None:
        return
    style: dict[str, Any] = {"color": colour, "linewidth": 1.0, "alpha": 0.5, "zorder": 2}
    axes.plot([100 * x.over_items.low, 100 * x.over_items.high], [100 * y.value] * 2, **style)
    axes.plot([100 * x.value] * 2, [100 * y.over_items.low, 100 * y.over_items.high], **style)


def _write_labels(
    axes: "Axes",
    places: Sequence[tuple[float, float]],
    labels: Sequence[tuple[float, float, str, str]],
) -> None:
    """Write every label beside its point; ``places`` are the points that it should not cover.

    Nor should it cover the lines that are there, where another place is near.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    sizes = []
    for _, _, text, _ in labels:
        trial = axes.text(0, 0, text, fontsize=9, fontweight="bold")
        extent = trial.get_window_extent()
        sizes.append((extent.width, extent.height))
        trial.remove()
    frame = axes.get_window_extent()
    unit = figure.dpi / 72
    anchors = _in_pixels(axes, [(x, y) for x, y, _, _ in labels])
    boxes = place_labels(
        anchors,
        sizes,
        _in_pixels(axes, places),
        [point for line in axes.get_lines() for point in _along(axes, line, step=3 * unit)],
        (frame.x0, frame.y0, frame.x1, frame.y1),
        unit=unit,
    )
    for (x, y, text, colour), anchor, box in zip(labels, anchors, boxes, strict=True):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        offset = ((middle[0] - anchor[0]) / unit, (middle[1] - anchor[1]) / unit)
        is_far = _gap(box, anchor) > 1.5 * _DISTANCES[0] * unit
        axes.annotate(
            text, (x, y), xytext=offset, textcoords="offset points", ha="center",
            va="center", fontsize=9, fontweight="bold", color=colour, zorder=6, bbox=_PAPER,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7} if is_far else None,
        )  # fmt: skip


def _in_pixels(axes: "Axes", places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    moved = (axes.transData.transform(place) for place in places)
    return [(float(x), float(y)) for x, y in moved]


def _along(axes: "Axes", line: "Line2D", *, step: float) -> list[tuple[float, float]]:
    """Points of a drawn line, ``step`` pixels apart; none of a line that is one point."""
    vertices = np.asarray(line.get_path().vertices, dtype=np.float64)
    corners = _in_pixels(axes, [(float(x), float(y)) for x, y in vertices])
    found = []
    for start, end in itertools.pairwise(corners):
        parts = max(1, round(math.dist(start, end) / step))
        for part in range(parts + 1):
            x, y = (a + (b - a) * part / parts for a, b in zip(start, end, strict=True))
            found.append((x, y))
    return found


def _gap(box: Box, point: tuple[float, float]) -> float:
    """How far ``point`` is from the box, in pixels; 0 inside of it."""
    x = max(box[0] - point[0], 0.0, point[0] - box[2])
    y = max(box[1] - point[1], 0.0, point[1] - box[3])
    return float((x * x + y * y) ** 0.5)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[tuple[float, float]],
    lines: Sequence[tuple[float, float]],
    frame: Box,
    *,
    unit: float,
) -> list[Box]:
    """Where labels stand: close to their points, over no other label and over few points.

    Each in turn takes the best of a fixed set of places, so the same figure comes out every time.

    Args:
        anchors: the points that are labelled, in pixels, as everything here.
        sizes: width and height of every label.
        obstacles: points that a label should not cover, the labelled ones included.
        lines: points of lines that a label may cover, if there is no better place nearby.
        frame: what no label should leave.
        unit: pixels of a point of 1/72 inch.
    """
    boxes: list[Box] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        found: list[tuple[float, Box]] = []
        for distance, (right, up) in itertools.product(_DISTANCES, _SIDES):
            centre_x = x + right * (width / 2 + distance * unit)
            centre_y = y + up * (height / 2 + distance * unit * (0.5 if right else 1.0))
            box = (
                centre_x - width / 2, centre_y - height / 2,
                centre_x + width / 2, centre_y + height / 2,
            )  # fmt: skip
            covered = sum(_gap(box, point) < 4 * unit for point in obstacles)
            crossed = sum(_overlap(box, other) for other in boxes)
            is_outside = (
                box[0] < frame[0] or box[1] < frame[1] or (box[2] > frame[2] or box[3] > frame[3])
            )
            hidden = sum(_gap(box, point) == 0.0 for point in lines)
            cost = distance + hidden + 40 * covered + 1e4 * (crossed + is_outside)
            found.append((cost, box))
        boxes.append(min(found, key=lambda one: one[0])[1])
    return boxes


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Rows of intervals


def draw_methods(table: ComparisonTable) -> "Figure":
    """A row a method, best first, with its difference from the reference."""
    rows = [row for row in table.rows if row.trade is not None]
    rows.sort(key=lambda row: -table.advantage(row))
    named = named_methods(table)
    shown = []
    for row in rows:
        assert row.trade is not None
        look = named.get(row.name)
        versus = None if row.versus is None else row.versus.combined
        name = row.title
        if look is not None:
            name = look.label if look.label.startswith(name) else f"{name} = {look.label}"
        shown.append(
            _Row(
                name,
                INK if look is None else look.colour,
                (row.trade.domain_gain, row.trade.forgetting, versus),
                (GREY if look is None else look.colour,) * 3,
            )
        )
    return _draw_rows(
        [
            f"Every method at its chosen learning rate, {table.items}, points of 100, best first.",
            "Right is better, for forgetting left. 95 % intervals: lines, seeds; bands, items.",
            f"Reference: {table.title_of(table.reference)}",
        ],
        ("domain gain", "forgetting", "combined - reference"),
        shown,
    )


def draw_effects(table: ComparisonTable) -> "Figure":
    """A forest plot: what each part of the methods changes, a row each, in the table's order.

    In colour is what neither seeds nor items explain, better and worse in different ones.
    """
    shown = []
    for effect in table.effects:
        values = (effect.trade.domain_gain, effect.trade.forgetting, effect.trade.combined)
        colours = []
        for value, good in zip(values, (1, -1, 1), strict=True):
            colour = BETTER if good * value.value > 0 else WORSE
            colours.append(colour if value.distinguishable else GREY)
        pairs, seeds = len(effect.pairs), len(effect.seeds)
        basis = f"{pairs} pair{'s' * (pairs > 1)}, {seeds} seed{'s' * (seeds > 1)}"
        shown.append(_Row(f"{effect.title} ({basis})", INK, values, tuple(colours)))
    return _draw_rows(
        [
            "What a part changes: methods with it less the same methods without it. Test items,",
            "points of 100. Lines: 95 % intervals over the seeds; bands: over the items.",
            "In colour where neither includes zero: green is better, orange is worse.",
        ],
        ("domain gain", "forgetting", "combined"),
        shown,
    )


@dataclass(frozen=True)
class _Row:
    """A name above, and below it an estimate in every panel."""

    name: str
    name_colour: str
    values: tuple[Estimate | None, ...]
    colours: tuple[str, ...]


def _draw_rows(lines: Sequence[str], titles: Sequence[str], rows: Sequence[_Row]) -> "Figure":
    height = ROW * max(1, len(rows))
    page = _Page(lines, TITLES + height + TICKS)
    width = (WIDTH - 2 * RIGHT - GAP * (len(titles) - 1)) / len(titles)
    for number, title in enumerate(titles):
        axes = page.axes(RIGHT + number * (width + GAP), TITLES, width, height)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
        axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first row on top
        axes.set_yticks([])
        axes.axvline(0, color="#475569", linewidth=0.9, zorder=1)
        axes.grid(axis="x", color="#eef2f6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
        for place, row in enumerate(rows):
            _draw_estimate(axes, place + DROP, row.values[number], row.colours[number])
    for place, row in enumerate(rows):
        # On the page, not in a panel: a name is longer than one panel is wide.
        page.text(RIGHT, TITLES + ROW * (place + 0.28), row.name, row.name_colour)
    return page.figure


def _draw_estimate(axes: "Axes", place: float, value: Estimate | None, colour: str) -> None:
    if value is None:
        return
    if value.over_items is not None:
        span = [100 * value.over_items.low, 100 * value.over_items.high]
        axes.plot(span, [place] * 2, color=colour, linewidth=6, alpha=0.3, solid_capstyle="butt")
    if value.over_seeds is not None:
        span = [100 * value.over_seeds.low, 100 * value.over_seeds.high]
        axes.plot(span, [place] * 2, color=colour, linewidth=1.3)
    axes.plot(
        100 * value.value, place, "o", color=colour, markersize=5.5, markeredgecolor="white",
        markeredgewidth=0.6,
    )  # fmt: skip


class _Page:
    """A figure of a fixed width with lines of text on top; places are inches, from below those."""

    def __init__(self, lines: Sequence[str], height: float) -> None:
        from matplotlib.figure import Figure

        self._top = 0.1 + LINE * len(lines) + 0.1
        self._height = self._top + height
        self.figure: Figure = Figure(figsize=(WIDTH, self._height), dpi=160)
        for number, line in enumerate(lines):
            self.text(RIGHT, 0.1 + LINE * (number + 0.5) - self._top, line, "#526077")

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """New axes."""
        bottom = self._height - self._top - top - height
        return self.figure.add_axes(
            (left / WIDTH, bottom / self._height, width / WIDTH, height / self._height)
        )

    def text(self, left: float, middle: float, text: str, colour: str) -> None:
        """One line of text."""
        self.figure.text(
            left / WIDTH, 1 - (self._top + middle) / self._height, text, va="center",
            fontsize=8.5, color=colour, bbox=_PAPER,
        )  # fmt: skip
