"""What the terminal shows while trials run: a live table, or plain lines in a log file."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrmc_ray.console import format_seconds, is_quiet, plain_console
from lrmc_ray.evaluate.numbers import points
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.study import StudyFile, TrialEntry
from lrmc_ray.tune.result import COMBINED, FORGETTING, GAIN

if TYPE_CHECKING:
    from rich.table import Table


POLL_SECONDS = 1.0

MOST_ROWS = 40
"""Of a live table."""

STEP_SECONDS = "train/step_seconds"

RECENT_STEPS = 8
"""Whose median says how long the steps to come take."""

LINE_SECONDS = 15.0
"""Time between two lines about running trials where there is no terminal."""


def watch(
    directory: Path,
    *,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], StudyFile],
) -> None:
    """Show the trials of the study that ``read`` returns until ``is_running`` says no.

    Args:
        directory: start of the trials' relative paths.
        total: trials in all.
        is_running: whether there is still something to show.
        read: the study as it is now.
    """
    if is_quiet():
        while is_running():
            time.sleep(POLL_SECONDS)
    elif sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        _watch_live(directory, total, is_running, read)
    else:
        _watch_lines(directory, total, is_running, read)


def _watch_live(
    directory: Path,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], StudyFile],
) -> None:
    from rich.live import Live

    start = time.time()
    with Live(
        console=plain_console(stderr=True, highlight=True), auto_refresh=False, transient=True
    ) as live:
        while is_running():
            live.update(trials_table(directory, read(), total, start), refresh=True)
            time.sleep(POLL_SECONDS)


def _watch_lines(
    directory: Path,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], StudyFile],
) -> None:
    seen: dict[int, str] = {}
    said: dict[int, str] = {}
    printed = 0.0
    while is_running():
        study = read()
        _print_changes(study, total, seen)
        if time.monotonic() - printed > LINE_SECONDS:
            printed = time.monotonic()
            for trial in study.trials:
                if trial.state == "RUNNING":
                    progress = _progress(directory, trial, study)
                    if said.get(trial.number) != progress:
                        said[trial.number] = progress
                        print(f"trial {trial.number}: {progress}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    _print_changes(read(), total, seen)


def _print_changes(study: StudyFile, total: int, seen: dict[int, str]) -> None:
    """A line about every trial whose state is not the one in ``seen``, which is brought up."""
    for trial in study.trials:
        if seen.get(trial.number) != trial.state:
            seen[trial.number] = trial.state
            line = trial_line(trial, total, is_best=trial.number == study.best)
            print(line, file=sys.stderr, flush=True)


def trial_line(trial: TrialEntry, total: int, *, is_best: bool) -> str:
    """A trial that has begun or ended, for a log file."""
    start = f"trial {trial.number} of {total} ({trial.role})"
    if trial.state == "COMPLETE":
        best = ", the best so far" if is_best else ""
        return f"{start}: {_scores(trial)}{best}"
    if trial.state == "PRUNED":
        return f"{start} stopped early: {trial.cause}"
    if trial.state == "FAIL":
        return f"{start} failed: {trial.cause}"
    return f"{start} runs with {_params(trial)}"


def _params(trial: TrialEntry) -> str:
    if trial.role == "yardstick":
        return f"plain fine-tuning, AdamW, lr {trial.settings['lr']:.3g}"
    pairs = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(trial.params.items())
    )
    return ", ".join(pairs)


def _scores(trial: TrialEntry) -> str:
    """In points of 100, on the search items."""
    return ", ".join(
        f"{name} {points(trial.results[key])}"
        for name, key in (("gain", GAIN), ("forgetting", FORGETTING), ("combined", COMBINED))
    )


def _progress(directory: Path, trial: TrialEntry, study: StudyFile) -> str:
    steps = trial.settings["steps"]
    lines = read_metrics(directory / trial.metrics_file) if trial.metrics_file else []
    if not lines:
        return "starting"
    last = lines[-1]
    if last.step >= steps:
        return "scoring" if study.base_scores else "waits for the base's scores"
    # The first step compiles, and takes a multiple of the others.
    seconds = [line.metrics[STEP_SECONDS] for line in lines if STEP_SECONDS in line.metrics][1:]
    left = (steps - last.step) * statistics.median(seconds[-RECENT_STEPS:]) if seconds else None
    loss = last.metrics.get("train/loss", float("nan"))
    scored = [line.metrics["slice/combined"] for line in lines if "slice/combined" in line.metrics]
    way = f", combined {points(scored[-1])} on the way" if scored else ""
    rest = "" if left is None else f", {format_seconds(left)} of training left"
    return f"step {last.step}/{steps}, loss {loss:.3f}{way}{rest}"


def _core_hours(trials: Sequence[TrialEntry]) -> float:
    """Cores held by the trials that have ended, times hours."""
    costs = [trial.cost for trial in trials if trial.cost]
    seconds: float = sum(
        cost["train_seconds"] * cost.get("train_cores", 1)
        + cost["evaluate_seconds"] * cost.get("evaluate_cores", 1)
        for cost in costs
    )
    return seconds / 3600


def _shown(study: StudyFile) -> list[TrialEntry]:
    """The trials that have room in a terminal: those that run, the best, and the latest to end."""
    running = {trial.number for trial in study.trials if trial.state == "RUNNING"}
    room = max(0, MOST_ROWS - len(running))
    latest = [trial.number for trial in study.trials if trial.number not in running]
    kept = running | set(latest[len(latest) - room :] if room else []) | {study.best}
    return [trial for trial in study.trials if trial.number in kept]


def trials_table(directory: Path, study: StudyFile, total: int, start: float) -> "Table":
    """All trials and how they stand, for a terminal.

    Args:
        directory: of the study.
        study: as it is now.
        total: trials in all.
        start: when this sitting began, in seconds since 1970.
    """
    from rich.table import Table

    ended = [trial for trial in study.trials if trial.state != "RUNNING"]
    now = time.time()
    title = f"{len(ended)} of {total} trials ended, {format_seconds(now - start)}"
    new = [trial for trial in ended if (trial.ended or 0.0) > start]
    if new:
        each = (now - start) / len(new)
        title += f", about {format_seconds(each * (total - len(ended)))} left"
    if hours := _core_hours(study.trials):
        title += f", {hours:.2g} core hours so far"
    table = Table(title=title, title_justify="left")
    table.add_column("trial")
    table.add_column("settings")
    table.add_column("state; scores in points of 100 on the search items")
    shown = _shown(study)
    if len(shown) < len(study.trials):
        table.caption = f"{len(study.trials) - len(shown)} that ended earlier are not shown"
    if study.base_scores is None:
        table.add_row("base", "not trained", "being scored")
    for trial in shown:
        if trial.state == "COMPLETE":
            state = _scores(trial) + ("  best so far" if trial.number == study.best else "")
        elif trial.state == "PRUNED":
            state = f"stopped early: {trial.cause}"
        elif trial.state == "FAIL":
            state = f"failed: {trial.cause}"
        else:
            state = _progress(directory, trial, study)
        table.add_row(str(trial.number), _params(trial), state)
    return table
