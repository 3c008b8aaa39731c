"""The sampled tail on a GPU: products of all positions with R rows that they share, in tiles.

Each kernel is one matrix product whose other factor is gathered. With half-precision inputs the
tensor cores multiply: their products are exact in float32. A derivative is float32 and would lose
bits in bfloat16, so it goes in as the sum of two of them; in float16 the small ones would be gone,
so there it is multiplied in float32, as float32 inputs are throughout. ``WIDE`` says that the
factors are float32; so it is under the interpreter, which multiplies no bfloat16.

Names as in ``head_triton``, which makes derivatives of ``tail_logits``.
"""

import triton
import triton.language as tl

from lrmc_ray.method.fast.head_triton import bounded
from lrmc_ray.method.fast.rounding_triton import narrowed


@triton.jit
def product(left, right, total, WIDE: tl.constexpr, TYPE: tl.constexpr):
    """``total`` + float32 ``left`` times ``right``, which is of ``TYPE`` unless ``WIDE``."""
    if WIDE:
        return tl.dot(left, right, total, input_precision="ieee")
    high = left.to(TYPE)
    low = (left - high.to(tl.float32)).to(TYPE)
    return tl.dot(low, right, tl.dot(high, right, total))


@triton.jit
def tail_products(
    hidden,
    weight,
    bias,
    tail_ids,
    tail_logits,
    num_rows,
    num_tail,
    num_hidden,
    hidden_stride,
    weight_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits [N, R] of the sampled tokens, float32."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    samples = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row, is_sample = rows < num_rows, samples < num_tail
    tokens = tl.load(tail_ids + samples, mask=is_sample, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, num_hidden, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        is_column = columns < num_hidden
        left = tl.load(
            hidden + rows[:, None].to(tl.int64) * hidden_stride + columns[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + tokens[None, :] * weight_stride + columns[:, None],
            mask=is_sample[None, :] & is_column[:, None],
            other=0.0,
        )
        if WIDE:
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
    if HAS_BIAS:
        total += tl.load(bias + tokens, mask=is_sample, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None].to(tl.int64) * num_tail + samples[None, :]
    is_inside = is_row[:, None] & is_sample[None, :]
    total *= logit_scale
    if HAS_CAP:
        total = bounded(total, softcap)
    tl.store(tail_logits + places, total, mask=is_inside)


@triton.jit
def add_tail_to_hidden(
    dlogits,
    weight,
    tail_ids,
    dhidden,
    num_rows,
    num_tail,
    num_hidden,
    weight_stride,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the tail's part to the gradients of the hidden states [N, D], float32."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row, is_column = rows < num_rows, columns < num_hidden
    is_inside = is_row[:, None] & is_column[None, :]
    target = dhidden + rows[:, None].to(tl.int64) * num_hidden + columns[None, :]
    total = tl.load(target, mask=is_inside, other=0.0)
    for start in range(0, num_tail, BLOCK_R):
        samples = start + tl.arange(0, BLOCK_R)
        is_sample = samples < num_tail
        tokens = tl.load(tail_ids + samples, mask=is_sample, other=0).to(tl.int64)
        left = tl.load(
            dlogits + rows[:, None].to(tl.int64) * num_tail + samples[None, :],
            mask=is_row[:, None] & is_sample[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + tokens[:, None] * weight_stride + columns[None, :],
            mask=is_sample[:, None] & is_column[None, :],
            other=0.0,
        )
        if WIDE:
            right = right.to(tl.float32)
        total = product(left, right, total, WIDE, weight.dtype.element_ty)
    tl.store(target, total, mask=is_inside)


@triton.jit
def add_tail_to_weight(
    dlogits,
    hidden,
    upstream,
    tail_ids,
    target,
    bias_target,
    num_rows,
    num_tail,
    num_hidden,
    hidden_stride,
    upstream_stride,
    target_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the tail's part to the rows of its tokens; the first of equal ones has all of it."""
    samples = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_sample, is_column = samples < num_tail, columns < num_hidden
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    bias_gradient = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        is_row = rows < num_rows
        left = tl.load(
            dlogits + rows[None, :].to(tl.int64) * num_tail + samples[:, None],
            mask=is_row[None, :] & is_sample[:, None],
            other=0.0,
        )
        scale = tl.load(upstream + rows.to(tl.int64) * upstream_stride, mask=is_row, other=0.0)
        left *= scale[None, :]
        if HAS_BIAS:
            bias_gradient += tl.sum(left, axis=1)
        if HAS_WEIGHT:
            right = tl.load(
                hidden + rows[:, None].to(tl.int64) * hidden_stride + columns[None, :],
                mask=is_row[:, None] & is_column[None, :],
                other=0.0,
            )
            if WIDE:
                right = right.to(tl.float32)
            total = product(left, right, total, WIDE, hidden.dtype.element_ty)
    tokens = tl.load(tail_ids + samples, mask=is_sample, other=0).to(tl.int64)
    before = tl.load(tail_ids + samples - 1, mask=is_sample & (samples > 0), other=-1)
    is_first = is_sample & (tokens != before)
    if HAS_WEIGHT:
        place = target + tokens[:, None] * target_stride + columns[None, :]
        is_inside = is_first[:, None] & is_column[None, :]
        old = tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(place, narrowed(old + total, target.dtype.element_ty), mask=is_inside)
    if HAS_BIAS:
        is_mine = is_first & (tl.program_id(1) == 0)
        old = tl.load(bias_target + tokens, mask=is_mine, other=0.0)
        tl.store(bias_target + tokens, old + bias_gradient, mask=is_mine)
