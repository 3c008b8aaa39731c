"""The command ``lrmc inspect``: look into a record, or verify every file of it.

lrmc inspect runs/records --sample 3
lrmc inspect runs/records --verify
lrmc inspect --data my.jsonl --model Qwen/Qwen3-4B
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.command_line import CommandParser
from lrmc_ray.config import load_settings
from lrmc_ray.console import plain_console, setup_logging
from lrmc_ray.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc inspect``."""
    arguments = _parser().parse_args(argv)
    if (arguments.directory is None) == (arguments.data is None):
        raise ConfigError("give either a record's directory or --data, not both or none")
    if arguments.data is not None:
        return _inspect_data(arguments)
    import torch

    from lrmc_ray.record.inspect import find_record, show_record, shown_samples, verify
    from lrmc_ray.record.reader import Records

    torch.set_num_threads(1)  # the tensors are small: more threads were fifteen times slower
    setup_logging()
    if arguments.sample < 0:
        raise ConfigError(f"--sample must be at least 0, got {arguments.sample}")
    records = Records(find_record(arguments.directory))
    result: dict[str, Any] = {
        "directory": str(records.directory),
        "identity": records.manifest["identity"],
        "summary": records.manifest["summary"],
    }
    if arguments.verify:
        result["verified"] = verify(records)
    if arguments.sample:
        result["samples"] = list(shown_samples(records, arguments.sample, arguments.model))
    if arguments.json:
        print(json.dumps(result))
    else:
        show_record(result, with_prompts=arguments.prompt)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "inspect",
        description="What a record holds. Green tokens are learned, dim ones are the prompt; K is "
        "the number of candidates, rho the base model's probability outside of them, gold is bold.",
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="a record, or the directory that holds it",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE[:LINE]",
        help="in place of a record, training data before anything is recorded: what is learned of "
        "every row; may be given several times",
    )
    parser.add_argument(
        "--template-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of model.template_options, with --data",
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="show N samples")
    parser.add_argument(
        "--prompt", action="store_true", help="with --sample: the tokens of the prompt, too"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read and check every file; exit code 4 if one is bad"
    )
    parser.add_argument(
        "--model", metavar="M", help="model whose tokenizer made the record (default: as recorded)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="as one JSON object on stdout; with --data one in a line for every sample",
    )
    return parser


def _inspect_data(arguments: argparse.Namespace) -> int:

    from lrmc_ray.record.inspect_data import inspect_rows, show_row

    setup_logging()
    overrides = [f"model.template_options.{option}" for option in arguments.template_option]
    if arguments.model is not None:
        overrides.append(f"model.name={json.dumps(arguments.model)}")
    samples = inspect_rows(arguments.data, load_settings(None, overrides).model)
    if arguments.sample:
        samples = itertools.islice(samples, arguments.sample)
    console = plain_console()
    for sample in samples:
        if arguments.json:
            print(json.dumps(sample))
        else:
            show_row(sample, console)
    return 0
