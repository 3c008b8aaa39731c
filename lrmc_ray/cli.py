"""The command ``lrmc``: every stage as a subcommand, and the arguments that they share."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.config import (
    RunSettings,
    SettingsType,
    apply_overrides,
    find_space,
    read_toml,
    validate,
)
from lrmc_ray.errors import IncompleteArtifactError

STAGES = {
    "record": "Stage 0: record the candidate tokens of the training data",
    "plan": "what recording, or a search on a cluster, would cost",
    "inspect": "look into a record, or verify every file of it",
    "train": "Stage 1: fine-tune on the recorded candidates with MoClip",
    "evaluate": "score a model: domain gain and forgetting against its base",
    "tune": "search tau, delta_max and more; does all of the above",
    "compare": "methods against each other at equal budget, with intervals over seeds",
    "suggest": "ranges of tau and delta_max worth searching",
    "report": "table, figure and report.html of a finished or running search",
    "doctor": "is everything in place, and what to do where it is not",
    "mlflow-sync": "bring MLflow up to date with the files of a search",
}

_MODULES = {"inspect": "inspect_records"}
"""Stages whose module is called otherwise."""


def add_run_arguments(parser: argparse.ArgumentParser, *, default_space: str | None = None) -> None:
    """The arguments of every stage that works from a settings file."""
    parser.add_argument(
        "--space",
        default=default_space,
        metavar="FILE",
        help="settings in TOML, or the name of one in tune_spaces/"
        + (f" (default: {default_space})" if default_space else ""),
    )
    parser.add_argument("--model", metavar="M", help="directory or Hugging Face id of the base")
    parser.add_argument(
        "--train-data",
        metavar="[DOMAIN=]FILE",
        action="append",
        help="JSONL or Parquet file, folder or pattern, with messages, or prompt and completion, "
        "or text in every row; may be given several times",
    )
    parser.add_argument(
        "--domain-tasks", metavar="TASKS", help="comma-separated tasks that should improve"
    )
    parser.add_argument(
        "--general-tasks", metavar="TASKS", help="comma-separated tasks that must not get worse"
    )
    parser.add_argument(
        "--output",
        type=output_directory,
        default=Path("runs"),
        metavar="DIR",
        help="where everything is kept (default: runs)",
    )
    parser.add_argument(
        "--storage",
        metavar="URI",
        help="resources.storage: where nodes that do not share DIR keep what they exchange, "
        "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
    )
    parser.add_argument(
        "--address",
        default="local",
        help="Ray cluster to join: auto, or host:port (default: start Ray on this machine)",
    )
    parser.add_argument("--json", action="store_true", help="results as one JSON object on stdout")
    parser.add_argument("--verbose", action="store_true", help="show the workers' output, too")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example train.lr=1e-5 search.trials=20",
    )


def output_directory(text: str) -> Path:
    """The directory that ``--output`` names.

    Raises:
        IncompleteArtifactError: it is the address of an object store.
    """
    if "://" in text:
        raise IncompleteArtifactError(
            f"--output must be a directory, got the address {text.partition('://')[0]}://...; "
            "give a local one, and the address as --storage, or a directory on a file system that "
            "all nodes share"
        )
    return Path(text)


def settings_from(arguments: argparse.Namespace) -> RunSettings:
    """The settings that the command line asks for; see :func:`read_settings`."""
    return read_settings(arguments, RunSettings)


def read_settings(arguments: argparse.Namespace, kind: type[SettingsType]) -> SettingsType:
    """The settings of a ``kind`` that the command line asks for.

    Raises:
        ConfigError: a setting is unknown or out of range.
        IncompleteArtifactError: the settings file does not exist.
    """
    path = find_space(arguments.space) if arguments.space else None
    of_file = read_toml(path) if path else {}
    values = apply_overrides(of_file, arguments.overrides)
    named: dict[tuple[str, str], object] = {
        ("resources", "storage"): arguments.storage,
        ("model", "name"): arguments.model,
        ("data", "train"): arguments.train_data,
        ("evaluate", "domain_tasks"): _names(arguments.domain_tasks),
        ("evaluate", "general_tasks"): _names(arguments.general_tasks),
    }
    for (section, key), value in named.items():
        if value is not None:
            table = values.setdefault(section, {})
            if isinstance(table, dict):  # else the validation says what is wrong
                table[key] = value
    source = str(path) if path else "settings"
    return validate(kind, values, source, of_file=of_file)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def mlflow_sync(argv: Sequence[str]) -> int:
    """The command ``lrmc mlflow-sync``."""
    from lrmc_ray.artifacts import lock_directory
    from lrmc_ray.tracking import default_tracking_uri, read_study, sync

    parser = argparse.ArgumentParser(
        prog="lrmc mlflow-sync",
        description="Send to MLflow what it lacks of a search; nothing is sent twice.",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="directory of the search, as `tune` named it"
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database (default: sqlite in the search's output directory)",
    )
    arguments = parser.parse_args(argv)
    directory = arguments.directory.resolve()
    uri = arguments.tracking_uri or default_tracking_uri(directory.parent)
    read_study(directory)  # before a lock is left where there is no search
    with lock_directory(directory):
        added = sync(directory, uri)
    print(f"{added.runs} runs and {added.points} metric values were added to {uri}")
    return 0


def main() -> int:
    """Run ``lrmc STAGE ...``; heavy imports wait until the stage is known."""
    from lrmc_ray.console import run_command

    parser = argparse.ArgumentParser(
        prog="lrmc",
        description="Teach a language model a new domain without losing what it knows.",
        epilog="`lrmc STAGE --help` explains a stage; `python -m lrmc_ray.STAGE` is the same.",
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, text in STAGES.items():
        stages.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(sys.argv[1:2])
    if arguments.stage == "mlflow-sync":
        return run_command(mlflow_sync, sys.argv[2:] + rest)
    name = _MODULES.get(arguments.stage, arguments.stage)
    module = importlib.import_module(f"lrmc_ray.{name}")
    return run_command(module.main, sys.argv[2:] + rest)


if __name__ == "__main__":
    sys.exit(main())
