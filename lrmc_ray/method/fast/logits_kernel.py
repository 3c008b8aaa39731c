"""Two passes over rows of float32 logits on a CPU, each one loop that numba compiles.

With torch's operators a row of 262,144 logits is widened, shifted, exponentiated and added up one
after the other, and looked at twice more for what is not finite. Here one loop does all of it. Rows
are independent, so every number of threads gives the same bits.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_PIECE = 2048
"""Logits whose exponentials wait in the cache to be added up."""
_WIDEST = np.float32(600)
"""exp(-600) is nothing beside the largest of a row, which is 1."""
_ROUNDER = 1.5 * 2**52
_LOG2_E = 1 / math.log(2)
_LN_2 = math.log(2)
# exp(r) for |r| <= ln(2) / 2, in powers of r; what is left out is below 7e-15.
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11 = (1 / math.factorial(n) for n in range(2, 12))


def can_take(logits_nV: Tensor) -> bool:
    """Whether these are contiguous float32 logits on the CPU."""
    return bool(logits_nV.is_cpu and logits_nV.dtype == torch.float32 and logits_nV.is_contiguous())


def block_maxima(logits_nV: Tensor, num_blocks: int) -> Tensor:
    """[n, X], the largest of the logits x, x + X, x + 2X, ... of each row, up to whole blocks."""
    maxima_nX = torch.empty(len(logits_nV), num_blocks)
    _by_rows(_loops().maxima, logits_nV.numpy(), maxima_nX.numpy())
    return maxima_nX


def exp_sums(logits_nV: Tensor, highest_n: Tensor) -> Tensor:
    """[n] float64, the sum of ``exp(logit - highest)``; NaN where a logit is not finite."""
    sum_n = torch.empty(len(logits_nV), dtype=torch.float64)
    _by_rows(_loops().sums, logits_nV.numpy(), highest_n.contiguous().numpy(), sum_n.numpy())
    return sum_n


def _by_rows(function: Callable[..., None], *arrays: Any) -> None:
    """Run ``function`` over all rows; torch's threads share them."""
    rows, threads = len(arrays[0]), torch.get_num_threads()
    if min(rows, threads) <= 1:
        function(*arrays)
        return
    size = -(-rows // threads)

    def take(start: int) -> None:
        function(*(array[start : start + size] for array in arrays))

    for _ in _threads(threads).map(take, range(0, rows, size)):
        pass


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="logits")


class _Loops(NamedTuple):
    maxima: Callable[..., None]
    sums: Callable[..., None]


@functools.cache
def _loops() -> _Loops:
    """Both loops, compiled; for this process alone where they cannot be kept or read back."""
    try:
        return _compile(cache=True)
    except Exception as error:  # whatever reading a damaged file raises
        _log.debug("the compiled search for candidates is not kept: %s", error)
        return _compile(cache=False)


def _compile(*, cache: bool) -> _Loops:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": cache}
    maxima = numba.njit(**options)(_maxima)
    sums = numba.njit(**options)(_sums)
    one = np.ones((1, 1), dtype=np.float32)
    maxima(one, np.ones((1, 1), dtype=np.float32))
    sums(one, one[0], np.ones(1))
    return _Loops(maxima, sums)


def _maxima(logits: Floats, maxima: Floats) -> None:
    size = maxima.shape[1]
    for i in range(logits.shape[0]):
        own, row = maxima[i], logits[i]
        for x in range(size):
            own[x] = row[x]
        for start in range(size, row.size - size + 1, size):
            part = row[start : start + size]
            for x in range(size):
                own[x] = own[x] if own[x] > part[x] else part[x]


def _sums(logits: Floats, highest: Floats, sums: Doubles) -> None:
    piece = np.empty(_PIECE)
    for i in range(logits.shape[0]):
        total = 0.0
        for start in range(0, logits.shape[1], _PIECE):
            part = logits[i, start : start + _PIECE]
            exponentials(part, highest[i], piece)
            total += added(piece[: part.size])
        sums[i] = total


@numba.njit(error_model="numpy", fastmath={"contract"})
def exponentials(logits: Floats, highest: np.float32, found: Doubles) -> None:
    """``exp(logit - highest)`` of each logit; NaN where it is not finite."""
    top, lowest = np.float64(highest), highest - _WIDEST
    for j in range(logits.size):
        logit = logits[j]
        bounded = logit if logit > lowest else lowest
        shifted = np.float64(bounded) - top
        # Behind so large a number there is no room for a fraction: the last bits are the power.
        rounded = shifted * _LOG2_E + _ROUNDER
        r = shifted - (rounded - _ROUNDER) * _LN_2
        # Two short chains of products rather than a long one: the processor computes both at once.
        s = r * r
        even = ((((_C10 * s + _C8) * s + _C6) * s + _C4) * s + _C2) * s + 1.0
        odd = ((((_C11 * s + _C9) * s + _C7) * s + _C5) * s + _C3) * s + 1.0
        bits = (np.float64(rounded).view(np.int64) << 52) + (1023 << 52)
        # Nothing is added, unless the logit is NaN or infinite.
        found[j] = (odd * r + even) * np.int64(bits).view(np.float64) + (logit - logit)


@numba.njit(error_model="numpy", fastmath={"reassoc", "nsz"})
def added(numbers: Doubles) -> float:
    """Their sum, in an order that the compiler chooses."""
    total = 0.0
    for j in range(numbers.size):
        total += numbers[j]
    return total
