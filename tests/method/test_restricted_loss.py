"""The losses on the candidates against dense float64 computations and the reference."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmc_ray.method.baselines.vocabulary_loss import full_cross_entropy
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import (
    Tail,
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from tests.support import reference
from tests.support.method_inputs import (
    gold_alone,
    gradient_of,
    head_problem,
    inside,
    leaves,
    logits_problem,
    masked_cross_entropy,
    reference_rows,
    rng,
)

torch.set_num_threads(1)

fast = settings(deadline=None, max_examples=30, derandomize=True)


BACKENDS = ("sparse", "gather", "dense")


HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"has_bias": True, "logit_scale": 1.7, "softcap": 5.0},
)


def head_of(weight_VD, bias_V, *, has_bias=False, **options) -> OutputHead:
    return OutputHead(weight_VD, bias_V if has_bias else None, **options)


def dense_logits(hidden_ND, head: OutputHead) -> Tensor:
    logits_NV = hidden_ND @ head.weight_VD.T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = logits_NV * head.logit_scale
    if head.softcap is None:
        return logits_NV
    return head.softcap * torch.tanh(logits_NV / head.softcap)


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_equal_the_dense_masked_computation(backend, options):
    *tensors, sets = head_problem()
    hidden, weight, bias = leaves(*tensors)
    head = head_of(weight, bias, **options)
    loss = restricted_cross_entropy(hidden, head, sets, backend=backend)
    loss.backward()

    true_hidden, true_weight, true_bias = leaves(*tensors)
    true_head = head_of(true_weight, true_bias, **options)
    truth = masked_cross_entropy(dense_logits(true_hidden, true_head), sets).sum()
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(hidden.grad, true_hidden.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.grad, true_weight.grad, rtol=0, atol=1e-10)
    if options.get("has_bias"):
        torch.testing.assert_close(bias.grad, true_bias.grad, rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.05, 1.0), n=st.integers(1, 9))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_loss_and_logit_gradient_follow_the_reference(seed, tau, n):
    """With the identity as head, hidden states are logits and their gradient the logits'."""
    _, _, _, sets = head_problem(seed, n=n, v=30, tau=tau)
    logits_NV = torch.randn(n, 30, generator=rng(seed), dtype=torch.float64, requires_grad=True)
    identity = torch.eye(30, dtype=torch.float64)
    loss = restricted_cross_entropy(logits_NV, OutputHead(identity), sets, backend="sparse")
    loss.backward()
    rows = reference_rows(sets)
    assert loss.item() == pytest.approx(
        reference.restricted_loss(logits_NV.detach().numpy(), rows), abs=1e-10
    )
    np.testing.assert_allclose(
        logits_NV.grad.numpy(),
        reference.restricted_loss_gradient(logits_NV.detach().numpy(), rows),
        atol=1e-12,
    )


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, with_tail):
    *tensors, sets = head_problem(1, n=4, d=3, v=12)
    tail = draw_tail(5, 12, seed=0, step=0) if with_tail else None

    def each(hidden, weight, bias):
        head = OutputHead(weight, bias, logit_scale=0.7, softcap=4.0)
        return restricted_cross_entropy(
            hidden, head, sets, tail=tail, reduction="none", backend=backend
        )

    assert torch.autograd.gradcheck(each, leaves(*tensors))


def test_reductions():
    """The mean counts every row, also one whose only candidate is gold."""
    hidden, weight, _, sets = head_problem()
    sets = CandidateSets.concatenate(
        [sets.rows(torch.arange(6)), gold_alone(sets).rows(torch.tensor([6]))]
    )
    each = restricted_cross_entropy(hidden, OutputHead(weight), sets, reduction="none")
    torch.testing.assert_close(each, masked_cross_entropy(hidden @ weight.T, sets))
    assert (each == 0).sum() == 1
    total = restricted_cross_entropy(hidden, OutputHead(weight), sets)
    mean = restricted_cross_entropy(hidden, OutputHead(weight), sets, reduction="mean")
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / 7)


def test_one_candidate_gives_loss_and_gradient_zero_exactly():
    *tensors, sets = head_problem()
    alone = gold_alone(sets)
    hidden, weight, bias = leaves(*tensors)
    head = OutputHead(weight, bias)
    loss_N = restricted_cross_entropy(hidden, head, alone, reduction="none", backend="sparse")
    loss_N.sum().backward()
    assert not loss_N.any()
    for x in (hidden, weight, bias):
        assert not x.grad.any()


def test_the_order_of_candidates_is_irrelevant():
    hidden, weight, _, sets = head_problem()
    keys = torch.rand(sets.token_ids.shape, generator=rng(0)) + sets.row_ids
    order = keys.argsort()
    shuffled = CandidateSets(
        sets.offsets, sets.token_ids[order], sets.logprobs[order], sets.gold_ids
    )
    for backend in BACKENDS:
        torch.testing.assert_close(
            restricted_cross_entropy(hidden, OutputHead(weight), shuffled, backend=backend),
            restricted_cross_entropy(hidden, OutputHead(weight), sets, backend=backend),
        )


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, _, sets = head_problem()
    shifting = OutputHead(weight, torch.full((40,), 1e4, dtype=torch.float64))
    shifted = restricted_cross_entropy(hidden, shifting, sets)
    torch.testing.assert_close(
        shifted, restricted_cross_entropy(hidden, OutputHead(weight), sets), rtol=0, atol=1e-8
    )
    huge = restricted_cross_entropy(1e5 * hidden, OutputHead(weight), sets)
    truth = masked_cross_entropy(1e5 * hidden @ weight.T, sets).sum()
    torch.testing.assert_close(huge, truth)


def test_no_positions_have_loss_zero():
    hidden, weight, _, sets = head_problem()
    none = sets.rows(torch.zeros(0, dtype=torch.int64))
    for backend, tail in itertools.product(BACKENDS, (None, draw_tail(5, 40, seed=0, step=0))):
        h, w = leaves(hidden[:0], weight)
        loss = restricted_cross_entropy(h, OutputHead(w), none, tail=tail, backend=backend)
        loss.backward()
        assert loss.item() == 0.0
        assert h.grad.shape == (0, 5)
        assert w.grad is None or not w.grad.any()


# Identities of the method


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.1, 0.99))
@fast
def test_identities_of_the_restricted_loss(seed, tau):
    logits_NV, weight_VD, sets = logits_problem(seed, tau=tau)
    head = OutputHead(weight_VD)
    p_NV = logits_NV.softmax(-1)
    rho_N = (p_NV * ~inside(sets, 30)).sum(-1)

    # Point 1: q - p has L1 norm 2 rho and L2 norm at most sqrt(2) rho.
    bias_NV = gradient_of(restricted_cross_entropy, logits_NV, head, sets) - gradient_of(
        full_cross_entropy, logits_NV, head, sets.gold_ids
    )
    torch.testing.assert_close(bias_NV.abs().sum(-1), 2 * rho_N, atol=1e-12, rtol=0)
    assert (bias_NV.norm(dim=-1) <= math.sqrt(2) * rho_N + 1e-12).all()

    # Point 2: the full loss is larger by -log(1 - rho).
    full = full_cross_entropy(logits_NV, head, sets.gold_ids)
    restricted = restricted_cross_entropy(logits_NV, head, sets)
    torch.testing.assert_close(full - restricted, -torch.log1p(-rho_N).sum(), atol=1e-11, rtol=0)


# Sampled tail


@given(seed=st.integers(0, 2**31 - 1), num_samples=st.integers(1, 30))
@fast
def test_tail_follows_the_reference(seed, num_samples):
    logits_NV, weight_VD, sets = logits_problem(seed)
    head = OutputHead(weight_VD)
    ids = torch.randint(30, (num_samples,), generator=rng(seed))  # with repetitions
    weights = torch.rand(num_samples, generator=rng(seed), dtype=torch.float64) * 9 + 0.1
    tail = Tail(ids, weights.log())
    loss = restricted_cross_entropy(logits_NV, head, sets, tail=tail)
    expected = reference.tail_loss(
        logits_NV.numpy(), reference_rows(sets), ids.numpy(), weights.numpy()
    )
    assert float(loss) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("backend", ["sparse", "gather", "dense"])
def test_a_tail_of_the_whole_vocabulary_is_the_full_loss(backend):
    logits_NV, weight_VD, sets = logits_problem()
    head = OutputHead(weight_VD)
    ids, logweights = draw_tail(30, 30, seed=3, step=4)
    assert ids.tolist() == list(range(30))
    assert logweights.tolist() == [0.0] * 30
    options = {"tail": Tail(ids, logweights), "backend": backend}
    torch.testing.assert_close(
        restricted_cross_entropy(logits_NV, head, sets, **options),
        F.cross_entropy(logits_NV, sets.gold_ids.long(), reduction="sum"),
        atol=1e-11,
        rtol=0,
    )
    torch.testing.assert_close(
        gradient_of(restricted_cross_entropy, logits_NV, head, sets, **options),
        gradient_of(lambda z: F.cross_entropy(z, sets.gold_ids.long(), reduction="sum"), logits_NV),
        atol=1e-11,
        rtol=0,
    )


def normalizers(logits_NV, head, sets, ids, logweights) -> Tensor:
    """[N], the estimated normalizer itself: exp(loss + z_gold)."""
    tail = Tail(ids, logweights)
    loss_N = restricted_cross_entropy(logits_NV, head, sets, tail=tail, reduction="none")
    return (loss_N + logits_NV.gather(1, sets.gold_ids[:, None].long()).squeeze(1)).exp()


def test_the_uniform_tail_estimates_the_normalizer_without_bias():
    """The mean over all 84 tails of 3 out of 9 tokens, each as likely."""
    logits_NV, weight_VD, sets = logits_problem(2, v=9, tau=0.6)
    head = OutputHead(weight_VD)
    logweights = torch.full((3,), math.log(9 / 3))
    tails = [torch.tensor(ids) for ids in itertools.combinations(range(9), 3)]
    mean_N = sum(normalizers(logits_NV, head, sets, ids, logweights) for ids in tails) / len(tails)
    torch.testing.assert_close(mean_N, logits_NV.exp().sum(-1), rtol=1e-6, atol=0)


def test_a_tail_drawn_by_probabilities_estimates_the_normalizer_without_bias():
    """The expectation over all 6^3 sequences of 3 tokens, weights as draw_tail gives them."""
    logits_NV, weight_VD, sets = logits_problem(3, v=6, tau=0.5)
    head = OutputHead(weight_VD)
    p_V = torch.tensor([0.05, 0.3, 0.1, 0.25, 0.2, 0.1], dtype=torch.float64)
    given_weights = dict(
        zip(
            *(x.tolist() for x in draw_tail(400, 6, seed=0, step=0, probabilities=7 * p_V)),
            strict=True,
        )
    )
    assert set(given_weights) == set(range(6))
    mean_N = torch.zeros(6, dtype=torch.float64)
    for sequence in itertools.product(range(6), repeat=3):
        ids = torch.tensor(sequence)
        # draw_tail(3, ...) gives 1 / (3 p), draw_tail(400, ...) 1 / (400 p).
        logweights = torch.tensor([given_weights[i] for i in sequence]) + math.log(400 / 3)
        mean_N += p_V[ids].prod() * normalizers(logits_NV, head, sets, ids, logweights)
    torch.testing.assert_close(mean_N, logits_NV.exp().sum(-1), rtol=1e-6, atol=0)


def test_uniform_draws_are_uniform_and_distinct():
    """2,000 draws of 3 out of 12: every token 500 times, give or take 5 standard deviations."""
    counts = torch.zeros(12)
    for step in range(2000):
        ids, logweights = draw_tail(3, 12, seed=5, step=step)
        assert len(set(ids.tolist())) == 3
        torch.testing.assert_close(logweights, torch.full((3,), math.log(4)))
        counts[ids] += 1
    deviation = math.sqrt(2000 * 0.25 * 0.75)
    assert (counts - 500).abs().max() < 5 * deviation


def test_draws_by_probabilities_follow_them():
    p_V = torch.tensor([0.0, 0.1, 0.2, 0.7])
    ids, logweights = draw_tail(20_000, 4, seed=5, step=0, probabilities=p_V)
    counts = torch.bincount(ids, minlength=4)
    assert counts[0] == 0
    expected = 20_000 * p_V
    assert ((counts - expected).abs() <= 5 * (expected * (1 - p_V)).sqrt()).all()
    torch.testing.assert_close(logweights, -(20_000 * p_V[ids]).log())


def test_draws_depend_on_seed_and_step_alone():
    torch.manual_seed(0)
    first = draw_tail(50, 1000, seed=1, step=2)[0]
    torch.manual_seed(1)
    assert torch.equal(draw_tail(50, 1000, seed=1, step=2)[0], first)
    assert not torch.equal(draw_tail(50, 1000, seed=1, step=3)[0], first)
    assert not torch.equal(draw_tail(50, 1000, seed=2, step=2)[0], first)
    assert not torch.equal(draw_tail(50, 1000, seed=2, step=1)[0], first)


@pytest.mark.parametrize(
    ("num_samples", "probabilities", "message"),
    [
        (0, None, "num_samples must be at least 1, got 0"),
        (11, None, "num_samples must be at most the vocabulary size 10, got 11"),
        (0, torch.ones(10), "num_samples must be at least 1, got 0"),
        (3, torch.ones(9), r"probabilities must be \[10\].* shape \(9,\)"),
        (3, torch.zeros(10), "not all 0"),
        (3, torch.full((10,), math.nan), "finite"),
        (3, torch.tensor([-1.0] + 9 * [1.0]), "at least 0"),
    ],
)
def test_draws_that_make_no_sense_are_refused(num_samples, probabilities, message):
    with pytest.raises(ValueError, match=message):
        draw_tail(num_samples, 10, seed=0, step=0, probabilities=probabilities)


# Soft loss and anchor


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.1, 0.99))
@fast
def test_soft_loss_and_anchor_follow_the_reference(seed, tau):
    logits_NV, weight_VD, sets = logits_problem(seed, tau=tau)
    head = OutputHead(weight_VD)
    rows, z = reference_rows(sets), logits_NV.numpy()
    expected = reference.soft_loss(z, rows)
    assert float(soft_cross_entropy(logits_NV, head, sets)) == pytest.approx(expected, abs=1e-10)
    assert float(anchor_kl(logits_NV, head, sets)) == pytest.approx(expected, abs=1e-10)
    ids = torch.randint(30, (9,), generator=rng(seed))
    weights = torch.rand(9, generator=rng(seed), dtype=torch.float64) * 9 + 0.1
    anchor = anchor_kl(logits_NV, head, sets, tail=Tail(ids, weights.log()))
    expected = reference.anchor_kl(z, rows, ids.numpy(), weights.numpy())
    # The outside mass is counted in units of 2^-40.
    assert float(anchor) == pytest.approx(expected, abs=1e-8)


def test_soft_gradient_is_the_difference_of_the_distributions():
    logits_NV, weight_VD, sets = logits_problem(4)
    head = OutputHead(weight_VD)
    recorded_NV = torch.full_like(logits_NV, -math.inf)
    recorded_NV[sets.row_ids, sets.token_ids] = sets.logprobs.double()
    model_NV = logits_NV.masked_fill(~inside(sets, 30), -math.inf)
    torch.testing.assert_close(
        gradient_of(soft_cross_entropy, logits_NV, head, sets),
        model_NV.softmax(-1) - recorded_NV.softmax(-1),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("num_samples", [0, 30])
def test_the_anchor_is_zero_at_the_base_model_and_positive_elsewhere(num_samples):
    """Zero up to float16's rounding: with a full tail, the KL of two distributions 2^-11 apart."""
    logits_NV, weight_VD, _ = logits_problem(5)
    head = OutputHead(weight_VD)
    sets = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=0.9)
    tail = draw_tail(num_samples, 30, seed=0, step=0) if num_samples else None
    at_base = float(anchor_kl(logits_NV, head, sets, tail=tail)) / 6
    assert 0 <= at_base < 2e-5
    assert float(anchor_kl(1.1 * logits_NV, head, sets, tail=tail)) / 6 > 20 * at_base


def test_anchor_with_a_full_tail_is_the_kl_of_the_bucketed_distributions():
    """Candidates and one bucket: base bucket 1 - stored mass, model bucket its true rho."""
    logits_NV, weight_VD, sets = logits_problem(6)
    head = OutputHead(weight_VD)
    tail = draw_tail(30, 30, seed=0, step=0)
    model_NV = logits_NV.softmax(-1)
    total = 0.0
    for i, (a, b) in enumerate(itertools.pairwise(sets.offsets.tolist())):
        stored = sets.logprobs[a:b].double().exp()
        q = model_NV[i, sets.token_ids[a:b]]
        base, model = torch.cat([stored, 1 - stored.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        total += float((base * (base / model).log()).sum())
    anchor = anchor_kl(logits_NV, head, sets, tail=tail)
    assert float(anchor) == pytest.approx(total, abs=1e-8)


def test_a_row_that_holds_the_whole_tail_counts_as_without_one():
    logits_NV, weight_VD, _ = logits_problem(7)
    head = OutputHead(weight_VD)
    whole = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=1.0)
    assert whole.sizes.tolist() == [30] * 6
    tail = draw_tail(4, 30, seed=0, step=0)
    moved_NV = logits_NV + torch.randn(6, 30, generator=rng(0), dtype=torch.float64)
    for loss in (anchor_kl, restricted_cross_entropy):
        torch.testing.assert_close(
            loss(moved_NV, head, whole, tail=tail), loss(moved_NV, head, whole), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(
            gradient_of(loss, moved_NV, head, whole, tail=tail),
            gradient_of(loss, moved_NV, head, whole),
            atol=1e-12,
            rtol=0,
        )


@pytest.mark.parametrize("backend", ["sparse", "gather", "dense"])
def test_gradcheck_of_the_anchor(backend):
    generator = rng(8)
    hidden_ND = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(12, generator=generator, dtype=torch.float64)
    _, _, sets = logits_problem(8, n=3, v=12, tau=0.6)
    tail = draw_tail(6, 12, seed=0, step=0)

    def anchor(hidden, weight, bias):
        head = OutputHead(weight, bias, softcap=3.0)
        return anchor_kl(hidden, head, sets, tail=tail, backend=backend)

    assert torch.autograd.gradcheck(anchor, leaves(hidden_ND, weight_VD, bias_V))


def test_wrong_arguments_are_refused():
    hidden, weight, _, sets = head_problem()
    with pytest.raises(ValueError, match="one row per candidate set, got 6 rows and 7 sets"):
        restricted_cross_entropy(hidden[:6], OutputHead(weight), sets)
    with pytest.raises(ValueError, match=r"backend must be .* got 'fast'"):
        restricted_cross_entropy(hidden, OutputHead(weight), sets, backend="fast")
    with pytest.raises(ValueError, match=r"reduction must be .* got 'total'"):
        restricted_cross_entropy(hidden, OutputHead(weight), sets, reduction="total")
    tail = Tail(torch.tensor([1, 2]), torch.zeros(3))
    with pytest.raises(ValueError, match="one weight per token, got 3 weights of 2 tokens"):
        restricted_cross_entropy(hidden, OutputHead(weight), sets, tail=tail)
