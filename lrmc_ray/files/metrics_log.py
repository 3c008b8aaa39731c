"""The metrics of one training run as a file: the truth that MLflow, reports and tests read.

Append-only JSON lines, one line per step::

    {"step": 12, "time": 1761200000.25, "metrics": {"train/loss": 0.71, "subset/rho": 0.002}}

``time`` is in seconds since 1970. A metric that is not finite is kept as the string ``"NaN"``,
``"Infinity"`` or ``"-Infinity"``, since JSON has no such numbers and hiding them would hide a
broken run. A run that goes on after a crash appends the steps that it redoes: the last line of a
step counts.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

from lrmc_ray.errors import DataError
from lrmc_ray.files.json_lines import JsonLines, whole_lines


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of the log."""

    step: int
    """Optimizer steps done."""
    time: float
    """Seconds since 1970 at which the line was written."""
    metrics: dict[str, float]
    """All metrics of the step by name; NaN and infinities included."""


class MetricsLog(JsonLines):
    """The one writer of a metrics file."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append the metrics of ``step``, all of them at once.

        Raises:
            OSError: the disk is full; the file then ends with the line before.
        """
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        self.append({"step": int(step), "time": time.time(), "metrics": values})


def read_metrics(path: Path) -> list[StepMetrics]:
    """The last line of each step, by ascending step; a torn last line is left out.

    No file reads as no steps: a run that ended before its first step has none.

    Raises:
        DataError: a line is not what :class:`MetricsLog` writes.
    """
    return last_of_each_step(read_new_lines(path, 0)[0])


def last_of_each_step(lines: Iterable[StepMetrics]) -> list[StepMetrics]:
    """Of ``lines`` in the order of writing, the last of each step, by ascending step."""
    by_step = {line.step: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def read_new_lines(path: Path, offset: int) -> tuple[list[StepMetrics], int]:
    """The whole lines from byte ``offset`` on, and the offset at which to go on.

    Starts over where the file has become shorter, because its run has been started over.

    Raises:
        DataError: a line is not what :class:`MetricsLog` writes.
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], 0
    lines = []
    for line in whole_lines(content).splitlines(keepends=True):
        lines.append(_parse(line, path, offset))
        offset += len(line)
    return lines, offset


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _parse(line: bytes, path: Path, offset: int) -> StepMetrics:
    try:
        fields = json.loads(line)
        return StepMetrics(
            step=int(fields["step"]),
            time=float(fields["time"]),
            metrics={str(name): float(value) for name, value in fields["metrics"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} must hold one JSON object with step, time and metrics per line; "
            f"the one at byte {offset} does not ({type(error).__name__}: {error}); remove it"
        ) from None
