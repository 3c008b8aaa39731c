"""Training in bf16: nothing is NaN, and errors are no larger than those of torch in bf16."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.architectures import Subject, records
from benchmarks.tiny_models import make, short_borders
from lrmc_ray.method.training_loop import StepOptions, compute_gradients, train
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.loading import load_model

torch.set_num_threads(1)

TYPES = [
    "gpt_oss",
    "mamba2",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("llama", "qwen3", "gemma3_text", "granite", "gpt2")
    ),
]


@pytest.fixture
def subject(request, tmp_path):
    made = make(request.param, **short_borders(request.param, 24))
    subject = Subject(request.param, made, tmp_path / "model")
    made.save_pretrained(subject.directory)
    records(subject)
    return subject


def plain(subject, dtype, *, autocast=False):
    """Cross-entropy of the model's own logits, sample by sample, and its gradients in a vector."""
    model = load_model(subject.directory, dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products know no float64
    count = sum(int(s.is_supervised_P.sum()) for s in subject.samples)
    total = 0.0
    for sample in subject.samples:
        positions_N = sample.positions_P[sample.is_supervised_P]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits_NV = model(input_ids=sample.input_ids_T[None]).logits[0, positions_N]
        assert not autocast or torch.equal(logits_NV, logits_NV.bfloat16().to(logits_NV.dtype))
        loss = F.cross_entropy(logits_NV, sample.input_ids_T[positions_N + 1], reduction="sum")
        (loss / count).backward()
        total += float(loss.detach()) / count
    return total, vector({n: p.grad for n, p in model.named_parameters()})


def vector(gradients):
    return torch.cat([g.double().flatten() for _, g in sorted(gradients.items()) if g is not None])


@pytest.mark.parametrize("subject", TYPES, indirect=True)
def test_errors_are_no_larger_than_those_of_torch(subject):
    true_loss, true_D = plain(subject, torch.float64)
    torch_loss, torch_D = plain(subject, torch.float32, autocast=True)
    learner = subject.learner(precision="bf16", packing=False)
    learner.model.eval()
    options = StepOptions(num_micro_batches=2, autocast=learner.autocast)
    batches = options.divide(subject.samples, learner.loss.activity)
    parameters = list(learner.trainable.parameters.values())
    found = compute_gradients(
        learner.language_model, parameters, batches, learner.loss, options, WorkerGroup(), step=0
    )
    our_loss = found.loss_sum / sum(batch.num_supervised for batch in batches)
    our_D = vector({n: p.grad for n, p in learner.trainable.parameters.items()})
    # The forward pass in bf16 is the same, and so is most of the error.
    assert abs(our_loss - true_loss) <= 1.05 * abs(torch_loss - true_loss) + 1e-3 * true_loss
    assert (our_D - true_D).norm() <= 1.05 * (torch_D - true_D).norm()
    assert (torch_D - true_D).norm() > 1e-4 * true_D.norm()  # bf16 it is


@pytest.mark.parametrize("subject", TYPES, indirect=True)
def test_it_learns_and_nothing_is_nan(subject):
    learner = subject.learner(
        precision="bf16", loss="restricted", tail_samples=32, anchor_weight=0.5, lr=3e-3
    )
    options = StepOptions(
        num_micro_batches=2,
        autocast=learner.autocast,
        attention_cost=learner.attention_cost,
        pack_up_to=longest_packed(learner.model.config),
    )
    results = list(
        train(
            learner.language_model,
            learner.optimizer,
            lambda _step: subject.samples,
            learner.loss,
            options,
            WorkerGroup(),
            steps=range(12),
            lr_of_step=lambda _step: 3e-3,
        )
    )
    assert all(result.is_applied and math.isfinite(result.loss) for result in results)
    assert results[-1].loss < 0.9 * results[0].loss
    for name, parameter in learner.trainable.parameters.items():
        assert parameter.isfinite().all(), name
