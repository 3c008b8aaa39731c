"""``lrmc tune --explain``: what a search would do and what it would cost, before it is started."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.resources import local_cpus
from lrmc_ray.config import DEMO, ModelSettings, ParameterRange, RunSettings
from lrmc_ray.console import format_seconds, plain_console
from lrmc_ray.evaluate.item_parts import is_divided
from lrmc_ray.evaluate.task_files import task_label
from lrmc_ray.models.template import has_chat_template
from lrmc_ray.record.sources import training_files
from lrmc_ray.tasks.demo.base_model import HUB_ID
from lrmc_ray.tasks.registry import expand
from lrmc_ray.tune.forecast import Forecast, forecast, with_expected_steps


def explain(settings: RunSettings, output: Path, *, as_json: bool) -> None:
    """Print the search space, the objective, the sampler and the forecast.

    Args:
        settings: the search.
        output: where costs of earlier searches are looked for.
        as_json: one JSON object in place of text.
    """
    files = training_files(settings)
    settings = with_expected_steps(settings, output)
    slots = local_cpus() // settings.resources.cpus_per_worker
    cost = forecast(settings, output, slots=max(1, slots))
    if as_json:
        print(json.dumps(_as_dict(settings, cost, output, files)))
        return
    from rich.table import Table

    table = Table(title=f"{settings.study_name()}: what is searched", title_justify="left")
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
    console = plain_console()
    for line in what_lines(settings, output, files):
        console.print(line)
    if settings.parameters:
        console.print()
        console.print(table)
    lines = [objective_text(settings), sampler_text(settings), early_stopping_text(settings)]
    for line in (*lines, *cost_lines(cost, slots)):
        console.print(line)


def what_lines(settings: RunSettings, output: Path, files: Sequence[Path]) -> list[str]:
    """Model, data, tasks, output, and what is compared with what."""
    scored, search = settings.evaluate, settings.search
    domain, general = expand(scored.domain_tasks), expand(scored.general_tasks)
    limit = "all items" if scored.limit is None else f"at most {scored.limit} items"
    divided = [name for name in domain if is_divided(name, "domain", scored.test_share)]
    kept = (
        f" {100 * scored.test_share:g} % of the items of {', '.join(map(task_label, divided))} are "
        "test items, which no trial is chosen by."
        if divided
        else ""
    )
    compared = ["the untuned base", "the settings of [train]"]
    if search.yardstick_lr is not None:
        compared.append(f"plain fine-tuning (AdamW, lr {search.yardstick_lr:g})")
    if (searched := search.trials - len(compared) + 1) > 0:
        compared.append(f"{searched} searched trial{'s' if searched > 1 else ''}")
    sources = ", ".join(settings.data.train)
    return [
        f"Model:         {HUB_ID if settings.model.name == DEMO else settings.model.name}"
        f"{template_text(settings.model)}",
        f"Training data: {sources} ({len(files)} file{'s' if len(files) != 1 else ''})",
        f"Domain tasks:  {', '.join(domain)}: should improve, {limit} each.{kept}",
        f"General tasks: {', '.join(general)}: must not get worse, {limit} each.",
        f"Output:        a directory {settings.study_name()}-ID in {output.resolve()}",
        f"Compared:      {'; '.join(compared)}. At the end base, best trial and plain fine-tuning "
        "are scored on the test items of the domain.",
    ]


def template_text(model: ModelSettings) -> str:
    """That a model of this machine has no chat template, where that is so."""
    directory = Path(model.name)
    if not directory.is_dir() or has_chat_template(directory):
        return ""
    return " (no chat template: conversations are written in the plain form 'User:', 'Assistant:')"


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
    workers = "1 worker" if cost.workers == 1 else f"up to {cost.workers} workers"
    return [
        f"Cost: about {format_seconds(cost.seconds)} on {slots} cores, "
        f"{cost.core_seconds / 3600:.2g} core hours: {cost.trials} trials, {cost.concurrent} at a "
        f"time with {workers}, {format_seconds(cost.train_seconds)} of training "
        f"and {format_seconds(cost.evaluate_seconds)} of scoring each; once "
        f"{format_seconds(cost.record_seconds)} to record and {format_seconds(cost.base_seconds)} "
        "to score the base model.",
        *saved,
        f"({cost.basis[0].upper()}{cost.basis[1:]}.)",
    ]


def _as_dict(
    settings: RunSettings, cost: Forecast | None, output: Path, files: Sequence[Path]
) -> Mapping[str, Any]:
    search = settings.search
    return {
        "name": settings.study_name(),
        "model": settings.model.name,
        "training_data": [str(path) for path in files],
        "domain_tasks": list(expand(settings.evaluate.domain_tasks)),
        "general_tasks": list(expand(settings.evaluate.general_tasks)),
        "output": str(output.resolve()),
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
