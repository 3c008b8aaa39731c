"""What Stage 0 and Stage 1 compute on a GPU, against the CPU in float64. Skipped without one."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmc_ray.method.baselines.l2_sp import StartingPoint
from lrmc_ray.method.baselines.vocabulary_loss import full_cross_entropy
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.measure import outside_mass
from lrmc_ray.method.microbatch import divide
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.restricted_loss import draw_tail, restricted_cross_entropy
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.method.training_loop import StepOptions, compute_gradients, train
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.record.candidates import CandidateRecorder
from tests.support.plain_training import (
    branching_samples,
    largest_difference,
    plain_gradients,
    random_samples,
    tiny_llama,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CUDA = torch.device("cuda")
N, D, V = 200, 64, 3000

LOSSES = {
    "restricted": LossSettings("restricted", 0, 0.0, seed=3),
    "restricted + tail + anchor": LossSettings("restricted", 40, 0.7, seed=3),
    "soft + anchor": LossSettings("soft", 0, 0.7, seed=3),
    "active_only": LossSettings("active_only", 0, 0.0, seed=3),
    "full + anchor": LossSettings("full", 0, 0.7, seed=3),
    "dft": LossSettings("dft", 0, 0.0, seed=3),
    "asft": LossSettings("asft", 0, 0.0, seed=3, base_kl_weight=0.4),
    "eaft": LossSettings("eaft", 0, 0.0, seed=3),
    "flow": LossSettings("flow", 0, 0.0, seed=3),
    "frozen_tail": LossSettings("frozen_tail", 0, 0.0, seed=3),
    "kl_to_base": LossSettings("kl_to_base", 0, 0.0, seed=3, base_kl_weight=0.4),
}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float32):
    """Hidden states and head on the CPU, and sets recorded by another model."""
    generator = rng(0)
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype)
    weight_VD = (torch.randn(V, D, generator=generator) / math.sqrt(D) * 3).to(dtype)
    recorded_NV = 3 * torch.randn(N, V, generator=generator)
    gold_N = torch.randint(V, (N,), generator=generator)
    return hidden_ND, weight_VD, select_candidates(recorded_NV, gold_N, tau=0.9)


def masked_logits(logits_NV: Tensor, sets: CandidateSets) -> Tensor:
    is_outside_NV = torch.ones_like(logits_NV, dtype=torch.bool)
    is_outside_NV[sets.row_ids, sets.token_ids] = False
    return logits_NV.masked_fill(is_outside_NV, -math.inf)


def error(value: Tensor, truth: Tensor) -> float:
    value = value.detach().double().cpu()
    return float((value - truth.detach()).norm() / truth.detach().norm())


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


# The operator and the losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["kernel", "dense_kernel", "sparse", "gather", "dense", "auto"])
def test_restricted_loss_and_gradients_equal_the_cpus_in_float64(backend, dtype):
    hidden, weight, sets = problem(dtype)
    truths = leaves(hidden.double(), weight.double())
    masked = masked_logits(truths[0] @ truths[1].T, sets)
    truth = F.cross_entropy(masked, sets.gold_ids.long(), reduction="sum")
    truth.backward()

    ours = leaves(hidden.to(CUDA), weight.to(CUDA))
    head = OutputHead(ours[1])
    loss = restricted_cross_entropy(ours[0], head, sets.to(CUDA), backend=backend)
    loss.backward()
    assert error(loss, truth) < 1e-6
    for our, true in zip(ours, truths, strict=True):
        assert our.grad.dtype == dtype
        # A bf16 gradient keeps 8 bits: half a unit of the last is 2^-9. The dense way, which auto
        # takes here, rounds derivatives as well.
        rounds_twice = {"dense": 2**-8, "dense_kernel": 2**-8, "auto": 2**-8}
        limit = {"gather": 2**-6, **rounds_twice}.get(backend, 2**-9)
        assert error(our.grad, true.grad) < (2e-6 if dtype == torch.float32 else limit)


def test_restricted_loss_with_a_tail_of_all_tokens_is_the_full_loss():
    hidden, weight, sets = (x.to(CUDA) for x in problem())
    tail = draw_tail(V, V, seed=0, step=0).to(CUDA)
    ours, full = leaves(hidden, weight), leaves(hidden, weight)
    loss = restricted_cross_entropy(ours[0], OutputHead(ours[1]), sets, tail=tail)
    truth = F.cross_entropy(full[0] @ full[1].T, sets.gold_ids.long(), reduction="sum")
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss, truth)
    for our, true in zip(ours, full, strict=True):
        assert error(our.grad, true.grad.double().cpu()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_loss_and_gradients_are_no_worse_than_torchs(dtype):
    hidden, weight, sets = problem(dtype)
    gold_N = sets.gold_ids.long()
    truths = leaves(hidden.double(), weight.double())
    truth = F.cross_entropy(truths[0] @ truths[1].T, gold_N, reduction="sum")
    theirs = leaves(hidden.to(CUDA), weight.to(CUDA))
    ours = leaves(hidden.to(CUDA), weight.to(CUDA))
    their_loss = F.cross_entropy(
        (theirs[0] @ theirs[1].T).float(), gold_N.to(CUDA), reduction="sum"
    )
    our_loss = full_cross_entropy(ours[0], OutputHead(ours[1]), gold_N.to(CUDA))
    for loss in (truth, their_loss, our_loss):
        loss.backward()
    assert error(our_loss, truth) <= error(their_loss, truth) + 1e-5
    for our, their, true in zip(ours, theirs, truths, strict=True):
        assert error(our.grad, true.grad) <= error(their.grad, true.grad) + 1e-5


def test_outside_mass_equals_the_cpus():
    hidden, weight, sets = problem()
    logits = hidden.double() @ weight.double().T
    truth = 1 - masked_logits(logits, sets).logsumexp(1).sub(logits.logsumexp(1)).exp()
    head = OutputHead(weight.to(CUDA))
    mean, _, count = outside_mass(hidden.to(CUDA), head, sets.to(CUDA), num_positions=N, seed=0)
    assert count == N
    assert mean == pytest.approx(truth.mean().item(), abs=1e-5)


# Stage 0


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.999, 1.0])
def test_candidate_sets_are_those_of_the_cpu(tau):
    """From the same logits; tokens on either side of the last one kept differ by a lot here."""
    generator = rng(7)
    logits_NV = 3 * torch.randn(N, V, generator=generator)
    gold_N = torch.randint(V, (N,), generator=generator)
    k_max_N = torch.where(torch.arange(N) % 3 == 0, 16, 700)
    ours = select_candidates(
        logits_NV.to(CUDA), gold_N.to(CUDA), tau=tau, k_min=2, k_max=k_max_N.to(CUDA)
    ).to("cpu")
    theirs = select_candidates(logits_NV, gold_N, tau=tau, k_min=2, k_max=k_max_N)
    assert torch.equal(ours.gold_ids, theirs.gold_ids)
    same = [
        torch.equal(a.token_ids, b.token_ids)
        for a, b in (
            (ours.rows(torch.tensor([n])), theirs.rows(torch.tensor([n]))) for n in range(N)
        )
    ]
    assert sum(same) >= N - 2  # tau is reached by a sum of roundings
    probability = logits_NV.double().softmax(1)
    inside = probability[ours.row_ids, ours.token_ids.long()]
    recorded = ours.logprobs.double().exp()
    relative = recorded / inside - 1
    assert float(relative.max()) < 1e-5  # float16, rounded down: -12.9 in steps of 2^-7
    assert float(relative.min()) > -2e-2


def test_recorder_keeps_what_the_cpu_keeps(tiny_model: Path, monkeypatch):
    generator = rng(5)
    common = torch.randint(3, 500, (12,), generator=generator).tolist()
    rows = []
    for number in range(9):
        length = 5 + 3 * number
        ids = common + torch.randint(3, 500, (length,), generator=generator).tolist()
        rows.append(
            {
                "sample_id": str(number),
                "domain": "",
                "input_ids": ids,
                "is_target": [place > 14 for place in range(len(ids))],
            }
        )
    options = {"tau": 0.95, "k_min": 1, "k_max": 300, "prompt_k_max": 64, "threads": 1}
    ours = CandidateRecorder(tiny_model, **options).record(rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    theirs = CandidateRecorder(tiny_model, **options).record(rows)
    sizes = 0
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.positions_P, their.positions_P)
        assert torch.equal(our.candidates.gold_ids, their.candidates.gold_ids)
        difference = (our.candidates.sizes - their.candidates.sizes).abs()
        assert int(difference.max()) <= 1
        sizes += int(difference.sum())
        same = our.candidates.sizes == their.candidates.sizes
        a, b = (x.candidates.rows(same.nonzero()[:, 0]) for x in (our, their))
        torch.testing.assert_close(a.logprobs.float(), b.logprobs.float(), atol=5e-3, rtol=0)
    assert sizes <= 2


# Stage 1


class HostRotary(nn.Module):
    """Angles of the positions from the CPU: in float32 they differ in the last bit elsewhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.cpu()

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, on the device of ``hidden``."""
        return tuple(x.to(hidden.device) for x in self.inner(hidden.cpu(), position_ids.cpu()))


def llama_on(device, **options):
    model = tiny_llama(**options).to(device)
    model.model.rotary_emb = HostRotary(model.model.rotary_emb)
    return model


def gradients_on(device, samples, loss, *, dtype, attention_cost=math.inf, autocast=None):
    model = llama_on(device, dtype=dtype)
    base = None
    if loss.loss in NEED_BASE:
        frozen = llama_on(device, dtype=dtype, seed=1).eval().requires_grad_(False)
        base = LanguageModel(lambda batch: batch_hidden_states(frozen, batch), head_of(frozen))
    parameters = list(model.parameters())
    compute_gradients(
        LanguageModel(lambda batch: batch_hidden_states(model, batch), head_of(model)),
        parameters,
        divide(samples, 2, loss.activity, attention_cost=attention_cost),
        loss,
        StepOptions(base=base, autocast=autocast),
        WorkerGroup(),
        step=2,
    )
    return [parameter.grad.cpu() for parameter in parameters]


@pytest.mark.parametrize("attention_cost", [math.inf, 0.0], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_those_from_full_logits_of_each_sample(name, attention_cost):
    """In float64 on both devices, against the plain loop of the tests on the CPU."""
    loss = LOSSES[name]
    samples = [*branching_samples(7, seed=3), random_samples(3, seed=2)[1]]
    expected = plain_gradients(tiny_llama(), samples, loss, step=2)
    ours = gradients_on(CUDA, samples, loss, dtype=torch.float64, attention_cost=attention_cost)
    assert largest_difference(ours, expected) < 1e-10


@pytest.mark.parametrize("name", ["restricted + tail + anchor", "full + anchor"])
def test_gradients_under_autocast_are_as_near_as_the_cpus(name):
    samples = random_samples(6, seed=1)
    exact = gradients_on("cpu", samples, LOSSES[name], dtype=torch.float64)
    errors = []
    for device in (CUDA, "cpu"):
        found = gradients_on(
            device, samples, LOSSES[name], dtype=torch.float32, autocast=torch.bfloat16
        )
        squares = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
        errors.append(math.sqrt(squares / sum(float(b.square().sum()) for b in exact)))
    assert errors[0] < 1.5 * errors[1]


def steps_on(device, *, optimizer="moclip", dtype=torch.float32, autocast=None, dropout=0.0):
    """Weights after four steps of eight samples, and the losses."""
    model = llama_on(device, dtype=dtype, dropout=dropout).train()
    parameters = list(model.parameters())
    penalty = StartingPoint(parameters, 0.1)
    results = train(
        LanguageModel(lambda batch: batch_hidden_states(model, batch), head_of(model)),
        make_optimizer(optimizer, parameters, lr=1e-2, weight_decay=0.1),
        lambda step: [*branching_samples(5, seed=step), *random_samples(3, seed=step)],
        LOSSES["restricted + tail + anchor"],
        StepOptions(
            num_micro_batches=2,
            max_grad_norm=1.0,
            attention_cost=0.0,
            autocast=autocast,
            penalize=penalty.add_gradient,
        ),
        WorkerGroup(),
        steps=range(4),
        lr_of_step=lambda step: 1e-2,
    )
    losses = [result.loss for result in results]
    return [parameter.detach().cpu() for parameter in parameters], losses


@pytest.mark.parametrize(
    "optimizer", ["moclip", "adamw", "adam_atan2", "mofo", "c_adamw", "magma"], ids=str
)
def test_steps_equal_the_cpus(optimizer):
    ours, losses = steps_on(CUDA, optimizer=optimizer, dtype=torch.float64)
    theirs, their_losses = steps_on("cpu", optimizer=optimizer, dtype=torch.float64)
    assert losses == pytest.approx(their_losses, rel=1e-9)
    assert largest_difference(ours, theirs) < 1e-8
    start = list(tiny_llama().parameters())
    assert largest_difference(ours, start) > 1e-2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_run_gives_the_same_bits(autocast):
    first, losses = steps_on(CUDA, autocast=autocast, dropout=0.1)
    second, again = steps_on(CUDA, autocast=autocast, dropout=0.1)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("clip", ["scale", "cautious", "momentum", "project", "rotate", "none"])
def test_moclip_takes_the_cpus_steps(clip):
    start = [torch.randn(300, 70, generator=rng(1)), torch.randn(5000, generator=rng(2))]
    common = [torch.randn(x.shape, generator=rng(3)) for x in start]
    found = []
    for device, dtype in ((CUDA, torch.float32), (torch.device("cpu"), torch.float64)):
        params = [torch.nn.Parameter(x.clone().to(device, dtype)) for x in start]
        optimizer = FastMoClip(params, lr=0.01, delta_max=45.0, clip=clip)
        for step in range(6):
            for number, param in enumerate(params):
                gradient = torch.randn(param.shape, generator=rng(10 * step + number))
                param.grad = (gradient + 0.8 * common[number]).to(device, dtype)
            optimizer.step()
        found.append([param.detach() for param in params])
    for ours, theirs, begin in zip(*found, start, strict=True):
        assert error(ours - begin.to(CUDA), theirs - begin.double()) < 1e-5
