"""MoClip's step on a GPU: two passes over fixed chunks of all tensors, each in one launch.

``chunk_dots`` leaves the dot products of chunks. Every program of ``chunk_update`` adds those of
its tensor up, in their order, caps the angle as ``angle_cap`` does, and goes on as
``moclip.update_``: a weight, its gradient and both moments are read once, and written once. There
are no atomics, and no program waits for another. A program finds its tensors by a table of
pointers, ``chunk_table``.

What the programs read again is bounded: a vector with an angle has at most ``MOST_SPANS`` = 512
sums of 32 bytes, so 16 KiB from the cache, where a chunk's update moves 896 KiB (float32) or 448
KiB (all in bf16): 2 to 4 %.

Sums and cap are in float64 and in a fixed order, so two runs give the same bits. The arctangent is
that of ``moclip_kernel``, with a relative error below 5e-7; the arc cosine's is 4e-16.
"""

import math

import torch
import triton
import triton.language as tl

from lrmc_ray.method.angle_cap import COLLINEAR_SINE
from lrmc_ray.method.fast.moclip_kernel import ARCTANGENT, HALF_PI, TINY
from lrmc_ray.method.fast.rounding_triton import narrowed
from lrmc_ray.method.stochastic_rounding import FIRST, GOLDEN, SECOND

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's names of types."""
_A2, _A4, _A6, _A8, _A10, _A12, _A14 = (tl.constexpr(float(number)) for number in ARCTANGENT)
_GOLDEN, _FIRST, _SECOND = tl.constexpr(GOLDEN), tl.constexpr(FIRST), tl.constexpr(SECOND)
_HALF_PI = tl.constexpr(float(HALF_PI))
_TINY = tl.constexpr(float(TINY))
_COLLINEAR = tl.constexpr(COLLINEAR_SINE)
_HALF_TURN = tl.constexpr(math.pi)
_REST = tl.constexpr(6.123233995736766e-17)  # of pi / 2, what float64 leaves out
_DEGREES = tl.constexpr(180 / math.pi)
# (arcsin(x) / x - 1) / x^2 for |x| <= 0.5 as a ratio of polynomials in x^2; Sun's fdlibm, e_acos.c.
_P0 = tl.constexpr(1.66666666666666657415e-01)
_P1 = tl.constexpr(-3.25565818622400915405e-01)
_P2 = tl.constexpr(2.01212532134862925881e-01)
_P3 = tl.constexpr(-4.00555345006794114027e-02)
_P4 = tl.constexpr(7.91534994289814532176e-04)
_P5 = tl.constexpr(3.47933107596021167570e-05)
_Q1 = tl.constexpr(-2.40339491173441421878e00)
_Q2 = tl.constexpr(2.02094576023350569471e00)
_Q3 = tl.constexpr(-6.88283971605453293030e-01)
_Q4 = tl.constexpr(7.70381505559019352791e-02)


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
    spans,
    partial,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``<g, g>``, ``<g, m>``, ``<m, m>`` and number of elements of each span of chunks [P, 4].

    The table has gradients and momenta.
    """
    span = tl.program_id(0).to(tl.int64)
    gg = tl.zeros((BLOCK,), tl.float64)
    gm = tl.zeros((BLOCK,), tl.float64)
    mm = tl.zeros((BLOCK,), tl.float64)
    number = tl.full((), 0, tl.int64)
    for chunk in range(tl.load(spans + span), tl.load(spans + span + 1)):
        owner = tl.load(owners + chunk)
        start = tl.multiple_of(tl.load(starts + chunk), BLOCK)
        size = tl.load(sizes + owner)
        grad = _pointer(table, owner * 2, GRAD_TYPE, ALIGNED)
        exp_avg = _pointer(table, owner * 2 + 1, MOMENT_TYPE, ALIGNED)
        number += tl.minimum(size - start, CHUNK)
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
    tl.store(partial + span * 4, tl.sum(gg, axis=0))
    tl.store(partial + span * 4 + 1, tl.sum(gm, axis=0))
    tl.store(partial + span * 4 + 2, tl.sum(mm, axis=0))
    tl.store(partial + span * 4 + 3, number.to(tl.float64))


@triton.jit
def _sums(partial, begin, end, TOGETHER: tl.constexpr):
    """The rows ``begin`` to ``end`` of ``partial`` [P, 4] added up in their order."""
    columns = tl.arange(0, 4)
    total = tl.zeros((4,), tl.float64)
    for start in range(begin, end, TOGETHER):
        rows = start + tl.arange(0, TOGETHER)
        values = tl.load(
            partial + rows[:, None] * 4 + columns[None, :], mask=(rows < end)[:, None], other=0.0
        )
        total += tl.sum(values, axis=0)
    return total


@triton.jit
def add_spans(partial, bounds, rows, dots, TOGETHER: tl.constexpr):
    """Sums of each tensor from those of its spans, to its row of ``dots`` [T, 4].

    Taken where they go through a sum over workers before the update.
    """
    owner = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds + owner * 2)
    end = tl.load(bounds + owner * 2 + 1)
    row = tl.load(rows + owner)
    tl.store(dots + row * 4 + tl.arange(0, 4), _sums(partial, begin, end, TOGETHER))


@triton.jit
def arccosine(x):
    """Of float64 in [-1, 1], with a relative error below 4e-16: the fit of fdlibm's acos."""
    size = tl.abs(x)
    is_small = size < 0.5
    z = tl.where(is_small, x * x, (1.0 - size) * 0.5)
    top = ((((_P5 * z + _P4) * z + _P3) * z + _P2) * z + _P1) * z + _P0
    below = (((_Q4 * z + _Q3) * z + _Q2) * z + _Q1) * z + 1.0
    ratio = z * top / below
    root = tl.sqrt(z)
    near_0 = _HALF_TURN * 0.5 - (x - (_REST - x * ratio))
    near_minus_1 = _HALF_TURN - 2.0 * (root + (ratio * root - _REST))
    near_1 = 2.0 * (root + ratio * root)
    return tl.where(is_small, near_0, tl.where(x < 0.0, near_minus_1, near_1))


@triton.jit
def capped_gradient(sums, numbers, CLIP: tl.constexpr):
    """``angle_cap.cap_angle``: p, q and the angle, NaN where there is none, in float64.

    Args:
        sums: [4], of what is one vector: dot products and number of elements.
        numbers: Pointer to delta, its cosine and sine, and beta1 / (1 - beta1) times the sine.
        CLIP: The reading.
    """
    columns = tl.arange(0, 4)
    g_norm = tl.sqrt(tl.sum(tl.where(columns == 0, sums, 0.0), axis=0))
    gm = tl.sum(tl.where(columns == 1, sums, 0.0), axis=0)
    m_norm = tl.sqrt(tl.sum(tl.where(columns == 2, sums, 0.0), axis=0))
    number = tl.sum(tl.where(columns == 3, sums, 0.0), axis=0)
    delta = tl.load(numbers)
    delta_cosine = tl.load(numbers + 1)
    delta_sine = tl.load(numbers + 2)
    cosine = gm / (g_norm * m_norm)
    has_angle = cosine == cosine
    # The larger of NaN and a number is the number, so NaN is remembered apart.
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    theta = arccosine(cosine)
    is_capped = has_angle & (theta - delta > 0.0)
    sine = tl.sqrt(tl.maximum((1.0 - cosine) * (1.0 + cosine), 0.0))
    turn = sine * delta_cosine - cosine * delta_sine  # sine of theta - delta
    p = tl.full((), 1.0, tl.float64)
    q = tl.full((), 0.0, tl.float64)
    if (CLIP == "scale") | (CLIP == "cautious"):
        p = delta / theta
    if CLIP == "momentum":
        bound = tl.load(numbers + 3) * m_norm
        p = tl.where(g_norm * turn > bound, bound / (g_norm * turn), 1.0)
    if (CLIP == "rotate") | (CLIP == "project"):
        is_capped &= number > 1.0
        share = tl.full((), 1.0, tl.float64)
        if CLIP == "project":
            share = tl.maximum(cosine * delta_cosine + sine * delta_sine, 0.0)
        length = tl.where(sine > _COLLINEAR, share / sine, 0.0)
        p = length * delta_sine
        q = length * turn * g_norm / m_norm
    p = tl.where(is_capped, p, 1.0)
    q = tl.where(is_capped, q, 0.0)
    return p, q, tl.where(has_angle, theta, float("nan"))


@triton.jit
def _count(counts, theta, is_changed, number, BINS: tl.constexpr):
    """Add an angle to the row of its tensor, as ``measure.AngleCounts`` does."""
    is_counted = (theta == theta) & (number > 0.0)
    degrees = theta * _DEGREES
    place = tl.minimum((tl.where(is_counted, degrees, 0.0) * (BINS / 180)).to(tl.int64), BINS - 1)
    before = tl.load(counts + place, mask=is_counted, other=0.0)
    tl.store(counts + place, before + 1.0, mask=is_counted)
    columns = tl.arange(0, 8)
    changed = tl.where(is_changed, 1.0, 0.0)
    more = tl.where(columns == 0, 1.0, tl.where(columns == 1, degrees, changed))
    more = tl.where(columns == 3, number, tl.where(columns == 4, number * changed, more))
    is_column = columns < tl.where(is_counted, 5, 0)
    before = tl.load(counts + BINS + columns, mask=is_column, other=0.0)
    tl.store(counts + BINS + columns, before + more, mask=is_column)


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
    CLIP: tl.constexpr,
    SEES_CAPPED: tl.constexpr,
    IS_CAUTIOUS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    w = _loaded(param, places, size, IS_WHOLE).to(tl.float32)
    g = _loaded(grad, places, size, IS_WHOLE).to(tl.float32)
    m = _loaded(exp_avg, places, size, IS_WHOLE).to(tl.float32)
    v = _loaded(exp_avg_sq, places, size, IS_WHOLE).to(tl.float32)
    capped = g
    if CLIP != "none":
        capped = p * g
    if (CLIP == "rotate") | (CLIP == "project"):
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
    rows,
    bounds,
    partial,
    numbers,
    counts,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    CLIP: tl.constexpr,
    SEES_CAPPED: tl.constexpr,
    IS_CAUTIOUS: tl.constexpr,
    IS_REDUCED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    NUMBERS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Cap the gradient of each chunk's tensor, and move the chunk's weights and moments by it.

    The table has weights, gradients and both moments. Of each tensor, ``bounds`` says which rows of
    ``partial`` [P, 4] are the vector that has the angle, ``rows`` its own row of ``counts`` (of
    ``partial`` as well with ``IS_REDUCED``, where that has a row per tensor), and ``numbers`` has
    what a step is made of, see ``moclip_launch``. Its first chunk counts the angle.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    start = tl.multiple_of(tl.load(starts + chunk), BLOCK)
    size = tl.load(sizes + owner)
    param = _pointer(table, owner * 4, PARAM_TYPE, ALIGNED)
    grad = _pointer(table, owner * 4 + 1, GRAD_TYPE, ALIGNED)
    exp_avg = _pointer(table, owner * 4 + 2, MOMENT_TYPE, ALIGNED)
    exp_avg_sq = _pointer(table, owner * 4 + 3, MOMENT_TYPE, ALIGNED)
    own = numbers + owner * NUMBERS
    first_rate = tl.load(own).to(tl.float32)
    second_rate = tl.load(own + 1).to(tl.float32)
    first_scale = tl.load(own + 2).to(tl.float32)
    second_scale = tl.load(own + 3).to(tl.float32)
    decay = tl.load(own + 4).to(tl.float32)
    step_size = tl.load(own + 5).to(tl.float32)
    key = tl.load(own + 6).to(tl.int64).to(tl.uint32)
    p = tl.full((), 1.0, tl.float64)
    q = tl.full((), 0.0, tl.float64)
    if CLIP != "none":
        begin = tl.load(bounds + owner * 2)
        end = tl.load(bounds + owner * 2 + 1)
        p, q, theta = capped_gradient(_sums(partial, begin, end, TOGETHER), own + 7, CLIP)
        if start == 0:
            row = tl.load(rows + owner)
            number = size.to(tl.float64)
            if IS_REDUCED:
                number = tl.load(partial + row * 4 + 3)
            _count(counts + row * (BINS + 5), theta, (p != 1.0) | (q != 0.0), number, BINS)
    p = p.to(tl.float32)
    q = q.to(tl.float32)
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            _update(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                start + offset + tl.arange(0, BLOCK),
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
                PARAM_TYPE,
                MOMENT_TYPE,
                CLIP,
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
                p,
                q,
                first_scale,
                second_scale,
                first_rate,
                second_rate,
                decay,
                step_size,
                key,
                PARAM_TYPE,
                MOMENT_TYPE,
                CLIP,
                SEES_CAPPED,
                IS_CAUTIOUS,
                False,
            )
