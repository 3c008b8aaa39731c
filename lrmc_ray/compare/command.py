"""The comparison from the command line: ``python -m lrmc_ray.compare``."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from lrmc_ray.cluster.resources import check_trial_slots
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.compare.jobs import num_jobs
from lrmc_ray.compare.run import COMPARISON_FILE, MADE_BY, SETTINGS_FILE, Comparing
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.console import format_seconds, setup_logging
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.files.artifacts import (
    lock_directory,
    write_json,
)
from lrmc_ray.files.storage import check_storage, publish_report

_log = logging.getLogger(__name__)


SOME_RUNS_FAILED = 10
"""Exit code of a finished comparison with failed runs."""


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
                f"{name!r}"
            )
    if not wanted:
        raise ConfigError("--methods must name at least one method, got none")
    return [name for name in space.methods if name in wanted]


def explain(comparing: Comparing) -> str:
    """What a comparison would run, and what that costs by the runs that have ended."""
    space, methods = comparing.space, comparing.methods
    total = num_jobs(space, methods)
    models = sum(len(space.learning_rates_of(m)) + len(space.compare.seeds) - 1 for m in methods)
    lines = []
    for method in methods:
        rates = ", ".join(f"{lr:g}" for lr in space.learning_rates_of(method))
        lines.append(f"  {method:<20} {space.methods[method].title:<40} lr {rates}")
    lines.append(
        f"{len(methods)} methods: {models} models of {space.train.steps} steps, scored {total} "
        f"times, {comparing.num_ended} of which are there; seeds "
        f"{', '.join(map(str, space.compare.seeds))}."
    )
    runs = comparing.description.get("runs", [])
    if costs := [entry["cost"] for entry in runs if entry.get("cost")]:
        import statistics

        seconds = statistics.median(c["train_seconds"] + c["evaluate_seconds"] for c in costs)
        left = total - comparing.num_ended
        lines.append(
            f"At {format_seconds(seconds)} each, the median of {len(costs)} that have ended, "
            f"{left} more take {format_seconds(seconds * left)} one after the other; as many run "
            "side by side as the machine has room for."
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.compare``."""
    from lrmc_ray.config.arguments import add_run_arguments, read_settings

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
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
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    space = read_settings(arguments, CompareSpace)
    methods = chosen_methods(space, arguments.methods)
    from lrmc_ray.record.sources import training_files

    training_files(space)
    storage = space.resources.storage
    if storage is not None and not (arguments.explain or arguments.report_only):
        check_storage(storage)
    comparing = Comparing(space, methods, arguments.output)
    has_begun = (comparing.directory / COMPARISON_FILE).is_file()
    if arguments.explain and not has_begun:
        print(explain(comparing))
        return 0
    if arguments.report_only and not has_begun:
        raise IncompleteArtifactError(
            f"{comparing.directory} has no {COMPARISON_FILE}: this comparison has not begun; run "
            "the same command without --report-only"
        )
    with lock_directory(comparing.directory):
        comparing.open(retry_failed=arguments.retry_failed)
        if arguments.explain:
            print(explain(comparing))
            return 0
        if not arguments.report_only:
            _run(comparing, arguments.address, verbose=arguments.verbose)
        _report(comparing, as_json=arguments.json)
    return SOME_RUNS_FAILED if comparing.num_failed else 0


def _run(comparing: Comparing, address: str, *, verbose: bool) -> None:
    """Run ``comparing`` to its end; however it ends, what there is gets reported."""
    from lrmc_ray.compare.report import write_report

    storage = comparing.space.resources.storage
    if comparing.is_finished:
        print("This comparison has finished; nothing was done again.", file=sys.stderr)
        return
    write_json(comparing.directory / SETTINGS_FILE, comparing.description["settings"])
    log = comparing.directory / RAY_LOG
    with ray_session(address, log=log, verbose=verbose, storage=storage):
        check_trial_slots(storage)
        comparing.prepare()
        try:
            comparing.run()
            comparing.leave_storage()
        except BaseException:
            if comparing.outcomes:
                write_report(comparing.directory)
                _log.info("what there is so far: %s", comparing.directory / "compare.html")
            raise


def _report(comparing: Comparing, *, as_json: bool) -> None:
    from lrmc_ray.compare.report import (
        as_json_object,
        console_effects,
        console_table,
        sentences,
        write_report,
    )
    from lrmc_ray.compare.table import load_table

    files = write_report(comparing.directory)
    copied = [comparing.directory / COMPARISON_FILE, *files.values()]
    storage = comparing.space.resources.storage
    publish_report(storage, comparing.id, {path.name: path for path in copied})
    table = load_table(comparing.directory)
    if as_json:
        print(json.dumps(as_json_object(table)))
        return
    from rich.console import Console

    console = Console()
    console.print(console_table(table))
    if table.effects:
        console.print(console_effects(table))
    for sentence in sentences(table):
        print(sentence)
    print()
    for kind, path in files.items():
        print(f"{kind:<9}{path}")
