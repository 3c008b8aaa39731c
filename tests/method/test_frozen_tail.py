"""The restricted loss with a frozen tail, against its formula and the full loss in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from lrmc_ray.method import frozen_tail
from lrmc_ray.method.frozen_tail import frozen_outside, frozen_tail_cross_entropy
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import restricted_cross_entropy
from lrmc_ray.method.subsets import select_candidates
from tests.support.method_inputs import gradient_of, leaves, logits_problem, rng

torch.set_num_threads(1)


def problem(seed=0, n=7, v=30, tau=0.8):
    """A base's logits, its sets, and a model that has moved away from it."""
    base_NV = 2 * torch.randn(n, v, generator=rng(seed), dtype=torch.float64) + 3.0
    gold_N = torch.randint(v, (n,), generator=rng(seed + 1))
    moved_NV = base_NV + torch.randn(n, v, generator=rng(seed + 2), dtype=torch.float64)
    weight_VD = torch.eye(v, dtype=torch.float64)
    return base_NV, moved_NV, OutputHead(weight_VD), select_candidates(base_NV, gold_N, tau=tau)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 1000])
def test_the_sum_outside_is_the_outside_mass_over_the_inside_one_times_the_sum_inside(
    monkeypatch, rows_per_chunk
):
    monkeypatch.setattr(frozen_tail, "CHUNK_ELEMENTS", 30 * rows_per_chunk)
    base_NV, _, _, sets = problem()
    before = base_NV.clone()
    outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, 30)
    assert torch.equal(base_NV, before)
    for row in range(7):
        inside = sets.rows(torch.tensor([row])).token_ids.long()
        rho = 1 - base_NV[row].softmax(0)[inside].sum()
        expected = rho / (1 - rho) * base_NV[row, inside].exp().sum()
        assert outside_N[row].exp().item() == pytest.approx(expected.item(), rel=1e-11)


def test_the_base_model_has_the_full_loss_and_its_gradient_inside():
    base_NV, _, head, sets = problem(4)
    outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, 30)
    loss = frozen_tail_cross_entropy(base_NV, head, sets, outside_N)
    gold_N = sets.gold_ids.long()
    torch.testing.assert_close(
        loss, F.cross_entropy(base_NV, gold_N, reduction="sum"), rtol=1e-12, atol=0
    )
    gradient_NV = gradient_of(frozen_tail_cross_entropy, base_NV, head, sets, outside_N)
    full_NV = base_NV.softmax(-1) - F.one_hot(gold_N, 30)
    is_inside_NV = torch.zeros(7, 30, dtype=torch.bool)
    is_inside_NV[sets.row_ids, sets.token_ids.long()] = True
    torch.testing.assert_close(gradient_NV[is_inside_NV], full_NV[is_inside_NV])
    assert not gradient_NV[~is_inside_NV].any()


def test_away_from_the_base_only_the_inside_moves():
    """The closed form: log(sum_S exp(z) + C) - z_g, and its derivative."""
    base_NV, moved_NV, head, sets = problem(8)
    outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, 30)
    gradient_NV = gradient_of(frozen_tail_cross_entropy, moved_NV, head, sets, outside_N)
    loss = frozen_tail_cross_entropy(moved_NV, head, sets, outside_N)
    total, expected_NV = 0.0, torch.zeros_like(moved_NV)
    for row in range(7):
        inside = sets.rows(torch.tensor([row])).token_ids.long()
        is_outside_V = torch.ones(30, dtype=torch.bool)
        is_outside_V[inside] = False
        normalizer = moved_NV[row, inside].exp().sum() + base_NV[row, is_outside_V].exp().sum()
        gold = int(sets.gold_ids[row])
        total += (normalizer.log() - moved_NV[row, gold]).item()
        expected_NV[row, inside] = moved_NV[row, inside].exp() / normalizer
        expected_NV[row, gold] -= 1
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-9, atol=1e-12)


def test_raising_all_logits_of_a_set_leaves_the_restricted_loss():
    """The easy way down, which the module names."""
    base_NV, moved_NV, head, sets = problem(8)
    outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, 30)
    restricted = restricted_cross_entropy(moved_NV, head, sets)
    before = frozen_tail_cross_entropy(moved_NV, head, sets, outside_N)
    raised = frozen_tail_cross_entropy(moved_NV + 40.0, head, sets, outside_N)
    assert before > restricted + 0.1
    torch.testing.assert_close(raised, restricted, rtol=1e-10, atol=0)


def test_sets_that_hold_the_whole_vocabulary_have_nothing_outside():
    base_NV, moved_NV, head, _ = problem()
    gold_N = torch.arange(7)
    sets = select_candidates(base_NV, gold_N, tau=1.0, k_min=30, k_max=30)
    outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, 30)
    assert outside_N.tolist() == [-math.inf] * 7
    leaf = leaves(moved_NV)[0]
    loss = frozen_tail_cross_entropy(leaf, head, sets, outside_N)
    loss.backward()
    truth = F.cross_entropy(moved_NV, gold_N, reduction="sum")
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(leaf.grad, moved_NV.softmax(-1) - F.one_hot(gold_N, 30))


def test_no_positions_have_no_loss():
    logits_NV, weight_VD, sets = logits_problem()
    none = sets.rows(torch.zeros(0, dtype=torch.int64))
    outside_N = frozen_outside(lambda chunk: logits_NV[chunk], none, 30)
    loss = frozen_tail_cross_entropy(logits_NV[:0], OutputHead(weight_VD), none, outside_N)
    assert loss.item() == 0.0
