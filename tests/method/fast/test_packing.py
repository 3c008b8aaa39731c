"""Shared prefixes computed once: the tree by hand, and the gradients of padded rows."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lrmc_ray.method.microbatch import Activity, collate
from tests.support.method_training import LOSSES, PAPER, gradients_of
from tests.support.plain_training import (
    branching_samples,
    largest_difference,
    plain_gradients,
    plain_sums,
    random_samples,
    sample_by_hand,
    tiny_llama,
)

FULL = Activity(supervised=1, prompt=math.inf)

ALL = Activity(supervised=1, prompt=1)


def test_packed_micro_batch_by_hand():
    """123 45, 123 46 and 129: a tree of 7 tokens, each seeing its ancestors and itself."""
    samples = [
        sample_by_hand("b", ids="1234608", positions="012345", supervised="nnyyyy", sizes="222222"),
        sample_by_hand("c", ids="12908", positions="0123", supervised="nyyy", sizes="2222"),
        sample_by_hand("a", ids="1234508", positions="012345", supervised="nnyyyy", sizes="222221"),
    ]
    batch = collate(samples, FULL, attention_cost=0.0)
    #  lexicographic: 12345 0, 12346 0, 129 0
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5, 0, 6, 0, 9, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 2, 3]]
    seen = ["".join("x" if v else "." for v in row) for row in batch.is_visible_TT.tolist()]
    assert seen == [
        "x.........",
        "xx........",
        "xxx.......",
        "xxxx......",
        "xxxxx.....",
        "xxxxxx....",
        "xxxx..x...",
        "xxxx..xx..",
        "xx......x.",
        "xx......xx",
    ]
    assert batch.supervised.row_N.tolist() == [0] * 11
    assert batch.supervised.column_N.tolist() == [2, 3, 6, 7, 1, 8, 9, 2, 3, 4, 5]
    assert (batch.num_processed, batch.num_shared) == (6 + 4 + 6, 16 - 10)


@given(seed=st.integers(0, 2**31 - 1), num=st.integers(0, 8))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_a_packed_batch_holds_every_sequence(seed, num):
    samples = branching_samples(num, seed=seed)
    batch = collate(samples, ALL, attention_cost=0.0, trim=False)
    if batch.is_visible_TT is None:
        assert num <= 1  # one sequence alone is as cheap either way
        return
    sees = batch.is_visible_TT
    assert sees.diagonal().all()
    assert not sees.triu(1).any()
    # The ancestors of a token, in order, are the beginning of a sequence that ends with it.
    tokens, depths = batch.input_ids_BT[0], batch.position_ids_BT[0]
    assert torch.equal(sees.sum(1), depths + 1)
    branches = {tuple(tokens[sees[i]].tolist()) for i in range(len(tokens))}
    assert len(branches) == len(tokens)  # nothing is there twice
    wanted = {
        tuple(s.input_ids_T[: n + 1].tolist()) for s in samples for n in range(len(s.input_ids_T))
    }
    assert branches == wanted
    assert batch.num_shared == sum(len(s.input_ids_T) for s in samples) - len(wanted)


def test_the_cheaper_layout_is_taken():
    """Two rows of 12 against one of 24 - common: seeing costs the square of the length."""

    def samples(common):
        start = torch.arange(1, common + 1)
        made = []
        for number in (1, 2):
            ids = torch.cat([start, 100 * number + torch.arange(12 - common)])
            digits = sample_by_hand("x", ids="1" * 12, positions="0", supervised="y", sizes="2")
            candidates = dataclasses.replace(digits.candidates, gold_ids=ids[1:2].int())
            made.append(dataclasses.replace(digits, input_ids_T=ids, candidates=candidates))
        return made

    def is_packed(common, cost):
        batch = collate(samples(common), FULL, attention_cost=cost, trim=False)
        return batch.is_visible_TT is not None

    # 24 (1 + 12 c) against (24 - common) (1 + (24 - common) c)
    assert is_packed(6, 0.0)
    assert not is_packed(0, 0.0)
    assert is_packed(6, 0.13)  # 61.44 against 60.12
    assert not is_packed(6, 0.18)  # 75.84 against 76.32
    assert not is_packed(6, math.inf)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_gradients_equal_those_from_full_logits_of_each_sample(name):
    """Prefixes computed once, against every sample alone; in float64."""
    loss = LOSSES[name]
    model = tiny_llama()
    samples = [*branching_samples(7, seed=3), random_samples(3, seed=2)[1]]
    main, _ = plain_sums(model, samples, loss, step=2)
    expected = plain_gradients(model, samples, loss, step=2)
    packed, result = gradients_of(model, samples, loss, step=2, attention_cost=0.0)
    assert result.loss_sum == pytest.approx(main.item(), rel=1e-12)
    assert largest_difference(packed, expected) < 1e-10
    (batch,) = result.micro_batches
    assert batch.num_shared > 15
    assert batch.input_ids_BT.shape == (1, batch.num_processed - batch.num_shared)


@given(seed=st.integers(0, 2**31 - 1), num=st.integers(1, 9), parts=st.integers(1, 3))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_packing_changes_no_gradient(seed, num, parts):
    model = tiny_llama()
    samples = branching_samples(num, seed=seed)
    loss = LOSSES["restricted + tail + anchor"]
    options = {"num_micro_batches": parts}
    padded, _ = gradients_of(model, samples, loss, **options)
    packed, _ = gradients_of(model, samples, loss, attention_cost=0.0, **options)
    assert largest_difference(padded, packed) < 1e-10


def test_packing_works_under_autocast():
    model = tiny_llama(dtype=torch.float32)
    samples = branching_samples(5)
    exact, _ = gradients_of(model, samples, PAPER)
    options = {"autocast": torch.bfloat16, "attention_cost": 0.0}
    rounded, result = gradients_of(model, samples, PAPER, **options)
    assert result.micro_batches[0].num_shared > 0
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True)]
    assert 1e-4 < max(relative) < 0.1
