"""Scoring from the command line: ``python -m lrmc_ray.evaluate``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.cluster.beforehand import check_beforehand
from lrmc_ray.cluster.resources import local_cpus
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser
from lrmc_ray.config import ModelSettings, RunSettings
from lrmc_ray.config.arguments import add_run_arguments, settings_from
from lrmc_ray.console import progress, setup_logging
from lrmc_ray.errors import ConfigError
from lrmc_ray.files.allowed_addresses import allow_addresses, check_addresses
from lrmc_ray.files.origin import ORIGIN_FILE, Origin, check_tuned, read_origin
from lrmc_ray.files.place import place_of
from lrmc_ray.models.directory import local_directory

_CHOSEN_BY_NOTHING = {"evaluate": {"test_share": 0}}
"""No search has chosen by any item, so that all are asked."""


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.evaluate``."""
    arguments = _parser().parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    if arguments.actors is not None and arguments.actors < 1:
        raise ConfigError(f"--actors must be at least 1, got {arguments.actors}")
    for directory in arguments.tuned:
        check_tuned(Path(directory))
    origin = read_origin(Path(arguments.tuned[0])) if arguments.tuned else None
    settings = settings_from(arguments, _CHOSEN_BY_NOTHING if origin is None else origin.settings)
    output = arguments.output or scores_directory(origin)
    place = place_of(settings.resources.storage)
    check_beforehand(settings, output, address=arguments.address, data=False)
    base = ModelSettings(name=arguments.base) if arguments.base else settings.model
    tuned = [ModelSettings(name=directory) for directory in arguments.tuned]
    if arguments.base and not tuned:
        tuned = [settings.model]
    place.check()

    from lrmc_ray.evaluate.allowed_python import allow_python
    from lrmc_ray.evaluate.run import evaluate
    from lrmc_ray.evaluate.show import items_text, show_changes, show_scores
    from lrmc_ray.evaluate.task_files import check_tasks
    from lrmc_ray.evaluate.task_names import asked_tasks
    from lrmc_ray.evaluate.task_sources import remote_data

    said = settings_from(arguments, None)
    if origin is not None:
        check_named_tasks(Path(arguments.tuned[0]), settings, said)
    check_tasks(asked_tasks(settings.evaluate), "test")
    named = [*said.evaluate.domain_tasks, *said.evaluate.general_tasks]
    allow_python(named)
    allow_addresses(said.resources.storage, *remote_data(named))
    models = [local_directory(model) for model in (base, *tuned)]
    scored: list[Path] = []
    with (
        ray_session(
            arguments.address,
            log=output / RAY_LOG,
            verbose=arguments.verbose,
            storage=place.uri,
        ),
        progress("Evaluating", total=len(models), unit="models") as bar,
    ):
        for model in models:
            scored.append(
                evaluate(
                    settings,
                    model,
                    output,
                    split="test",
                    base=scored[0] if scored else None,
                    parallel=arguments.actors
                    or (local_cpus() if arguments.address == "local" else 4),
                )
            )
            bar.advance(1)
    items = items_text(settings.evaluate)
    if tuned:
        show_changes(settings.search, scored, items=items, as_json=arguments.json)
    else:
        show_scores(scored[0], items=items, as_json=arguments.json)
    return 0


def check_named_tasks(model: Path, settings: RunSettings, said: RunSettings) -> None:
    """Refuse Python and addresses that only a model's directory names: it may come from anybody.

    Args:
        model: the tuned model's directory.
        settings: those of the command, the model's where nothing else was said.
        said: those without what the model says.

    Raises:
        ConfigError: a task file that runs Python, or whose data are behind a URL, was named by the
            model alone, and no command of this user has named the same before.
    """
    from lrmc_ray.evaluate.allowed_python import check_allowed
    from lrmc_ray.evaluate.task_sources import remote_data

    for group in ("domain_tasks", "general_tasks"):
        names = getattr(settings.evaluate, group)
        if names != getattr(said.evaluate, group):
            flag = f"--{group.replace('_', '-')}"
            remedy = f"name the task with {flag}"
            check_allowed(names, named_by=model / ORIGIN_FILE, remedy=remedy)
            check_addresses(*remote_data(names), named_by=model / ORIGIN_FILE, remedy=remedy)


def scores_directory(origin: Origin | None) -> Path:
    """Where scores are kept: where those of the model's base are, if that is on this machine."""
    if origin is not None and (Path(origin.output) / "scores").is_dir():
        return Path(origin.output)
    return Path("runs")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "evaluate",
        description="Score a model; with --base or --tuned, against the model it was made from.",
    )
    add_run_arguments(parser)
    parser.set_defaults(output=None)
    parser.add_argument(
        "--base", metavar="B", help="the base (default: --model); then --model is scored against it"
    )
    parser.add_argument(
        "--tuned",
        metavar="DIR",
        action="append",
        default=[],
        help="a tuned model's directory; may be given several times. Base, tasks and output are "
        "those that it was made with, where nothing else is said",
    )
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="Ray actors that share the tasks (default: one per CPU)",
    )
    return parser
