"""The trade-off between gain and forgetting: which trials no other beats, and which to prefer.

A point is (gain, forgetting): gain is better when larger, forgetting when smaller. Everything here
is plain NumPy on arrays.

Shape suffixes: T = trials, F = trials on the front, B = bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmc_ray.config.search import Objective
from lrmc_ray.evaluate.statistics import FloatArray

BoolArray = NDArray[np.bool_]

HYPERVOLUME_REFERENCE = (0.0, 0.1)
"""(gain, forgetting) below which a trial adds nothing: no gain, or 10 points of 100 forgotten.

Fixed, so that searches over the same tasks can be compared.
"""


def on_front(gain_T: ArrayLike, forgetting_T: ArrayLike) -> BoolArray:
    """Which trials no other trial beats, shape [T] (or [T, B], each column on its own).

    One trial beats another if it is at least as good in both objectives and better in one. So
    equal points are on the front together or not at all.
    """
    gain = np.asarray(gain_T, dtype=np.float64)
    forgetting = np.asarray(forgetting_T, dtype=np.float64)
    if not (np.isfinite(gain).all() and np.isfinite(forgetting).all()):
        raise ValueError("gain and forgetting must be finite; leave failed trials out")
    front = np.ones(gain.shape, dtype=bool)
    for own, (own_gain, own_forgetting) in enumerate(zip(gain, forgetting, strict=True)):
        at_least_as_good = (gain >= own_gain) & (forgetting <= own_forgetting)
        better = (gain > own_gain) | (forgetting < own_forgetting)
        front[own] = ~(at_least_as_good & better).any(axis=0)
    return front


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (gain, forgetting) points on the Pareto front, least forgetting first.

    Equal points are all kept, in their order of appearance.
    """
    if not points:
        return []
    gain_T, forgetting_T = np.asarray(points, dtype=np.float64).T
    front = np.flatnonzero(on_front(gain_T, forgetting_T))
    return [int(index) for index in front[np.argsort(forgetting_T[front], kind="stable")]]


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the front's point farthest above the line between the front's two ends.

    Both axes are scaled to the front's own range first, so units do not matter. Without a bulge
    (two points, or a hollow front) it is the end with the least forgetting; ``None`` without
    points.
    """
    front = pareto_front(points)
    if not front:
        return None
    gain_F, forgetting_F = np.asarray([points[index] for index in front], dtype=np.float64).T
    # On a front both ranges are positive, or all points are equal.
    gain_range = float(np.ptp(gain_F)) or 1.0
    forgetting_range = float(np.ptp(forgetting_F)) or 1.0
    above_F = (gain_F - gain_F[0]) / gain_range - (
        forgetting_F - forgetting_F[0]
    ) / forgetting_range
    # The two ends are at 0 by construction; rounding must not make the far one win.
    above_F[[0, -1]] = 0.0
    return front[int(np.argmax(above_F))]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area between the front of (gain, forgetting) points and a worse ``reference`` point.

    Points that do not beat the reference in both objectives add nothing.
    """
    reference_gain, reference_forgetting = reference
    area = 0.0
    covered_gain = reference_gain
    for index in pareto_front(points):
        gain, forgetting = points[index]
        if gain > covered_gain and forgetting < reference_forgetting:
            area += (gain - covered_gain) * (reference_forgetting - forgetting)
            covered_gain = gain
    return area


def front_probability(gain_TB: ArrayLike, forgetting_TB: ArrayLike) -> FloatArray:
    """Share of the bootstrap replicates in which each trial is on the front, shape [T].

    Column b must hold the same resampled items for all trials (``changes.compare`` with one
    seed does), or the trials' common luck is counted as a difference between them.
    """
    probability_T: FloatArray = on_front(gain_TB, forgetting_TB).mean(axis=1, dtype=np.float64)
    return probability_T


@dataclass(frozen=True, slots=True)
class Choice:
    """The trial that an objective prefers."""

    index: int
    is_feasible: bool
    """False: no trial stays within the budget, and this one forgets least."""


def choose(
    points: Sequence[tuple[float, float]],
    objective: Objective,
    *,
    forgetting_weight: float,
    max_forgetting: float,
) -> Choice | None:
    """The best of the (gain, forgetting) points; None where there are none.

    - ``combined``: the largest gain - forgetting_weight * forgetting.
    - ``budget``: the largest gain with forgetting <= max_forgetting. Without any such point the one
      with the least forgetting, marked as not feasible.
    - ``pareto``: the knee of the front.

    Of equals the first wins.
    """
    if not points:
        return None
    indices = range(len(points))
    if objective == "combined":
        best = max(indices, key=lambda i: points[i][0] - forgetting_weight * points[i][1])
        return Choice(best, True)
    if objective == "pareto":
        bend = knee(points)
        assert bend is not None  # There are points.
        return Choice(bend, True)
    feasible = [i for i in indices if points[i][1] <= max_forgetting]
    if feasible:
        return Choice(max(feasible, key=lambda i: (points[i][0], -points[i][1])), True)
    return Choice(min(indices, key=lambda i: (points[i][1], -points[i][0])), False)


def hypervolume_replicates(
    gain_TB: ArrayLike, forgetting_TB: ArrayLike, reference: tuple[float, float]
) -> FloatArray:
    """``hypervolume`` of the first 1, 2, ... T trials in every replicate, shape [T, B].

    The area is a maximum over noisy points, so its replicates lie above it on average.
    """
    least_gain, most_forgetting = reference
    # A point that does not beat the reference is moved onto its edge, where it has no area.
    above_TB = np.maximum(np.asarray(gain_TB, dtype=np.float64), least_gain)
    below_TB = np.minimum(np.asarray(forgetting_TB, dtype=np.float64), most_forgetting)
    area_TB = np.empty_like(above_TB)
    for count in range(1, len(above_TB) + 1):
        order_tB = np.argsort(below_TB[:count], axis=0, kind="stable")
        gain_tB = np.take_along_axis(above_TB[:count], order_tB, axis=0)
        forgetting_tB = np.take_along_axis(below_TB[:count], order_tB, axis=0)
        covered_tB = np.maximum.accumulate(gain_tB, axis=0)
        rise_tB = np.diff(covered_tB, axis=0, prepend=least_gain)
        area_TB[count - 1] = (rise_tB * (most_forgetting - forgetting_tB)).sum(axis=0)
    return area_TB


def knee_replicates(gain_TB: ArrayLike, forgetting_TB: ArrayLike) -> NDArray[np.intp]:
    """``knee`` of every replicate: indices of trials, shape [B]."""
    # By ascending forgetting, as the front is walked.
    order_TB = np.argsort(np.asarray(forgetting_TB, dtype=np.float64), axis=0, kind="stable")
    rising_TB = np.take_along_axis(np.asarray(gain_TB, dtype=np.float64), order_TB, axis=0)
    spent_TB = np.take_along_axis(np.asarray(forgetting_TB, dtype=np.float64), order_TB, axis=0)
    front_TB = on_front(rising_TB, spent_TB)

    def scaled(values_TB: FloatArray) -> FloatArray:
        low_B = np.where(front_TB, values_TB, np.inf).min(axis=0)
        high_B = np.where(front_TB, values_TB, -np.inf).max(axis=0)
        range_B = np.where(high_B > low_B, high_B - low_B, 1.0)
        return np.asarray((values_TB - low_B) / range_B)

    x_TB, y_TB = scaled(spent_TB), scaled(rising_TB)
    # The front's two ends lie on the line by construction; rounding must not make one win.
    is_end_TB = (x_TB <= 0.0) | (x_TB >= 1.0)
    above_TB = np.where(front_TB, np.where(is_end_TB, 0.0, y_TB - x_TB), -np.inf)
    chosen_B = np.take_along_axis(order_TB, above_TB.argmax(axis=0)[None], axis=0)[0]
    return np.asarray(chosen_B, dtype=np.intp)
