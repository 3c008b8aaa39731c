import copy
import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lrmc_ray.method.losses import LanguageModel
from lrmc_ray.method.microbatch import collate
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.training_loop import StepOptions, compute_gradients, micro_batch_seed
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import hidden_states
from lrmc_ray.models.head import head_of
from tests.support.method_training import (
    LOSSES,
    PAPER,
    bytes_of,
    gradients_of,
    run,
    state_of,
)
from tests.support.plain_training import (
    largest_difference,
    plain_gradients,
    plain_sums,
    random_sample,
    random_samples,
    tiny_llama,
)

# The gradient


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_those_from_full_logits(name, tied):
    """Also trimmed and untrimmed are the same gradient; all in float64."""
    loss = LOSSES[name]
    model = tiny_llama(tied=tied)
    samples = random_samples(6, seed=1)
    main, anchor = plain_sums(model, samples, loss, step=2)
    expected = plain_gradients(model, samples, loss, step=2)

    trimmed, result = gradients_of(model, samples, loss, step=2)
    assert result.loss_sum == pytest.approx(main.item(), rel=1e-12)
    assert result.anchor_sum == pytest.approx(anchor.item(), rel=1e-11)
    assert largest_difference(trimmed, expected) < 1e-10
    # Those of ``dft`` and ``asft`` have the probabilities of an untrained model as factors.
    floor = 1e-3 if loss.loss in ("dft", "asft") else 1e-2
    assert max(float(gradient.abs().max()) for gradient in trimmed) > floor

    untrimmed, _ = gradients_of(model, samples, loss, step=2, trim=False)
    assert largest_difference(trimmed, untrimmed) < 1e-10


@given(seed=st.integers(0, 2**31 - 1), name=st.sampled_from(sorted(LOSSES)))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_trimming_changes_no_gradient(seed, name):
    model = tiny_llama()
    samples = random_samples(3, seed=seed)
    trimmed, fewer = gradients_of(model, samples, LOSSES[name])
    untrimmed, more = gradients_of(model, samples, LOSSES[name], trim=False)
    assert largest_difference(trimmed, untrimmed) < 1e-10
    assert fewer.micro_batches[0].num_processed <= more.micro_batches[0].num_processed


def test_samples_without_an_active_position_count_in_the_divisor():
    """Five supervised positions with a choice, and five without: half the gradient."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    active = random_sample(generator, sizes=[3] * 6)
    inactive = random_sample(generator, sizes=[1] * 6)
    is_supervised = torch.tensor([False] + [True] * 5)
    active = dataclasses.replace(active, is_supervised_P=is_supervised)
    inactive = dataclasses.replace(inactive, is_supervised_P=is_supervised)
    alone, _ = gradients_of(model, [active], PAPER)
    both, _ = gradients_of(model, [active, inactive], PAPER)
    assert largest_difference(both, [gradient / 2 for gradient in alone]) < 1e-15


@pytest.mark.parametrize("name", ["restricted", "restricted + tail + anchor", "full + anchor"])
@pytest.mark.parametrize("reduction", ["strict", "fast"])
def test_one_micro_batch_of_eight_equals_eight_of_one_equals_four_of_two(name, reduction):
    loss = LOSSES[name]
    model = tiny_llama()
    samples = random_samples(8, seed=5)
    counts = [int(sample.is_supervised_P.sum()) for sample in samples]
    assert len(set(counts)) > 4
    expected = plain_gradients(model, samples, loss)
    for num_micro_batches in (1, 8, 4, 11):
        gradients, _ = gradients_of(
            model, samples, loss, num_micro_batches=num_micro_batches, reduction=reduction
        )
        assert largest_difference(gradients, expected) < 1e-10

    # What the test would miss if all samples had equally many positions: a mean of means.
    means = [plain_gradients(model, [sample], loss) for sample in samples]
    mean_of_means = [sum(parts) / len(samples) for parts in zip(*means, strict=True)]
    assert largest_difference(mean_of_means, expected) > 1e-2


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_right_one():
    """As with adapters: only some parameters are trained."""
    loss = LOSSES["restricted + tail + anchor"]
    model = tiny_llama(tied=False)
    samples = random_samples(4, seed=2)
    names = [name for name, _ in model.named_parameters()]
    wanted = dict(zip(names, plain_gradients(model, samples, loss), strict=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    compute_gradients(
        LanguageModel(lambda batch: hidden_states(model, batch.input_ids_BT), head_of(model)),
        list(trained.values()),
        [collate(samples, loss.activity)],
        loss,
        StepOptions(),
        WorkerGroup(),
        step=0,
    )
    gradients = [parameter.grad for parameter in trained.values()]
    assert largest_difference(gradients, [wanted[name] for name in trained]) < 1e-10
    assert model.lm_head.weight.grad is None


def test_autocast_runs_the_forward_pass_in_bfloat16_and_keeps_float32_gradients():
    model = tiny_llama(dtype=torch.float32)
    samples = random_samples(4)
    seen = []
    exact, _ = gradients_of(model, samples, PAPER)
    rounded, _ = gradients_of(
        model,
        samples,
        PAPER,
        autocast=torch.bfloat16,
        step=3,
        probe=lambda step, hidden_BTD, batch: seen.append(step),
    )
    assert {gradient.dtype for gradient in rounded} == {torch.float32}
    # A linear layer's output is bf16 under autocast, so the gradients keep about 8 bits.
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True)]
    assert 1e-4 < max(relative) < 0.1
    assert seen == [3]


def test_micro_batches_have_seeds_of_their_own():
    grid = {
        micro_batch_seed(seed, step, index)
        for seed in (0, 1, 2, 17, 2**31)
        for step in range(200)
        for index in range(16)
    }
    assert len(grid) == 5 * 200 * 16
    assert all(0 <= seed < 2**63 for seed in grid)


# Steps


@pytest.mark.parametrize("max_grad_norm", [None, 0.1, 1e6])
def test_a_step_of_sgd_follows_the_clipped_plain_gradient(max_grad_norm):
    """SGD without momentum: the change is lr times the gradient, at the schedule's lr."""
    model = tiny_llama()
    samples = random_samples(8)
    expected = plain_gradients(model, samples, PAPER)
    copies = [nn.Parameter(torch.zeros_like(gradient)) for gradient in expected]
    for parameter, gradient in zip(copies, expected, strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(copies, max_grad_norm or math.inf)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    (result,) = run(
        model,
        optimizer,
        lambda step: samples,
        steps=1,
        max_grad_norm=max_grad_norm,
        lr_of_step=lambda step: 0.5 + step,
    )
    change = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    assert largest_difference(change, [copy.grad.mul(0.5) for copy in copies]) < 1e-12
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert result.lr == 0.5
    if max_grad_norm == 0.1:
        assert float(norm) > 0.1


def test_the_schedule_sets_the_rate_of_every_step():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    results = run(
        model,
        optimizer,
        lambda step: random_samples(2),
        steps=5,
        first_step=2,
        lr_of_step=lambda step: 10.0**-step,
    )
    seen = [(result.step, result.lr, optimizer.param_groups[0]["lr"]) for result in results]
    assert seen == [(step, 10.0**-step, 10.0**-step) for step in (2, 3, 4)]


def test_numbers_of_a_step_by_hand():
    """Three samples: one cut short, one without a choice, one whole."""
    generator = torch.Generator().manual_seed(0)
    cut = random_sample(generator, name="cut", sizes=[2, 3, 1, 4, 1, 1, 1])
    none = random_sample(generator, name="none", sizes=[1, 1, 1, 1])
    whole = random_sample(generator, name="whole", sizes=[5, 1, 7])
    prompts = {"cut": 1, "none": 2, "whole": 1}
    samples = [
        dataclasses.replace(
            s, is_supervised_P=torch.arange(len(s.positions_P)) >= prompts[s.sample_id]
        )
        for s in (cut, none, whole)
    ]
    model = tiny_llama()
    main, anchor = plain_sums(model, samples, dataclasses.replace(PAPER, anchor_weight=2.0), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = dataclasses.replace(PAPER, anchor_weight=2.0)
    (result,) = run(model, optimizer, lambda step: samples, loss, steps=1, num_micro_batches=2)
    assert result.sample_ids == ["cut", "none", "whole"]
    assert result.num_supervised == 6 + 2 + 2
    assert result.num_active == 2 + 0 + 1
    assert result.mean_candidates == pytest.approx((3 + 4 + 7) / 3)
    assert result.num_tokens == 8 + 5 + 4
    assert result.num_processed == 4 + 0 + 3
    # "none" and "whole" are the shorter two: one part of one row of 3; "cut" is the other part.
    assert result.num_padded == 3 + 4
    # The anchor's mean is over all 4 prompt positions, those of "none" included.
    assert result.loss == pytest.approx(main.item() / 10, rel=1e-12)
    assert result.anchor == pytest.approx(anchor.item() / 4, rel=1e-12)
    assert result.is_applied


def test_padding_counts_as_padded_alone():
    generator = torch.Generator().manual_seed(0)
    samples = [random_sample(generator, sizes=[2] * size) for size in (3, 9)]
    samples = [
        dataclasses.replace(s, is_supervised_P=torch.ones_like(s.is_supervised_P)) for s in samples
    ]
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (result,) = run(model, optimizer, lambda step: samples, steps=1, num_micro_batches=1)
    assert (result.num_tokens, result.num_processed, result.num_padded) == (14, 12, 18)


def test_a_run_in_two_parts_ends_in_the_same_bits():
    """Dropout, the sampled tail and the schedule follow the step alone."""
    loss = LOSSES["restricted + tail + anchor"]

    def start():
        model = tiny_llama(dropout=0.1, dtype=torch.float32).train()
        return model, MoClip(model.parameters(), lr=0.01)

    def batch_of_step(step):
        return random_samples(4, seed=step)

    model, optimizer = start()
    whole = list(run(model, optimizer, batch_of_step, loss, steps=4))
    first_model, first_optimizer = start()
    parts = list(run(first_model, first_optimizer, batch_of_step, loss, steps=2))
    second_model, second_optimizer = start()
    second_model.load_state_dict(copy.deepcopy(first_model.state_dict()))
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    torch.manual_seed(12345)  # whatever happened before does not matter
    parts += run(second_model, second_optimizer, batch_of_step, loss, steps=4, first_step=2)
    assert parts == whole
    assert bytes_of(second_model.parameters()) == bytes_of(model.parameters())
    assert state_of(second_optimizer) == state_of(optimizer)


def test_the_probe_sees_the_first_part_with_an_active_supervised_position():
    """Sorted by length, the parts without a choice come first; the anchor may keep them busy."""
    generator = torch.Generator().manual_seed(9)
    loss = dataclasses.replace(PAPER, anchor_weight=1.0)

    def sample(name, sizes, prompt):
        drawn = random_sample(generator, name=name, sizes=sizes)
        is_supervised_P = torch.arange(len(sizes)) >= prompt
        return dataclasses.replace(drawn, is_supervised_P=is_supervised_P)

    empty = sample("empty", [1, 1], 1)
    anchored = sample("anchored", [4, 4, 1, 1], 2)
    first = sample("first", [1, 1, 1, 4, 3], 2)
    second = sample("second", [1, 1, 1, 4, 3, 2], 2)
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []

    def probe(step, hidden_BTD, batch):
        assert not hidden_BTD.requires_grad
        expected_BTD = hidden_states(model, batch.input_ids_BT).detach()
        torch.testing.assert_close(hidden_BTD, expected_BTD)
        seen.append((step, batch.supervised.column_N.tolist()))

    samples = [second, first, anchored, empty]
    list(
        run(model, optimizer, lambda step: samples, loss, steps=2, probe=probe, num_micro_batches=4)
    )
    assert seen == [(0, [3, 4]), (1, [3, 4])]
    list(run(model, optimizer, lambda step: [empty], loss, steps=1, probe=probe))
    assert len(seen) == 2


# Steps that are not finite


class Poisoned:
    """A model whose hidden states, or their gradient, are poisoned in some steps."""

    def __init__(self, bad_steps, *, value=math.nan, where="loss"):
        self.model = tiny_llama(dtype=torch.float32)
        self.bad_steps, self.value, self.where = bad_steps, value, where
        self.step = -1

    def batch_of_step(self, step):
        self.step = step
        return random_samples(4, seed=step)

    def forward(self, batch):
        hidden_BTD = hidden_states(self.model, batch.input_ids_BT)
        if self.step not in self.bad_steps:
            return hidden_BTD
        if self.where == "loss":
            return hidden_BTD * self.value
        hidden_BTD.register_hook(lambda gradient: gradient * self.value)
        return hidden_BTD

    def run(self, optimizer, **options):
        return run(self.model, optimizer, self.batch_of_step, forward=self.forward, **options)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(where, value, max_grad_norm):
    poisoned = Poisoned({1}, value=value, where=where)
    optimizer = MoClip(poisoned.model.parameters(), lr=0.01, weight_decay=0.1)
    applied, weights, states = [], [], []
    for result in poisoned.run(optimizer, steps=3, max_grad_norm=max_grad_norm):
        applied.append(result.is_applied)
        weights.append(bytes_of(poisoned.model.parameters()))
        states.append(state_of(optimizer))
        assert all(parameter.grad is None for parameter in poisoned.model.parameters())
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        assert is_finite == result.is_applied
    assert applied == [True, False, True]
    assert weights[0] == weights[1] != weights[2]
    assert states[0] == states[1] != states[2]


def test_bad_steps_in_a_row_end_the_run_by_name():
    poisoned = Poisoned({1, 2, 3})
    optimizer = torch.optim.SGD(poisoned.model.parameters(), lr=0.01)
    results = poisoned.run(optimizer, steps=9, max_bad_steps=3)
    assert [next(results).is_applied for _ in range(3)] == [True, False, False]
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .*step 3.*lower train\.lr"):
        next(results)


def test_the_count_of_bad_steps_goes_on_in_the_next_run():
    """A worker that dies after every bad step must not start the count again."""
    poisoned = Poisoned({2, 3, 4})
    optimizer = torch.optim.SGD(poisoned.model.parameters(), lr=0.01)
    *_, last = poisoned.run(optimizer, steps=4, max_bad_steps=3)
    assert last.bad_steps == 2
    results = poisoned.run(
        optimizer, steps=9, first_step=4, max_bad_steps=3, bad_steps=last.bad_steps
    )
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .*step 4"):
        next(results)


def test_a_good_step_between_bad_ones_starts_the_count_again():
    poisoned = Poisoned({0, 1, 3, 4})
    optimizer = torch.optim.SGD(poisoned.model.parameters(), lr=0.01)
    results = poisoned.run(optimizer, steps=6, max_bad_steps=3)
    assert [result.is_applied for result in results] == [False, False, True, False, False, True]
