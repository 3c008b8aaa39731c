"""Scoring from the command line: ``python -m lrmc_ray.evaluate``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.config import ModelSettings, RunSettings
from lrmc_ray.console import progress, setup_logging
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.evaluate.run import MADE_BY, RECEIPT, evaluate
from lrmc_ray.files.artifacts import (
    read_manifest,
)
from lrmc_ray.files.storage import check_storage


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.evaluate``."""
    from lrmc_ray.cluster.resources import local_cpus
    from lrmc_ray.config.arguments import add_run_arguments, settings_from
    from lrmc_ray.models import local_directory

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Score a model; with --base or --tuned, against the model it was made from.",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--base", metavar="B", help="the base (default: --model); then --model is scored against it"
    )
    parser.add_argument(
        "--tuned",
        metavar="DIR",
        action="append",
        default=[],
        help="a tuned model's directory; may be given several times",
    )
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="Ray actors that share the tasks (default: one per CPU)",
    )
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    if arguments.actors is not None and arguments.actors < 1:
        raise ConfigError(f"--actors must be at least 1, got {arguments.actors}")
    settings = settings_from(arguments)
    storage = settings.resources.storage
    for directory in arguments.tuned:
        if not Path(directory).is_dir():
            raise IncompleteArtifactError(
                f"{directory} does not exist; give the directory of a tuned model"
            )
    base = ModelSettings(name=arguments.base) if arguments.base else settings.model
    tuned = [ModelSettings(name=directory) for directory in arguments.tuned]
    if arguments.base and not tuned:
        tuned = [settings.model]
    models = [local_directory(model) for model in (base, *tuned)]
    scored: list[Path] = []
    if storage is not None:
        check_storage(storage)
    with (
        ray_session(
            arguments.address,
            log=arguments.output / RAY_LOG,
            verbose=arguments.verbose,
            storage=storage,
        ),
        progress("Evaluating", total=len(models), unit="models") as bar,
    ):
        for model in models:
            scored.append(
                evaluate(
                    settings,
                    model,
                    arguments.output,
                    split="test",
                    base=scored[0] if scored else None,
                    parallel=arguments.actors
                    or (local_cpus() if arguments.address == "local" else 4),
                )
            )
            bar.advance(1)
    if tuned:
        _show_changes(settings, scored, as_json=arguments.json)
    else:
        _show_scores(scored[0], as_json=arguments.json)
    return 0


def _show_scores(directory: Path, *, as_json: bool) -> None:
    """One model's scores, each with its standard error and interval."""
    from rich.console import Console
    from rich.table import Table

    from lrmc_ray.evaluate.items import Scores

    scores = Scores.load(directory)
    if as_json:
        values: dict[str, Any] = {"scores": str(directory)}
        for (task, metric), items in scores.metrics.items():
            values[f"{task}/{metric}"] = items.value.value
            values[f"{task}/{metric}_low"] = items.value.low
            values[f"{task}/{metric}_high"] = items.value.high
            values[f"{task}/{metric}_standard_error"] = items.standard_error
        print(json.dumps(values))
        return
    table = Table(title="95 % intervals in brackets")
    for column in ("task", "metric", "items", "score", "standard error"):
        table.add_column(column)
    for (task, metric), items in scores.metrics.items():
        row = (task, metric, str(items.num_items), str(items.value), f"{items.standard_error:.3f}")
        table.add_row(*row)
    Console().print(table)
    print(f"The scores are in {directory}. Next: {MADE_BY} --tuned DIR")


def _show_changes(settings: RunSettings, scored: Sequence[Path], *, as_json: bool) -> None:
    """Each tuned model against the base, the first of ``scored``."""
    from rich.console import Console
    from rich.table import Table

    from lrmc_ray.evaluate.changes import compare, receipt
    from lrmc_ray.evaluate.items import Scores
    from lrmc_ray.evaluate.statistics import Interval

    base = Scores.load(scored[0])
    console = Console()
    for directory in scored[1:]:
        tuned = Scores.load(directory)
        search = settings.search
        compared = compare(
            base, tuned, forgetting_weight=search.forgetting_weight, seed=search.seed
        )
        drift = read_manifest(directory, made_by=MADE_BY)["drift"]
        if as_json:
            paths = [str(scored[0]), str(directory)]
            print(json.dumps({"scores": paths, **compared.metrics(), **drift}))
            continue
        table = Table(title="95 % intervals in brackets; grey: not distinguishable from no change")
        for column in ("task", "metric", "items", "base", "tuned", "change"):
            table.add_column(column)
        for task in compared.tasks:
            for change in task.metrics:
                cells = [str(change.before), str(change.after), str(change.delta)]
                style = None if change.delta.distinguishable else "bright_black"
                table.add_row(task.task, change.metric, str(task.num_items), *cells, style=style)
        console.print(table)
        for name, interval in (
            ("domain gain", compared.domain_gain),
            ("forgetting", compared.forgetting),
            ("combined", compared.combined),
            ("cross-entropy of general text", compared.general_ce_delta),
        ):
            if interval is not None:
                doubt = "" if interval.distinguishable else ", not distinguishable from 0"
                style = None if interval.distinguishable else "bright_black"
                console.print(f"{name} {interval}{doubt}", style=style, highlight=False)
        for group in ("domain", "general"):
            name = f"eval/kl_base_{group}"
            if name in drift:
                interval = Interval(drift[name], drift[f"{name}_low"], drift[f"{name}_high"])
                console.print(f"KL from the base on {group} text {interval} nats", highlight=False)
        changes = receipt(base, tuned)["change"].to_pylist()
        console.print(
            f"{changes.count('lost')} items lost, {changes.count('gained')} gained: "
            f"{directory / RECEIPT}",
            highlight=False,
            soft_wrap=True,
        )
