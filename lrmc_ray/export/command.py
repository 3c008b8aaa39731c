"""The command ``lrmc export``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.command_line import CommandParser, pasteable
from lrmc_ray.console import setup_logging
from lrmc_ray.errors import ConfigError
from lrmc_ray.export.allowing import add_allow_network
from lrmc_ray.files.sizes import size_text
from lrmc_ray.files.study import find_study


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc export``."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.verbose)
    if not 0.0 <= arguments.blend <= 1.0:
        raise ConfigError(
            f"--blend must be from 0, the base, to 1, the tuned model, got {arguments.blend:g}"
        )
    if arguments.by_depth and arguments.blend == 1.0:
        raise ConfigError(
            "--by-depth needs a --blend below 1, got 1: that is the tuned model, whatever the depth"
        )
    study = find_study(arguments.study)

    from lrmc_ray.export.run import ExportRequest, export

    made = export(
        ExportRequest(
            study=study,
            target=arguments.to,
            trial=arguments.trial,
            dtype=arguments.dtype,
            blend=arguments.blend,
            form="depth" if arguments.by_depth else "even",
            with_gguf=arguments.gguf,
            allow_network=arguments.allow_network,
            address=arguments.address,
            verbose=arguments.verbose,
        )
    )
    if arguments.json:
        values = {
            "directory": str(made.directory),
            "trial": made.trial,
            "blend": arguments.blend,
            "by_depth": arguments.by_depth,
        }
        values |= {"size_bytes": made.size_bytes, "fingerprint": made.fingerprint}
        values["rounding"] = made.rounding
        print(json.dumps(values | {"gguf": None if made.gguf is None else str(made.gguf)}))
        return 0
    what = f"trial {made.trial} of {study.name}"
    if arguments.blend != 1.0:
        depth = ", growing to 1 with depth," if arguments.by_depth else ""
        what = f"blend {arguments.blend:g}{depth} of the base and {what}"
    print(f"{made.directory}: {size_text(made.size_bytes)}, {what}, {arguments.dtype}")
    if made.rounding is not None:
        print(
            f"rounding to bf16 moves the weights by {made.rounding:.1%} of what training did; "
            f"`{pasteable('lrmc', 'evaluate', '--tuned', made.directory)}` says what that costs"
        )
    if made.gguf is not None:
        print(f"{made.gguf}: {size_text(made.gguf.stat().st_size)}")
    print("Next:")
    print(f"  {pasteable('lrmc', 'chat', made.directory)}")
    if 0.0 < arguments.blend < 1.0:
        words = ["--trial", made.trial, "--at", f"{arguments.blend:g}"]
        words += ["--by-depth"] if arguments.by_depth else []
        print(f"  {pasteable('lrmc', 'blend', study, *words)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "export",
        description="Write the model of a finished trial, with its card, to a directory of its "
        "own. A model that was not kept is trained again, to the same bits.",
    )
    parser.add_argument(
        "study",
        type=Path,
        metavar="STUDY",
        help="the search's output directory, or the study's in it",
    )
    parser.add_argument(
        "--trial", type=int, metavar="N", help="number of a finished trial (default: the best one)"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a new or empty directory"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16"),
        default="float32",
        help="of the weights; float32 is what was trained and scored (default: float32)",
    )
    parser.add_argument(
        "--blend",
        type=float,
        default=1.0,
        metavar="X",
        help="how far to go from the base, 0, to the tuned model, 1 (default: 1)",
    )
    parser.add_argument(
        "--by-depth",
        action="store_true",
        help="with --blend: X for the first layer, growing to 1 for the last (LiNeS)",
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="also write a GGUF file, by the converter of llama.cpp on the PATH or in $LLAMA_CPP",
    )
    add_allow_network(parser)
    parser.add_argument(
        "--address",
        default="local",
        help="Ray cluster on which a trial is trained again (default: Ray on this machine)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--verbose", action="store_true", help="show the workers' output, too")
    return parser
