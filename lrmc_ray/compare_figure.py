"""A comparison as one figure: gain against forgetting over learning rates, and what was chosen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lrmc_ray.compare_table import ComparisonTable, Estimate, MethodRow
from lrmc_ray.report_html import FORGETTING_LABEL, GAIN_LABEL
from lrmc_ray.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALETTE = (
    "#c2410c", "#0f766e", "#4f46e5", "#b45309", "#be185d", "#0369a1", "#65a30d", "#7c3aed",
    "#475569", "#a16207", "#0891b2", "#dc2626",
)  # fmt: skip
_SHAPES = ("o", "s", "^", "D", "v", "P")
_LINEAR = 3.0  # points of forgetting; beyond, the axis is logarithmic
_TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)


def draw(table: ComparisonTable) -> "Figure":
    """The figure; methods have the numbers of the table's order.

    On the left every method over its learning rates, on the items that choose. On the right every
    method at the chosen one, a line each, best first, on the items that are reported: intervals
    over the seeds as lines, over the items as bands.
    """
    from matplotlib.figure import Figure

    scored = [index for index, row in enumerate(table.rows) if row.trade is not None]
    scored.sort(key=lambda index: -table.advantage(table.rows[index]))
    height = max(5.6, 1.7 + 0.27 * len(scored))
    figure = Figure(figsize=(15.5, height), dpi=140, layout="constrained")
    fronts, *panels = figure.subplots(1, 4, width_ratios=(2.6, 1, 1, 1))
    _draw_fronts(fronts, table)
    titles = ("domain gain", "forgetting", "combined - reference")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10)
    for place, index in enumerate(scored):
        row = table.rows[index]
        assert row.trade is not None
        _draw_estimate(panels[0], place, index, row.trade.domain_gain)
        _draw_estimate(panels[1], place, index, row.trade.forgetting)
        if row.versus is not None:
            _draw_estimate(panels[2], place, index, row.versus.combined)
    _label_rows(panels, table, scored)
    figure.suptitle(
        f"Left: development items, seed {table.seeds[0]}; filled: the learning rate chosen by "
        "them; cross: the base model. Right: test items at that rate, points of 100, mean of the "
        "seeds; lines: 95 % intervals over seeds, bands: over items; reference: "
        f"{table.title_of(table.reference)}.",
        x=0.01, ha="left", fontsize=9, color="#526077",
    )  # fmt: skip
    return figure


def _style(index: int) -> tuple[str, str]:
    return _PALETTE[index % len(_PALETTE)], _SHAPES[(index // len(_PALETTE)) % len(_SHAPES)]


def _draw_fronts(axes: "Axes", table: ComparisonTable) -> None:
    """One line per method, along its learning rates, with its number at the largest."""
    x_all = [0.0]
    for index, row in enumerate(table.rows):
        own = [point for point in table.points if point.method == row.name]
        if not own:
            continue
        colour, shape = _style(index)
        x = [100 * point.forgetting.value for point in own]
        y = [100 * point.domain_gain.value for point in own]
        axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.6)
        for point, left, bottom in zip(own, x, y, strict=True):
            face = colour if point.is_chosen else "white"
            axes.plot(left, bottom, shape, color=colour, markerfacecolor=face, markersize=6)
        axes.annotate(
            str(index + 1), (x[-1], y[-1]), xytext=(5, 4), textcoords="offset points",
            fontsize=8, color=colour,
        )  # fmt: skip
        x_all += x
    axes.plot(0, 0, "X", color="#111827", markersize=8)
    # One model that has lost everything must not squeeze all others into one spot.
    axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.5)
    low, high = min(x_all), max(x_all)
    margin = max(1.0, 0.15 * high)
    axes.set_xlim(low - 1.0, high + margin)
    ticks = [tick for tick in _TICKS if low - 1.0 <= tick <= high + margin]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
    axes.grid(color="#eef2f6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(FORGETTING_LABEL)
    axes.set_ylabel(GAIN_LABEL)


def _draw_estimate(axes: "Axes", place: int, index: int, value: Estimate) -> None:
    colour, shape = _style(index)
    if value.over_items is not None:
        axes.plot(
            *_span(value.over_items, place), color=colour, linewidth=7, alpha=0.22,
            solid_capstyle="butt",
        )  # fmt: skip
    if value.over_seeds is not None:
        axes.plot(*_span(value.over_seeds, place), color=colour, linewidth=1.3)
    axes.plot(
        100 * value.value, place, shape, color=colour, markersize=7, markeredgecolor="white",
        markeredgewidth=0.8,
    )  # fmt: skip


def _span(interval: Interval, place: int) -> tuple[list[float], list[int]]:
    return [100 * interval.low, 100 * interval.high], [place, place]


def _label_rows(panels: Sequence["Axes"], table: ComparisonTable, scored: Sequence[int]) -> None:
    rows: list[MethodRow] = [table.rows[index] for index in scored]
    for panel in panels:
        panel.set_ylim(len(scored) - 0.4, -0.6)
        panel.set_yticks(np.arange(len(scored)), [""] * len(scored))
        panel.axvline(0, color="#94a3b8", linewidth=0.8, zorder=0)
        panel.grid(axis="x", color="#eef2f6", zorder=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    labels = [f"{row.title}  {index + 1}" for row, index in zip(rows, scored, strict=True)]
    panels[0].set_yticks(np.arange(len(scored)), labels, fontsize=9)
    for label, index in zip(panels[0].get_yticklabels(), scored, strict=True):
        label.set_color(_style(index)[0])
