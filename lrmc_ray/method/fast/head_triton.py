"""The losses on the candidates and their gradients on a GPU, without the logits of other tokens.

- ``candidate_loss``: a program per position gathers the rows of its candidates, takes their dot
  products with the hidden state in float32 and keeps a running log-sum-exp. It then reads the same
  rows again, mostly from the cache, and writes the gradients of logits and hidden state. Without
  ``GATHERS`` the logits are there already, by ``parts_triton`` or ``tile_triton``, which take care
  of the hidden state's gradient as well.
- ``add_token_rows``: a program per token and stretch of the hidden size adds up the token's part of
  the weight's gradient, in the order of :class:`.loss_plan.LossPlan`. No atomics, so two runs give
  the same bits. ``add_partial_rows`` does the rest for tokens of many entries.

Names: N positions, V tokens, D hidden size, E candidates, R tokens of the sampled tail. Only
``fused_loss`` calls these, and only where Triton is installed.
"""

import triton
import triton.language as tl

from lrmc_ray.method.fast.rounding_triton import narrowed

# tanh(x) / x - 1 in powers x^2, x^4, ... for |x| <= 0.6: least squares, relative error below 2e-7.
_TANH_2 = tl.constexpr(-0.33333298563957214)
_TANH_4 = tl.constexpr(0.13331958651542664)
_TANH_6 = tl.constexpr(-0.05378668010234833)
_TANH_8 = tl.constexpr(0.020805377513170242)
_TANH_10 = tl.constexpr(-0.005905861034989357)


@triton.jit
def bounded(logits, softcap):
    """``softcap tanh(logits / softcap)``, as :class:`lrmc_ray.method.head.OutputHead` has it."""
    x = logits / softcap
    s = x * x
    series = ((((_TANH_10 * s + _TANH_8) * s + _TANH_6) * s + _TANH_4) * s + _TANH_2) * s
    size = tl.abs(x)
    decayed = tl.exp(-2.0 * size)
    large = (1.0 - decayed) / (1.0 + decayed)
    return softcap * tl.where(size < 0.6, x + x * series, tl.where(x < 0, -large, large))


@triton.jit
def rows_of(weight, tokens, columns, is_entry, is_column, weight_stride):
    """Rows [K, D] of tokens (int64), float32."""
    return tl.load(
        weight + tokens[:, None] * weight_stride + columns[None, :],
        mask=is_entry[:, None] & is_column[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def logits_of(
    h,
    values,
    bias,
    tokens,
    is_entry,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Logits [K] of a hidden state [D] and the rows [K, D] of tokens."""
    z = tl.sum(values * h[None, :], axis=1)
    if HAS_BIAS:
        z += tl.load(bias + tokens, mask=is_entry, other=0.0).to(tl.float32)
    z *= logit_scale
    if HAS_CAP:
        z = bounded(z, softcap)
    return z


@triton.jit
def grown(highest, total, values):
    """The largest of some numbers, and the sum of exponentials over it, with ``values`` more."""
    above = tl.maximum(highest, tl.max(values, axis=0))
    # Of nothing but -inf there is no difference.
    level = tl.maximum(above, -1e38)
    total = total * tl.exp(highest - level) + tl.sum(tl.exp(values - level), axis=0)
    return above, total


@triton.jit
def with_tail(normalizer, tail):
    """The logarithm of both sums together."""
    above = tl.maximum(normalizer, tail)
    return above + tl.log(tl.exp(normalizer - above) + tl.exp(tail - above))


@triton.jit
def with_outside(base_shift, tail, outside_mass):
    """The base's mass outside, all that it has, and what its logarithms are lowered by.

    Without a sampled token outside there is no such outcome: the base is renormalized.
    """
    has_tail = tail > float("-inf")
    mass = tl.where(has_tail, tl.exp(base_shift) + outside_mass, 1.0)
    return tl.where(has_tail, outside_mass, 0.0), mass, tl.where(has_tail, 0.0, base_shift)


@triton.jit
def candidate_loss(
    hidden,
    weight,
    bias,
    offsets,
    token_ids,
    gold_ids,
    logprobs,
    rows,
    outside,
    tail_logits,
    tail_logweights,
    tail_places,
    loss,
    dlogits,
    dhidden,
    hidden_stride,
    weight_stride,
    num_hidden,
    num_tail,
    logit_scale,
    softcap,
    IS_ANCHOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    GATHERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Loss [N], and with ``WANTS_GRADIENT`` its derivatives: of products [E], hidden states [N, D].

    ``tail_logits`` [N, R] are read, and derivatives left in their place. Both derivatives of
    products are before scale and bound, so they are the bias's as well. Without ``GATHERS``,
    ``dlogits`` hold logits, and ``dhidden`` is left alone.
    """
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    if GATHERS:
        h = tl.load(hidden + row * hidden_stride + columns, mask=is_column, other=0.0)
        h = h.to(tl.float32)
    gold = tl.load(gold_ids + row)
    tail_row = tail_logits + row * num_tail

    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    gold_logit = tl.full((), 0.0, tl.float32)
    base_highest = tl.full((), float("-inf"), tl.float32)
    base_total = tl.full((), 0.0, tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=NUM_STAGES):
        places = start + tl.arange(0, BLOCK_K)
        is_entry = places < end
        tokens = tl.load(token_ids + places, mask=is_entry, other=0).to(tl.int64)
        if GATHERS:
            values = rows_of(weight, tokens, columns, is_entry, is_column, weight_stride)
            z = logits_of(
                h, values, bias, tokens, is_entry, logit_scale, softcap, HAS_BIAS, HAS_CAP
            )
            tl.store(dlogits + places, z, mask=is_entry)
        else:
            z = tl.load(dlogits + places, mask=is_entry, other=0.0)
        gold_logit += tl.sum(tl.where(is_entry & (tokens == gold), z, 0.0), axis=0)
        seen = tl.where(is_entry, z, float("-inf"))
        highest, total = grown(highest, total, seen)
        if IS_ANCHOR:
            base = tl.load(logprobs + places, mask=is_entry, other=float("-inf")).to(tl.float32)
            base_highest, base_total = grown(base_highest, base_total, base)
        if HAS_TAIL:
            # A sampled token that is a candidate does not count as one of the tail.
            place = tl.load(tail_places + tokens, mask=is_entry, other=-1)
            tl.store(tail_row + place, float("-inf"), mask=place >= 0)

    # All threads of the program see what each of them has written.
    tl.debug_barrier()
    normalizer = highest + tl.log(total)
    tail = tl.full((), float("-inf"), tl.float32)
    if HAS_TAIL:
        tail_highest = tl.full((), float("-inf"), tl.float32)
        tail_total = tl.full((), 0.0, tl.float32)
        for start in range(0, num_tail, BLOCK_R):
            places = start + tl.arange(0, BLOCK_R)
            is_sample = places < num_tail
            z = tl.load(tail_row + places, mask=is_sample, other=float("-inf"))
            z += tl.load(tail_logweights + places, mask=is_sample, other=0.0)
            tail_highest, tail_total = grown(tail_highest, tail_total, z)
        tail = tail_highest + tl.log(tail_total)
        normalizer = with_tail(normalizer, tail)

    outside_mass = tl.full((), 0.0, tl.float32)
    base_shift = base_highest + tl.log(base_total)
    mass = tl.full((), 1.0, tl.float32)
    if IS_ANCHOR and HAS_TAIL:
        outside_mass, mass, base_shift = with_outside(base_shift, tail, tl.load(outside + row))

    value = normalizer - gold_logit
    if IS_ANCHOR:
        value = tl.where(outside_mass > 0.0, outside_mass * tl.log(outside_mass), 0.0)
        if HAS_TAIL:
            value -= tl.where(outside_mass > 0.0, outside_mass * (tail - normalizer), 0.0)
    if IS_ANCHOR or WANTS_GRADIENT:
        gradient = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=NUM_STAGES):
            places = start + tl.arange(0, BLOCK_K)
            is_entry = places < end
            tokens = tl.load(token_ids + places, mask=is_entry, other=0).to(tl.int64)
            z = tl.load(dlogits + places, mask=is_entry, other=float("-inf"))
            p = tl.exp(z - normalizer)
            if IS_ANCHOR:
                base = tl.load(logprobs + places, mask=is_entry, other=float("-inf"))
                base = base.to(tl.float32) - base_shift
                b = tl.exp(base)
                ratio = tl.where(is_entry, base - (z - normalizer), 0.0)
                value += tl.sum(b * ratio, axis=0)
                d = mass * p - b
            else:
                d = p - tl.where(tokens == gold, 1.0, 0.0)
            if WANTS_GRADIENT:
                if HAS_CAP:
                    d *= 1.0 - (z / softcap) * (z / softcap)
                d = tl.where(is_entry, d * logit_scale, 0.0)
                if GATHERS:
                    values = rows_of(weight, tokens, columns, is_entry, is_column, weight_stride)
                    gradient += tl.sum(values * d[:, None], axis=0)
                tl.store(dlogits + places, d, mask=is_entry)
        if WANTS_GRADIENT and GATHERS:
            tl.store(dhidden + row * num_hidden + columns, gradient, mask=is_column)
    tl.store(loss + row, tl.where(begin < end, value, 0.0))
    if HAS_TAIL and WANTS_GRADIENT:
        for start in range(0, num_tail, BLOCK_R):
            places = start + tl.arange(0, BLOCK_R)
            is_sample = places < num_tail
            z = tl.load(tail_row + places, mask=is_sample, other=float("-inf"))
            weighted = z + tl.load(tail_logweights + places, mask=is_sample, other=0.0)
            d = tl.exp(weighted - normalizer)
            if IS_ANCHOR:
                d = mass * d - outside_mass * tl.exp(weighted - tail)
            is_counted = (weighted > float("-inf")) & (begin < end)
            if HAS_CAP:
                d *= 1.0 - (z / softcap) * (z / softcap)
            d = tl.where(is_counted, d * logit_scale, 0.0)
            tl.store(tail_row + places, d, mask=is_sample)


@triton.jit
def add_token_rows(
    hidden,
    dlogits,
    upstream,
    entries,
    positions,
    bounds,
    partial_rows,
    token_ids,
    target,
    bias_target,
    partial,
    partial_bias,
    hidden_stride,
    upstream_stride,
    target_stride,
    num_hidden,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add a chunk of one token's entries to its row of the gradient, or to a partial row."""
    chunk = tl.program_id(0)
    begin = tl.load(bounds + chunk)
    end = tl.load(bounds + chunk + 1)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    bias_gradient = tl.full((), 0.0, tl.float32)
    for start in tl.range(begin, end, BLOCK_E, num_stages=NUM_STAGES):
        places = start + tl.arange(0, BLOCK_E)
        is_entry = places < end
        entry = tl.load(entries + places, mask=is_entry, other=0)
        position = tl.load(positions + places, mask=is_entry, other=0).to(tl.int64)
        d = tl.load(dlogits + entry, mask=is_entry, other=0.0)
        d *= tl.load(upstream + position * upstream_stride, mask=is_entry, other=0.0)
        if HAS_BIAS:
            bias_gradient += tl.sum(d, axis=0)
        if HAS_WEIGHT:
            values = tl.load(
                hidden + position[:, None] * hidden_stride + columns[None, :],
                mask=is_entry[:, None] & is_column[None, :],
                other=0.0,
            ).to(tl.float32)
            gradient += tl.sum(values * d[:, None], axis=0)
    partial_row = tl.load(partial_rows + chunk).to(tl.int64)
    token = tl.load(token_ids + tl.load(entries + begin)).to(tl.int64)
    is_whole = partial_row < 0
    if HAS_WEIGHT:
        place = target + token * target_stride + columns
        before = tl.load(place, mask=is_column & is_whole, other=0.0).to(tl.float32)
        after = narrowed(before + gradient, target.dtype.element_ty)
        tl.store(place, after, mask=is_column & is_whole)
        partial_place = partial + partial_row * num_hidden + columns
        tl.store(partial_place, gradient, mask=is_column & (partial_row >= 0))
    if HAS_BIAS:
        is_first = tl.program_id(1) == 0
        before = tl.load(bias_target + token, mask=is_first & is_whole, other=0.0)
        tl.store(bias_target + token, before + bias_gradient, mask=is_first & is_whole)
        tl.store(partial_bias + partial_row, bias_gradient, mask=is_first & (partial_row >= 0))


@triton.jit
def add_partial_rows(
    partial,
    partial_bias,
    bounds,
    entries,
    token_ids,
    target,
    bias_target,
    target_stride,
    num_hidden,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial rows of one token to its row of the gradient, in their order."""
    split = tl.program_id(0)
    begin = tl.load(bounds + split)
    end = tl.load(bounds + split + 1)
    token = tl.load(token_ids + tl.load(entries + split)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    bias_gradient = tl.full((), 0.0, tl.float32)
    for index in range(begin, end):
        place = tl.cast(index, tl.int64)
        if HAS_WEIGHT:
            gradient += tl.load(partial + place * num_hidden + columns, mask=is_column, other=0.0)
        if HAS_BIAS:
            bias_gradient += tl.load(partial_bias + place)
    if HAS_WEIGHT:
        place = target + token * target_stride + columns
        before = tl.load(place, mask=is_column, other=0.0).to(tl.float32)
        tl.store(place, narrowed(before + gradient, target.dtype.element_ty), mask=is_column)
    if HAS_BIAS:
        is_first = tl.program_id(1) == 0
        before = tl.load(bias_target + token, mask=is_first, other=0.0)
        tl.store(bias_target + token, before + bias_gradient, mask=is_first)
