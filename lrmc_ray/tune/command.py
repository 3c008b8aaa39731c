"""The search from the command line: ``python -m lrmc_ray.tune``."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lrmc_ray.command_line import CommandParser, pasteable
from lrmc_ray.config.arguments import add_run_arguments, settings_from
from lrmc_ray.console import plain_console, public, setup_logging
from lrmc_ray.files.allowed_addresses import allow_addresses
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.files.names import BEST_MODEL
from lrmc_ray.files.study import trial_directory

if TYPE_CHECKING:
    from lrmc_ray.tune.run import Search

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens by default."""

SOME_TRIALS_FAILED = 10
"""Exit code of a finished search with failed trials."""


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.tune``."""
    arguments = _parser().parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    settings = settings_from(arguments)

    from lrmc_ray.tune.inputs import check_inputs, check_quickly, check_to_explain

    check_quickly(settings, arguments.output, arguments.address)
    if arguments.explain:
        from lrmc_ray.tune.explain import explain

        check_to_explain(settings)
        explain(settings, arguments.output, as_json=arguments.json)
        return 0

    from lrmc_ray.evaluate.allowed_python import allow_python
    from lrmc_ray.evaluate.task_sources import remote_data
    from lrmc_ray.tune.description import study_directory
    from lrmc_ray.tune.run import Search

    contents = check_inputs(settings, arguments.output)
    tasks = [*settings.evaluate.domain_tasks, *settings.evaluate.general_tasks]
    allow_python(tasks)
    allow_addresses(settings.resources.storage, *remote_data(tasks))
    with lock_directory(study_directory(settings, arguments.output, contents)):
        search = Search(
            settings,
            arguments.output,
            contents,
            tracking_uri=arguments.tracking_uri,
            experiment=arguments.experiment,
        )
        if search.description.is_finished:
            print("This search has finished; nothing was done again.", file=sys.stderr)
        else:
            search.run(arguments.address, verbose=arguments.verbose)
        if arguments.register_model:
            _register(search, arguments.register_model)
    _print_end(search, arguments)
    return SOME_TRIALS_FAILED if search.description.num_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tune",
        description="Search the settings that learn the domain and forget least. Without arguments "
        "it runs the embedded demo: SmolLM2-135M learns to answer questions about countries and "
        "cities in SQL.",
    )
    add_run_arguments(parser, default_space="demo")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database (default: sqlite in the output directory)",
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help="MLflow experiment (default: lrmc_ray)"
    )
    parser.add_argument(
        "--register-model", metavar="NAME", help="put the best model into MLflow's registry"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="only say what would be searched and what it would cost",
    )
    return parser


def _register(search: "Search", name: str) -> None:
    """Put the best model, if there is one, into MLflow's registry."""
    from lrmc_ray.report.mlflow import register_model

    model = search.directory / BEST_MODEL
    if model.is_dir():
        version = register_model(search.directory, model, name, search.tracking_uri)
        print(f"MLflow has it as models:/{name}/{version}", file=sys.stderr)


def _print_end(search: "Search", arguments: argparse.Namespace) -> None:
    from lrmc_ray.report.console import as_json, summary_table
    from lrmc_ray.report.study import load_study
    from lrmc_ray.report.words import headline, record_sentences, score_text

    study = load_study(search.directory)
    if arguments.json:
        print(json.dumps(as_json(study)))
        return
    console = plain_console(highlight=True)
    console.print(summary_table(study))
    if study.verdict is not None:
        console.print(score_text(study.verdict.comparison), style="bright_black")
    for sentence in headline(study):
        console.print(sentence.text)
    for warning in record_sentences(study):
        console.print(f"Warning: {warning}")
    model = search.directory / BEST_MODEL
    print(f"\nReport  {search.directory / 'report.html'}")
    print(f"Figure  {search.directory / 'gain_vs_forgetting.png'}")
    if study.best is not None:
        print(f"Model   {model}")
    elif study.closest is not None:
        closest = trial_directory(search.directory, study.closest.entry.number)
        print(
            f"Model   none: no trial keeps the budget. Raise search.max_forgetting, or take the "
            f"closest one: {closest / 'training' / 'model'}"
        )
    print("\nNext:")
    for line in in_mlflow(public(search.tracking_uri), search.description.file.trade_off_path):
        print(f"  {line}")
    if study.best is not None:
        print(f"  {pasteable('lrmc', 'evaluate', '--tuned', model)}")
        print(f"  {pasteable('lrmc', 'chat', model)}")
        print(f"  {pasteable('lrmc', 'blend', search.directory)}")


def in_mlflow(uri: str, path: str | None) -> list[str]:
    """What to open or to type to see the search in MLflow: a server has a page, a database none.

    Args:
        uri: of the server or database, without passwords.
        path: of the chart behind the server's address, where it is known.
    """
    is_server = urlsplit(uri).scheme in ("http", "https")
    page = uri.rstrip("/") if is_server else MLFLOW_UI
    start = f"MLflow: {page}"
    if not is_server:
        start = pasteable("mlflow", "ui", "--backend-store-uri", uri)
    return [start, f"    forgetting against gain: {page}/{path}"] if path else [start]
