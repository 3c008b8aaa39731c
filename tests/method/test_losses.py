"""The other losses, the sampled tail, the identities of the method, and the outside-mass probe."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmc_ray.method import probe, vocabulary_loss
from lrmc_ray.method.probe import outside_mass
from lrmc_ray.method.restricted_loss import (
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.method.vocabulary_loss import (
    active_only_cross_entropy,
    dft_cross_entropy,
    full_cross_entropy,
    head_logits,
    kl_regularized_cross_entropy,
)
from tests.support import reference

# Shape suffixes: N = positions, D = hidden size, V = vocabulary size.

torch.set_num_threads(1)

fast = settings(deadline=None, max_examples=30, derandomize=True)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0, n: int = 6, v: int = 30, tau: float = 0.8):
    """A model's logits, given as hidden states of an identity head, and sets of another model."""
    generator = rng(seed)
    logits_NV = 1.5 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    recorded_NV = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    gold_N = torch.randint(v, (n,), generator=generator)
    sets = select_candidates(recorded_NV, gold_N, tau=tau)
    return logits_NV, torch.eye(v, dtype=torch.float64), sets


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def gradient_of(loss, logits_NV: Tensor, *args, **options) -> Tensor:
    (logits_NV,) = leaves(logits_NV)
    loss(logits_NV, *args, **options).backward()
    return logits_NV.grad


def reference_rows(sets: CandidateSets) -> list[reference.Row]:
    return [
        reference.Row(sets.token_ids[a:b].numpy(), sets.logprobs[a:b].numpy(), int(gold))
        for (a, b), gold in zip(
            itertools.pairwise(sets.offsets.tolist()), sets.gold_ids, strict=True
        )
    ]


def inside(sets: CandidateSets, vocabulary_size: int) -> Tensor:
    is_inside_NV = torch.zeros(sets.num_rows, vocabulary_size, dtype=torch.bool)
    is_inside_NV[sets.row_ids, sets.token_ids] = True
    return is_inside_NV


# Identities of the method


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.1, 0.99))
@fast
def test_identities_of_the_restricted_loss(seed, tau):
    logits_NV, head, sets = problem(seed, tau=tau)
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


def test_rho_of_the_recording_model_stays_below_one_minus_tau():
    logits_NV, head, _ = problem(1)
    for tau in (0.3, 0.8, 0.99):
        sets = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=tau)
        measured = outside_mass(logits_NV, head, sets, num_positions=6, seed=0)
        assert measured.mean <= 1 - tau
        assert measured.mean <= float(sets.outside_mass().mean())


# Sampled tail


@given(seed=st.integers(0, 2**31 - 1), num_samples=st.integers(1, 30))
@fast
def test_tail_follows_the_reference(seed, num_samples):
    logits_NV, head, sets = problem(seed)
    ids = torch.randint(30, (num_samples,), generator=rng(seed))  # with repetitions
    weights = torch.rand(num_samples, generator=rng(seed), dtype=torch.float64) * 9 + 0.1
    loss = restricted_cross_entropy(
        logits_NV, head, sets, tail_ids=ids, tail_logweights=weights.log()
    )
    expected = reference.tail_loss(
        logits_NV.numpy(), reference_rows(sets), ids.numpy(), weights.numpy()
    )
    assert float(loss) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("backend", ["sparse", "gather", "dense"])
def test_a_tail_of_the_whole_vocabulary_is_the_full_loss(backend):
    logits_NV, head, sets = problem()
    ids, logweights = draw_tail(30, 30, seed=3, step=4)
    assert ids.tolist() == list(range(30))
    assert logweights.tolist() == [0.0] * 30
    options = {"tail_ids": ids, "tail_logweights": logweights, "backend": backend}
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
    loss_N = restricted_cross_entropy(
        logits_NV, head, sets, tail_ids=ids, tail_logweights=logweights, reduction="none"
    )
    return (loss_N + logits_NV.gather(1, sets.gold_ids[:, None].long()).squeeze(1)).exp()


def test_the_uniform_tail_estimates_the_normalizer_without_bias():
    """The mean over all 84 tails of 3 out of 9 tokens, each as likely."""
    logits_NV, head, sets = problem(2, v=9, tau=0.6)
    logweights = torch.full((3,), math.log(9 / 3))
    tails = [torch.tensor(ids) for ids in itertools.combinations(range(9), 3)]
    mean_N = sum(normalizers(logits_NV, head, sets, ids, logweights) for ids in tails) / len(tails)
    torch.testing.assert_close(mean_N, logits_NV.exp().sum(-1), rtol=1e-6, atol=0)


def test_a_tail_drawn_by_probabilities_estimates_the_normalizer_without_bias():
    """The expectation over all 6^3 sequences of 3 tokens, weights as draw_tail gives them."""
    logits_NV, head, sets = problem(3, v=6, tau=0.5)
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
    logits_NV, head, sets = problem(seed, tau=tau)
    rows, z = reference_rows(sets), logits_NV.numpy()
    expected = reference.soft_loss(z, rows)
    assert float(soft_cross_entropy(logits_NV, head, sets)) == pytest.approx(expected, abs=1e-10)
    assert float(anchor_kl(logits_NV, head, sets)) == pytest.approx(expected, abs=1e-10)
    ids = torch.randint(30, (9,), generator=rng(seed))
    weights = torch.rand(9, generator=rng(seed), dtype=torch.float64) * 9 + 0.1
    anchor = anchor_kl(logits_NV, head, sets, tail_ids=ids, tail_logweights=weights.log())
    expected = reference.anchor_kl(z, rows, ids.numpy(), weights.numpy())
    # The outside mass is counted in units of 2^-40.
    assert float(anchor) == pytest.approx(expected, abs=1e-8)


def test_soft_gradient_is_the_difference_of_the_distributions():
    logits_NV, head, sets = problem(4)
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
    logits_NV, head, _ = problem(5)
    sets = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=0.9)
    tail = {}
    if num_samples:
        ids, logweights = draw_tail(num_samples, 30, seed=0, step=0)
        tail = {"tail_ids": ids, "tail_logweights": logweights}
    at_base = float(anchor_kl(logits_NV, head, sets, **tail)) / 6
    assert 0 <= at_base < 2e-5
    assert float(anchor_kl(1.1 * logits_NV, head, sets, **tail)) / 6 > 20 * at_base


def test_anchor_with_a_full_tail_is_the_kl_of_the_bucketed_distributions():
    """Candidates and one bucket: base bucket 1 - stored mass, model bucket its true rho."""
    logits_NV, head, sets = problem(6)
    ids, logweights = draw_tail(30, 30, seed=0, step=0)
    model_NV = logits_NV.softmax(-1)
    total = 0.0
    for i, (a, b) in enumerate(itertools.pairwise(sets.offsets.tolist())):
        stored = sets.logprobs[a:b].double().exp()
        q = model_NV[i, sets.token_ids[a:b]]
        base, model = torch.cat([stored, 1 - stored.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        total += float((base * (base / model).log()).sum())
    anchor = anchor_kl(logits_NV, head, sets, tail_ids=ids, tail_logweights=logweights)
    assert float(anchor) == pytest.approx(total, abs=1e-8)


def test_a_row_that_holds_the_whole_tail_counts_as_without_one():
    logits_NV, head, _ = problem(7)
    whole = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=1.0)
    assert whole.sizes.tolist() == [30] * 6
    ids, logweights = draw_tail(4, 30, seed=0, step=0)
    tail = {"tail_ids": ids, "tail_logweights": logweights}
    moved_NV = logits_NV + torch.randn(6, 30, generator=rng(0), dtype=torch.float64)
    for loss in (anchor_kl, restricted_cross_entropy):
        torch.testing.assert_close(
            loss(moved_NV, head, whole, **tail), loss(moved_NV, head, whole), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(
            gradient_of(loss, moved_NV, head, whole, **tail),
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
    _, _, sets = problem(8, n=3, v=12, tau=0.6)
    ids, logweights = draw_tail(6, 12, seed=0, step=0)

    def anchor(hidden, weight, bias):
        return anchor_kl(
            hidden,
            weight,
            sets,
            bias_V=bias,
            softcap=3.0,
            tail_ids=ids,
            tail_logweights=logweights,
            backend=backend,
        )

    assert torch.autograd.gradcheck(anchor, leaves(hidden_ND, weight_VD, bias_V))


# Full loss


def full_problem(dtype: torch.dtype = torch.float64):
    generator = rng(9)
    hidden_ND = torch.randn(13, 5, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(40, 5, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(40, generator=generator, dtype=torch.float64).to(dtype)
    return hidden_ND, weight_VD, bias_V, torch.randint(40, (13,), generator=generator)


@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.4, None), (1.3, 2.0)])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_full_loss_equals_torchs_in_value_and_gradients(
    monkeypatch, rows_per_chunk, logit_scale, softcap
):
    monkeypatch.setattr(vocabulary_loss, "_CHUNK_ELEMENTS", 40 * rows_per_chunk)
    *tensors, gold_N = full_problem()
    ours, theirs = leaves(*tensors), leaves(*tensors)
    loss = full_cross_entropy(
        ours[0], ours[1], gold_N.int(), bias_V=ours[2], logit_scale=logit_scale, softcap=softcap
    )
    logits_NV = logit_scale * (theirs[0] @ theirs[1].T + theirs[2])
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    truth = F.cross_entropy(logits_NV, gold_N, reduction="sum")
    torch.testing.assert_close(loss, truth, atol=1e-10, rtol=0)
    (3 * loss).backward()
    (3 * truth).backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, atol=1e-10, rtol=0)


def test_full_loss_makes_only_the_gradients_that_are_asked_for():
    *tensors, gold_N = full_problem()
    truth = F.cross_entropy(tensors[0] @ tensors[1].T, gold_N, reduction="sum")
    with torch.no_grad():
        loss = full_cross_entropy(*leaves(*tensors[:2]), gold_N)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth)
    for wanted in (0, 1):
        both = list(tensors[:2])
        both[wanted] = leaves(both[wanted])[0]
        full_cross_entropy(*both, gold_N).backward()
        expected = gradient_of(
            lambda x, both=both, wanted=wanted: F.cross_entropy(
                x @ both[1].T if wanted == 0 else both[0] @ x.T, gold_N, reduction="sum"
            ),
            both[wanted],
        )
        torch.testing.assert_close(both[wanted].grad, expected)
        assert both[1 - wanted].grad is None


def test_full_loss_in_bfloat16_is_no_worse_than_torchs():
    """bf16 in, float64 truth on the same values; budget: torch's own error + 1e-5 relative."""
    hidden, weight, _, gold_N = full_problem(torch.bfloat16)
    truths = leaves(hidden.double(), weight.double())
    truth = F.cross_entropy(truths[0] @ truths[1].T, gold_N, reduction="sum")
    theirs, ours = leaves(hidden, weight), leaves(hidden, weight)
    their_loss = F.cross_entropy((theirs[0] @ theirs[1].T).float(), gold_N, reduction="sum")
    our_loss = full_cross_entropy(*ours, gold_N)
    for loss in (truth, their_loss, our_loss):
        loss.backward()
    assert our_loss.dtype == torch.float32

    def error(value: Tensor, true_value: Tensor) -> float:
        return ((value.double() - true_value).norm() / true_value.norm()).item()

    assert error(our_loss, truth) <= error(their_loss, truth) + 1e-5
    for our, their, true in zip(ours, theirs, truths, strict=True):
        assert our.grad.dtype == torch.bfloat16
        assert error(our.grad, true.grad) <= error(their.grad, true.grad) + 1e-5


@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (1.3, 2.0)])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
@pytest.mark.parametrize("name", ["dft", "kl_to_base"])
def test_baseline_losses_equal_autograds_in_value_and_gradients(
    monkeypatch, name, rows_per_chunk, logit_scale, softcap
):
    """Against torch's own operators on all logits at once, in float64."""
    monkeypatch.setattr(vocabulary_loss, "_CHUNK_ELEMENTS", 40 * rows_per_chunk)
    *tensors, gold_N = full_problem()
    ours, theirs = leaves(*tensors), leaves(*tensors)
    base_NV = 2 * torch.randn(13, 40, generator=rng(4), dtype=torch.float64)
    head = {"bias_V": ours[2], "logit_scale": logit_scale, "softcap": softcap}
    logits_NV = logit_scale * (theirs[0] @ theirs[1].T + theirs[2])
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    torch.testing.assert_close(head_logits(ours[0], ours[1], **head), logits_NV)
    each_N = F.cross_entropy(logits_NV, gold_N, reduction="none")
    if name == "dft":
        loss = dft_cross_entropy(ours[0], ours[1], gold_N.int(), **head)
        truth = ((-each_N).exp().detach() * each_N).sum()
    else:
        loss = kl_regularized_cross_entropy(
            ours[0], ours[1], gold_N.int(), lambda chunk: base_NV[chunk], kl_weight=0.7, **head
        )
        kl = F.kl_div(
            logits_NV.log_softmax(-1), base_NV.log_softmax(-1), reduction="sum", log_target=True
        )
        truth = each_N.sum() + 0.7 * kl
    torch.testing.assert_close(loss, truth, atol=1e-10, rtol=0)
    (3 * loss).backward()
    (3 * truth).backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, atol=1e-10, rtol=0)


def test_at_the_base_model_the_kl_is_zero_and_its_gradient_too():
    logits_NV, head, sets = problem(11)
    full = gradient_of(full_cross_entropy, logits_NV, head, sets.gold_ids)
    regularized = gradient_of(
        kl_regularized_cross_entropy,
        logits_NV,
        head,
        sets.gold_ids,
        lambda chunk: logits_NV[chunk] + 5.0,  # a constant changes nothing
        kl_weight=100.0,
    )
    torch.testing.assert_close(regularized, full, atol=1e-12, rtol=0)


def test_dft_hardly_learns_what_is_unlikely():
    """By hand: two tokens at probability p and 1 - p; the gradient is p (1 - p)."""
    for p in (0.01, 0.5, 0.99):
        logits_NV = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
        gradient_NV = gradient_of(
            dft_cross_entropy, logits_NV, torch.eye(2, dtype=torch.float64), torch.tensor([0])
        )
        assert gradient_NV[0].tolist() == pytest.approx([-p * (1 - p), p * (1 - p)], rel=1e-12)


def test_active_only_is_the_full_loss_where_there_is_a_choice():
    logits_NV, head, _ = problem(10, n=20)
    recorded_NV = 3 * torch.randn(20, 30, generator=rng(10))
    sets = select_candidates(recorded_NV, recorded_NV.argmax(-1), tau=0.5)
    alone = sets.sizes == 1
    assert 0 < int(alone.sum()) < 20
    each_N = F.cross_entropy(logits_NV, sets.gold_ids.long(), reduction="none")
    torch.testing.assert_close(
        active_only_cross_entropy(logits_NV, head, sets), each_N[~alone].sum()
    )
    gradient_NV = gradient_of(active_only_cross_entropy, logits_NV, head, sets)
    assert not gradient_NV[alone].any()
    torch.testing.assert_close(
        gradient_NV[~alone],
        gradient_of(full_cross_entropy, logits_NV, head, sets.gold_ids)[~alone],
    )


def test_losses_of_no_positions_are_zero():
    logits_NV, head, sets = problem()
    none = sets.rows(torch.zeros(0, dtype=torch.int64))
    ids, logweights = draw_tail(5, 30, seed=0, step=0)
    tail = {"tail_ids": ids, "tail_logweights": logweights}
    for loss in (
        lambda h, w: full_cross_entropy(h, w, none.gold_ids),
        lambda h, w: active_only_cross_entropy(h, w, none),
        lambda h, w: soft_cross_entropy(h, w, none),
        lambda h, w: anchor_kl(h, w, none, **tail),
    ):
        h, w = leaves(logits_NV[:0], head)
        value = loss(h, w)
        value.backward()
        assert value.item() == 0.0
        assert w.grad is None or not w.grad.any()


def test_misspelt_options_are_refused():
    logits_NV, head, sets = problem()
    for loss in (soft_cross_entropy, anchor_kl, active_only_cross_entropy):
        with pytest.raises(TypeError, match="soft_cap"):
            loss(logits_NV, head, sets, soft_cap=3.0)


# Outside-mass probe


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_probe_measures_the_outside_mass_of_the_current_model(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(probe, "_CHUNK_ELEMENTS", 30 * rows_per_chunk)
    logits_NV, head, sets = problem(11, n=20)
    bias_V = torch.randn(30, generator=rng(0), dtype=torch.float64)
    shaped_NV = 2.5 * torch.tanh(0.8 * (logits_NV + bias_V) / 2.5)
    rho_N = (shaped_NV.softmax(-1) * ~inside(sets, 30)).sum(-1).numpy()
    measured = outside_mass(
        logits_NV,
        head,
        sets,
        bias_V=bias_V,
        logit_scale=0.8,
        softcap=2.5,
        num_positions=100,
        seed=0,
    )
    assert measured.num_positions == 20
    assert measured.mean == pytest.approx(rho_N.mean(), abs=1e-12)
    assert measured.stderr == pytest.approx(rho_N.std(ddof=1) / math.sqrt(20), abs=1e-12)


def test_probe_of_a_sample_is_one_of_the_positions_and_repeatable():
    logits_NV, head, sets = problem(12, n=20)
    rho_N = (logits_NV.softmax(-1) * ~inside(sets, 30)).sum(-1).numpy()
    means = [
        outside_mass(logits_NV, head, sets, num_positions=3, seed=seed).mean for seed in range(40)
    ]
    possible = np.array([np.mean(x) for x in itertools.combinations(rho_N, 3)])
    assert all(np.abs(possible - mean).min() < 1e-12 for mean in means)
    assert len(set(means)) > 30
    assert outside_mass(logits_NV, head, sets, num_positions=3, seed=7).mean == means[7]
    single = outside_mass(logits_NV, head, sets, num_positions=1, seed=0)
    assert single.num_positions == 1
    assert math.isnan(single.stderr)


def test_probe_leaves_no_trace_and_takes_half_precision():
    logits_NV, head, sets = problem(13)
    hidden, weight = leaves(logits_NV.bfloat16(), head.bfloat16())
    measured = outside_mass(hidden, weight, sets, num_positions=6, seed=0)
    rho_N = (hidden.detach().double().softmax(-1) * ~inside(sets, 30)).sum(-1)
    assert measured.mean == pytest.approx(float(rho_N.mean()), abs=1e-6)
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize(("rows", "num_positions"), [(6, 0), (0, 5)])
def test_probe_of_nothing_is_refused(rows, num_positions):
    logits_NV, head, sets = problem()
    index = torch.arange(rows)
    with pytest.raises(ValueError, match=f"got {num_positions} of {rows}"):
        outside_mass(logits_NV[index], head, sets.rows(index), num_positions=num_positions, seed=0)
