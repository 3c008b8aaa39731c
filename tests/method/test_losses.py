"""The losses by name within a step: tail, anchor, base model and head reach each of them."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import collate
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.method.training_loop import StepOptions, compute_gradients
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import hidden_states
from tests.support.method_training import LOSSES, PAPER, base_of, bytes_of, gradients_of, run
from tests.support.plain_training import (
    VOCABULARY,
    base_llama,
    largest_difference,
    plain_gradients,
    plain_sums,
    random_sample,
    random_samples,
    tiny_llama,
)


def test_a_tail_beyond_the_vocabulary_is_all_of_it_and_the_loss_full_cross_entropy():
    model = tiny_llama()
    samples = random_samples(3, seed=2)
    beyond = dataclasses.replace(PAPER, tail_samples=VOCABULARY + 1000)
    gradients, result = gradients_of(model, samples, beyond)
    expected, full = gradients_of(model, samples, LOSSES["full"])
    assert largest_difference(gradients, expected) < 1e-10
    assert result.loss_sum == pytest.approx(full.loss_sum, rel=1e-12)


@pytest.mark.parametrize("name", ["kl_to_base", "frozen_tail"])
def test_the_loss_that_needs_the_base_model_says_so(name):
    with pytest.raises(ValueError, match=f"{name} needs the base model, got none"):
        gradients_of(tiny_llama(), random_samples(2), LOSSES[name], base=None)


def test_the_base_model_stays_as_it_is_and_has_no_gradient():
    base = base_llama()
    before = bytes_of(base.parameters())
    gradients_of(tiny_llama(), random_samples(3), LOSSES["kl_to_base"])
    assert bytes_of(base.parameters()) == before
    assert all(parameter.grad is None for parameter in base.parameters())


def test_head_options_reach_every_loss():
    """A head with bias, scale and softcap, against logits shaped by hand."""
    torch.manual_seed(0)
    weight_VD = nn.Parameter(torch.randn(VOCABULARY, 8, dtype=torch.float64))
    bias_V = nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    embedding_VD = nn.Parameter(torch.randn(VOCABULARY, 8, dtype=torch.float64))
    head = OutputHead(weight_VD, bias_V, logit_scale=0.3, softcap=2.0)
    parameters = [embedding_VD, weight_VD, bias_V]

    class Plain:
        """The part of a Hugging Face model that ``plain_gradients`` uses."""

        def parameters(self):
            return parameters

        def __call__(self, input_ids, attention_mask):
            raw_BTV = embedding_VD[input_ids] @ weight_VD.T + bias_V
            self.logits = 2.0 * torch.tanh(0.3 * raw_BTV / 2.0)
            return self

    samples = random_samples(3, seed=4)
    for loss in LOSSES.values():
        compute_gradients(
            LanguageModel(lambda batch: embedding_VD[batch.input_ids_BT], head),
            parameters,
            [collate(samples, loss.activity)],
            loss,
            StepOptions(base=base_of(loss)),
            WorkerGroup(),
            step=0,
        )
        expected = plain_gradients(Plain(), samples, loss)
        gradients: list[Any] = [p.grad for p in parameters]
        assert largest_difference(gradients, expected) < 1e-10


@pytest.mark.parametrize("tail_samples", [0, VOCABULARY])
def test_the_untouched_base_model_is_where_the_anchor_has_its_minimum(tail_samples):
    """Its KL and gradient are zero up to the float16 rounding of the recorded log-probabilities.

    With u the unit of rounding of the smallest one, a recorded probability inside S is too small
    by a factor of at least exp(-u), and what is missing, at most u, is in the bucket outside, whose
    true probability is rho. So the KL is at most its chi-squared bound u^2 (1 + 1 / rho), and its
    gradient by the logits at most 2 u in L1 norm. The gradient of the head's weight is the mean of
    outer products of such gradients with hidden states.
    """
    model = tiny_llama(tied=False)
    generator = torch.Generator().manual_seed(1)
    input_ids_T = torch.randint(VOCABULARY, (40,), generator=generator)
    positions_P = torch.arange(39)
    gold_P = input_ids_T[1:]
    with torch.no_grad():
        hidden_TD = hidden_states(model, input_ids_T[None])[0]
        logits_PV = model(input_ids=input_ids_T[None]).logits[0, :-1]
    candidates = select_candidates(logits_PV, gold_P, tau=0.9, k_max=64)
    sample = dataclasses.replace(
        random_sample(generator, length=40),
        input_ids_T=input_ids_T,
        positions_P=positions_P,
        is_supervised_P=positions_P >= 38,
        candidates=candidates,
    )
    loss = LossSettings("active_only", tail_samples, 1.0, seed=0)
    # float16 has 11 significant bits; values are rounded down by less than one unit.
    prompt = candidates.rows(positions_P[:38])
    unit = 2.0 ** (math.floor(math.log2(-float(prompt.logprobs.min()))) - 10)
    assert 2**-10 < unit <= 2**-6
    is_inside_PV = torch.zeros_like(logits_PV[:38], dtype=torch.bool)
    is_inside_PV[prompt.row_ids, prompt.token_ids] = True
    rho_P = logits_PV[:38].softmax(-1).masked_fill(is_inside_PV, 0.0).sum(-1)

    without, _ = gradients_of(model, [sample], dataclasses.replace(loss, anchor_weight=0.0))
    gradients, result = gradients_of(model, [sample], loss)
    head = [name for name, _ in model.named_parameters()].index("lm_head.weight")
    by_anchor = gradients[head] - without[head]
    limit = 2 * unit * float(hidden_TD[:38].norm(dim=-1).mean())
    assert float(by_anchor.norm()) < limit
    limit = unit**2 * float((1 + 1 / rho_P).mean())
    assert 0 < result.anchor_sum / 38 < limit < 0.01

    # Not so once the model has moved.
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape) * 0.2)
    _, moved = gradients_of(model, [sample], loss)
    assert moved.anchor_sum / 38 > 10 * limit


def test_one_tail_serves_all_micro_batches_of_a_step_and_no_other():
    """Against the plain loss with the tail drawn for that very step."""
    loss = LOSSES["restricted + tail"]
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters())
    samples = random_samples(6)
    supervised = sum(int(sample.is_supervised_P.sum()) for sample in samples)
    results = run(
        model,
        optimizer,
        lambda step: samples,
        loss,
        steps=3,
        num_micro_batches=3,
        lr_of_step=lambda step: 0.0,
    )
    expected = [plain_sums(model, samples, loss, step)[0].item() / supervised for step in range(3)]
    assert [result.loss for result in results] == pytest.approx(expected, rel=1e-12)
    assert len({round(value, 6) for value in expected}) == 3
    tails = [draw_tail(40, VOCABULARY, seed=3, step=step)[0].tolist() for step in range(3)]
    assert tails[0] != tails[1] != tails[2]


@pytest.mark.parametrize(
    ("name", "supervised", "prompt"),
    [
        ("restricted", 2, math.inf),
        ("restricted + anchor", 2, 2),
        ("restricted + tail", 1, math.inf),
        ("restricted + tail + anchor", 1, 1),
        ("soft", 2, math.inf),
        ("soft + tail + anchor", 2, 1),
        ("active_only", 2, math.inf),
        ("active_only + tail + anchor", 2, 1),
        ("full", 1, math.inf),
        ("full + anchor", 1, 2),
        ("dft", 1, math.inf),
        ("kl_to_base + anchor", 1, 2),
        ("asft + anchor", 1, 2),
        ("eaft", 1, math.inf),
        ("flow", 1, math.inf),
        ("frozen_tail", 1, math.inf),
        ("frozen_tail + tail + anchor", 1, 1),
    ],
)
def test_how_many_candidates_make_a_position_active(name, supervised, prompt):
    """One is enough where the loss sees tokens outside of S, at whichever kind of position."""
    activity = LOSSES[name].activity
    assert (activity.supervised, activity.prompt) == (supervised, prompt)


def test_the_tail_of_a_step_is_that_of_the_seed_and_at_most_the_vocabulary():
    head = OutputHead(torch.zeros(VOCABULARY, 3))
    assert PAPER.tail_of_step(2, head) is None
    tail = LOSSES["restricted + tail"].tail_of_step(2, head)
    drawn = draw_tail(40, VOCABULARY, seed=3, step=2)
    assert all(torch.equal(a, b) for a, b in zip(tail, drawn, strict=True))
    beyond = dataclasses.replace(PAPER, tail_samples=VOCABULARY + 1).tail_of_step(2, head)
    assert beyond.ids_R.tolist() == list(range(VOCABULARY))
