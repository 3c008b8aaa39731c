import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lrmc_ray.evaluate import statistics
from lrmc_ray.evaluate.statistics import (
    Interval,
    bootstrap_means,
    mean_interval,
    mean_of_independent,
    paired_bootstrap,
    percentile_interval,
    proportion_interval,
    rank_correlation,
    weighted_standard_error,
)


def paired_items(seed: int, num_items: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    before = rng.beta(2, 3, num_items)
    after = np.clip(before + rng.normal(0.05, 0.2, num_items), 0, 1)
    return before, after, rng.integers(5, 200, num_items).astype(float)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(0.1, 0.05, 0.2), True),
        (Interval(-0.1, -0.2, -0.05), True),
        (Interval(0.1, -0.05, 0.2), False),
        (Interval(0.1, 0.0, 0.2), False),
        (Interval(-0.1, -0.2, 0.0), False),
    ],
)
def test_distinguishable_means_that_the_interval_excludes_zero(interval, expected):
    assert interval.distinguishable is expected
    assert (-interval).distinguishable is expected


def test_negating_an_interval_swaps_its_ends():
    assert -Interval(1.0, -2.0, 3.0) == Interval(-1.0, -3.0, 2.0)


def test_percentile_interval_takes_the_quantiles_of_the_replicates():
    interval = percentile_interval(300.0, np.arange(1001))
    assert (interval.value, interval.low, interval.high) == pytest.approx((300.0, 25.0, 975.0))
    interval = percentile_interval(300.0, np.arange(1001), confidence=0.5)
    assert (interval.value, interval.low, interval.high) == pytest.approx((300.0, 250.0, 750.0))


def test_percentile_interval_contains_its_value():
    interval = percentile_interval(7.0, np.arange(1001))
    assert (interval.low, interval.high) == pytest.approx((7.0, 975.0))
    interval = percentile_interval(999.0, np.arange(1001))
    assert (interval.low, interval.high) == pytest.approx((25.0, 999.0))


def test_an_interval_reads_as_value_and_ends():
    assert str(Interval(0.6125, -0.52, 0.7)) == "0.613 [-0.520, 0.700]"


# Bootstrap


def test_bootstrap_means_equal_a_loop_over_the_drawn_items():
    before, after, weights = paired_items(0, 17)
    means = bootstrap_means([before, after], weights, resamples=50, rng=np.random.default_rng(3))
    drawn = np.random.default_rng(3).integers(17, size=(50, 17))
    for row, values in enumerate([before, after]):
        expected = [np.average(values[items], weights=weights[items]) for items in drawn]
        np.testing.assert_allclose(means[row], expected, rtol=1e-12)


def test_blocks_do_not_change_the_resamples(monkeypatch):
    before, after, weights = paired_items(1, 23)
    whole = bootstrap_means([before, after], weights, resamples=101, rng=np.random.default_rng(0))
    monkeypatch.setattr(statistics, "_MAX_BLOCK_CELLS", 23 * 7)
    blocks = bootstrap_means([before, after], weights, resamples=101, rng=np.random.default_rng(0))
    assert blocks.shape == (2, 101)
    np.testing.assert_allclose(blocks, whole, rtol=1e-12)


def test_bootstrap_spread_follows_its_closed_form():
    """The bootstrap's standard deviation of a mean is sqrt(sum (x - mean)^2) / N."""
    before, after, _ = paired_items(2)
    replicates = bootstrap_means(after - before, resamples=40_000, rng=np.random.default_rng(0))[0]
    expected = np.std(after - before, ddof=0) / math.sqrt(60)
    # The relative error of a standard deviation from B draws is 1 / sqrt(2 B) = 0.0035.
    assert replicates.std() == pytest.approx(expected, rel=0.015)
    assert replicates.mean() == pytest.approx(np.mean(after - before), abs=4 * expected / 200)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_paired_bootstrap_agrees_with_scipy(seed, weighted):
    before, after, weights = paired_items(seed)
    weights = weights if weighted else np.ones(60)

    def delta(before, after, weights, axis):
        total = weights.sum(axis)
        return (weights * after).sum(axis) / total - (weights * before).sum(axis) / total

    expected = stats.bootstrap(
        (before, after, weights),
        delta,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(99),
    )
    interval = paired_bootstrap(before, after, weights, resamples=20_000, seed=seed)
    assert interval.value == pytest.approx(delta(before, after, weights, 0), abs=1e-12)
    # Both ends carry Monte Carlo error: about 0.019 standard errors each for 20,000 resamples.
    tolerance = 0.08 * expected.standard_error
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 80)
    interval = paired_bootstrap(before, before + 0.25)
    assert interval.low == pytest.approx(0.25, abs=1e-9)
    assert interval.high == pytest.approx(0.25, abs=1e-9)


def test_paired_bootstrap_repeats_and_depends_on_the_seed():
    before, after, _ = paired_items(4)
    assert paired_bootstrap(before, after, seed=5) == paired_bootstrap(before, after, seed=5)
    assert paired_bootstrap(before, after, seed=5) != paired_bootstrap(before, after, seed=6)


def test_paired_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """300 samples of 60 skewed items: the expected share is 0.94, its error 0.014."""
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(300):
        deltas = rng.exponential(1.0, 60) - 1.0
        interval = paired_bootstrap(np.zeros(60), deltas, resamples=500, seed=seed)
        covered += interval.low <= 0.0 <= interval.high
    assert 0.89 <= covered / 300 <= 0.98


# Means and proportions


def test_mean_interval_is_students_t():
    values = [0.61, 0.66, 0.58]
    expected = stats.t.interval(0.95, df=2, loc=np.mean(values), scale=stats.sem(values))
    interval = mean_interval(values)
    assert interval.value == pytest.approx(np.mean(values))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_mean_interval_of_two_values_by_hand():
    """Mean 2, s = sqrt(2), standard error 1, t with one degree of freedom 12.706."""
    interval = mean_interval([1.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 12.7062047, 2 + 12.7062047))


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        mean_interval([0.5])


def test_weighted_standard_error_with_equal_weights_is_the_usual_one():
    values = paired_items(3)[0]
    assert weighted_standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)
    assert weighted_standard_error(values, 7 * np.ones(60)) == pytest.approx(stats.sem(values))


def test_weighted_standard_error_agrees_with_the_bootstrap():
    values, _, weights = paired_items(5)
    replicates = bootstrap_means(values, weights, resamples=20_000, rng=np.random.default_rng(0))[0]
    # The bootstrap lacks the factor sqrt(60 / 59), and the linearisation is first order.
    assert weighted_standard_error(values, weights) == pytest.approx(replicates.std(), rel=0.05)


@pytest.mark.parametrize(("successes", "trials"), [(0, 60), (1, 60), (37, 60), (60, 60), (1, 2)])
def test_proportion_interval_is_wilsons(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    interval = proportion_interval(successes, trials)
    assert interval.value == successes / trials
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0


def test_rank_correlation_is_scipys_and_draws_whole_groups():
    rng = np.random.default_rng(3)
    x = rng.normal(size=24)
    y = x**3 + rng.normal(size=24)
    groups = [str(i // 4) for i in range(24)]
    found = rank_correlation(x, y, groups, resamples=300)
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.low < found.value < found.high <= 1.0
    assert found == rank_correlation(x, y, groups, resamples=300)

    # By hand: rank correlations of every way to draw 4 groups of 4, each as likely as the other.
    x, y, groups = x[:16], y[:16], groups[:16]
    exact = []
    for drawn in itertools.product(range(4), repeat=4):
        rows = np.concatenate([np.arange(4 * g, 4 * g + 4) for g in drawn])
        exact.append(stats.spearmanr(x[rows], y[rows]).statistic)
    few = rank_correlation(x, y, groups, resamples=4000)
    assert few is not None
    assert few.low == pytest.approx(np.quantile(exact, 0.025), abs=0.03)
    assert few.high == pytest.approx(np.quantile(exact, 0.975), abs=0.03)


def test_no_rank_correlation_of_constants_or_of_too_few_groups():
    groups = ["a", "b", "c", "d"]
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4], groups) is None
    assert rank_correlation([1, 2, 3, 4], [2, 2, 2, 2], groups) is None
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], ["a", "a", "b", "c"]) is None
    perfect = rank_correlation([1, 2, 3, 4], [1, 4, 9, 16], groups, resamples=50)
    assert perfect == Interval(pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0))


def test_the_mean_of_independent_values_has_each_side_in_quadrature():
    one = Interval(0.5, 0.2, 0.6)
    assert mean_of_independent([one]) == Interval(0.5, pytest.approx(0.2), pytest.approx(0.6))
    three = [one, Interval(0.0, 0.0, 0.4), Interval(0.4, 0.0, 0.6)]
    found = mean_of_independent(three)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 0.5 / 3)  # 0.3, 0, 0.4
    assert found.high == pytest.approx(0.3 + math.sqrt(0.01 + 0.16 + 0.04) / 3)

    # Normal means: the interval of the mean of two is the one that a normal mean of both has.
    half = stats.norm.ppf(0.975)
    normal = [Interval(m, m - half * s, m + half * s) for m, s in ((1.0, 0.3), (2.0, 0.4))]
    found = mean_of_independent(normal)
    assert found.high - found.value == pytest.approx(half * math.hypot(0.3, 0.4) / 2)
