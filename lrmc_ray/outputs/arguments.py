"""What the commands of this room are about."""

import argparse
from pathlib import Path


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """The directory that a command looks into, ``arguments.output``."""
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="OUTPUT",
        help="the --output of earlier commands (default: runs)",
    )
