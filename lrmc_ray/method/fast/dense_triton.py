"""The losses on candidates from all logits on a GPU, and their derivatives: a program per position.

The matrix product that makes the logits is torch's, and so are both that take the derivatives.

- ``row_losses`` reads the logits of a position's candidates, and of the sampled tail, in its row of
  all logits, and keeps what its derivatives take.
- ``row_derivatives`` writes the derivatives of that row: zeros, and in their places those of the
  candidates and of the tail. So nothing has to be scattered.

Tokens of a position rise, so neighbours share what memory gives at a time: no pass reads more than
the row. Names as in ``head_triton``.
"""

import triton
import triton.language as tl

from lrmc_ray.method.fast.head_triton import bounded, grown, with_outside, with_tail
from lrmc_ray.method.fast.rounding_triton import narrowed


@triton.jit
def logits_at(
    row_logits,
    bias,
    tokens,
    is_wanted,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Logits of tokens from the products of their position, 0 where ``is_wanted`` is false."""
    z = tl.load(row_logits + tokens, mask=is_wanted, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + tokens, mask=is_wanted, other=0.0).to(tl.float32)
    z *= logit_scale
    if HAS_CAP:
        z = bounded(z, softcap)
    return z


@triton.jit
def is_among(tokens, begin, end, wanted, is_wanted):
    """Whether each of ``wanted`` is among the rising ``tokens[begin:end]``, by halving."""
    low = begin + tl.zeros_like(wanted)
    high = end + tl.zeros_like(wanted)
    length = end - begin
    while length > 0:
        middle = (low + high) // 2
        is_open = low < high
        found = tl.load(tokens + middle, mask=is_open & is_wanted, other=0).to(tl.int64)
        low = tl.where(is_open & (found < wanted), middle + 1, low)
        high = tl.where(is_open & (found >= wanted), middle, high)
        length = length // 2
    found = tl.load(tokens + low, mask=is_wanted & (low < end), other=-1).to(tl.int64)
    return found == wanted


@triton.jit
def row_losses(
    logits,
    bias,
    offsets,
    tokens,
    logprobs,
    gold_ids,
    rows,
    outside,
    tail_ids,
    tail_logweights,
    loss,
    state,
    num_tokens,
    num_tail,
    logit_scale,
    softcap,
    IS_ANCHOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss [N], and of each position four numbers for its derivatives [N, 4], float32.

    These are the normalizer, the tail's part of it, what the base's log-probabilities are lowered
    by, and the mass that they then have; logarithms but for the last.
    """
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    row_logits = logits + row * num_tokens
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    base_highest = tl.full((), float("-inf"), tl.float32)
    base_total = tl.full((), 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_entry = places < end
        token = tl.load(tokens + places, mask=is_entry, other=0).to(tl.int64)
        z = logits_at(row_logits, bias, token, is_entry, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        z = tl.where(is_entry, z, float("-inf"))
        highest, total = grown(highest, total, z)
        if IS_ANCHOR:
            base = tl.load(logprobs + places, mask=is_entry, other=float("-inf")).to(tl.float32)
            base_highest, base_total = grown(base_highest, base_total, base)
    normalizer = highest + tl.log(total)

    tail = tl.full((), float("-inf"), tl.float32)
    if HAS_TAIL:
        tail_highest = tl.full((), float("-inf"), tl.float32)
        tail_total = tl.full((), 0.0, tl.float32)
        for start in range(0, num_tail, BLOCK):
            places = start + tl.arange(0, BLOCK)
            is_sample = places < num_tail
            token = tl.load(tail_ids + places, mask=is_sample, other=0).to(tl.int64)
            weight = tl.load(tail_logweights + places, mask=is_sample, other=float("-inf"))
            is_counted = is_sample & (weight > float("-inf"))
            # A sampled token that is a candidate does not count as one of the tail.
            is_counted &= is_among(tokens, begin, end, token, is_counted) == 0
            z = logits_at(
                row_logits, bias, token, is_counted, logit_scale, softcap, HAS_BIAS, HAS_CAP
            )
            z = tl.where(is_counted, z + weight, float("-inf"))
            tail_highest, tail_total = grown(tail_highest, tail_total, z)
        tail = tail_highest + tl.log(tail_total)
        normalizer = with_tail(normalizer, tail)

    base_shift = base_highest + tl.log(base_total)
    mass = tl.full((), 1.0, tl.float32)
    if IS_ANCHOR:
        outside_mass = tl.full((), 0.0, tl.float32)
        if HAS_TAIL:
            outside_mass, mass, base_shift = with_outside(base_shift, tail, tl.load(outside + row))
        value = tl.where(outside_mass > 0.0, outside_mass * tl.log(outside_mass), 0.0)
        value -= tl.where(outside_mass > 0.0, outside_mass * (tail - normalizer), 0.0)
        for start in range(begin, end, BLOCK):
            places = start + tl.arange(0, BLOCK)
            is_entry = places < end
            token = tl.load(tokens + places, mask=is_entry, other=0).to(tl.int64)
            z = logits_at(
                row_logits, bias, token, is_entry, logit_scale, softcap, HAS_BIAS, HAS_CAP
            )
            base = tl.load(logprobs + places, mask=is_entry, other=float("-inf")).to(tl.float32)
            base -= base_shift
            ratio = tl.where(is_entry, base - (z - normalizer), 0.0)
            value += tl.sum(tl.exp(base) * ratio, axis=0)
    else:
        gold = tl.load(gold_ids + row).to(tl.int64)
        value = normalizer - logits_at(
            row_logits, bias, gold, begin < end, logit_scale, softcap, HAS_BIAS, HAS_CAP
        )
    tl.store(loss + row, tl.where(begin < end, value, 0.0))
    tl.store(state + row * 4, normalizer)
    tl.store(state + row * 4 + 1, tail)
    tl.store(state + row * 4 + 2, base_shift)
    tl.store(state + row * 4 + 3, mass)


@triton.jit
def row_derivatives(
    logits,
    bias,
    offsets,
    tokens,
    logprobs,
    gold_ids,
    rows,
    outside,
    tail_ids,
    tail_logweights,
    state,
    upstream,
    hidden,
    dlogits,
    scaled,
    rests,
    num_tokens,
    num_tail,
    num_hidden,
    hidden_stride,
    upstream_stride,
    logit_scale,
    softcap,
    IS_ANCHOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Derivatives of all products [N, V], times the losses' own, before bias, scale and bound.

    With ``DIVIDES``, for float16, a loss's own derivative u is divided, lest small products vanish:
    a factor of at least sqrt(|u|) and 1/16 goes into the row, the rest of it to ``rests`` [N] and,
    times the hidden state, to ``scaled`` [N, D].
    """
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    row_logits = logits + row * num_tokens
    row_dlogits = dlogits + row * num_tokens
    for start in range(0, num_tokens, BLOCK):
        places = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), tl.float32).to(dlogits.dtype.element_ty)
        tl.store(row_dlogits + places, zeros, mask=places < num_tokens)
    factor = tl.load(upstream + row * upstream_stride)
    if DIVIDES:
        part = tl.maximum(tl.sqrt(tl.abs(factor)), 0.0625)
        rest = factor / part
        factor = part
        tl.store(rests + row, rest)
        for start in range(0, num_hidden, BLOCK):
            places = start + tl.arange(0, BLOCK)
            h = tl.load(hidden + row * hidden_stride + places, mask=places < num_hidden, other=0.0)
            h = (h.to(tl.float32) * rest).to(scaled.dtype.element_ty)
            tl.store(scaled + row * num_hidden + places, h, mask=places < num_hidden)
    factor *= logit_scale
    normalizer = tl.load(state + row * 4)
    tail = tl.load(state + row * 4 + 1)
    base_shift = tl.load(state + row * 4 + 2)
    mass = tl.load(state + row * 4 + 3)
    gold = tl.load(gold_ids + row).to(tl.int64)
    # The zeros lie there before what takes their places is written.
    tl.debug_barrier()
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_entry = places < end
        token = tl.load(tokens + places, mask=is_entry, other=0).to(tl.int64)
        z = logits_at(row_logits, bias, token, is_entry, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        p = tl.exp(z - normalizer)
        if IS_ANCHOR:
            base = tl.load(logprobs + places, mask=is_entry, other=float("-inf")).to(tl.float32)
            d = mass * p - tl.exp(base - base_shift)
        else:
            d = p - tl.where(token == gold, 1.0, 0.0)
        if HAS_CAP:
            d *= 1.0 - (z / softcap) * (z / softcap)
        d = narrowed(d * factor, dlogits.dtype.element_ty)
        tl.store(row_dlogits + token, d, mask=is_entry)
    if HAS_TAIL:
        for start in range(0, num_tail, BLOCK):
            places = start + tl.arange(0, BLOCK)
            is_sample = places < num_tail
            token = tl.load(tail_ids + places, mask=is_sample, other=0).to(tl.int64)
            weight = tl.load(tail_logweights + places, mask=is_sample, other=float("-inf"))
            is_counted = is_sample & (weight > float("-inf")) & (begin < end)
            is_counted &= is_among(tokens, begin, end, token, is_counted) == 0
            z = logits_at(
                row_logits, bias, token, is_counted, logit_scale, softcap, HAS_BIAS, HAS_CAP
            )
            d = tl.exp(z + weight - normalizer)
            if IS_ANCHOR:
                outside_mass = tl.load(outside + row)
                d = mass * d - outside_mass * tl.exp(z + weight - tail)
            if HAS_CAP:
                d *= 1.0 - (z / softcap) * (z / softcap)
            d = narrowed(d * factor, dlogits.dtype.element_ty)
            tl.store(row_dlogits + token, d, mask=is_counted)
