"""Kill a stage again and again, run the same command, and count what was lost.

    python benchmarks/faults.py --stage record --kills 20 --seed 0

The arguments behind --stage are those of benchmarks/faults_STAGE.py; its --help explains them.
"""

import argparse
import importlib
import sys
from pathlib import Path

STAGES = ("record", "train", "tune")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    if argv in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    arguments, rest = parser.parse_known_args(argv)
    here = Path(__file__).resolve().parent
    if not (here / f"faults_{arguments.stage}.py").is_file():
        parser.error(f"there is no benchmarks/faults_{arguments.stage}.py")
    # The stages' files, and `tests.support.tiny` for a small model.
    sys.path[:0] = [str(here), str(here.parent)]
    return int(importlib.import_module(f"faults_{arguments.stage}").main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
