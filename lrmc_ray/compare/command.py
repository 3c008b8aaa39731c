"""The comparison from the command line: ``python -m lrmc_ray.compare``."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrmc_ray.command_line import CommandParser, nearest
from lrmc_ray.config.arguments import add_run_arguments, read_settings
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.console import plain_console, setup_logging
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.files.allowed_addresses import allow_addresses
from lrmc_ray.files.artifacts import lock_directory

if TYPE_CHECKING:
    from lrmc_ray.compare.run import Comparing

SOME_RUNS_FAILED = 10
"""Exit code of a finished comparison with failed runs."""


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.compare``."""
    arguments = _parser().parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    space = read_settings(arguments, CompareSpace)
    methods = chosen_methods(space, arguments.methods)

    from lrmc_ray.cluster.beforehand import model_here
    from lrmc_ray.compare.description import COMPARISON_FILE, Description
    from lrmc_ray.compare.explain import explain
    from lrmc_ray.compare.run import Comparing
    from lrmc_ray.evaluate.allowed_python import allow_python
    from lrmc_ray.evaluate.task_sources import remote_data
    from lrmc_ray.record.prepare import look, prepare
    from lrmc_ray.train.checks import check_training
    from lrmc_ray.tune.provenance import contents

    _check_quickly(space, methods, arguments)
    made_of = contents(space.run_settings(space.train))
    description = Description(space, methods, arguments.output, made_of)
    comparing = Comparing(description)
    if not (arguments.explain or arguments.report_only):
        comparing.place.check()
    if arguments.report_only and not description.has_begun:
        description.go_back()
    run_settings = space.run_settings(space.train)
    rate = space.compare.learning_rates[0]
    trains = [space.train_of(method, lr=rate, seed=0) for method in methods]
    if arguments.explain:
        look(run_settings, model_here(space.model))
        if model_here(space.model) is not None:
            check_training(space.model, trains, space.resources)
    if arguments.explain and not description.has_begun:
        print(explain(description))
        return 0
    if arguments.report_only and not description.has_begun:
        raise IncompleteArtifactError(
            f"{comparing.directory} has no {COMPARISON_FILE}: this comparison has not begun; run "
            "the same command without --report-only"
        )
    # What is wrong with the data is found before Ray starts and a comparison is begun.
    is_new = not (arguments.report_only or description.has_begun)
    if is_new:
        check_training(space.model, trains, space.resources)
        prepare(run_settings, arguments.output)
        tasks = [*space.evaluate.domain_tasks, *space.evaluate.general_tasks]
        allow_python(tasks)
        allow_addresses(space.resources.storage, *remote_data(tasks))
    with lock_directory(comparing.directory):
        description.open(retry_failed=arguments.retry_failed)
        if arguments.explain:
            print(explain(description))
            return 0
        if not arguments.report_only and description.is_finished:
            print("This comparison has finished; nothing was done again.", file=sys.stderr)
        elif not arguments.report_only:
            if not is_new:
                check_training(space.model, trains, space.resources)
                prepare(run_settings, arguments.output)
            comparing.run(arguments.address, verbose=arguments.verbose)
        _report(comparing, as_json=arguments.json)
    return SOME_RUNS_FAILED if description.num_failed else 0


def _check_quickly(
    space: CompareSpace, methods: Sequence[str], arguments: argparse.Namespace
) -> None:
    """Look at whatever can be looked at in seconds; of a report alone at the data's names."""
    from lrmc_ray.cluster.beforehand import check_beforehand, check_model, trains_lora
    from lrmc_ray.evaluate.task_files import check_tasks, task_data
    from lrmc_ray.evaluate.task_names import asked_tasks
    from lrmc_ray.record.sources import training_files

    if arguments.report_only:
        training_files(space)
        return
    lora = trains_lora(space, [space.methods[method].train for method in methods])
    check_beforehand(space, arguments.output, address=arguments.address, lora=lora)
    check_model(space.model)
    training_files(space)
    names = asked_tasks(space.evaluate)
    check_tasks(names, "dev")
    task_data(names, "test")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "compare",
        description="Compare methods at equal budget: every learning rate on one seed, the best of "
        "each by the development questions on more seeds, reported on the test questions.",
    )
    add_run_arguments(parser, default_space="compare")
    parser.add_argument(
        "--methods", metavar="A,B", help="a part of the methods (default: all of the space file)"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="run what failed before once more"
    )
    parser.add_argument(
        "--explain", action="store_true", help="only say what would be run, and what is there"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report of what is there"
    )
    return parser


def chosen_methods(space: CompareSpace, names: str | None) -> list[str]:
    """The methods that the command line asks for, all by default, in the order of the file.

    Raises:
        ConfigError: one is not in the space file.
    """
    if names is None:
        return list(space.methods)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in space.methods:
            raise ConfigError(
                f"--methods must name methods of the space file ({', '.join(space.methods)}), got "
                f"{name!r}{nearest(name, space.methods)}"
            )
    if not wanted:
        raise ConfigError("--methods must name at least one method, got none")
    return [name for name in space.methods if name in wanted]


def _report(comparing: "Comparing", *, as_json: bool) -> None:
    from lrmc_ray.compare.description import COMPARISON_FILE
    from lrmc_ray.compare.report import (
        as_json_object,
        console_effects,
        console_table,
        write_report,
    )
    from lrmc_ray.compare.table import load_table
    from lrmc_ray.compare.words import sentences

    files = write_report(comparing.directory)
    copied = [comparing.directory / COMPARISON_FILE, *files.values()]
    comparing.place.publish_report(comparing.description.id, {path.name: path for path in copied})
    table = load_table(comparing.directory)
    if as_json:
        print(json.dumps(as_json_object(table)))
        return
    console = plain_console(highlight=True)
    console.print(console_table(table))
    if table.effects:
        console.print(console_effects(table))
    for sentence in sentences(table):
        print(sentence)
    print()
    for kind, path in files.items():
        print(f"{kind:<9}{path}")
