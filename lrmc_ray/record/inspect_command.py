"""The command ``lrmc inspect``: look into a record, or verify every file of it.

lrmc inspect runs/records --sample 3
lrmc inspect runs/records --verify
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.console import setup_logging
from lrmc_ray.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc inspect``."""
    parser = argparse.ArgumentParser(
        prog="lrmc inspect",
        description="What a record holds. Green tokens are learned, dim ones are the prompt; K is "
        "the number of candidates, rho the base model's probability outside of them, gold is bold.",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="a record, or the directory that holds it"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="show N samples")
    parser.add_argument(
        "--verify", action="store_true", help="read and check every file; exit code 4 if one is bad"
    )
    parser.add_argument(
        "--model", metavar="M", help="model whose tokenizer made the record (default: as recorded)"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object on stdout")
    arguments = parser.parse_args(argv)
    import torch

    from lrmc_ray.record.inspect import find_record, show_record, shown_samples, verify
    from lrmc_ray.record.parts import Records

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
        show_record(result)
    return 0
