"""Intervals over items and seeds.

Everything here is plain NumPy on arrays: it knows nothing about models, tasks or files.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


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


def _as_weights(weights_I: ArrayLike | None, num_items: int) -> FloatArray:
    """Equal weights by default."""
    return np.ones(num_items) if weights_I is None else np.asarray(weights_I, dtype=np.float64)


def bootstrap_means(
    values_AI: ArrayLike,
    weights_I: ArrayLike | None = None,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Weighted means of every row over the same resampled items, shape [A, Z].

    Each resample draws N of the N items with replacement and uses them for all rows, so the
    rows stay paired: differences and ratios of the returned rows are paired replicates.
    """
    values_AI = np.atleast_2d(np.asarray(values_AI, dtype=np.float64))
    num_items = values_AI.shape[1]
    weights_I = _as_weights(weights_I, num_items)
    sums_XI = np.vstack([values_AI * weights_I, weights_I])
    block = max(1, _MAX_BLOCK_CELLS // num_items)
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(num_items, size=(rows, num_items))
        drawn += num_items * np.arange(rows)[:, None]
        # How often each item was drawn: one matrix product then serves every row.
        counts_ZI = np.bincount(drawn.ravel(), minlength=rows * num_items).reshape(rows, num_items)
        sums_XZ = sums_XI @ counts_ZI.T
        means.append(sums_XZ[:-1] / sums_XZ[-1])
    return np.concatenate(means, axis=1)


def percentile_interval(
    value: float, replicates_Z: ArrayLike, *, confidence: float = CONFIDENCE
) -> Interval:
    """``value`` with the central ``confidence`` share of its bootstrap replicates.

    Always contains ``value``, which rounding, or one very heavy item, could put outside.
    """
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.asarray(replicates_Z, dtype=np.float64), [tail, 1.0 - tail])
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


def paired_bootstrap(
    before_I: ArrayLike,
    after_I: ArrayLike,
    weights_I: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Difference of the weighted means, after - before, over items scored twice.

    Percentile bootstrap (Efron 1979). It needs a few dozen items: where hardly any item
    changes, or all change alike, the resamples hardly differ and the interval is too short.
    """
    values_AI = np.stack([np.asarray(before_I, dtype=np.float64), np.asarray(after_I)])
    weights_I = _as_weights(weights_I, values_AI.shape[1])
    rng = np.random.default_rng(seed)
    before_Z, after_Z = bootstrap_means(values_AI, weights_I, resamples=resamples, rng=rng)
    before, after = np.average(values_AI, axis=1, weights=weights_I)
    return percentile_interval(after - before, after_Z - before_Z, confidence=confidence)


def weighted_standard_error(values_I: ArrayLike, weights_I: ArrayLike | None = None) -> float:
    """Standard error of the weighted mean over items, weights taken as given.

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, 6.13),
    sum (w_i (x_i - mean))^2 / (sum w)^2 * N / (N - 1); with equal weights s / sqrt(N).
    """
    values_I = np.asarray(values_I, dtype=np.float64)
    num_items = len(values_I)
    if num_items < 2:
        raise ValueError(f"a standard error needs at least 2 values, got {num_items}")
    weights_I = _as_weights(weights_I, num_items)
    residuals_I = weights_I * (values_I - np.average(values_I, weights=weights_I))
    variance = np.sum(residuals_I**2) / np.sum(weights_I) ** 2 * num_items / (num_items - 1)
    return math.sqrt(variance)


def mean_interval(
    values_I: ArrayLike,
    weights_I: ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Student's t interval of the (weighted) mean of independent values: seeds, or items.

    Raises:
        ValueError: fewer than two values; one value says nothing about spread.
    """
    from scipy import stats

    values_I = np.asarray(values_I, dtype=np.float64)
    weights_I = _as_weights(weights_I, len(values_I))
    error = weighted_standard_error(values_I, weights_I)
    mean = float(np.average(values_I, weights=weights_I))
    half = float(stats.t.ppf((1.0 + confidence) / 2.0, df=len(values_I) - 1)) * error
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
    x_I: ArrayLike,
    y_I: ArrayLike,
    groups_I: Sequence[str],
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

    x_I = np.asarray(x_I, dtype=np.float64)
    y_I = np.asarray(y_I, dtype=np.float64)
    members = [np.flatnonzero(np.asarray(groups_I) == group) for group in sorted(set(groups_I))]
    if len(members) < MIN_GROUPS or np.ptp(x_I) == 0.0 or np.ptp(y_I) == 0.0:
        return None
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(resamples):
        drawn = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        if np.ptp(x_I[drawn]) > 0.0 and np.ptp(y_I[drawn]) > 0.0:
            replicates.append(stats.spearmanr(x_I[drawn], y_I[drawn]).statistic)
    value = float(stats.spearmanr(x_I, y_I).statistic)
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
