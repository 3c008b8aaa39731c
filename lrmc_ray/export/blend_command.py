"""The command ``lrmc blend``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser, pasteable
from lrmc_ray.console import plain_console, setup_logging
from lrmc_ray.errors import ConfigError
from lrmc_ray.export.allowing import add_allow_network
from lrmc_ray.files.allowed_addresses import allow_addresses, check_addresses
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.files.names import SETTINGS_FILE
from lrmc_ray.files.study import find_study, read_study


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc blend``."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.verbose)
    weights = _weights(arguments.at, by_depth=arguments.by_depth)
    directory = find_study(arguments.study)

    from lrmc_ray.evaluate.allowed_python import allow_python, check_allowed
    from lrmc_ray.evaluate.task_sources import remote_data
    from lrmc_ray.export.curve import curve_trials, measure_curves
    from lrmc_ray.export.trial_model import study_settings
    from lrmc_ray.report.blend_section import curves_table
    from lrmc_ray.report.blends import blend_curves
    from lrmc_ray.report.page import write_study_report
    from lrmc_ray.report.study import load_study

    file = read_study(directory)
    trials = curve_trials(file, arguments.trial)
    settings = study_settings(directory)
    tasks = [*settings.evaluate.domain_tasks, *settings.evaluate.general_tasks]
    if arguments.allow_python:
        allow_python(tasks)
    storage, named_by = settings.resources.storage, directory / SETTINGS_FILE
    addresses = [storage, *remote_data(tasks)]
    if arguments.allow_network:
        allow_addresses(*addresses)
    check_allowed(tasks, named_by=named_by, remedy="add --allow-python")
    check_addresses(*addresses, named_by=named_by, remedy="add --allow-network")
    with (
        lock_directory(directory),
        ray_session(
            arguments.address,
            log=directory / RAY_LOG,
            verbose=arguments.verbose,
            storage=storage,
        ),
    ):
        measure_curves(directory, file, trials, weights, "depth" if arguments.by_depth else "even")
    study = load_study(directory)
    report = write_study_report(study)
    curves = blend_curves(study, [trial.number for trial in trials])
    if arguments.json:
        rows = [
            {
                "trial": curve.trial.entry.number,
                "weight": place.weight,
                "by_depth": curve.form == "depth",
                **place.comparison.metrics(),
            }
            for curve in curves
            for place in curve.places
        ]
        print(json.dumps({"report": str(report), "points": rows}))
        return 0

    plain_console().print(curves_table(study, curves))
    print(f"\nReport  {report}")
    trial = curves[0].trial.entry.number
    depth = ("--by-depth",) if arguments.by_depth else ()
    command = ("export", directory, "--trial", trial, "--blend", "0.5", *depth, "--to", "DIR")
    print(f"The model of a row: {pasteable('lrmc', *command)}")
    return 0


def _weights(text: str, *, by_depth: bool) -> list[float]:
    """Numbers between 0 and 1, ascending; by depth 0 is a blend, too.

    Raises:
        ConfigError: one is none.
    """
    try:
        weights = sorted({float(part) for part in text.split(",")})
    except ValueError:
        weights = []
    if not weights or not all(0.0 < x < 1.0 or (by_depth and x == 0.0) for x in weights):
        raise ConfigError(
            f"--at must be numbers between 0 and 1, got {text}; write them as 0.25,0.5,0.75"
        )
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "blend",
        description="Score models between the base and a trial's, so that you can pick how much "
        "gain for how much forgetting. The curves come into the report.",
    )
    parser.add_argument(
        "study",
        type=Path,
        metavar="STUDY",
        help="the search's output directory, or the study's in it",
    )
    parser.add_argument(
        "--trial",
        type=int,
        action="append",
        metavar="N",
        help="a finished trial; may be given several times (default: the best one and plain "
        "fine-tuning)",
    )
    parser.add_argument(
        "--at",
        default="0.25,0.5,0.75",
        metavar="X,X,...",
        help="how far from the base, 0, to the trial, 1 (default: 0.25,0.5,0.75)",
    )
    parser.add_argument(
        "--allow-python",
        action="store_true",
        help="run the Python that the study's task files name; needed where no command of yours "
        "has named the same tasks",
    )
    add_allow_network(parser)
    parser.add_argument(
        "--by-depth",
        action="store_true",
        help="X for the first layer, growing to 1 for the last (LiNeS)",
    )
    parser.add_argument(
        "--address", default="local", help="Ray cluster to join (default: Ray on this machine)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--verbose", action="store_true", help="show the workers' output, too")
    return parser
