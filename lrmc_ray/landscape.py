"""A smooth surface through a search's trials: how the score changes over two parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrmc_ray.statistics import FloatArray

FEWEST_TRIALS = 6
"""Fewer points than this say nothing about a surface."""
_CELLS = 41
_SMOOTHING = 1e-2  # in units of the scores' variance: scores are noisy, the surface is not


@dataclass(frozen=True, eq=False)
class Surface:
    """Scores on a grid; NaN outside of the trials' convex hull, where nothing is known."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    """Shape [len(y), len(x)]."""


def surface(x_T: Sequence[float], y_T: Sequence[float], z_T: Sequence[float]) -> Surface | None:
    """A thin-plate spline through the points; None where they are too few or on one line."""
    from scipy.interpolate import RBFInterpolator
    from scipy.spatial import Delaunay, QhullError

    points = np.column_stack([x_T, y_T]).astype(np.float64)
    values = np.asarray(z_T, dtype=np.float64)
    span = np.ptp(points, axis=0) if len(points) else np.zeros(2)
    if len(np.unique(points, axis=0)) < FEWEST_TRIALS or (span == 0).any():
        return None
    low = points.min(axis=0)
    unit = (points - low) / span
    scale = float(values.std()) or 1.0
    try:
        hull = Delaunay(unit)
        fit = RBFInterpolator(
            unit, (values - values.mean()) / scale, kernel="thin_plate_spline", smoothing=_SMOOTHING
        )
    except (QhullError, np.linalg.LinAlgError):
        return None
    axis = np.linspace(0.0, 1.0, _CELLS)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    z = fit(grid) * scale + values.mean()
    z[hull.find_simplex(grid, tol=1e-9) < 0] = np.nan
    return Surface(
        x=low[0] + axis * span[0], y=low[1] + axis * span[1], z=z.reshape(_CELLS, _CELLS)
    )
