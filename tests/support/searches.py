"""Searches whose trials have ended, without running one."""

from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.files.study import TrialEntry
from lrmc_ray.tune.choice import model_of
from lrmc_ray.tune.description import Description, study_directory

POINTS = [(0.2, 0.001), (0.5, 0.09), (0.45, 0.008), (0.6, 0.05), (0.1, 0.02)]
"""(gain, forgetting) of five trials."""


def trial_entry(number: int, state: Any, **more: Any) -> TrialEntry:
    """A trial as ``study.json`` describes it."""
    values: dict[str, Any] = {
        "role": "search",
        "params": {"lr": 3e-5},
        "settings": {"steps": 10, "lr": 3e-5},
        "metrics_file": "none.jsonl",
    }
    return TrialEntry(number=number, state=state, **values | more)


def complete_entry(number: int, gain: float, forgetting: float, **more: Any) -> TrialEntry:
    """A trial with these results; the second one is the yardstick."""
    results = {
        "eval/domain_gain": gain,
        "eval/forgetting": forgetting,
        "eval/combined": gain - forgetting,
    }
    role = "yardstick" if number == 1 else "search"
    return trial_entry(number, "COMPLETE", role=role, results=results, **more)


def search_settings(**search: Any) -> RunSettings:
    """Settings of a search of as many trials as there are points."""
    return RunSettings.model_validate({"search": {"trials": len(POINTS), **search}})


def make_description(output: Path, points: list[tuple[float, float]], **search: Any) -> Description:
    """A search in ``output`` whose trials have these results, each with a model."""
    settings = search_settings(**{"trials": len(points), **search})
    made = Description(study_directory(settings, output, {}), settings, {})
    made.file.trials = [complete_entry(number, *point) for number, point in enumerate(points)]
    for number in range(len(points)):
        model_of(made.directory, number).mkdir(parents=True)
    return made
