import numpy as np
import pytest

from lrmc_ray.report.trade_off import surface


def test_a_plane_is_found_inside_the_hull_and_nothing_outside():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.8, 1.0, 20), rng.uniform(10, 120, 20)
    z = 3 * x - 0.01 * y
    found = surface(x, y, z)
    inside = np.isfinite(found.z)
    assert 0.3 < inside.mean() < 1.0
    expected = 3 * found.x[None, :] - 0.01 * found.y[:, None]
    assert found.z[inside] == pytest.approx(expected[inside], abs=0.01)
    assert (found.x[0], found.x[-1]) == pytest.approx((x.min(), x.max()))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]),  # too few
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),  # on one line
        ([1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]),
        ([1, 1, 1, 2, 2, 2], [1, 1, 1, 3, 3, 3]),  # two places only
        ([], []),
    ],
)
def test_too_little_to_draw_a_surface(x, y):
    assert surface(x, y, list(range(len(x)))) is None


@pytest.mark.slow
def test_the_surface_of_many_trials_is_that_of_all_of_them(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0.8, 1.0, 600), rng.uniform(10, 120, 600)
    z = np.sin(8 * x) + np.cos(y / 40)
    found = surface(x, y, z)
    monkeypatch.setattr("lrmc_ray.report.trade_off._NEIGHBORS", 600)
    of_all = surface(x, y, z)
    inside = np.isfinite(of_all.z)
    assert 0.8 < inside.mean() < 1.0
    assert (np.isfinite(found.z) == inside).all()
    assert found.z[inside] == pytest.approx(of_all.z[inside], abs=1e-3)
    expected = np.sin(8 * found.x[None, :]) + np.cos(found.y[:, None] / 40)
    assert found.z[inside] == pytest.approx(expected[inside], abs=0.01)
