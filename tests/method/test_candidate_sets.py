"""Candidate sets: their parts, their quantities, and what is refused."""

import math

import pytest
import torch

from lrmc_ray.method.candidate_sets import CandidateSets, row_logsumexp
from lrmc_ray.method.subsets import select_candidates
from tests.support.method_inputs import assert_same_sets, random_logits, rng

torch.set_num_threads(1)


def test_rows_and_concatenate_take_sets_apart_and_together():
    logits_NV, gold_N = random_logits(13, 9, 60)
    sets = select_candidates(logits_NV, gold_N, tau=0.9)
    index = torch.tensor([8, 0, 3, 3])
    assert_same_sets(sets.rows(index), select_candidates(logits_NV[index], gold_N[index], tau=0.9))
    mask = gold_N % 2 == 0
    assert_same_sets(sets.rows(mask), select_candidates(logits_NV[mask], gold_N[mask], tau=0.9))
    parts = [sets.rows(torch.arange(a, b)) for a, b in ((0, 4), (4, 4), (4, 9))]
    assert_same_sets(CandidateSets.concatenate(parts), sets)
    assert_same_sets(sets.to("cpu"), sets)
    assert sets.to("meta").token_ids.device.type == "meta"


def test_row_quantities_follow_their_definitions():
    sets = CandidateSets(
        offsets=torch.tensor([0, 1, 3, 6]),
        token_ids=torch.tensor([4, 2, 4, 0, 1, 2], dtype=torch.int32),
        logprobs=torch.tensor([0.0, -0.5, -3.0, -1.0, -1.5, -9.0], dtype=torch.float16),
        gold_ids=torch.tensor([4, 4, 1], dtype=torch.int32),
    )
    sets.check(5)
    assert sets.sizes.tolist() == [1, 2, 3]
    assert sets.row_ids.tolist() == [0, 1, 1, 2, 2, 2]
    assert sets.is_gold.tolist() == [True, False, True, False, True, False]
    assert sets.active().tolist() == [False, True, True]
    mass = [1.0, math.exp(-0.5) + math.exp(-3.0), math.exp(-1) + math.exp(-1.5) + math.exp(-9)]
    torch.testing.assert_close(
        sets.outside_mass(), 1 - torch.tensor(mass, dtype=torch.float64), atol=1e-11, rtol=0
    )
    assert sets.capped(mass[1] - 1e-9).tolist() == [False, False, True]
    assert sets.capped(mass[1] + 1e-9).tolist() == [False, True, True]


def test_outside_mass_is_never_negative():
    """Two tokens of stored probability one cannot be recorded, but must not break a report."""
    sets = CandidateSets(
        torch.tensor([0, 2]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.zeros(2, dtype=torch.float16),
        torch.tensor([0], dtype=torch.int32),
    )
    assert sets.outside_mass().tolist() == [0.0]


VALID = {
    "offsets": torch.tensor([0, 2, 3]),
    "token_ids": torch.tensor([5, 1, 3], dtype=torch.int32),
    "logprobs": torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float16),
    "gold_ids": torch.tensor([1, 3], dtype=torch.int32),
}


def test_check_accepts_valid_sets():
    CandidateSets(**VALID).check(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}, "offsets must be a torch.int64"),
        ({"logprobs": torch.tensor([-0.5, -2.0, -0.1])}, "logprobs must be a torch.float16"),
        ({"token_ids": torch.tensor([[5, 1, 3]], dtype=torch.int32)}, r"shape \(1, 3\)"),
        ({"offsets": torch.tensor([0, 3])}, "offsets must be one longer than gold_ids"),
        ({"logprobs": torch.tensor([-0.5, -2.0], dtype=torch.float16)}, "as long as token_ids"),
        ({"offsets": torch.tensor([1, 2, 3])}, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 4, 3])}, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 1, 2])}, "offsets must rise from 0"),
        ({"token_ids": torch.tensor([6, 1, 3], dtype=torch.int32)}, r"\[0, 6\), got 6"),
        ({"token_ids": torch.tensor([-1, 1, 3], dtype=torch.int32)}, r"\[0, 6\), got -1"),
        ({"gold_ids": torch.tensor([1, 9], dtype=torch.int32)}, r"gold_ids must .*got 9"),
        ({"gold_ids": torch.tensor([3, 3], dtype=torch.int32)}, "row 0 lacks 3"),
        ({"token_ids": torch.tensor([1, 1, 3], dtype=torch.int32)}, "distinct within a row"),
        (
            {"logprobs": torch.tensor([-0.5, math.nan, -1], dtype=torch.float16)},
            "finite and at most 0, got nan",
        ),
        (
            {"logprobs": torch.tensor([-0.5, -math.inf, -1], dtype=torch.float16)},
            "finite and at most 0, got -inf",
        ),
        (
            {"logprobs": torch.tensor([0.5, -1, -1], dtype=torch.float16)},
            "finite and at most 0, got 0.5",
        ),
        (
            {"logprobs": torch.tensor([-2, -0.5, -0.1], dtype=torch.float16)},
            "descend within a row",
        ),
    ],
)
def test_check_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        CandidateSets(**{**VALID, **changes}).check(6)


def test_only_keeps_the_rows_and_the_chosen_entries():
    sets = CandidateSets(**VALID).only(torch.tensor([False, True, True]))
    assert sets.offsets.tolist() == [0, 1, 2]
    assert sets.token_ids.tolist() == [1, 3]
    assert sets.logprobs.tolist() == VALID["logprobs"][1:].tolist()
    assert sets.gold_ids.tolist() == [1, 3]
    sets.check(6)


def test_row_logsumexp_is_that_of_each_row():
    """Values over a thousand apart in one row, and a gradient that is the rows' softmax."""
    logits_NV, gold_N = random_logits(3, 7, 60)
    sets = select_candidates(logits_NV, gold_N, tau=0.9)
    values_E = torch.randn(sets.token_ids.shape, generator=rng(1), dtype=torch.float64)
    values_E[0] += 1000.0
    values_E.requires_grad_()
    sums_N = row_logsumexp(values_E, sets)
    rows = values_E.split(sets.sizes.tolist())
    torch.testing.assert_close(sums_N, torch.stack([row.logsumexp(0) for row in rows]))
    (gradient_E,) = torch.autograd.grad(sums_N.sum(), values_E)
    torch.testing.assert_close(gradient_E, torch.cat([row.softmax(0) for row in rows]))
