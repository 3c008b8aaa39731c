"""Gain against forgetting as a PNG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrmc_ray.report.figures_html import (
    COLOURS,
    FORGETTING_LABEL,
    GAIN_LABEL,
    MARKERS,
    ROLE_NAMES,
    FrontPoint,
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
    axes.plot(
        0, 0, MARKERS["base"][1], color=COLOURS["base"], markersize=9, linestyle="", label="base"
    )
    axes.set_title(f"{study.file.name}: what was learned against what was forgotten", loc="left")
    axes.set_xlabel(FORGETTING_LABEL)
    axes.set_ylabel(GAIN_LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eef2f6", zorder=0)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.text(
        0.01, -0.02, f"Bars: 95 % intervals over the items. {note_on_not_drawn(study)}".strip(),
        fontsize=8, color="#526077",
    )  # fmt: skip
    return figure


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
        ecolor=COLOURS[role] if is_marked else "#dbe2ea", elinewidth=1.3 if is_marked else 0.9,
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


def front_point_of(study: Study, trial: Trial) -> FrontPoint:
    """A compared trial as a point of the figure."""
    assert trial.comparison is not None  # Only compared trials are drawn.
    details = [settings_text(chosen_settings(study, trial))]
    accuracy = trial.accuracy("domain")
    if accuracy is not None:
        details.append(f"domain {accuracy_text(accuracy)}")
    return FrontPoint(
        label=trial.name,
        role=shown_role(study, trial),
        gain=trial.comparison.domain_gain,
        forgetting=trial.comparison.forgetting,
        details="\n".join(line for line in details if line),
        is_on_front=trial.is_on_front,
    )
