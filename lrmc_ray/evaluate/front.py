"""The trade-off between gain and forgetting: which trials no other beats, and which to prefer.

A point is (gain, forgetting): gain is better when larger, forgetting when smaller. Everything here
is plain NumPy on arrays.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmc_ray.config.search import Objective
from lrmc_ray.evaluate.objective import combined_objective
from lrmc_ray.evaluate.statistics import FloatArray

BoolArray = NDArray[np.bool_]

HYPERVOLUME_REFERENCE = (0.0, 0.1)
"""(gain, forgetting) below which a trial adds nothing: no gain, or 10 points of 100 forgotten.

Fixed, so that searches over the same tasks can be compared.
"""


def on_front(gain_J: ArrayLike, forgetting_J: ArrayLike) -> BoolArray:
    """Which trials no other trial beats, shape [J] (or [J, Z], each column on its own).

    One trial beats another if it is at least as good in both objectives and better in one. So
    equal points are on the front together or not at all.
    """
    gain = np.asarray(gain_J, dtype=np.float64)
    forgetting = np.asarray(forgetting_J, dtype=np.float64)
    if not (np.isfinite(gain).all() and np.isfinite(forgetting).all()):
        raise ValueError("gain and forgetting must be finite; leave failed trials out")
    front = np.zeros(gain.shape, dtype=bool)
    if not gain.size:
        return front
    # By forgetting, and of equals the largest gain first: a point is beaten by one before it.
    order = np.lexsort((-gain, forgetting), axis=0)
    gain = np.take_along_axis(gain, order, axis=0)
    forgetting = np.take_along_axis(forgetting, order, axis=0)
    is_new = np.ones(gain.shape, dtype=bool)
    is_new[1:] = forgetting[1:] != forgetting[:-1]
    rows = np.arange(len(gain)).reshape(-1, *[1] * (gain.ndim - 1))
    begin = np.maximum.accumulate(np.where(is_new, rows, 0), axis=0)
    before = np.full_like(gain, -np.inf)
    before[1:] = np.maximum.accumulate(gain, axis=0)[:-1]
    best_of_equals = np.take_along_axis(gain, begin, axis=0)
    best_of_less = np.take_along_axis(before, begin, axis=0)
    is_unbeaten = (gain == best_of_equals) & (gain > best_of_less)
    np.put_along_axis(front, order, is_unbeaten, axis=0)
    return front


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (gain, forgetting) points on the Pareto front, least forgetting first.

    Equal points are all kept, in their order of appearance.
    """
    if not points:
        return []
    gain_J, forgetting_J = np.asarray(points, dtype=np.float64).T
    front = np.flatnonzero(on_front(gain_J, forgetting_J))
    return [int(index) for index in front[np.argsort(forgetting_J[front], kind="stable")]]


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
    if not points:
        return 0.0
    gain_J, forgetting_J = np.asarray(points, dtype=np.float64).T
    return float(hypervolume_replicates(gain_J[:, None], forgetting_J[:, None], reference)[-1, 0])


def front_probability(gain_JZ: ArrayLike, forgetting_JZ: ArrayLike) -> FloatArray:
    """Share of the bootstrap replicates in which each trial is on the front, shape [J].

    Column b must hold the same resampled items for all trials (``changes.compare`` with one
    seed does), or the trials' common luck is counted as a difference between them.
    """
    probability_J: FloatArray = on_front(gain_JZ, forgetting_JZ).mean(axis=1, dtype=np.float64)
    return probability_J


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
        combined = partial(combined_objective, forgetting_weight=forgetting_weight)
        best = max(indices, key=lambda i: combined(*points[i]))
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
    gain_JZ: ArrayLike, forgetting_JZ: ArrayLike, reference: tuple[float, float]
) -> FloatArray:
    """``hypervolume`` of the first 1, 2, ... J trials in every replicate, shape [J, Z].

    The area is a maximum over noisy points, so its replicates lie above it on average.
    """
    least_gain, most_forgetting = reference
    # A point that does not beat the reference is moved onto its edge, where it has no area.
    above_JZ = np.maximum(np.asarray(gain_JZ, dtype=np.float64), least_gain)
    below_JZ = np.minimum(np.asarray(forgetting_JZ, dtype=np.float64), most_forgetting)
    area_JZ = np.empty_like(above_JZ)
    # Of the trials so far those that add to the area, F at most, by ascending forgetting.
    gain_FZ, forgetting_FZ = above_JZ[:0], below_JZ[:0]
    for index in range(len(above_JZ)):
        gain_fZ = np.concatenate([gain_FZ, above_JZ[index : index + 1]])
        forgetting_fZ = np.concatenate([forgetting_FZ, below_JZ[index : index + 1]])
        order_fZ = np.argsort(forgetting_fZ, axis=0, kind="stable")
        gain_fZ = np.take_along_axis(gain_fZ, order_fZ, axis=0)
        forgetting_fZ = np.take_along_axis(forgetting_fZ, order_fZ, axis=0)
        covered_fZ = np.maximum.accumulate(gain_fZ, axis=0)
        rise_fZ = np.diff(covered_fZ, axis=0, prepend=least_gain)
        area_JZ[index] = (rise_fZ * (most_forgetting - forgetting_fZ)).sum(axis=0)
        adds_fZ = rise_fZ > 0
        most = int(adds_fZ.sum(axis=0).max())
        kept_FZ = np.argsort(~adds_fZ, axis=0, kind="stable")[:most]
        adds_FZ = np.take_along_axis(adds_fZ, kept_FZ, axis=0)
        gain_FZ = np.where(adds_FZ, np.take_along_axis(gain_fZ, kept_FZ, axis=0), least_gain)
        forgetting_FZ = np.where(
            adds_FZ, np.take_along_axis(forgetting_fZ, kept_FZ, axis=0), most_forgetting
        )
    return area_JZ


def knee_replicates(gain_JZ: ArrayLike, forgetting_JZ: ArrayLike) -> NDArray[np.intp]:
    """``knee`` of every replicate: indices of trials, shape [Z]."""
    # By ascending forgetting, as the front is walked.
    order_JZ = np.argsort(np.asarray(forgetting_JZ, dtype=np.float64), axis=0, kind="stable")
    rising_JZ = np.take_along_axis(np.asarray(gain_JZ, dtype=np.float64), order_JZ, axis=0)
    spent_JZ = np.take_along_axis(np.asarray(forgetting_JZ, dtype=np.float64), order_JZ, axis=0)
    front_JZ = on_front(rising_JZ, spent_JZ)

    def scaled(values_JZ: FloatArray) -> FloatArray:
        low_Z = np.where(front_JZ, values_JZ, np.inf).min(axis=0)
        high_Z = np.where(front_JZ, values_JZ, -np.inf).max(axis=0)
        range_Z = np.where(high_Z > low_Z, high_Z - low_Z, 1.0)
        return np.asarray((values_JZ - low_Z) / range_Z)

    x_JZ, y_JZ = scaled(spent_JZ), scaled(rising_JZ)
    # The front's two ends lie on the line by construction; rounding must not make one win.
    is_end_JZ = (x_JZ <= 0.0) | (x_JZ >= 1.0)
    above_JZ = np.where(front_JZ, np.where(is_end_JZ, 0.0, y_JZ - x_JZ), -np.inf)
    chosen_Z = np.take_along_axis(order_JZ, above_JZ.argmax(axis=0)[None], axis=0)[0]
    return np.asarray(chosen_Z, dtype=np.intp)
