"""Intervals over items and seeds, and the trade-off between two objectives.

Everything here is plain NumPy on arrays: it knows nothing about models, tasks or files.
``scores`` feeds it per-item values, ``report`` and the search feed it trials.

Shape suffixes: N = items of a task, M = rows that share those items (for example before and
after), B = bootstrap resamples, T = trials.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmc_ray.config.search import Objective

FloatArray = NDArray[np.float64]


BoolArray = NDArray[np.bool_]

CONFIDENCE = 0.95


MIN_GROUPS = 4
"""Fewest groups whose resampling says anything about another group."""


# Resamples are counted in blocks of about this many cells, which stay in the cache: twice as fast
# as blocks of 4 million, and 2,000 resamples of MMLU's 14,000 items need no matrix of 224 MB.
_MAX_BLOCK_CELLS = 100_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the two ends of its 95 % interval, all in the value's unit."""

    value: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0.0 or self.high < 0.0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __neg__(self) -> "Interval":
        return Interval(-self.value, -self.high, -self.low)


def _as_weights(weights_N: ArrayLike | None, num_items: int) -> FloatArray:
    """Equal weights by default."""
    return np.ones(num_items) if weights_N is None else np.asarray(weights_N, dtype=np.float64)


def bootstrap_means(
    values_MN: ArrayLike,
    weights_N: ArrayLike | None = None,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Weighted means of every row over the same resampled items, shape [M, B].

    Each resample draws N of the N items with replacement and uses them for all rows, so the
    rows stay paired: differences and ratios of the returned rows are paired replicates.
    """
    values_MN = np.atleast_2d(np.asarray(values_MN, dtype=np.float64))
    num_items = values_MN.shape[1]
    weights_N = _as_weights(weights_N, num_items)
    sums_KN = np.vstack([values_MN * weights_N, weights_N])
    block = max(1, _MAX_BLOCK_CELLS // num_items)
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(num_items, size=(rows, num_items))
        drawn += num_items * np.arange(rows)[:, None]
        # How often each item was drawn: one matrix product then serves every row.
        counts_BN = np.bincount(drawn.ravel(), minlength=rows * num_items).reshape(rows, num_items)
        sums_KB = sums_KN @ counts_BN.T
        means.append(sums_KB[:-1] / sums_KB[-1])
    return np.concatenate(means, axis=1)


def percentile_interval(
    value: float, replicates_B: ArrayLike, *, confidence: float = CONFIDENCE
) -> Interval:
    """``value`` with the central ``confidence`` share of its bootstrap replicates.

    Always contains ``value``, which rounding, or one very heavy item, could put outside.
    """
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.asarray(replicates_B, dtype=np.float64), [tail, 1.0 - tail])
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


def paired_bootstrap(
    before_N: ArrayLike,
    after_N: ArrayLike,
    weights_N: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Difference of the weighted means, after - before, over items scored twice.

    Percentile bootstrap (Efron 1979). It needs a few dozen items: where hardly any item
    changes, or all change alike, the resamples hardly differ and the interval is too short.
    """
    values_MN = np.stack([np.asarray(before_N, dtype=np.float64), np.asarray(after_N)])
    weights_N = _as_weights(weights_N, values_MN.shape[1])
    rng = np.random.default_rng(seed)
    before_B, after_B = bootstrap_means(values_MN, weights_N, resamples=resamples, rng=rng)
    before, after = np.average(values_MN, axis=1, weights=weights_N)
    return percentile_interval(after - before, after_B - before_B, confidence=confidence)


def weighted_standard_error(values_N: ArrayLike, weights_N: ArrayLike | None = None) -> float:
    """Standard error of the weighted mean over items, weights taken as given.

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, 6.13),
    sum (w_i (x_i - mean))^2 / (sum w)^2 * N / (N - 1); with equal weights s / sqrt(N).
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    num_items = len(values_N)
    if num_items < 2:
        raise ValueError(f"a standard error needs at least 2 values, got {num_items}")
    weights_N = _as_weights(weights_N, num_items)
    residuals_N = weights_N * (values_N - np.average(values_N, weights=weights_N))
    variance = np.sum(residuals_N**2) / np.sum(weights_N) ** 2 * num_items / (num_items - 1)
    return math.sqrt(variance)


def mean_interval(
    values_N: ArrayLike,
    weights_N: ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Student's t interval of the (weighted) mean of independent values: seeds, or items.

    Raises:
        ValueError: fewer than two values; one value says nothing about spread.
    """
    from scipy import stats

    values_N = np.asarray(values_N, dtype=np.float64)
    weights_N = _as_weights(weights_N, len(values_N))
    error = weighted_standard_error(values_N, weights_N)
    mean = float(np.average(values_N, weights=weights_N))
    half = float(stats.t.ppf((1.0 + confidence) / 2.0, df=len(values_N) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def mean_of_independent(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent values, each known with an interval of its own.

    Distances to the ends add in quadrature, each side by itself (Zou and Donner 2008, "MOVER"),
    so that the lopsided intervals of proportions near 0 and 1 stay lopsided.
    """
    values = np.array([(i.value, i.low, i.high) for i in intervals])
    mean = float(values[:, 0].mean())
    below, above = (
        float(np.linalg.norm(values[:, end] - values[:, 0])) / len(values) for end in (1, 2)
    )
    return Interval(mean, mean - below, mean + above)


def rank_correlation(
    x_N: ArrayLike,
    y_N: ArrayLike,
    groups_N: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Spearman's rank correlation of points that belong to groups, as Interval.

    Percentile bootstrap that draws whole groups (cluster bootstrap; Davison and Hinkley 1997,
    3.8), since the points of one group resemble each other. Resamples in which either side is
    constant have no correlation and are left out. None with fewer than ``MIN_GROUPS`` groups or
    where either side is constant.
    """
    from scipy import stats

    x_N = np.asarray(x_N, dtype=np.float64)
    y_N = np.asarray(y_N, dtype=np.float64)
    members = [np.flatnonzero(np.asarray(groups_N) == group) for group in sorted(set(groups_N))]
    if len(members) < MIN_GROUPS or np.ptp(x_N) == 0.0 or np.ptp(y_N) == 0.0:
        return None
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(resamples):
        drawn = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        if np.ptp(x_N[drawn]) > 0.0 and np.ptp(y_N[drawn]) > 0.0:
            replicates.append(stats.spearmanr(x_N[drawn], y_N[drawn]).statistic)
    value = float(stats.spearmanr(x_N, y_N).statistic)
    return percentile_interval(value, replicates, confidence=confidence)


def proportion_interval(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval (1927) of a proportion; stays inside [0, 1], also at 0 and 1."""
    from scipy import stats

    z = float(stats.norm.ppf((1.0 + confidence) / 2.0))
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = (
        z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    )
    # At 0 and 1 an end equals the share, but for rounding.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


# Trade-off. A point is (gain, forgetting): gain is better when larger, forgetting when smaller.


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

    Column b must hold the same resampled items for all trials (``scores.compare`` with one
    seed does), or the trials' common luck is counted as a difference between them.
    """
    probability_T: FloatArray = on_front(gain_TB, forgetting_TB).mean(axis=1, dtype=np.float64)
    return probability_T


HYPERVOLUME_REFERENCE = (0.0, 0.1)
"""(gain, forgetting) below which a trial adds nothing: no gain, or 10 points of 100 forgotten.

Fixed, so that searches over the same tasks can be compared.
"""


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
