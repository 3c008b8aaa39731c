"""Positions that share most of their candidates on a GPU: a matrix product with the shared rows.

``tile_products`` leaves the logits of candidates, of which ``candidate_loss`` makes the
derivatives, and ``tile_gradients`` the gradients of hidden states. What is no candidate of a
position is computed and thrown away, or a zero in the second product. The types of the factors are
those of ``tail_triton``.

Names as in ``head_triton``; T positions of a tile, U columns: the distinct tokens of all tiles
(``loss_plan.DenseTiles``).
"""

import triton
import triton.language as tl

from lrmc_ray.method.fast.head_triton import bounded
from lrmc_ray.method.fast.tail_triton import product


@triton.jit
def tile_products(
    hidden,
    weight,
    bias,
    tile_rows,
    bounds,
    entries,
    entry_places,
    blocks,
    token_ids,
    dlogits,
    hidden_stride,
    weight_stride,
    num_hidden,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of the candidates in a block of columns, to ``dlogits`` [E]."""
    block = blocks + tl.program_id(0) * 2
    tile = tl.load(block)
    places = tl.load(block + 1) + tl.arange(0, BLOCK_U)
    is_token = places < tl.load(bounds + tile + 1)
    entry = tl.load(entries + places, mask=is_token, other=0)
    tokens = tl.load(token_ids + entry, mask=is_token, other=0).to(tl.int64)
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    is_row = rows >= 0
    total = tl.zeros((TILE, BLOCK_U), tl.float32)
    for start in range(0, num_hidden, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        is_column = columns < num_hidden
        left = tl.load(
            hidden + rows[:, None] * hidden_stride + columns[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + tokens[None, :] * weight_stride + columns[:, None],
            mask=is_token[None, :] & is_column[:, None],
            other=0.0,
        )
        if WIDE:
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
    if HAS_BIAS:
        total += tl.load(bias + tokens, mask=is_token, other=0.0).to(tl.float32)[None, :]
    total *= logit_scale
    if HAS_CAP:
        total = bounded(total, softcap)
    to = tl.load(
        entry_places + places[None, :].to(tl.int64) * TILE + tl.arange(0, TILE)[:, None],
        mask=is_token[None, :],
        other=-1,
    )
    tl.store(dlogits + to, total, mask=to >= 0)


@triton.jit
def tile_gradients(
    weight,
    tile_rows,
    bounds,
    entries,
    entry_places,
    token_ids,
    dlogits,
    dhidden,
    weight_stride,
    num_hidden,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the hidden states of a tile, from all of its columns in their order."""
    tile = tl.program_id(0)
    begin, end = tl.load(bounds + tile), tl.load(bounds + tile + 1)
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < num_hidden
    total = tl.zeros((TILE, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_U):
        places = start + tl.arange(0, BLOCK_U)
        is_token = places < end
        entry = tl.load(entries + places, mask=is_token, other=0)
        tokens = tl.load(token_ids + entry, mask=is_token, other=0).to(tl.int64)
        of = tl.load(
            entry_places + places[None, :].to(tl.int64) * TILE + tl.arange(0, TILE)[:, None],
            mask=is_token[None, :],
            other=-1,
        )
        left = tl.load(dlogits + of, mask=of >= 0, other=0.0)
        right = tl.load(
            weight + tokens[:, None] * weight_stride + columns[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        if WIDE:
            right = right.to(tl.float32)
        total = product(left, right, total, WIDE, weight.dtype.element_ty)
    is_inside = (rows >= 0)[:, None] & is_column[None, :]
    tl.store(dhidden + rows[:, None] * num_hidden + columns[None, :], total, mask=is_inside)
