import dataclasses
import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lrmc_ray.method.microbatch import (
    Activity,
    active_length,
    collate,
    cut_sample,
    deal,
    divide,
)
from tests.support import reference
from tests.support.method_inputs import reference_rows
from tests.support.plain_training import random_sample, random_samples, sample_by_hand

PAPER = Activity(supervised=2, prompt=math.inf)
ANCHORED = Activity(supervised=2, prompt=2)
FULL = Activity(supervised=1, prompt=math.inf)
ALL = Activity(supervised=1, prompt=1)
ACTIVITIES = [PAPER, ANCHORED, FULL, ALL]


# Three samples of 6, 5 and 4 tokens. "n" is a prompt position, "y" a supervised one.
LONG = sample_by_hand("long", ids="345678", positions="0124", supervised="nyyy", sizes="2131")
MIDDLE = sample_by_hand("middle", ids="12345", positions="0123", supervised="nnyy", sizes="1411")
SHORT = sample_by_hand("short", ids="9876", positions="012", supervised="yyy", sizes="111")
SAMPLES = [LONG, MIDDLE, SHORT]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Activity


@pytest.mark.parametrize(
    ("activity", "expected"),
    [
        # One candidate: loss 0 and gradient 0. Prompt positions have no loss without an anchor.
        (PAPER, {"long": "0010", "middle": "0000", "short": "000"}),
        (ANCHORED, {"long": "1010", "middle": "0100", "short": "000"}),
        (FULL, {"long": "0111", "middle": "0011", "short": "111"}),
        (ALL, {"long": "1111", "middle": "1111", "short": "111"}),
    ],
)
def test_active_positions_by_hand(activity, expected):
    actual = {
        sample.sample_id: "".join(str(int(a)) for a in activity.of(sample)) for sample in SAMPLES
    }
    assert actual == expected


@pytest.mark.parametrize(
    ("activity", "expected"),
    [(PAPER, [3, 0, 0]), (ANCHORED, [3, 2, 0]), (FULL, [5, 4, 3]), (ALL, [5, 4, 3])],
)
def test_active_length_by_hand(activity, expected):
    """Up to and with the last active position; the token after it is its label, not its input."""
    assert [active_length(sample, activity) for sample in SAMPLES] == expected


# Collating


def test_trimmed_micro_batch_by_hand():
    batch = collate(SAMPLES, ANCHORED)
    assert batch.input_ids_BT.tolist() == [[3, 4, 5], [1, 2, 0]]
    assert batch.input_ids_BT.dtype == torch.int64
    assert batch.supervised.row_N.tolist() == [0]
    assert batch.supervised.column_N.tolist() == [2]
    assert batch.supervised.candidates.token_ids.tolist() == [6, 16, 26]
    assert batch.anchored.row_N.tolist() == [0, 1]
    assert batch.anchored.column_N.tolist() == [0, 1]
    assert batch.anchored.candidates.token_ids.tolist() == [4, 14, 3, 13, 23, 33]
    assert batch.anchored.candidates.gold_ids.tolist() == [4, 3]
    # The divisors and the token counts include what was cut away.
    assert (batch.num_supervised, batch.num_prompt) == (3 + 2 + 3, 1 + 2)
    assert (batch.num_tokens, batch.num_processed) == (6 + 5 + 4, 3 + 2 + 0)


def test_untrimmed_micro_batch_by_hand():
    batch = collate(SAMPLES, ANCHORED, trim=False)
    assert batch.input_ids_BT.tolist() == [
        [3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 0],
        [9, 8, 7, 6, 0, 0],
    ]
    # The same losses in the same places, the same divisors.
    trimmed = collate(SAMPLES, ANCHORED)
    for name in ("supervised", "anchored"):
        ours, theirs = getattr(batch, name), getattr(trimmed, name)
        assert torch.equal(ours.row_N, theirs.row_N)
        assert torch.equal(ours.column_N, theirs.column_N)
        assert torch.equal(ours.candidates.token_ids, theirs.candidates.token_ids)
    assert batch.num_supervised == trimmed.num_supervised
    assert batch.num_prompt == trimmed.num_prompt
    assert (batch.num_tokens, batch.num_processed) == (15, 15)


def test_no_active_position_leaves_an_empty_batch_that_still_counts():
    batch = collate([SHORT, MIDDLE], PAPER)
    assert batch.input_ids_BT.shape == (0, 0)
    assert batch.supervised.candidates.num_rows == batch.anchored.candidates.num_rows == 0
    assert (batch.num_supervised, batch.num_prompt) == (5, 2)
    assert (batch.num_tokens, batch.num_processed) == (9, 0)


def test_no_samples_give_an_empty_batch():
    batch = collate([], ALL)
    assert batch.input_ids_BT.shape == (0, 0)
    assert (batch.num_supervised, batch.num_prompt) == (0, 0)
    assert (batch.num_tokens, batch.num_processed) == (0, 0)


@given(seed=st.integers(0, 2**31 - 1), activity=st.sampled_from(ACTIVITIES), trim=st.booleans())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_every_active_position_meets_its_own_token_and_candidates(seed, activity, trim):
    generator = seeded(seed)
    samples = [random_sample(generator, name=str(i)) for i in range(5)]
    batch = collate(samples, activity, trim=trim)

    expected: dict[bool, list[Any]] = {True: [], False: []}
    lengths = []
    for sample in samples:
        length = 0
        for row, position in enumerate(sample.positions_P.tolist()):
            is_supervised = bool(sample.is_supervised_P[row])
            size = int(sample.candidates.sizes[row])
            if size >= (activity.supervised if is_supervised else activity.prompt):
                start = int(sample.candidates.offsets[row])
                expected[is_supervised].append(
                    (
                        sample.input_ids_T[: position + 1].tolist(),
                        sample.candidates.token_ids[start : start + size].tolist(),
                        sample.candidates.logprobs[start : start + size].tolist(),
                        int(sample.input_ids_T[position + 1]),
                    )
                )
                length = position + 1
        lengths.append(length if trim else len(sample.input_ids_T))

    for is_supervised, where in ((True, batch.supervised), (False, batch.anchored)):
        sets = where.candidates
        actual = [
            (
                batch.input_ids_BT[row, : column + 1].tolist(),
                sets.token_ids[sets.offsets[i] : sets.offsets[i + 1]].tolist(),
                sets.logprobs[sets.offsets[i] : sets.offsets[i + 1]].tolist(),
                int(sets.gold_ids[i]),
            )
            for i, (row, column) in enumerate(
                zip(where.row_N.tolist(), where.column_N.tolist(), strict=True)
            )
        ]
        assert actual == expected[is_supervised]
    assert batch.num_processed == sum(lengths)
    assert batch.input_ids_BT.shape == (sum(n > 0 for n in lengths), max(lengths))


def test_moving_takes_every_tensor_along():
    batch = collate(SAMPLES, ANCHORED).to(torch.device("meta"))
    tensors = [batch.input_ids_BT]
    for where in (batch.supervised, batch.anchored):
        sets = where.candidates
        tensors += [where.row_N, where.column_N]
        tensors += [sets.offsets, sets.token_ids, sets.logprobs, sets.gold_ids]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (batch.num_supervised, batch.num_processed) == (8, 5)


# Dealing


def test_deal_by_hand():
    """Active lengths 3, 0, 0 without an anchor: the two that need no work go together."""
    assert deal(SAMPLES, 1, PAPER) == [[1, 2, 0]]
    assert deal(SAMPLES, 2, PAPER) == [[1, 2], [0]]
    assert deal(SAMPLES, 2, ALL) == [[2, 1], [0]]
    assert deal(SAMPLES, 5, ALL) == [[2], [1], [0], [], []]


@given(
    seed=st.integers(0, 2**31 - 1),
    num=st.integers(1, 12),
    parts=st.integers(1, 9),
    activity=st.sampled_from(ACTIVITIES),
)
@settings(deadline=None, max_examples=50, derandomize=True)
def test_deal_covers_all_samples_evenly_and_groups_lengths(seed, num, parts, activity):
    generator = seeded(seed)
    samples = [random_sample(generator) for _ in range(num)]
    dealt = deal(samples, parts, activity)
    assert len(dealt) == parts
    assert sorted(index for part in dealt for index in part) == list(range(num))
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    lengths = [[active_length(samples[i], activity) for i in part] for part in dealt if part]
    for shorter, longer in itertools.pairwise(lengths):
        assert max(shorter) <= min(longer)


def test_divided_is_dealt_and_collated():
    divided = divide(SAMPLES, 2, ANCHORED, trim=False)
    expected = [collate(part, ANCHORED, trim=False) for part in ([SHORT, MIDDLE], [LONG])]
    assert [b.input_ids_BT.tolist() for b in divided] == [b.input_ids_BT.tolist() for b in expected]
    assert [b.num_supervised for b in divided] == [5, 3]
    trimmed = divide(SAMPLES, 2, ANCHORED)
    assert [b.input_ids_BT.shape[1] for b in trimmed] == [2, 3]


# Cutting


@pytest.mark.parametrize(("tau", "k_min"), [(0.3, 1), (0.7, 1), (0.5, 2)])
def test_cut_sample_cuts_supervised_positions_alone_and_keeps_their_order(tau, k_min):
    """Prompt and supervised positions alternate; the cut itself is the slow NumPy one."""
    sample = random_sample(seeded(3), sizes=[5, 8, 2, 7, 6, 3, 4, 8, 2, 5])
    sample = dataclasses.replace(sample, is_supervised_P=torch.tensor([False, True] * 5))
    rows = reference_rows(sample.candidates)
    trimmed = reference.cut(rows, tau, k_min=k_min)
    expected = [
        (new if is_supervised else old)
        for old, new, is_supervised in zip(rows, trimmed, sample.is_supervised_P, strict=True)
    ]
    assert any(
        len(old.token_ids) > len(new.token_ids)
        for old, new in zip(rows[1::2], trimmed[1::2], strict=True)
    )

    actual = cut_sample(sample, tau, k_min=k_min)
    assert actual.candidates.sizes.tolist() == [len(row.token_ids) for row in expected]
    assert actual.candidates.token_ids.tolist() == [t for row in expected for t in row.token_ids]
    assert actual.candidates.logprobs.tolist() == [x for row in expected for x in row.logprobs]
    assert torch.equal(actual.candidates.gold_ids, sample.candidates.gold_ids)
    assert actual.sample_id == sample.sample_id
    for name in ("input_ids_T", "positions_P", "is_supervised_P"):
        assert torch.equal(getattr(actual, name), getattr(sample, name))


def test_cut_sample_of_a_sample_without_prompt_positions():
    sample = random_samples(1)[0]
    sample = dataclasses.replace(sample, is_supervised_P=torch.ones_like(sample.is_supervised_P))
    cut_to_one = cut_sample(sample, 1e-6, k_min=1)
    # The most probable token, and the gold one where it is another.
    first = sample.candidates.token_ids[sample.candidates.offsets[:-1]]
    expected = 1 + (first != sample.candidates.gold_ids).int()
    assert torch.equal(cut_to_one.candidates.sizes.int(), expected)
