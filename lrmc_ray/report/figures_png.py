"""Gain against forgetting as a PNG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrmc_ray.report.figures_html import (
    BASE_LABEL,
    COLOURS,
    FORGETTING_LABEL,
    GAIN_LABEL,
    MARKERS,
    ROLE_NAMES,
    SEARCH_ITEMS,
    Canvas,
    FrontPoint,
    axis_label,
    canvas_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from lrmc_ray.report.study import Study, Trial
from lrmc_ray.report.words import (
    accuracy_text,
    chosen_settings,
    note_on_not_drawn,
    settings_text,
    shown_role,
)

FIGURE_FILE = "gain_vs_forgetting.png"


# Figure


def draw_front(study: Study) -> "Figure":
    """``gain_vs_forgetting.png``: every trial with its intervals, the front, base and best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
    shown = [front_point_of(study, trial) for trial in study.compared]
    front = sorted((p for p in shown if p.is_on_front), key=lambda p: p.forgetting.value)
    axes.plot(
        [100 * p.forgetting.value for p in front],
        [100 * p.gain.value for p in front],
        drawstyle="steps-post",
        color=COLOURS["front"],
        linestyle=":",
        linewidth=1.5,
        label="Pareto front",
    )
    for role in ("search", "defaults", "yardstick", "best"):
        _draw_trials(axes, [p for p in shown if p.role == role], role)
    if shown:
        _draw_base(axes, canvas_of(shown))
    axes.set_title(f"{study.file.name}: what was learned against what was forgotten", loc="left")
    axes.set_xlabel(axis_label(FORGETTING_LABEL, SEARCH_ITEMS))
    axes.set_ylabel(axis_label(GAIN_LABEL, SEARCH_ITEMS))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eef2f6", zorder=0)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.text(
        0.01, -0.02,
        f"Bars: 95 % intervals over the search items. {note_on_not_drawn(study)}".strip(),
        fontsize=8, color="#526077",
    )  # fmt: skip
    return figure


def _draw_base(axes: "Axes", canvas: Canvas) -> None:
    """Set the axes, and mark the base model, or the way to it from the nearest edge."""
    axes.set_xlim(*canvas.forgetting)
    axes.set_ylim(*canvas.gain)
    across, up = canvas.nearest_to_base
    axes.plot(
        across, up, MARKERS["base"][1], color=COLOURS["base"], markersize=9, linestyle="",
        label="base", clip_on=False, zorder=6,
    )  # fmt: skip
    if not canvas.shows_base:
        is_left = across <= sum(canvas.forgetting) / 2
        axes.annotate(
            f"{BASE_LABEL} lies this way", (across, up), xytext=(8 if is_left else -8, 6),
            textcoords="offset points", ha="left" if is_left else "right", fontsize=8,
            color=COLOURS["base"],
        )  # fmt: skip


def _draw_trials(axes: "Axes", trials: Sequence[FrontPoint], role: str) -> None:
    if not trials:
        return
    is_marked = role != "search"
    x = [100 * p.forgetting.value for p in trials]
    y = [100 * p.gain.value for p in trials]
    errors = [
        [
            [100 * (interval.value - interval.low) for interval in intervals],
            [100 * (interval.high - interval.value) for interval in intervals],
        ]
        for intervals in ([p.forgetting for p in trials], [p.gain for p in trials])
    ]
    axes.errorbar(
        x, y, xerr=errors[0], yerr=errors[1],
        fmt=MARKERS[role][1], markersize=14 if role == "best" else 7,
        color=COLOURS[role], markeredgecolor="white", markeredgewidth=0.8,
        ecolor=COLOURS[role] if is_marked else "#edf1f5", elinewidth=1.3 if is_marked else 0.7,
        capsize=2.5 if is_marked else 0, zorder=4 if is_marked else 2, label=ROLE_NAMES[role],
    )  # fmt: skip
    for point, left, bottom in zip(trials, x, y, strict=True):
        axes.annotate(
            point.label if is_marked else point.label.removeprefix("trial "),
            (left, bottom),
            xytext=(7, 6),
            textcoords="offset points",
            fontsize=10 if is_marked else 8,
            color=COLOURS[role] if is_marked else "#64748b",
            zorder=5,
        )


def point_label(study: Study, trial: Trial) -> str:
    """What a trial is called in the figure: by its role, where it has one."""
    names = {"yardstick": "plain fine-tuning", "defaults": "defaults", "search": trial.name}
    role = trial.entry.role
    name = names[role]
    if sum(other.entry.role == role for other in study.compared) > 1:
        name = trial.name if role == "search" else f"{name}, {trial.name}"
    return f"best: {name}" if trial is study.best else name


def front_point_of(study: Study, trial: Trial) -> FrontPoint:
    """A compared trial as a point of the figure."""
    assert trial.comparison is not None  # Only compared trials are drawn.
    details = [settings_text(chosen_settings(study, trial))]
    accuracy = trial.accuracy("domain")
    if accuracy is not None:
        details.append(f"domain {accuracy_text(accuracy)}")
    return FrontPoint(
        label=point_label(study, trial),
        role=shown_role(study, trial),
        gain=trial.comparison.domain_gain,
        forgetting=trial.comparison.forgetting,
        details="\n".join(line for line in details if line),
        is_on_front=trial.is_on_front,
    )
