"""Losses over the whole vocabulary against torch's own operators on all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.baselines import vocabulary_loss
from lrmc_ray.method.baselines.vocabulary_loss import (
    active_only_cross_entropy,
    asft_cross_entropy,
    dft_cross_entropy,
    eaft_cross_entropy,
    full_cross_entropy,
    kl_regularized_cross_entropy,
    weighted_cross_entropy,
)
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.subsets import select_candidates
from tests.support.method_inputs import gradient_of, leaves, logits_problem, rng

torch.set_num_threads(1)


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
    monkeypatch.setattr(vocabulary_loss, "CHUNK_ELEMENTS", 40 * rows_per_chunk)
    *tensors, gold_N = full_problem()
    ours, theirs = leaves(*tensors), leaves(*tensors)
    head = OutputHead(ours[1], ours[2], logit_scale=logit_scale, softcap=softcap)
    loss = full_cross_entropy(ours[0], head, gold_N.int())
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
        hidden, weight = leaves(*tensors[:2])
        loss = full_cross_entropy(hidden, OutputHead(weight), gold_N)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth)
    for wanted in (0, 1):
        both = list(tensors[:2])
        both[wanted] = leaves(both[wanted])[0]
        full_cross_entropy(both[0], OutputHead(both[1]), gold_N).backward()
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
    our_loss = full_cross_entropy(ours[0], OutputHead(ours[1]), gold_N)
    for loss in (truth, their_loss, our_loss):
        loss.backward()
    assert our_loss.dtype == torch.float32

    def error(value: Tensor, true_value: Tensor) -> float:
        return ((value.double() - true_value).norm() / true_value.norm()).item()

    assert error(our_loss, truth) <= error(their_loss, truth) + 1e-5
    for our, their, true in zip(ours, theirs, truths, strict=True):
        assert our.grad.dtype == torch.bfloat16
        assert error(our.grad, true.grad) <= error(their.grad, true.grad) + 1e-5


def coarse_kl(logits_NV, sets):
    """KL(base || model) where all tokens outside a row's set are one outcome, row by row."""
    total = logits_NV.new_zeros(())
    for row, logits_V in enumerate(logits_NV):
        entries = sets.rows(torch.tensor([row]))
        inside = entries.token_ids.long()
        base = entries.logprobs.double().exp()
        base = torch.cat([base, 1 - base.sum().reshape(1)])
        model = logits_V.softmax(0)[inside]
        model = torch.cat([model, 1 - model.sum().reshape(1)])
        total = total + torch.distributions.kl_divergence(
            torch.distributions.Categorical(base), torch.distributions.Categorical(model)
        )
    return total


@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (1.3, 2.0)])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
@pytest.mark.parametrize("name", ["dft", "kl_to_base", "asft", "eaft", "flow"])
def test_baseline_losses_equal_autograds_in_value_and_gradients(
    monkeypatch, name, rows_per_chunk, logit_scale, softcap
):
    """Against torch's own operators on all logits at once, in float64."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_ELEMENTS", 40 * rows_per_chunk)
    *tensors, gold_N = full_problem()
    ours, theirs = leaves(*tensors), leaves(*tensors)
    base_NV = 2 * torch.randn(13, 40, generator=rng(4), dtype=torch.float64)
    head = OutputHead(ours[1], ours[2], logit_scale=logit_scale, softcap=softcap)
    logits_NV = logit_scale * (theirs[0] @ theirs[1].T + theirs[2])
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    each_N = F.cross_entropy(logits_NV, gold_N, reduction="none")
    if name == "dft":
        loss = dft_cross_entropy(ours[0], head, gold_N.int())
        truth = ((-each_N).exp().detach() * each_N).sum()
    elif name == "asft":
        sets = select_candidates(base_NV, gold_N, tau=0.8)
        loss = asft_cross_entropy(ours[0], head, sets, kl_weight=0.7)
        truth = ((-each_N).exp().detach() * each_N).sum() + 0.7 * coarse_kl(logits_NV, sets)
    elif name == "eaft":
        loss = eaft_cross_entropy(ours[0], head, gold_N.int())
        likeliest_NK = logits_NV.detach().sort(-1, descending=True).values[:, :20]
        entropy_N = torch.distributions.Categorical(logits=likeliest_NK).entropy()
        truth = (entropy_N / math.log(20) * each_N).sum()
    elif name == "flow":
        weight_N = torch.rand(13, generator=rng(5), dtype=torch.float64)
        loss = weighted_cross_entropy(ours[0], head, gold_N.int(), weight_N)
        truth = (weight_N * each_N).sum()
    else:
        loss = kl_regularized_cross_entropy(
            ours[0], head, gold_N.int(), lambda chunk: base_NV[chunk], kl_weight=0.7
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
    logits_NV, weight_VD, sets = logits_problem(11)
    head = OutputHead(weight_VD)
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
            dft_cross_entropy,
            logits_NV,
            OutputHead(torch.eye(2, dtype=torch.float64)),
            torch.tensor([0]),
        )
        assert gradient_NV[0].tolist() == pytest.approx([-p * (1 - p), p * (1 - p)], rel=1e-12)


def test_eaft_learns_nothing_where_the_model_is_sure_and_all_where_it_is_not():
    """By hand: of 25 tokens 20 are equally likely, and one has everything."""
    open_V = torch.cat([torch.zeros(20), torch.full((5,), -50.0)])
    sure_V = torch.cat([torch.tensor([60.0]), torch.zeros(24)])
    logits_NV = torch.stack([open_V, sure_V]).double()
    head, gold_N = OutputHead(torch.eye(25, dtype=torch.float64)), torch.tensor([3, 3])
    gradient_NV = gradient_of(eaft_cross_entropy, logits_NV, head, gold_N)
    full_NV = gradient_of(full_cross_entropy, logits_NV, head, gold_N)
    torch.testing.assert_close(gradient_NV[0], full_NV[0], rtol=1e-12, atol=0)
    assert full_NV[1].abs().max() > 0.99
    assert gradient_NV[1].abs().max() < 1e-20


def test_asft_is_dft_where_the_model_is_the_recorded_base():
    """Up to the float16 rounding of what is recorded, at any weight of the KL."""
    logits_NV, weight_VD, _ = logits_problem(11)
    head, gold_N = OutputHead(weight_VD), logits_NV.argmin(-1)
    sets = select_candidates(logits_NV, gold_N, tau=0.9)
    dft_NV = gradient_of(dft_cross_entropy, logits_NV, head, gold_N)
    asft_NV = gradient_of(lambda h: asft_cross_entropy(h, head, sets, kl_weight=1.0), logits_NV)
    torch.testing.assert_close(asft_NV, dft_NV, rtol=0, atol=2e-3)


def test_asft_with_the_whole_vocabulary_recorded_has_the_whole_kl():
    logits_NV, weight_VD, _ = logits_problem(12)
    recorded_NV = 2 * torch.randn(6, 30, generator=rng(3), dtype=torch.float64)
    sets = select_candidates(recorded_NV, logits_NV.argmax(-1), tau=1.0, k_min=30, k_max=30)
    loss = asft_cross_entropy(logits_NV, OutputHead(weight_VD), sets, kl_weight=2.0)
    dft = dft_cross_entropy(logits_NV, OutputHead(weight_VD), sets.gold_ids)
    kl = F.kl_div(
        logits_NV.log_softmax(-1), recorded_NV.log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(loss, dft + 2 * kl, rtol=2e-3, atol=0)


def test_asft_stays_finite_where_the_model_leaves_nothing_outside():
    """In float32 the mass outside S is zero, and so is its part of each token there."""
    logits_NV = torch.full((1, 30), -300.0)
    logits_NV[0, :2] = 0.0
    recorded_NV = torch.zeros(1, 30)
    recorded_NV[0, :2] = 5.0
    sets = select_candidates(recorded_NV, torch.tensor([0]), tau=0.9)
    assert sets.sizes.tolist() == [2]
    gradient_NV = gradient_of(
        lambda h: asft_cross_entropy(h, OutputHead(torch.eye(30)), sets, kl_weight=1.0), logits_NV
    )
    # By hand: -o / 28 for each of the 28, where o is the base's mass outside.
    share = float(sets.outside_mass()) / 28
    torch.testing.assert_close(gradient_NV[0, 2:], torch.full((28,), -share), rtol=1e-4, atol=0)


def test_active_only_is_the_full_loss_where_there_is_a_choice():
    logits_NV, weight_VD, _ = logits_problem(10, n=20)
    head = OutputHead(weight_VD)
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
    logits_NV, weight_VD, sets = logits_problem()
    none = sets.rows(torch.zeros(0, dtype=torch.int64))
    for loss in (
        lambda h, head: full_cross_entropy(h, head, none.gold_ids),
        lambda h, head: active_only_cross_entropy(h, head, none),
        lambda h, head: dft_cross_entropy(h, head, none.gold_ids),
        lambda h, head: eaft_cross_entropy(h, head, none.gold_ids),
        lambda h, head: asft_cross_entropy(h, head, none, kl_weight=1.0),
        lambda h, head: weighted_cross_entropy(h, head, none.gold_ids, torch.zeros(0)),
    ):
        h, w = leaves(logits_NV[:0], weight_VD)
        value = loss(h, OutputHead(w))
        value.backward()
        assert value.item() == 0.0
        assert w.grad is None or not w.grad.any()
