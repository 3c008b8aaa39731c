"""The flag by which a person lets a command contact what a study names."""

import argparse


def add_allow_network(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-network``; see ``evaluate.allowed_addresses``."""
    parser.add_argument(
        "--allow-network",
        action="store_true",
        help="contact the storage, and data behind URLs, that the study's files name; needed where "
        "no command of yours has named the same addresses",
    )
