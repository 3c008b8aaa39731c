"""Positions of very many candidates on a GPU, a program for each part of their candidates.

``part_products`` leaves the logits of a part, of which ``candidate_loss`` makes the derivatives.
``part_gradients`` leaves what each part adds to the gradient of its hidden state, and ``add_parts``
adds that up in the order of the parts, so two runs give the same bits.

Names as in ``head_triton``; P parts, L positions that have parts (``loss_plan.RowParts``).
"""

import triton
import triton.language as tl

from lrmc_ray.method.fast.head_triton import logits_of, rows_of


@triton.jit
def part_products(
    hidden,
    weight,
    bias,
    parts,
    token_ids,
    dlogits,
    hidden_stride,
    weight_stride,
    num_hidden,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Logits of the entries of each part [P, 3], to ``dlogits`` [E]."""
    part = parts + tl.program_id(0) * 3
    row = tl.load(part).to(tl.int64)
    begin, end = tl.load(part + 1), tl.load(part + 2)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    h = tl.load(hidden + row * hidden_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=NUM_STAGES):
        places = start + tl.arange(0, BLOCK_K)
        is_entry = places < end
        tokens = tl.load(token_ids + places, mask=is_entry, other=0).to(tl.int64)
        values = rows_of(weight, tokens, columns, is_entry, is_column, weight_stride)
        z = logits_of(h, values, bias, tokens, is_entry, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        tl.store(dlogits + places, z, mask=is_entry)


@triton.jit
def part_gradients(
    weight,
    parts,
    token_ids,
    dlogits,
    partial,
    weight_stride,
    num_hidden,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """What each part adds to the gradient of its hidden state, to ``partial`` [P, D]."""
    index = tl.program_id(0).to(tl.int64)
    part = parts + index * 3
    begin, end = tl.load(part + 1), tl.load(part + 2)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=NUM_STAGES):
        places = start + tl.arange(0, BLOCK_K)
        is_entry = places < end
        tokens = tl.load(token_ids + places, mask=is_entry, other=0).to(tl.int64)
        d = tl.load(dlogits + places, mask=is_entry, other=0.0)
        values = rows_of(weight, tokens, columns, is_entry, is_column, weight_stride)
        gradient += tl.sum(values * d[:, None], axis=0)
    tl.store(partial + index * num_hidden + columns, gradient, mask=is_column)


@triton.jit
def add_parts(partial, rows, bounds, dhidden, num_hidden, BLOCK_D: tl.constexpr):
    """Gradients of hidden states from those of their parts, in their order."""
    place = tl.program_id(0)
    row = tl.load(rows + place).to(tl.int64)
    begin, end = tl.load(bounds + place), tl.load(bounds + place + 1)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    for index in range(begin, end):
        start = tl.cast(index, tl.int64) * num_hidden
        gradient += tl.load(partial + start + columns, mask=is_column, other=0.0)
    tl.store(dhidden + row * num_hidden + columns, gradient, mask=is_column)
