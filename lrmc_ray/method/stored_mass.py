"""Probability mass as it is stored: float16 logarithms rounded down, summed as integers.

The mass of a stored log-probability x is ``floor(2^40 exp(x)) / 2^40``. Integer sums depend on no
order, chunk or device, so whoever sums the same entries finds the same mass, to the last bit.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

MASS_UNIT = 2**40
"""Masses are integers, this many of them to a probability of 1."""
_LOWEST = torch.finfo(torch.float16).min


def round_down(logprobs: Tensor) -> Tensor:
    """The largest float16 at most ``logprobs`` (and at least the lowest finite one)."""
    logprobs = logprobs.clamp(_LOWEST, 0.0)
    rounded = logprobs.half()
    down = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded > logprobs, down, rounded)


def mass_of(logprobs: Tensor) -> Tensor:
    """Mass of each stored log-probability, int64 in units of ``1 / MASS_UNIT``."""
    bits = logprobs.view(torch.int16).long() & 0xFFFF
    return _mass_table(logprobs.device)[bits]


def running_mass(logprobs_E: Tensor) -> Tensor:
    """[E + 1] int64, the mass before each entry, and that of all of them.

    Integers may wrap around past 2^23 rows; differences stay exact.
    """
    return F.pad(mass_of(logprobs_E).cumsum(0), (1, 0))


def mass_goal(tau: float) -> int:
    """The least mass that reaches the probability ``tau``."""
    return math.ceil(tau * MASS_UNIT)


def first_reaching(tau: float, mass_nK: Tensor) -> Tensor:
    """[n], how many leading entries it takes to hold ``tau``; K + 1 where all do not."""
    return 1 + (mass_nK.cumsum(-1) < mass_goal(tau)).sum(-1)


@functools.cache
def _mass_table(device: torch.device) -> Tensor:
    """[65536] int64: the mass of every float16 bit pattern of an x <= 0."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).tolist()
    masses = [math.floor(math.exp(x) * MASS_UNIT) if x <= 0 else 0 for x in values]
    return torch.tensor(masses, dtype=torch.int64, device=device)
