"""Which part of a method does it? Pairs of compared methods that differ in one part alone.

    lrmc compare
    python benchmarks/compare_effects.py runs/compare-ID

Every pair is subtracted seed by seed and item by item; where several differ in the same part, the
mean of their differences is shown, with 95 % intervals over the seeds ( ) and over the items [ ].
Pairs that have not been run are left out, and said.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from lrmc_ray.compare_report import Estimate, _Reader, _with_intervals, estimate, load_table
from lrmc_ray.scores import Comparison

PAIRS = {
    "restricted loss": [
        ("restricted_adamw", "sft"),
        ("restricted_atan2", "adam_atan2"),
        ("lrmc", "full_moclip"),
    ],
    "arctan2 step": [("adam_atan2", "sft"), ("restricted_atan2", "restricted_adamw")],
    "angle cap, 45 degrees": [("full_moclip", "adam_atan2"), ("lrmc", "restricted_atan2")],
    "cap at 90 in place of 45": [("lrmc_90", "lrmc")],
    "anchor, weight 1": [
        ("sft_anchor", "sft"),
        ("lrmc_anchor", "lrmc"),
        ("restricted_adamw_anchor", "restricted_adamw"),
    ],
    "tail of 1,024": [("lrmc_tail", "lrmc"), ("lrmc_tail_anchor", "lrmc_anchor")],
}
"""Each part, and the methods with and without it."""


def effect(
    pairs: list[tuple[dict[int, Comparison], dict[int, Comparison]]], part: str
) -> tuple[Estimate, int]:
    """Mean difference of ``part`` over the pairs, by seed, and how many seeds all of them have."""
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in pairs)))

    def value(one: Comparison) -> float:
        return float(getattr(one, part).value)

    def replicates(one: Comparison) -> np.ndarray:
        if part == "combined":
            return one.domain_gain_replicates - one.forgetting_weight * one.forgetting_replicates
        return np.asarray(getattr(one, f"{part}_replicates"))

    values = [np.mean([value(a[s]) - value(b[s]) for a, b in pairs]) for s in seeds]
    drawn = [np.mean([replicates(a[s]) - replicates(b[s]) for a, b in pairs], 0) for s in seeds]
    return estimate(values, drawn), len(seeds)


def drift_ratio(reader: _Reader, pairs: list[tuple[str, str]], chosen: dict[str, float]) -> float:
    """KL to the base on general text with the part over that without: geometric mean."""
    logs = []
    for names in pairs:
        means = [
            np.mean(
                [
                    drift
                    for seed in reader.description["seeds"]
                    if (drift := reader.drift(name, chosen[name], seed, "general")) is not None
                ]
            )
            for name in names
        ]
        logs.append(np.log(means[0] / means[1]))
    return float(np.exp(np.mean(logs)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="of the comparison")
    arguments = parser.parse_args()
    description = load_table(arguments.directory).description
    reader, chosen = _Reader(arguments.directory, description), description["chosen"]
    print("| part | pairs | seeds | domain gain | forgetting | combined | KL general, ratio |")
    print("|---|---|---|---|---|---|---|")
    for part, pairs in PAIRS.items():
        there = [pair for pair in pairs if all(chosen.get(name) for name in pair)]
        compared = [
            tuple(reader.comparisons(name, chosen[name], "test") for name in pair) for pair in there
        ]
        both = [(pair, sides) for pair, sides in zip(there, compared, strict=True) if all(sides)]
        if not both:
            print(f"{part}: not run yet", file=sys.stderr)
            continue
        cells = []
        for what in ("domain_gain", "forgetting", "combined"):
            estimated, seeds = effect([sides for _, sides in both], what)
            cells.append(_with_intervals(estimated))
        ratio = drift_ratio(reader, [pair for pair, _ in both], chosen)
        print(f"| {part} | {len(both)} | {seeds} | {' | '.join(cells)} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
