"""Attention in blocks against attention over all pairs, in float64."""

import gc

import pytest
import torch
import torch.nn.functional as F

from lrmc_ray.method.fast import attention_blocks
from lrmc_ray.method.fast.attention_blocks import (
    PAIRS_OF_A_CALL,
    attend_in_blocks,
    blocks_of,
    divide,
    divided,
)
from lrmc_ray.method.fast.packing import pack

torch.set_num_threads(1)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def tree(lengths, common, seed=0):
    """What is visible where sequences of these lengths share their first ``common`` tokens."""
    shared = torch.arange(common) + 10
    sequences = [
        torch.cat([shared, torch.randint(100, 10**6, (n - common,), generator=rng(seed + i))])
        for i, n in enumerate(lengths)
    ]
    layout = pack(sequences)
    assert layout.is_visible_TT.shape == (common + sum(n - common for n in lengths),) * 2
    return layout.is_visible_TT


def attend(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def mask_of(is_visible, dtype=torch.float64):
    mask = torch.zeros(is_visible.shape, dtype=dtype)
    return mask.masked_fill_(~is_visible, torch.finfo(dtype).min)[None, None]


def inputs(num_queries, num_tokens, seed=0):
    shapes = [(1, 3, num_queries, 8), (1, 3, num_tokens, 8), (1, 3, num_tokens, 8)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=rng(seed + i)).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("first_query", [0, 50, 57])
@pytest.mark.parametrize("lengths", [[90, 90, 80, 120], [60, 61, 200, 70, 65, 52]])
def test_results_and_gradients_are_those_of_all_pairs(lengths, first_query):
    is_visible = tree(lengths, 50)[first_query:]
    mask = mask_of(is_visible)
    divide(mask, is_visible)
    found = divided(mask)
    assert found is not None
    assert len(found.blocks) > 2
    one, other = (inputs(*is_visible.shape) for _ in range(2))
    query, key, value = one
    expected = attend(query, key, value, mask)
    query, key, value = other
    actual = attend_in_blocks(attend, query, key, value, found)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=rng(9))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for ours, theirs in zip(other, one, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_blocks_hold_every_visible_pair_once_and_begin_with_the_sequences():
    is_visible = tree([90, 90, 80, 120], 50)
    blocks = blocks_of(is_visible)
    assert [(b.start, b.stop) for b in blocks[:1]] == [(0, blocks[1].start)]
    # The first sequence with the common beginning, then each by itself: 50 and its own.
    own = sorted(b.stop - b.start for b in blocks[1:])
    assert sorted([*own, blocks[0].stop - 50]) == sorted([40, 40, 30, 70])
    for block in blocks:
        length = block.stop - block.start
        assert len(block.columns_X) == (50 + length if block.start else length)
        hidden = torch.ones(is_visible.shape[1], dtype=torch.bool)
        hidden[block.columns_X] = False
        assert not is_visible[block.start : block.stop, hidden].any()
    assert [b.stop for b in blocks[:-1]] == [b.start for b in blocks[1:]]
    assert blocks[-1].stop == len(is_visible)


def test_short_sequences_are_put_together_while_that_costs_less_than_a_call():
    # 12 tokens of their own each. Two blocks of 12 x 32 pairs make one of 24 x 44, 288 more than
    # apart; with a third it would be 36 x 56. The first one holds the beginning, and stays alone.
    blocks = blocks_of(tree([32] * 20, 20))
    assert PAIRS_OF_A_CALL == 512
    assert [b.stop - b.start for b in blocks] == [32, *[24] * 9, 12]


@pytest.mark.parametrize(
    "is_visible",
    [
        torch.ones(200, 200, dtype=torch.bool).tril(),  # one sequence
        torch.ones(1, 1, dtype=torch.bool),
        tree([14, 15, 13], 10),  # too few pairs
    ],
)
def test_where_little_is_spared_the_row_is_left_whole(is_visible):
    mask = mask_of(is_visible)
    divide(mask, is_visible)
    assert divided(mask) is None


def test_blocks_are_found_by_the_mask_itself_and_go_with_it():
    is_visible = tree([90, 90, 80, 120], 50)
    mask = mask_of(is_visible)
    divide(mask, is_visible)
    assert divided(mask) is not None
    assert divided(mask.clone()) is None
    before = len(attention_blocks._KNOWN)
    del mask
    gc.collect()
    assert len(attention_blocks._KNOWN) == before - 1
