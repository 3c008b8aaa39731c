"""Batches that are made ahead and planned for a GPU's kernels: the same steps, to the last bit."""

import threading

import pytest
import torch
from torch import Tensor

from lrmc_ray.method import restricted_loss
from lrmc_ray.method.fast import attention_blocks
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.restricted_loss import anchor_kl, draw_tail, restricted_cross_entropy
from lrmc_ray.method.step_result import StepResult
from lrmc_ray.method.training_loop import StepOptions, compute_gradients, train
from lrmc_ray.method.vocabulary_rows import (
    EmbeddingLookup,
    HeadRows,
    TrainedRows,
    distinct_padded,
)
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from tests.support.operators import NoHostSync
from tests.support.plain_training import random_samples, tiny_llama

torch.set_num_threads(1)

LOSS = LossSettings("restricted", 40, 0.7, seed=3)


def language_model(model) -> LanguageModel:
    return LanguageModel(lambda batch: batch_hidden_states(model, batch), head_of(model))


def run(batch_of_step, *, steps=4, **options) -> tuple[list[StepResult], list[Tensor]]:
    model = tiny_llama(dtype=torch.float32, dropout=0.1).train()
    results = train(
        language_model(model),
        MoClip(model.parameters(), lr=0.01),
        batch_of_step,
        LOSS,
        StepOptions(num_micro_batches=2, **options),
        WorkerGroup(),
        steps=range(steps),
        lr_of_step=lambda step: 0.01,
    )
    return list(results), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("plans", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_neither_changes_a_bit(plans, ahead):
    def batch_of_step(step: int) -> list[Sample]:
        return random_samples(4, seed=step)

    expected, weights = run(batch_of_step)
    results, ours = run(batch_of_step, plans_losses=plans, prepares_ahead=ahead)
    assert results == expected
    assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))


def test_one_batch_is_made_ahead_in_order_and_none_behind_the_last():
    asked, threads = [], set()

    def batch_of_step(step: int) -> list[Sample]:
        asked.append(step)
        threads.add(threading.current_thread())
        return random_samples(2, seed=step)

    model = tiny_llama(dtype=torch.float32)
    steps = train(
        language_model(model),
        torch.optim.SGD(model.parameters(), lr=0.0),
        batch_of_step,
        LOSS,
        StepOptions(prepares_ahead=True),
        WorkerGroup(),
        steps=range(3, 6),
        lr_of_step=lambda step: 0.0,
    )
    for number, result in enumerate(steps):
        assert result.step == 3 + number
        assert set(asked) <= {3, 4, 5}
        assert max(asked) <= result.step + 1
    assert asked == [3, 4, 5]
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_of_a_batch_is_raised_at_its_own_step():
    def batch_of_step(step: int) -> list[Sample]:
        if step == 2:
            raise OSError("no such sample")
        return random_samples(2, seed=step)

    model = tiny_llama(dtype=torch.float32)
    taken = train(
        language_model(model),
        torch.optim.SGD(model.parameters(), lr=0.0),
        batch_of_step,
        LOSS,
        StepOptions(prepares_ahead=True),
        WorkerGroup(),
        steps=range(5),
        lr_of_step=lambda step: 0.0,
    )
    assert [next(taken).step, next(taken).step] == [0, 1]
    with pytest.raises(OSError, match="no such sample"):
        next(taken)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_by_the_kernels_has_the_plain_gradients(monkeypatch):
    """All of a step but the layers: planned batches, tail, anchor, tied weights."""
    pytest.importorskip("triton", reason="Triton is not installed")
    found = []
    for way in ("kernel", "gather"):
        monkeypatch.setattr(restricted_loss, "_way", lambda *args, way=way: way)
        model = tiny_llama(dtype=torch.float32)
        parameters = list(model.parameters())
        options = StepOptions(num_micro_batches=2, plans_losses=way == "kernel")
        batches = options.divide(random_samples(3, seed=0), LOSS.activity)
        gradients = compute_gradients(
            language_model(model), parameters, batches, LOSS, options, WorkerGroup(), step=0
        )
        found.append((gradients, [parameter.grad for parameter in parameters]))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-5)
    assert ours.anchor_sum == pytest.approx(theirs.anchor_sum, rel=1e-5)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert float((our - their).norm()) < 1e-5 * float(their.norm())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_plan_by_tokens_is_one_by_places_of_trained_rows():
    pytest.importorskip("triton", reason="Triton is not installed")
    (batch,) = StepOptions(plans_losses=True).divide(random_samples(2, seed=1), LOSS.activity)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(256, 8, generator=generator))
    used = torch.cat([batch.supervised.candidates.token_ids, batch.anchored.candidates.token_ids])
    truth = weight.detach().clone().requires_grad_()
    rows = TrainedRows(weight, used.long())
    mapped = HeadRows(OutputHead(weight), rows).batch(batch)
    for loss, name in ((restricted_cross_entropy, "supervised"), (anchor_kl, "anchored")):
        sets, of_rows = getattr(batch, name).candidates, getattr(mapped, name).candidates
        assert of_rows.plan.bounds_X is sets.plan.bounds_X
        assert torch.equal(of_rows.plan.tokens_E, rows.places(sets.plan.tokens_E))
        hidden = torch.randn(sets.num_rows, 8, generator=generator)
        for backend in ("kernel", "dense_kernel"):
            ours = loss(hidden, OutputHead(rows.rows_XD), of_rows, backend=backend)
            theirs = loss(hidden, OutputHead(truth), sets, backend="gather")
            for value in (ours, theirs):
                value.backward()
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rows.rows_XD.grad, truth.grad[rows.token_ids_X])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_host_waits_for_no_device_within_a_step(monkeypatch):
    """From the embedding to the gradients, of planned batches, by the kernels; trained rows too.

    Packed ones, that is: for padded rows transformers asks a tensor whether they are packed.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(restricted_loss, "_way", lambda *args: "kernel")
    monkeypatch.setattr(attention_blocks, "divide", lambda *args: None)  # on a CPU alone
    monkeypatch.setattr(EmbeddingLookup, "distinct", lambda _, tokens: distinct_padded(tokens))
    monkeypatch.setattr(TrainedRows, "places", lambda rows, tokens: rows._place_V[tokens.long()])
    samples = random_samples(3, seed=0)
    for divides in (False, True):
        model = tiny_llama(dtype=torch.float32).train()
        head, embedding = head_of(model), model.get_input_embeddings()
        parameters, rows = list(model.parameters()), None
        if divides:
            rows = TrainedRows(head.weight_VD, torch.arange(len(head.weight_VD)))
            parameters = [rows.rows_XD, *(p for p in parameters if p is not head.weight_VD)]
        EmbeddingLookup(embedding, rows)
        forward = language_model(model).forward
        options = StepOptions(plans_losses=True, attention_cost=0.001)
        batches = options.divide(samples, LOSS.activity)
        assert all(batch.is_visible_TT is not None for batch in batches)
        with NoHostSync():
            compute_gradients(
                LanguageModel(forward, head, None, HeadRows(head, rows) if rows else None),
                parameters, batches, LOSS, options, WorkerGroup(), step=0,
            )  # fmt: skip
        assert all(parameter.grad.any() for parameter in parameters)


def test_a_tail_is_shared_once_per_step_and_anew_where_it_has_changed(monkeypatch):
    tail = draw_tail(5, 40, seed=0, step=0)
    first = restricted_loss._shared(tail, 40)
    assert restricted_loss._shared(tail, 40) is first
    assert len(restricted_loss._shared(tail, 50).places_V) == 50
    again = restricted_loss._shared(tail, 40)
    assert torch.equal(again.logweights_R, first.logweights_R)
    tail.logweights_R.add_(1)
    torch.testing.assert_close(
        restricted_loss._shared(tail, 40).logweights_R, first.logweights_R + 1
    )
