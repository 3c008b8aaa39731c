"""What a search maximizes: domain gain less weighted forgetting, both as fractions of a score."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Measured = TypeVar("Measured", float, NDArray[np.float64])
"""One number, or one per bootstrap replicate."""


def combined_objective(
    domain_gain: Measured, forgetting: Measured, *, forgetting_weight: float
) -> Measured:
    """``domain_gain - forgetting_weight * forgetting``; more is better."""
    return domain_gain - forgetting_weight * forgetting
