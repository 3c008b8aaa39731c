import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.evaluate.front import (
    Choice,
    choose,
    front_probability,
    hypervolume,
    hypervolume_replicates,
    knee,
    knee_replicates,
    on_front,
    pareto_front,
)

# Few distinct values, so that ties and duplicates are common.
coordinates = st.integers(-3, 3).map(lambda value: value / 4)
point_lists = st.lists(st.tuples(coordinates, coordinates), max_size=9)
quick = settings(deadline=None, max_examples=100, derandomize=True)


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


@given(seed=st.integers(0, 2**16), num_trials=st.integers(1, 12), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_area_is_that_of_the_points_counted_on_a_grid(seed, num_trials, ties):
    """Against a sum over all cells between the coordinates, for every number of trials."""
    rng = np.random.default_rng(seed)
    points = rng.normal([0.3, 0.05], [0.3, 0.05], (num_trials, 2)).round(2 if ties else 9)
    low, high = 0.0, 0.1
    areas = hypervolume_replicates(points[:, :1], points[:, 1:], (low, high))[:, 0]
    for count in range(1, num_trials + 1):
        own = points[:count]
        gains = np.unique([low, *own[:, 0][own[:, 0] > low]])
        spent = np.unique([high, *own[:, 1][own[:, 1] < high]])
        expected = sum(
            (g_end - g) * (f_end - f)
            for g, g_end in itertools.pairwise(gains)
            for f, f_end in itertools.pairwise(spent)
            if any(gain >= g_end and forgotten <= f for gain, forgotten in own)
        )
        assert areas[count - 1] == pytest.approx(expected, abs=1e-12)


def test_ten_thousand_trials_take_seconds():
    """Most lie behind the front; all of them on it is the worst case."""
    rng = np.random.default_rng(0)
    gain_TB, forgetting_TB = rng.normal(0.3, 0.1, (2, 10_000, 20))
    begin = time.process_time()
    is_on = on_front(gain_TB, forgetting_TB)
    area_TB = hypervolume_replicates(gain_TB, forgetting_TB, (0.0, 0.1))
    assert time.process_time() - begin < 20
    assert 1 <= is_on.sum(axis=0).min() <= is_on.sum(axis=0).max() < 100
    assert (np.diff(area_TB, axis=0) >= -1e-12).all()
    line = np.linspace(0.0, 1.0, 10_000)
    assert on_front(line, line).all()
