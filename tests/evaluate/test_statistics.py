import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lrmc_ray.evaluate import statistics
from lrmc_ray.evaluate.statistics import (
    Choice,
    Interval,
    bootstrap_means,
    choose,
    front_probability,
    hypervolume,
    hypervolume_replicates,
    knee,
    knee_replicates,
    mean_interval,
    mean_of_independent,
    on_front,
    paired_bootstrap,
    pareto_front,
    percentile_interval,
    proportion_interval,
    rank_correlation,
    weighted_standard_error,
)

# Few distinct values, so that ties and duplicates are common.
coordinates = st.integers(-3, 3).map(lambda value: value / 4)
point_lists = st.lists(st.tuples(coordinates, coordinates), max_size=9)
quick = settings(deadline=None, max_examples=100, derandomize=True)


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


# Trade-off


def beats(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Brute force: at least as good in both, better in one."""
    return first != second and first[0] >= second[0] and first[1] <= second[1]


def test_pareto_front_by_hand():
    #         best gain    beaten        knee-ish     cautious     beaten      equal to knee-ish
    points = [(0.9, 0.30), (0.5, 0.30), (0.8, 0.05), (0.2, 0.00), (0.1, 0.00), (0.8, 0.05)]
    assert pareto_front(points) == [3, 2, 5, 0]


def test_no_points_have_no_front():
    assert pareto_front([]) == []
    assert knee([]) is None
    assert hypervolume([], (0.0, 1.0)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_front_of_non_finite_points_is_refused(value):
    with pytest.raises(ValueError, match="must be finite"):
        pareto_front([(0.1, 0.2), (value, 0.1)])


@given(points=point_lists)
@quick
def test_pareto_front_equals_brute_force(points):
    expected = {
        index
        for index, point in enumerate(points)
        if not any(beats(other, point) for other in points)
    }
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    forgetting = [points[index][1] for index in front]
    gain = [points[index][0] for index in front]
    assert forgetting == sorted(forgetting)
    assert gain == sorted(gain)


@given(points=point_lists)
@quick
def test_hypervolume_counts_the_dominated_cells(points):
    """On a grid of quarters the dominated area is a number of cells."""
    reference = (-0.5, 0.5)
    cells = [index / 4 for index in range(-4, 4)]
    expected = sum(
        1 / 16
        for gain, forgetting in itertools.product(cells, cells)
        # The cell [gain, gain + 1/4] x [forgetting, forgetting + 1/4].
        if gain >= reference[0]
        and forgetting + 0.25 <= reference[1]
        and any(point[0] >= gain + 0.25 and point[1] <= forgetting for point in points)
    )
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_by_hand():
    assert hypervolume([(1.0, 0.0)], (0.0, 2.0)) == 2.0
    # 1 x 2 below the first, and 1 x 1 more above it.
    assert hypervolume([(1.0, 0.0), (2.0, 1.0), (1.5, 1.5)], (0.0, 2.0)) == 3.0


def test_knee_is_the_point_farthest_above_the_line_between_the_ends():
    # Scaled to [0, 1]^2 the ends are (0, 0) and (1, 1); 0.9 - 0.2 is the largest bulge.
    points = [(10.0, 2.0), (0.0, 0.0), (9.0, 0.4), (9.2, 0.6), (3.0, 0.1), (8.0, 0.5)]
    assert knee(points) == 2


@given(
    points=st.lists(
        st.tuples(st.floats(-1, 1, width=16), st.floats(-1, 1, width=16)), min_size=1, max_size=9
    )
)
@quick
def test_knee_has_the_largest_distance_to_the_chord(points):
    """The knee's distance from the chord, by the cross product, is the largest on the front."""
    front = [points[index] for index in pareto_front(points)]
    (gain_0, forgetting_0), (gain_1, forgetting_1) = front[0], front[-1]
    gain_range, forgetting_range = gain_1 - gain_0 or 1, forgetting_1 - forgetting_0 or 1

    def height(point: tuple[float, float]) -> float:
        x, y = (point[1] - forgetting_0) / forgetting_range, (point[0] - gain_0) / gain_range
        return (y - x) / math.sqrt(2)

    assert height(points[knee(points)]) == pytest.approx(max(map(height, front)), abs=1e-9)


def test_a_front_without_a_bulge_has_its_knee_at_the_least_forgetting():
    assert knee([(1.0, 1.0), (0.0, 0.0)]) == 1
    assert knee([(1.0, 1.0), (0.0, 0.0), (0.3, 0.6)]) == 1
    assert knee([(0.5, 0.5), (0.5, 0.5)]) == 0


@given(seed=st.integers(0, 2**31 - 1))
@quick
def test_front_probability_counts_replicates_one_by_one(seed):
    rng = np.random.default_rng(seed)
    gain, forgetting = rng.integers(0, 4, (2, 5, 20)).astype(float)
    counts = np.zeros(5)
    for replicate in range(20):
        points = list(zip(gain[:, replicate], forgetting[:, replicate], strict=True))
        counts[pareto_front(points)] += 1
    np.testing.assert_allclose(front_probability(gain, forgetting), counts / 20)


def test_on_front_takes_columns_one_by_one():
    gain = np.array([[1.0, 0.0], [0.0, 1.0]])
    forgetting = np.zeros((2, 2))
    np.testing.assert_array_equal(on_front(gain, forgetting), [[True, False], [False, True]])


# What an objective prefers

POINTS = [(0.10, 0.000), (0.40, 0.012), (0.30, 0.008), (0.60, 0.200), (0.40, 0.009)]


@pytest.mark.parametrize(
    ("objective", "weight", "limit", "expected"),
    [
        ("combined", 1.0, 0.0, Choice(3, True)),  # 0.6 - 0.2 = 0.4 against 0.4 - 0.009
        ("combined", 1.1, 0.0, Choice(4, True)),  # 0.38 against 0.3901
        ("combined", 1000.0, 0.0, Choice(0, True)),
        ("budget", 1.0, 0.02, Choice(4, True)),  # two gain 0.4: the one that forgets less
        ("budget", 1.0, 0.0085, Choice(2, True)),
        ("budget", 1.0, 0.009, Choice(4, True)),  # the limit itself is allowed
        ("budget", 1.0, -0.01, Choice(0, False)),
        ("budget", 1.0, 1.0, Choice(3, True)),
    ],
)
def test_choose_by_hand(objective, weight, limit, expected):
    chosen = choose(POINTS, objective, forgetting_weight=weight, max_forgetting=limit)
    assert chosen == expected


def test_choose_takes_the_knee_of_a_front_and_nothing_from_nothing():
    options = {"forgetting_weight": 1.0, "max_forgetting": 0.01}
    assert choose(POINTS, "pareto", **options) == Choice(knee(POINTS), True)
    for objective in ("combined", "budget", "pareto"):
        assert choose([], objective, **options) is None


@given(seed=st.integers(0, 2**16), num_trials=st.integers(1, 7), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_replicates_of_knee_and_hypervolume_equal_one_replicate_at_a_time(seed, num_trials, ties):
    rng = np.random.default_rng(seed)
    gain_TB = rng.normal(0.3, 0.3, (num_trials, 9))
    forgetting_TB = rng.normal(0.05, 0.05, (num_trials, 9))
    if ties:
        gain_TB, forgetting_TB = gain_TB.round(1), forgetting_TB.round(2)
    reference = (0.0, 0.1)
    area_TB = hypervolume_replicates(gain_TB, forgetting_TB, reference)
    knee_B = knee_replicates(gain_TB, forgetting_TB)
    for b in range(9):
        points = list(zip(gain_TB[:, b], forgetting_TB[:, b], strict=True))
        for count in range(1, num_trials + 1):
            expected = hypervolume(points[:count], reference)
            assert area_TB[count - 1, b] == pytest.approx(expected, abs=1e-12)
        # Equal points may be exchanged, and so may equal heights above the line.
        assert points[knee_B[b]] == points[knee(points)]
    assert (np.diff(area_TB, axis=0) >= -1e-12).all()


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
