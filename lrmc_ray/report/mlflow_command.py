"""The command ``lrmc mlflow-sync``."""

from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.command_line import CommandParser
from lrmc_ray.console import public
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.files.names import default_tracking_uri
from lrmc_ray.files.study import find_study
from lrmc_ray.report.mlflow import read_forwarded
from lrmc_ray.report.mlflow_sync import sync


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc mlflow-sync``."""
    parser = CommandParser(
        "mlflow-sync",
        description="Send to MLflow what it lacks of a search; nothing is sent twice.",
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="RUNS_DIR",
        help="the search's output directory, or the study's in it (default: runs)",
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database (default: sqlite in the search's output directory)",
    )
    arguments = parser.parse_args(argv)
    directory = find_study(arguments.directory).resolve()
    uri = arguments.tracking_uri or default_tracking_uri(directory.parent)
    read_forwarded(directory)  # before a lock is left where there is no search
    with lock_directory(directory):
        added = sync(directory, uri)
    print(f"{added.runs} runs and {added.points} metric values were added to {public(uri)}")
    return 0
