"""What the terminal shows while trials run: a live table, or plain lines in a log file."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.console import format_seconds
from lrmc_ray.files.metrics_log import read_metrics

if TYPE_CHECKING:
    from rich.table import Table


POLL_SECONDS = 1.0


LINE_SECONDS = 15.0
"""Time between two lines about running trials where there is no terminal."""


def watch(
    directory: Path,
    *,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], list[dict[str, Any]]],
) -> None:
    """Show the trials that ``read`` returns until ``is_running`` says no.

    Args:
        directory: start of the trials' relative paths.
        total: trials in all.
        is_running: whether there is still something to show.
        read: the trials as ``study.json`` describes them.
    """
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        _watch_live(directory, total, is_running, read)
    else:
        _watch_lines(directory, total, is_running, read)


def _watch_live(
    directory: Path,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], list[dict[str, Any]]],
) -> None:
    from rich.console import Console
    from rich.live import Live

    start = time.time()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while is_running():
            live.update(_table(directory, read(), total, start), refresh=True)
            time.sleep(POLL_SECONDS)


def _watch_lines(
    directory: Path,
    total: int,
    is_running: Callable[[], bool],
    read: Callable[[], list[dict[str, Any]]],
) -> None:
    seen: dict[int, str] = {}
    printed = 0.0
    while is_running():
        trials = read()
        for trial in trials:
            if seen.get(trial["number"]) != trial["state"]:
                seen[trial["number"]] = trial["state"]
                print(_line(trial, total), file=sys.stderr, flush=True)
        if time.monotonic() - printed > LINE_SECONDS:
            printed = time.monotonic()
            for trial in trials:
                if trial["state"] == "RUNNING":
                    progress = _progress(directory, trial)
                    print(f"trial {trial['number']}: {progress}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    for trial in read():
        if seen.get(trial["number"]) != trial["state"]:
            print(_line(trial, total), file=sys.stderr, flush=True)


def _line(trial: dict[str, Any], total: int) -> str:
    start = f"trial {trial['number']} of {total} ({trial['role']})"
    if trial["state"] == "COMPLETE":
        best = ", the best so far" if trial.get("is_best") else ""
        return f"{start}: {_scores(trial)}{best}"
    if trial["state"] == "PRUNED":
        return f"{start} stopped early: {trial['cause']}"
    if trial["state"] == "FAIL":
        return f"{start} failed: {trial['cause']}"
    return f"{start} runs with {_params(trial)}"


def _params(trial: dict[str, Any]) -> str:
    if trial["role"] == "yardstick":
        return f"plain fine-tuning, AdamW, lr {trial['settings']['lr']:.3g}"
    pairs = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(trial["params"].items())
    )
    return ", ".join(pairs)


def _scores(trial: dict[str, Any]) -> str:
    results = trial["results"]
    return ", ".join(
        f"{name} {results[f'eval/{key}']:+.3f}"
        for name, key in (
            ("gain", "domain_gain"),
            ("forgetting", "forgetting"),
            ("combined", "combined"),
        )
    )


def _progress(directory: Path, trial: dict[str, Any]) -> str:
    steps = trial["settings"]["steps"]
    lines = read_metrics(directory / trial["metrics_file"])
    if not lines:
        return "starting"
    last = lines[-1]
    if last.step >= steps:
        return "evaluating"
    left = (steps - last.step) * last.metrics.get("train/step_seconds", 0.0)
    loss = last.metrics.get("train/loss", float("nan"))
    scored = [line.metrics["slice/combined"] for line in lines if "slice/combined" in line.metrics]
    way = f"{scored[-1]:+.3f} on the way, " if scored else ""
    return (
        f"step {last.step}/{steps}, loss {loss:.3f}, {way}{format_seconds(left)} of training left"
    )


def _core_hours(trials: Sequence[dict[str, Any]]) -> float:
    """Cores held by the trials that have ended, times hours."""
    costs = [trial["cost"] for trial in trials if trial.get("cost")]
    seconds: float = sum(
        cost["train_seconds"] * cost.get("train_cores", 1)
        + cost["evaluate_seconds"] * cost.get("evaluate_cores", 1)
        for cost in costs
    )
    return seconds / 3600


def _table(directory: Path, trials: Sequence[dict[str, Any]], total: int, start: float) -> "Table":
    from rich.table import Table

    ended = [trial for trial in trials if trial["state"] != "RUNNING"]
    now = time.time()
    title = f"{len(ended)} of {total} trials ended, {format_seconds(now - start)}"
    new = [trial for trial in ended if trial.get("ended", 0) > start]
    if new:
        each = (now - start) / len(new)
        title += f", about {format_seconds(each * (total - len(ended)))} left"
    if hours := _core_hours(trials):
        title += f", {hours:.2g} core hours so far"
    table = Table(title=title, title_justify="left")
    for column in ("trial", "settings", "state"):
        table.add_column(column)
    for trial in trials:
        if trial["state"] == "COMPLETE":
            state = _scores(trial)
            if trial.get("is_best"):
                state += "  best so far"
        elif trial["state"] == "PRUNED":
            state = f"stopped early: {trial['cause']}"
        elif trial["state"] == "FAIL":
            state = f"failed: {trial['cause']}"
        else:
            state = _progress(directory, trial)
        table.add_row(str(trial["number"]), _params(trial), state)
    return table
