"""MoClip's step on a GPU: two passes over fixed chunks of all tensors, each in one launch.

``chunk_dots`` leaves the dot products of every chunk, which ``add_chunks`` adds up for each tensor,
in their order. The cap on the angle is computed from these few numbers by torch (``angle_cap``).
``chunk_update`` is ``moclip.update_``: a weight, its gradient and both moments are read once, and
written once. A program finds its tensors by a table of pointers, ``chunk_table``.

Sums are in float64 and in a fixed order, so two runs give the same bits. The arctangent is that of
``moclip_kernel``, with a relative error below 5e-7.
"""

import torch
import triton
import triton.language as tl

from lrmc_ray.method.fast.moclip_kernel import ARCTANGENT, HALF_PI, TINY
from lrmc_ray.method.fast.rounding_triton import narrowed
from lrmc_ray.method.stochastic_rounding import FIRST, GOLDEN, SECOND

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's names of types."""
_A2, _A4, _A6, _A8, _A10, _A12, _A14 = (tl.constexpr(float(number)) for number in ARCTANGENT)
_GOLDEN, _FIRST, _SECOND = tl.constexpr(GOLDEN), tl.constexpr(FIRST), tl.constexpr(SECOND)
_HALF_PI = tl.constexpr(float(HALF_PI))
_TINY = tl.constexpr(float(TINY))


@triton.jit
def _pointer(table, place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor whose address stands at ``place``; ``ALIGNED`` is what a wide load needs."""
    tensor = tl.load(table + place).to(tl.pointer_type(TYPE))
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
    return tensor


@triton.jit
def _loaded(tensor, places, size, IS_WHOLE: tl.constexpr):
    """Elements in their own type. Where all places are inside, nothing asks, and loads are wide."""
    if IS_WHOLE:
        return tl.load(tensor + places)
    return tl.load(tensor + places, mask=places < size, other=0.0)


@triton.jit
def _stored(tensor, places, values, size, IS_WHOLE: tl.constexpr):
    if IS_WHOLE:
        tl.store(tensor + places, values)
    else:
        tl.store(tensor + places, values, mask=places < size)


@triton.jit
def _products(grad, exp_avg, places, size, IS_WHOLE: tl.constexpr):
    g = _loaded(grad, places, size, IS_WHOLE).to(tl.float32).to(tl.float64)
    m = _loaded(exp_avg, places, size, IS_WHOLE).to(tl.float32).to(tl.float64)
    return g * g, g * m, m * m


@triton.jit
def chunk_dots(
    table,
    sizes,
    owners,
    starts,
    partial,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``<g, g>``, ``<g, m>`` and ``<m, m>`` of each chunk; the table has gradients and momenta."""
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    start = tl.multiple_of(tl.load(starts + chunk), BLOCK)
    size = tl.load(sizes + owner)
    grad = _pointer(table, owner * 2, GRAD_TYPE, ALIGNED)
    exp_avg = _pointer(table, owner * 2 + 1, MOMENT_TYPE, ALIGNED)
    gg = tl.zeros((BLOCK,), tl.float64)
    gm = tl.zeros((BLOCK,), tl.float64)
    mm = tl.zeros((BLOCK,), tl.float64)
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            places = start + offset + tl.arange(0, BLOCK)
            more_gg, more_gm, more_mm = _products(grad, exp_avg, places, size, True)
            gg += more_gg
            gm += more_gm
            mm += more_mm
    else:
        for offset in range(0, CHUNK, BLOCK):
            places = start + offset + tl.arange(0, BLOCK)
            more_gg, more_gm, more_mm = _products(grad, exp_avg, places, size, False)
            gg += more_gg
            gm += more_gm
            mm += more_mm
    tl.store(partial + chunk * 3, tl.sum(gg, axis=0))
    tl.store(partial + chunk * 3 + 1, tl.sum(gm, axis=0))
    tl.store(partial + chunk * 3 + 2, tl.sum(mm, axis=0))


@triton.jit
def add_chunks(partial, bounds, dots, BLOCK: tl.constexpr):
    """Dot products [G, 3] of each tensor, from those of its chunks."""
    owner = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds + owner)
    end = tl.load(bounds + owner + 1)
    columns = tl.arange(0, 4)
    total = tl.zeros((4,), tl.float64)
    for start in range(begin, end, BLOCK):
        chunks = start + tl.arange(0, BLOCK)
        values = tl.load(
            partial + chunks[:, None] * 3 + columns[None, :],
            mask=(chunks < end)[:, None] & (columns < 3)[None, :],
            other=0.0,
        )
        total += tl.sum(values, axis=0)
    tl.store(dots + owner * 3 + columns, total, mask=columns < 3)


@triton.jit
def _arctangent(y, x):
    """``arctan2(y, x)`` for x >= 0, see ``moclip_kernel.arctan2_nonnegative``."""
    height = tl.abs(y)
    is_steep = height > x
    longer = tl.where(is_steep, height, x) + _TINY
    r = tl.div_rn(tl.where(is_steep, x, height), longer)
    s = r * r
    series = ((((_A14 * s + _A12) * s + _A10) * s + _A8) * s + _A6) * s
    series = ((series + _A4) * s + _A2) * s
    octant = r + r * series
    angle = tl.where(is_steep, _HALF_PI - octant, octant)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def _random_bits(places, key):
    """``stochastic_rounding.random_bits`` of elements."""
    bits = places.to(tl.uint32) * _GOLDEN + key
    bits = (bits ^ (bits >> 16)) * _FIRST
    bits = (bits ^ (bits >> 13)) * _SECOND
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(values, bits):
    """``stochastic_rounding.round_to_bf16``."""
    whole = values.to(tl.uint32, bitcast=True) + bits
    return (whole >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    places,
    size,
    p,
    q,
    first_scale,
    second_scale,
    first_rate,
    second_rate,
    decay,
    step_size,
    key,
    PARAM_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_Q: tl.constexpr,
    SEES_CAPPED: tl.constexpr,
    IS_CAUTIOUS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    w = _loaded(param, places, size, IS_WHOLE).to(tl.float32)
    g = _loaded(grad, places, size, IS_WHOLE).to(tl.float32)
    m = _loaded(exp_avg, places, size, IS_WHOLE).to(tl.float32)
    v = _loaded(exp_avg_sq, places, size, IS_WHOLE).to(tl.float32)
    capped = g
    if HAS_P:
        capped = p * g
    if HAS_Q:
        capped += q * m
    seen = g
    if SEES_CAPPED:
        seen = capped
    m += first_rate * (capped - m)
    v += second_rate * (seen * seen - v)
    angle = _arctangent(first_scale * m, tl.sqrt_rn(second_scale * v))
    if IS_CAUTIOUS:
        # The product of g and m could be too small for float32, and would have no sign then.
        angle = tl.where(((g > 0) & (m < 0)) | ((g < 0) & (m > 0)), 0.0, angle)
    w = narrowed(decay * w - step_size * angle, PARAM_TYPE)
    if tl.bfloat16 == MOMENT_TYPE:
        bits = _random_bits(places, key)
        m = _rounded(m, bits & 0xFFFF)
        v = _rounded(v, bits >> 16)
    _stored(exp_avg, places, m, size, IS_WHOLE)
    _stored(exp_avg_sq, places, v, size, IS_WHOLE)
    _stored(param, places, w, size, IS_WHOLE)


@triton.jit
def chunk_update(
    table,
    sizes,
    owners,
    starts,
    indices,
    keys,
    p,
    q,
    scales,
    first_rate,
    second_rate,
    decay,
    step_size,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_Q: tl.constexpr,
    SEES_CAPPED: tl.constexpr,
    IS_CAUTIOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the weights and moments of each chunk by the capped gradient p g + q m.

    The table has weights, gradients and both moments. ``indices`` says where in p and q a tensor's
    numbers are, ``scales`` has 1 / (1 - beta^t) of both moments for each tensor, and ``keys`` has
    what moments in bf16 are rounded by.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    start = tl.multiple_of(tl.load(starts + chunk), BLOCK)
    size = tl.load(sizes + owner)
    index = tl.load(indices + owner)
    param = _pointer(table, owner * 4, PARAM_TYPE, ALIGNED)
    grad = _pointer(table, owner * 4 + 1, GRAD_TYPE, ALIGNED)
    exp_avg = _pointer(table, owner * 4 + 2, MOMENT_TYPE, ALIGNED)
    exp_avg_sq = _pointer(table, owner * 4 + 3, MOMENT_TYPE, ALIGNED)
    first_scale = tl.load(scales + owner * 2)
    second_scale = tl.load(scales + owner * 2 + 1)
    p_of_tensor = tl.full((), 1.0, tl.float32)
    q_of_tensor = tl.full((), 0.0, tl.float32)
    if HAS_P:
        p_of_tensor = tl.load(p + index).to(tl.float32)
    if HAS_Q:
        q_of_tensor = tl.load(q + index).to(tl.float32)
    key = tl.full((), 0, tl.uint32)
    if tl.bfloat16 == MOMENT_TYPE:
        key = tl.load(keys + owner).to(tl.uint32)
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            _update(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                start + offset + tl.arange(0, BLOCK),
                size,
                p_of_tensor,
                q_of_tensor,
                first_scale,
                second_scale,
                first_rate,
                second_rate,
                decay,
                step_size,
                key,
                PARAM_TYPE,
                MOMENT_TYPE,
                HAS_P,
                HAS_Q,
                SEES_CAPPED,
                IS_CAUTIOUS,
                True,
            )
    else:
        for offset in range(0, CHUNK, BLOCK):
            _update(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                start + offset + tl.arange(0, BLOCK),
                size,
                p_of_tensor,
                q_of_tensor,
                first_scale,
                second_scale,
                first_rate,
                second_rate,
                decay,
                step_size,
                key,
                PARAM_TYPE,
                MOMENT_TYPE,
                HAS_P,
                HAS_Q,
                SEES_CAPPED,
                IS_CAUTIOUS,
                False,
            )
