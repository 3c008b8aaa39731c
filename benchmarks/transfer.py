"""Do short runs tell which settings are good in longer ones? Two comparisons of the same methods.

    lrmc compare --space compare_transfer train.steps=10 compare.name=transfer10
    lrmc compare --space compare_transfer train.steps=60 compare.name=transfer60
    python benchmarks/transfer.py runs/transfer10-ID runs/transfer60-ID

Spearman's rank correlation over the methods, of the scores on the test items (one seed).
"""

import argparse
import sys
from pathlib import Path

from scipy.stats import spearmanr

from lrmc_ray.compare.table import MethodRow, load_table

PARTS = ("domain_gain", "forgetting", "combined")


def rows(directory: Path) -> dict[str, MethodRow]:
    """The methods that were reported, by name."""
    return {row.name: row for row in load_table(directory).rows if row.trade is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("short", type=Path, help="directory of the comparison with fewer steps")
    parser.add_argument("long", type=Path, help="directory of the one with more")
    arguments = parser.parse_args()
    short, long = rows(arguments.short), rows(arguments.long)
    names = [name for name in short if name in long]
    print("| method | " + " | ".join(f"{part}, short | long" for part in PARTS) + " |")
    print("|---" * (1 + 2 * len(PARTS)) + "|")
    for name in names:
        cells = []
        for part in PARTS:
            for side in (short, long):
                value = getattr(side[name].trade, part)
                ends = value.over_items
                cells.append(
                    f"{100 * value.value:.1f} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"
                )
        print(f"| {short[name].title} | {' | '.join(cells)} |")
    for part in PARTS:
        pairs = [[getattr(s[n].trade, part).value for n in names] for s in (short, long)]
        print(
            f"{part}: rank correlation {spearmanr(*pairs).statistic:.2f} over {len(names)} methods"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
