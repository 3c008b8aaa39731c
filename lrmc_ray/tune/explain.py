"""``lrmc tune --explain``: what a search would do and what it would cost, before it is started."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.resources import local_cpus
from lrmc_ray.config import ParameterRange, RunSettings
from lrmc_ray.console import format_seconds
from lrmc_ray.record.sources import training_files
from lrmc_ray.tune.forecast import Forecast, forecast, with_expected_steps


def explain(settings: RunSettings, output: Path, *, as_json: bool) -> None:
    """Print the search space, the objective, the sampler and the forecast.

    Args:
        settings: the search.
        output: where costs of earlier searches are looked for.
        as_json: one JSON object in place of text.
    """
    training_files(settings)
    settings = with_expected_steps(settings, output)
    slots = local_cpus() // settings.resources.cpus_per_worker
    cost = forecast(settings, output, slots=max(1, slots))
    if as_json:
        print(json.dumps(_as_dict(settings, cost)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{settings.search.name}: what is searched", title_justify="left")
    for column in ("setting of train", "values", "scale", "only where", "first trial"):
        table.add_column(column)
    for name, searched in settings.parameters.items():
        table.add_row(
            name,
            values_text(searched),
            "log" if searched.log else "choice" if searched.choices else "linear",
            ", ".join(f"{key} = {value}" for key, value in searched.when.items()),
            str(getattr(settings.train, name)),
        )
    console = Console(highlight=False)
    if settings.parameters:
        console.print(table)
    lines = [objective_text(settings), sampler_text(settings), early_stopping_text(settings)]
    for line in (*lines, *cost_lines(cost, slots)):
        console.print(line, markup=False)


def values_text(searched: ParameterRange) -> str:
    """The range of a parameter in words."""
    if searched.range is not None:
        return "automatic, from the record and a short run"
    if searched.choices is not None:
        return ", ".join(str(value) for value in searched.choices)
    return f"{searched.low:g} to {searched.high:g}"


def objective_text(settings: RunSettings) -> str:
    """What makes one trial better than another."""
    search = settings.search
    if search.objective == "budget":
        return (
            f"Objective: the most domain gain with at most {100 * search.max_forgetting:g} points "
            "of 100 of forgetting (search.max_forgetting). No other trial can be the best."
        )
    if search.objective == "pareto":
        return (
            "Objective: domain gain up and forgetting down, both at once; the knee of the front is "
            "exported."
        )
    return (
        f"Objective: combined = domain gain - {search.forgetting_weight:g} x forgetting "
        "(search.forgetting_weight)."
    )


def sampler_text(settings: RunSettings) -> str:
    """How the trials are chosen."""
    search = settings.search
    fixed = ["the settings of [train]"] if search.trials > 0 else []
    if search.yardstick_lr is not None:
        fixed.append(f"plain fine-tuning with AdamW at lr {search.yardstick_lr:g}")
    return (
        f"Trials: {search.trials}. First {' and '.join(fixed)}, then Optuna's TPE, random until "
        f"{search.startup_trials} trials have ended, seed {search.seed}."
    )


def early_stopping_text(settings: RunSettings) -> str:
    """Whether, where and how hopeless trials end."""
    search = settings.search
    if not search.stops_early:
        few = search.early_stopping == "median"
        why = (
            f": {search.trials} trials are not more than search.early_stopping_trials = "
            f"{search.early_stopping_trials}"
            if few
            else " (search.early_stopping)"
        )
        return f"Early stopping: none{why}."
    return (
        f"Early stopping: after {100 * search.early_stopping_after:g} % of its steps a trial is "
        f"scored on {search.early_stopping_items} items a task, and ends if that is worse than the "
        f"median of at least {search.early_stopping_trials} others there. The first trial and "
        "plain fine-tuning never end early."
    )


def cost_lines(cost: Forecast | None, slots: int) -> list[str]:
    """The forecast in words."""
    if cost is None:
        return [
            "Cost: unknown. The model is not on this machine, or it would run on GPUs, and no "
            "earlier search in the output directory had this model, data and tasks. Two trials "
            "tell: search.trials=2."
        ]
    saved = []
    if cost.saved_seconds > 0:
        saved = [
            f"Early stopping costs {format_seconds(cost.early_seconds)} of that per trial, and "
            f"saves about {format_seconds(cost.saved_seconds)} if half of the trials that may end "
            "early do."
        ]
    return [
        f"Cost: about {format_seconds(cost.seconds)} on {slots} cores, "
        f"{cost.core_seconds / 3600:.2g} core hours: {cost.trials} trials, {cost.concurrent} at a "
        f"time with up to {cost.workers} workers, {format_seconds(cost.train_seconds)} of training "
        f"and {format_seconds(cost.evaluate_seconds)} of scoring each; once "
        f"{format_seconds(cost.record_seconds)} to record and {format_seconds(cost.base_seconds)} "
        "to score the base model.",
        *saved,
        f"({cost.basis[0].upper()}{cost.basis[1:]}.)",
    ]


def _as_dict(settings: RunSettings, cost: Forecast | None) -> Mapping[str, Any]:
    search = settings.search
    return {
        "name": search.name,
        "objective": search.objective,
        "max_forgetting": search.max_forgetting,
        "forgetting_weight": search.forgetting_weight,
        "trials": search.trials,
        "sampler": "TPE",
        "seed": search.seed,
        "early_stopping": search.early_stopping if search.stops_early else "none",
        "parameters": {
            name: searched.model_dump(mode="json") for name, searched in settings.parameters.items()
        },
        "forecast": asdict(cost) if cost else None,
    }
