"""A smooth surface through a search's trials: how the score changes over two parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrmc_ray.evaluate.changes import Comparison
from lrmc_ray.evaluate.front import (
    HYPERVOLUME_REFERENCE,
    front_probability,
    hypervolume_replicates,
    knee,
    knee_replicates,
    pareto_front,
)
from lrmc_ray.evaluate.statistics import FloatArray, Interval, percentile_interval

FEWEST_TRIALS = 6
"""Fewer points than this say nothing about a surface."""
_CELLS = 41
_NEIGHBORS = 500
"""Where there are more trials, the surface at a place is that of so many trials around it."""
_SMOOTHING = 1e-2  # in units of the scores' variance: scores are noisy, the surface is not


@dataclass(frozen=True, eq=False)
class Surface:
    """Scores on a grid; NaN outside of the trials' convex hull, where nothing is known."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    """Shape [len(y), len(x)]."""


def surface(x_J: Sequence[float], y_J: Sequence[float], z_J: Sequence[float]) -> Surface | None:
    """A thin-plate spline through the points; None where they are too few or on one line."""
    from scipy.interpolate import RBFInterpolator
    from scipy.spatial import Delaunay, QhullError

    points = np.column_stack([x_J, y_J]).astype(np.float64)
    values = np.asarray(z_J, dtype=np.float64)
    span = np.ptp(points, axis=0) if len(points) else np.zeros(2)
    if len(np.unique(points, axis=0)) < FEWEST_TRIALS or (span == 0).any():
        return None
    low = points.min(axis=0)
    unit = (points - low) / span
    scale = float(values.std()) or 1.0
    try:
        hull = Delaunay(unit)
        fit = RBFInterpolator(
            unit,
            (values - values.mean()) / scale,
            # The spline through all points takes the cube of their number.
            neighbors=_NEIGHBORS if len(unit) > _NEIGHBORS else None,
            kernel="thin_plate_spline",
            smoothing=_SMOOTHING,
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
    gain_JZ = np.stack([one.domain_gain_replicates for one in comparisons])
    forgetting_JZ = np.stack([one.forgetting_replicates for one in comparisons])
    bend = knee(points)
    assert bend is not None  # There is at least one point.
    knee_Z = knee_replicates(gain_JZ, forgetting_JZ)
    columns_Z = np.arange(len(knee_Z))
    area_JZ = hypervolume_replicates(gain_JZ, forgetting_JZ, HYPERVOLUME_REFERENCE)
    gain_J, forgetting_J = np.asarray(points, dtype=np.float64).T
    area_J = hypervolume_replicates(gain_J[:, None], forgetting_J[:, None], HYPERVOLUME_REFERENCE)[
        :, 0
    ]
    times_J = np.bincount(knee_Z, minlength=len(points))
    return TradeOff(
        front=tuple(pareto_front(points)),
        front_probability=tuple(map(float, front_probability(gain_JZ, forgetting_JZ))),
        knee=bend,
        knee_probability=tuple(map(float, times_J / len(knee_Z))),
        knee_gain=percentile_interval(points[bend][0], gain_JZ[knee_Z, columns_Z]),
        knee_forgetting=percentile_interval(points[bend][1], forgetting_JZ[knee_Z, columns_Z]),
        hypervolume=tuple(
            percentile_interval(float(area), area_Z)
            for area, area_Z in zip(area_J, area_JZ, strict=True)
        ),
        budget_probability=tuple(
            float(np.mean(row_Z <= max_forgetting)) for row_Z in forgetting_JZ
        ),
    )
