"""What a study's trials together say about gain against forgetting.

Every number comes with an interval over the items, from the bootstrap replicates that the trials'
comparisons share. Shape suffixes: T = trials, B = resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrmc_ray.scores import Comparison
from lrmc_ray.statistics import (
    HYPERVOLUME_REFERENCE,
    Interval,
    front_probability,
    hypervolume,
    hypervolume_replicates,
    knee,
    knee_replicates,
    pareto_front,
    percentile_interval,
)


@dataclass(frozen=True)
class TradeOff:
    """The front of a study's trials; indices count the comparisons that it was made of."""

    front: tuple[int, ...]
    """The Pareto front, least forgetting first."""
    front_probability: tuple[float, ...]
    """Of each trial: share of the resamples in which it is on the front."""
    knee: int
    """The front's point farthest above the line between its ends."""
    knee_probability: tuple[float, ...]
    """Of each trial: share of the resamples in which it is the knee."""
    knee_gain: Interval
    """Domain gain at the knee, whichever trial that is in a resample."""
    knee_forgetting: Interval
    hypervolume: tuple[Interval, ...]
    """Area between the front of the first 1, 2, ... trials and ``HYPERVOLUME_REFERENCE``."""
    budget_probability: tuple[float, ...]
    """Of each trial: share of the resamples in which it forgets at most what was allowed."""


def trade_off(comparisons: Sequence[Comparison], *, max_forgetting: float) -> TradeOff:
    """The trade-off of at least one comparison, all made with the same base, tasks and seed."""
    points = [(one.domain_gain.value, one.forgetting.value) for one in comparisons]
    gain_TB = np.stack([one.domain_gain_replicates for one in comparisons])
    forgetting_TB = np.stack([one.forgetting_replicates for one in comparisons])
    bend = knee(points)
    assert bend is not None  # There is at least one point.
    knee_B = knee_replicates(gain_TB, forgetting_TB)
    columns_B = np.arange(len(knee_B))
    area_TB = hypervolume_replicates(gain_TB, forgetting_TB, HYPERVOLUME_REFERENCE)
    counts = range(1, len(points) + 1)
    return TradeOff(
        front=tuple(pareto_front(points)),
        front_probability=tuple(map(float, front_probability(gain_TB, forgetting_TB))),
        knee=bend,
        knee_probability=tuple(float(np.mean(knee_B == t)) for t in range(len(points))),
        knee_gain=percentile_interval(points[bend][0], gain_TB[knee_B, columns_B]),
        knee_forgetting=percentile_interval(points[bend][1], forgetting_TB[knee_B, columns_B]),
        hypervolume=tuple(
            percentile_interval(
                hypervolume(points[:count], HYPERVOLUME_REFERENCE), area_TB[count - 1]
            )
            for count in counts
        ),
        budget_probability=tuple(
            float(np.mean(row_B <= max_forgetting)) for row_B in forgetting_TB
        ),
    )
