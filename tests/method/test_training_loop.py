import copy
import dataclasses
import math
import multiprocessing

import hypothesis.strategies as st
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from torch import nn

from lrmc_ray.method.l2_sp import StartingPoint
from lrmc_ray.method.microbatch import active_length, collate, deal
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.method.training_loop import (
    FrozenBase,
    LossSettings,
    OutputHead,
    WorkerGroup,
    compute_gradients,
    learning_rate,
    micro_batch_seed,
    train,
    waves,
)
from lrmc_ray.models import batch_hidden_states, head_of, hidden_states
from tests.method import elastic_workers
from tests.method.elastic_workers import CASES, LR, STEPS, WEIGHT_DECAY, WORLD_SIZES, Case
from tests.method.plain_training import (
    VOCABULARY,
    base_llama,
    branching_samples,
    largest_difference,
    plain_gradients,
    plain_sums,
    random_sample,
    random_samples,
    tiny_llama,
)

PAPER = LossSettings("restricted", tail_samples=0, anchor_weight=0.0, seed=3)
LOSSES = {
    "restricted": PAPER,
    "restricted + anchor": dataclasses.replace(PAPER, anchor_weight=0.7),
    "restricted + tail": dataclasses.replace(PAPER, tail_samples=40),
    "restricted + tail + anchor": LossSettings("restricted", 40, 0.7, seed=3),
    "restricted + tail of all tokens + anchor": LossSettings("restricted", VOCABULARY, 0.7, seed=3),
    "soft": LossSettings("soft", 0, 0.0, seed=3),
    "soft + tail + anchor": LossSettings("soft", 40, 0.7, seed=3),
    "active_only": LossSettings("active_only", 0, 0.0, seed=3),
    "active_only + tail + anchor": LossSettings("active_only", 40, 0.7, seed=3),
    "full": LossSettings("full", 0, 0.0, seed=3),
    "full + anchor": LossSettings("full", 0, 0.7, seed=3),
    "dft": LossSettings("dft", 0, 0.0, seed=3),
    "dft + anchor": LossSettings("dft", 0, 0.7, seed=3),
    "kl_to_base": LossSettings("kl_to_base", 0, 0.0, seed=3, base_kl_weight=0.4),
    "kl_to_base + anchor": LossSettings("kl_to_base", 0, 0.7, seed=3, base_kl_weight=3.0),
}


def base_of(loss, dtype=torch.float64):
    """The frozen base model that the loss needs, if it does."""
    if loss.loss != "kl_to_base":
        return None
    base = base_llama(dtype)
    return FrozenBase(lambda batch: batch_hidden_states(base, batch), head_of(base))


def gradients_of(
    model,
    samples,
    loss,
    *,
    num_micro_batches=1,
    trim=True,
    step=0,
    attention_cost=math.inf,
    **options,
):
    """The gradients that ``compute_gradients`` leaves, and what it returns."""
    parameters = list(model.parameters())
    parts = deal(samples, num_micro_batches, loss.activity)
    result = compute_gradients(
        lambda batch: batch_hidden_states(model, batch),
        head_of(model),
        parameters,
        [
            collate(
                [samples[i] for i in part],
                loss.activity,
                trim=trim,
                attention_cost=attention_cost,
            )
            for part in parts
        ],
        loss,
        WorkerGroup(),
        step=step,
        **{"reduction": "strict", "base": base_of(loss), **options},
    )
    gradients = [parameter.grad for parameter in parameters]
    model.zero_grad(set_to_none=True)
    return gradients, result


def run(model, optimizer, batch_of_step, loss=PAPER, *, steps, first_step=0, **options):
    """All steps of a run on one worker."""
    forward = options.pop("forward", lambda batch: hidden_states(model, batch.input_ids_BT))
    options = {"num_micro_batches": 2, "lr_of_step": lambda step: 0.01, **options}
    return train(
        forward,
        head_of(model),
        optimizer,
        batch_of_step,
        loss,
        WorkerGroup(),
        first_step=first_step,
        steps=steps,
        **options,
    )


def bytes_of(tensors) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def state_of(optimizer) -> list[bytes]:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return bytes_of(state[name] for state in states for name in sorted(state))


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
    # That of ``dft`` has the probabilities of an untrained model as factors.
    floor = 1e-3 if loss.loss == "dft" else 1e-2
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


def test_a_tail_beyond_the_vocabulary_is_all_of_it_and_the_loss_full_cross_entropy():
    model = tiny_llama()
    samples = random_samples(3, seed=2)
    beyond = dataclasses.replace(PAPER, tail_samples=VOCABULARY + 1000)
    gradients, result = gradients_of(model, samples, beyond)
    expected, full = gradients_of(model, samples, LOSSES["full"])
    assert largest_difference(gradients, expected) < 1e-10
    assert result.loss_sum == pytest.approx(full.loss_sum, rel=1e-12)


def test_the_loss_that_needs_the_base_model_says_so():
    loss = LOSSES["kl_to_base"]
    with pytest.raises(ValueError, match="kl_to_base needs the base model, got none"):
        gradients_of(tiny_llama(), random_samples(2), loss, base=None)


def test_the_base_model_stays_as_it_is_and_has_no_gradient():
    base = base_llama()
    before = bytes_of(base.parameters())
    gradients_of(tiny_llama(), random_samples(3), LOSSES["kl_to_base"])
    assert bytes_of(base.parameters()) == before
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_penalty_is_within_the_gradient_that_is_clipped_and_taken():
    """L2-SP by hand: two steps of gradient descent in float64, clipped to norm 0.01."""
    model, plain = tiny_llama(), tiny_llama()
    start = [p.detach().clone() for p in plain.parameters()]
    samples = [random_samples(4, seed=step) for step in range(2)]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    penalty = StartingPoint(parameters, 0.3)
    list(
        run(
            model,
            optimizer,
            samples.__getitem__,
            steps=2,
            lr_of_step=lambda step: 1.0,
            max_grad_norm=0.01,
            penalize=penalty.add_gradient,
        )
    )
    for step in range(2):
        gradients = plain_gradients(plain, samples[step], PAPER)
        with torch.no_grad():
            whole = [
                g + 0.3 * (p - p0)
                for g, p, p0 in zip(gradients, plain.parameters(), start, strict=True)
            ]
            norm = torch.stack([g.norm() for g in whole]).norm()
            for parameter, gradient in zip(plain.parameters(), whole, strict=True):
                parameter -= gradient * 0.01 / (norm + 1e-6)
    weights = [[p.detach() for p in m.parameters()] for m in (model, plain)]
    assert largest_difference(*weights) < 1e-12


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
        lambda batch: hidden_states(model, batch.input_ids_BT),
        head_of(model),
        list(trained.values()),
        [collate(samples, loss.activity)],
        loss,
        WorkerGroup(),
        step=0,
        reduction="strict",
    )
    gradients = [parameter.grad for parameter in trained.values()]
    assert largest_difference(gradients, [wanted[name] for name in trained]) < 1e-10
    assert model.lm_head.weight.grad is None


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
            lambda batch: embedding_VD[batch.input_ids_BT],
            head,
            parameters,
            [collate(samples, loss.activity)],
            loss,
            WorkerGroup(),
            step=0,
            reduction="strict",
            base=base_of(loss),
        )
        expected = plain_gradients(Plain(), samples, loss)
        assert largest_difference([p.grad for p in parameters], expected) < 1e-10


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
        probe=lambda hidden_BTD, batch: seen.append(hidden_BTD.dtype),
    )
    assert {gradient.dtype for gradient in rounded} == {torch.float32}
    # A linear layer's output is bf16 under autocast, so the gradients keep about 8 bits.
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True)]
    assert 1e-4 < max(relative) < 0.1
    assert len(seen) == 1


# Workers


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every world size, of every rank, of every case: one set of processes for all."""
    directory = tmp_path_factory.mktemp("workers")
    # The server imports torch and transformers once, then forks every worker.
    multiprocessing.get_context("forkserver").set_forkserver_preload([elastic_workers.__name__])
    torch.multiprocessing.start_processes(
        elastic_workers.worker, (directory,), nprocs=max(WORLD_SIZES), start_method="forkserver"
    )
    return elastic_workers.outcomes(directory)


STRICT = [name for name, case in CASES.items() if case.reduction == "strict"]


@pytest.mark.parametrize("name", STRICT)
def test_strict_gives_the_same_bits_for_every_number_of_workers(outcomes, name):
    """With dropout, several optimizer steps and W = 3, which does not divide 4 micro-batches."""
    digests = {rank[name].digest for ranks in outcomes.values() for rank in ranks}
    assert len(digests) == 1
    results = [rank[name].results for ranks in outcomes.values() for rank in ranks]
    assert all(result == results[0] for result in results)
    assert len(results[0]) == STEPS


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICT])
def test_fast_agrees_up_to_rounding(outcomes, name):
    """Measured: parameters within 3e-6, losses within 3e-8 relative, after 3 steps of lr 0.01."""
    alone = outcomes[1][0][name]
    for world_size, ranks in outcomes.items():
        assert len({rank[name].digest for rank in ranks}) == 1
        assert all(rank[name].results == ranks[0][name].results for rank in ranks)
        assert largest_difference(ranks[0][name].parameters, alone.parameters) < 2e-5
        for ours, theirs in zip(ranks[0][name].results, alone.results, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        # Only where nothing is added up are the bits the same; so ``strict`` is not in vain.
        is_same = ranks[0][name].digest == alone.digest
        assert is_same == (world_size == 1 or CASES[name].num_active <= 2)


def test_fast_and_strict_agree_up_to_rounding(outcomes):
    fast, strict = outcomes[4][0]["fast"], outcomes[4][0]["anchor"]
    assert largest_difference(fast.parameters, strict.parameters) < 2e-5


def test_workers_without_an_active_position_change_nothing(outcomes):
    """Three of four parts empty: one worker computes, all of them hold its result."""
    (case,) = [case for name, case in CASES.items() if name == "one busy part"]
    samples = elastic_workers.samples_of_step(case, 0)
    empty = [sample for sample in samples if not active_length(sample, case.loss.activity)]
    assert len(empty) == 6
    result = outcomes[4][3]["one busy part"].results[0]
    assert 0 < result.num_processed < result.num_tokens / 2
    assert result.num_supervised == sum(int(s.is_supervised_P.sum()) for s in samples)
    assert result.loss > 0


def test_without_any_active_position_weights_only_decay(outcomes):
    start = tiny_llama(dtype=torch.float32, dropout=0.1)
    decayed = [p.detach() * (1 - LR * WEIGHT_DECAY) ** STEPS for p in start.parameters()]
    outcome = outcomes[4][2]["no busy part"]
    torch.testing.assert_close(outcome.parameters, decayed)
    assert {(r.loss, r.grad_norm, r.num_active, r.is_applied) for r in outcome.results} == {
        (0.0, 0.0, 0, True)
    }


def test_dropout_takes_part(outcomes):
    without = elastic_workers.run(Case(dropout=0.0), WorkerGroup())
    assert without.digest != outcomes[1][0]["tied"].digest
    assert without.results[0].loss != outcomes[1][0]["tied"].results[0].loss


# The learning rate and the seeds


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4],
        ),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    """Four steps of warm-up, then four of the schedule; the step after the last would have 0."""
    options = {"peak": 3e-5, "warmup_steps": 4, "steps": 8, "schedule": schedule}
    actual = [learning_rate(step, **options) for step in range(8)]
    assert actual == pytest.approx([3e-5 * share for share in expected], rel=1e-14)
    end = learning_rate(8, **options)
    assert end == pytest.approx(3e-5 if schedule == "constant" else 0.0, abs=1e-20)


@given(
    peak=st.floats(1e-8, 1.0),
    warmup_steps=st.integers(0, 60),
    steps=st.integers(1, 60),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_learning_rate_rises_to_the_peak_and_never_again(peak, warmup_steps, steps, schedule):
    rates = [
        learning_rate(s, peak=peak, warmup_steps=warmup_steps, steps=steps, schedule=schedule)
        for s in range(steps)
    ]
    assert all(0 < rate <= peak for rate in rates)
    rising, falling = rates[:warmup_steps], rates[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == peak


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
    assert largest_difference(change, [0.5 * copy.grad for copy in copies]) < 1e-12
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


@given(num=st.integers(0, 40), world_size=st.integers(1, 9))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_part_is_computed_by_one_worker(num, world_size):
    parts = [3 * number for number in range(num)]
    rounds = waves(parts, world_size)
    assert [part for wave in rounds for part in wave] == parts
    assert all(1 <= len(wave) <= world_size for wave in rounds)
    # No worker waits while another has two to do.
    assert len(rounds) == math.ceil(num / world_size)


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


# The anchor and the tail


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
