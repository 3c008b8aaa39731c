"""MoClip's two passes over a float32 tensor on a CPU, each one loop that numba compiles.

Moments are float32, or bf16 with stochastic rounding, which numba knows as integers of 16 bits.

torch's operators pass over memory once each, a dozen times per step. Here a weight, its gradient
and both moments are read once, and written once. numba needs no C++ compiler. It compiles for some
seconds at the first step, and keeps the result beside this file or in the user's cache directory.

- An array is taken in pieces of ``PIECE`` elements, whose dot products are added up in their order.
  So the sums have the same bits for every number of threads.
- Products are fused with sums where the processor can, so the last bits are not those of torch's
  operators. The arctangent has a relative error below 5e-7.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
"""The bits of bf16."""

PIECE = 1 << 20
"""Elements of an array that one thread takes at a time."""

_ZERO = np.float32(0)
HALF_PI = np.float32(np.pi / 2)
TINY = np.finfo(np.float32).tiny
_HALF, _LOW = np.uint32(16), np.uint32(0xFFFF)
_GOLDEN, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
ARCTANGENT = tuple(
    np.float32(number)
    for number in (
        -0.3333239155999517,
        0.1997421377925786,
        -0.14041326814428545,
        0.09968471672476224,
        -0.060203114669943915,
        0.024734049977873446,
        -0.004822528846739724,
    )
)
"""``atan(r) / r - 1`` in powers r^2, r^4, ...: minimax fit on [0, 1], relative error 1.1e-7."""
_ATAN_2, _ATAN_4, _ATAN_6, _ATAN_8, _ATAN_10, _ATAN_12, _ATAN_14 = ARCTANGENT


class StepScalars(NamedTuple):
    """The numbers of one step of a parameter group."""

    first_rate: float
    """1 - beta1"""
    second_rate: float
    """1 - beta2"""
    first_scale: float
    """1 / (1 - beta1^t)"""
    second_scale: float
    """1 / (1 - beta2^t)"""
    decay: float
    """1 - lr weight_decay"""
    step_size: float
    """lr a"""


def can_take(param: Tensor, *moments: Tensor) -> bool:
    """Whether these are contiguous on the CPU, weights float32, moments that or bf16."""
    return (
        all(tensor.is_cpu and tensor.is_contiguous() for tensor in (param, *moments))
        and param.dtype == torch.float32
        and len(dtypes := {moment.dtype for moment in moments}) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
    )


def dot_products(grad: Tensor, exp_avg: Tensor) -> Tensor:
    """``[<g, g>, <g, m>, <m, m>]`` of a gradient and a moment on the CPU, [3] float64."""
    g, m = _flat(grad), _flat(exp_avg)
    loop = _loops(exp_avg.dtype).dots
    pieces = _in_pieces(lambda piece: loop(g[piece], m[piece]), g.size)
    return torch.tensor(list(pieces), dtype=torch.float64).sum(0)


def update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    p: float,
    q: float,
    scalars: StepScalars,
    *,
    sees_capped: bool,
    is_cautious: bool,
    key: int,
) -> None:
    """``moclip.update_`` of tensors that :func:`can_take` takes.

    Args:
        param: The weights, changed in place, as both moments are.
        grad: Their gradient, of any layout.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        p: The capped gradient is p g + q m.
        q: See there.
        scalars: The numbers of this step.
        sees_capped: The second moment is of the capped gradient, not of the raw one.
        is_cautious: A weight that would move against its gradient stays.
        key: By which bf16 moments are rounded.
    """
    arrays = _flat(param), _flat(grad), _flat(exp_avg), _flat(exp_avg_sq)
    numbers = tuple(map(np.float32, (p, q, *scalars)))
    loop = _loops(exp_avg.dtype).update
    is_rounded = exp_avg.dtype == torch.bfloat16

    def take(piece: slice) -> None:
        place = (np.uint32(key), np.uint32(piece.start % 2**32)) if is_rounded else ()
        loop(*(array[piece] for array in arrays), sees_capped, is_cautious, *place, *numbers)

    for _ in _in_pieces(take, arrays[0].size):
        pass
    for tensor in (param, exp_avg, exp_avg_sq):
        torch.autograd.graph.increment_version(tensor)  # numpy's writes are unknown to torch


def _flat(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().contiguous().view(-1)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.float().numpy()


def _in_pieces(take: Callable[[slice], Any], size: int) -> Iterable[Any]:
    """The results of ``take`` for all pieces, in order; torch's threads share the work."""
    pieces = [slice(start, start + PIECE) for start in range(0, max(1, size), PIECE)]
    if len(pieces) == 1 or torch.get_num_threads() == 1:
        return [take(piece) for piece in pieces]
    return _threads(torch.get_num_threads()).map(take, pieces)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="moclip")


class _Loops(NamedTuple):
    dots: Callable[..., tuple[float, float, float]]
    update: Callable[..., None]


@functools.cache
def _loops(moments: torch.dtype) -> _Loops:
    """Both loops for moments of this type, compiled.

    Where they cannot be kept or read back (no place that can be written to, a full disk, a damaged
    file), this process compiles them for itself.
    """
    try:
        return _compile(moments, cache=True)
    except Exception as error:  # whatever reading a damaged file raises
        _log.debug("MoClip's compiled step is not kept: %s", error)
        return _compile(moments, cache=False)


def _compile(moments: torch.dtype, *, cache: bool) -> _Loops:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": cache}
    is_rounded = moments == torch.bfloat16
    # Rules of IEEE 754 that LLVM may relax: sums may be reordered in the first loop alone.
    dots = numba.njit(fastmath={"contract", "reassoc", "nsz"}, **options)(
        _dots_of_halves if is_rounded else _dots
    )
    update = numba.njit(fastmath={"contract"}, **options)(
        _update_rounded if is_rounded else _update
    )
    one = np.ones(1, dtype=np.float32)
    moment = np.ones(1, dtype=np.uint16) if is_rounded else one
    place = [np.uint32(0)] * 2 if is_rounded else []
    dots(one, moment)
    update(one, one, moment, moment, False, False, *place, *[np.float32(0.5)] * 8)
    return _Loops(dots, update)


def _dots(grad: Floats, exp_avg: Floats) -> tuple[float, float, float]:
    gg = gm = mm = 0.0
    for i in range(grad.size):
        g, m = np.float64(grad[i]), np.float64(exp_avg[i])
        gg += g * g
        gm += g * m
        mm += m * m
    return gg, gm, mm


def _dots_of_halves(grad: Floats, exp_avg: Halves) -> tuple[float, float, float]:
    gg = gm = mm = 0.0
    for i in range(grad.size):
        g, m = np.float64(grad[i]), np.float64(_widened(exp_avg[i]))
        gg += g * g
        gm += g * m
        mm += m * m
    return gg, gm, mm


def _update(
    param: Floats,
    grad: Floats,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    sees_capped: bool,
    is_cautious: bool,
    *numbers: np.float32,
) -> None:
    for i in range(param.size):
        param[i], exp_avg[i], exp_avg_sq[i] = _moved(
            param[i], grad[i], exp_avg[i], exp_avg_sq[i], sees_capped, is_cautious, *numbers
        )


def _update_rounded(
    param: Floats,
    grad: Floats,
    exp_avg: Halves,
    exp_avg_sq: Halves,
    sees_capped: bool,
    is_cautious: bool,
    key: np.uint32,
    first: np.uint32,
    *numbers: np.float32,
) -> None:
    for i in range(param.size):
        m, v = _widened(exp_avg[i]), _widened(exp_avg_sq[i])
        param[i], m, v = _moved(param[i], grad[i], m, v, sees_capped, is_cautious, *numbers)
        bits = _random_bits(np.uint32(first + np.uint32(i)), key)
        exp_avg[i] = _rounded(m, bits & _LOW)
        exp_avg_sq[i] = _rounded(v, bits >> _HALF)


@numba.njit(error_model="numpy", fastmath={"contract"})
def _moved(
    w: np.float32,
    g: np.float32,
    m: np.float32,
    v: np.float32,
    sees_capped: bool,
    is_cautious: bool,
    p: np.float32,
    q: np.float32,
    first_rate: np.float32,
    second_rate: np.float32,
    first_scale: np.float32,
    second_scale: np.float32,
    decay: np.float32,
    step_size: np.float32,
) -> tuple[np.float32, np.float32, np.float32]:
    """A weight and its moments behind the step."""
    capped = p * g + q * m
    seen = capped if sees_capped else g
    m += first_rate * (capped - m)
    v += second_rate * (seen * seen - v)
    angle = arctan2_nonnegative(first_scale * m, np.sqrt(second_scale * v))
    # The product of g and m could be too small for float32, and would have no sign then. Where m is
    # 0, so is the angle.
    along = -g if m < 0 else g
    if is_cautious and along < 0:
        angle = _ZERO
    return decay * w - step_size * angle, m, v


@numba.njit(error_model="numpy")
def _widened(half: np.uint16) -> np.float32:
    wide: np.float32 = np.uint32(np.uint32(half) << _HALF).view(np.float32)
    return wide


@numba.njit(error_model="numpy")
def _rounded(value: np.float32, bits: np.uint32) -> np.uint16:
    """``stochastic_rounding.round_to_bf16``, by the bits of a number."""
    return np.uint16(np.uint32(np.float32(value).view(np.uint32) + bits) >> _HALF)


@numba.njit(error_model="numpy")
def _random_bits(place: np.uint32, key: np.uint32) -> np.uint32:
    """``stochastic_rounding.random_bits`` of one element."""
    bits = np.uint32(place * _GOLDEN + key)
    bits = np.uint32((bits ^ (bits >> _HALF)) * _FIRST)
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * _SECOND)
    return np.uint32(bits ^ (bits >> _HALF))


@numba.njit(error_model="numpy", fastmath={"contract"})
def arctan2_nonnegative(y: np.float32, x: np.float32) -> np.float32:
    """``arctan2(y, x)`` for finite y and x >= 0, with a relative error below 5e-7.

    The library's covers four quadrants to the last bit, and no compiler makes a loop of it that
    takes several numbers at a time. Where both are below 1e-30, the angle is too small.
    """
    height = np.abs(y)
    is_steep = height > x
    # The smallest normal number, so that (0, 0) has the angle 0; no change above 1e-30.
    longer = (height if is_steep else x) + TINY
    r = (x if is_steep else height) / longer
    s = r * r
    series = ((((_ATAN_14 * s + _ATAN_12) * s + _ATAN_10) * s + _ATAN_8) * s + _ATAN_6) * s
    series = ((series + _ATAN_4) * s + _ATAN_2) * s
    octant = r + r * series
    angle = HALF_PI - octant if is_steep else octant
    return -angle if y < 0 else angle
