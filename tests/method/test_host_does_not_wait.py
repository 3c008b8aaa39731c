"""No plain way to the losses on candidates waits for a device, forward or backward.

On a CPU nothing waits. So a mode refuses every operator whose result has a size that only the
content of a tensor tells, and everything that reads one. Sets are planned, as batches are made.
"""

import functools
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from lrmc_ray.method import candidate_sets, frozen_tail, restricted_loss
from lrmc_ray.method.baselines import vocabulary_loss
from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast import candidate_logits
from lrmc_ray.method.frozen_tail import frozen_outside, frozen_tail_cross_entropy
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LossSettings, loss_sums
from lrmc_ray.method.microbatch import LossPositions
from lrmc_ray.method.names import Loss
from lrmc_ray.method.restricted_loss import (
    Tail,
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from tests.support.method_inputs import head_problem, leaves, rng
from tests.support.operators import NothingRead

torch.set_num_threads(1)

N, D, V = 30, 8, 40
WAYS = ("sparse", "gather", "dense")
TAILS = {
    "no tail": None,
    "tail": draw_tail(9, V, seed=0, step=0),
    "drawn twice": draw_tail(60, V, seed=0, step=1, probabilities=torch.arange(V) + 1.0),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(candidate_sets, "takes_sums", lambda values_E: True)
    monkeypatch.setattr(candidate_logits, "is_taken_on", lambda device: True)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, CandidateSets]:
    hidden, weight, bias, sets = head_problem(3, n=N, d=D, v=V)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), sets.planned()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_their_gradients(way, tail, dtype, monkeypatch):
    restricted_loss._SHARED.clear()
    *tensors, sets = problem(dtype)
    hidden, weight, bias = leaves(*tensors)
    head = OutputHead(weight, bias, logit_scale=0.7, softcap=4.0)
    with NothingRead():
        for loss in (restricted_cross_entropy, anchor_kl):
            loss(hidden, head, sets, tail=TAILS[tail], backend=way).backward()
        soft_cross_entropy(hidden, head, sets, backend=way).backward()
    assert all(x.grad.any() for x in (hidden, weight, bias))


def test_the_frozen_tail(monkeypatch):
    monkeypatch.setattr(frozen_tail, "CHUNK_ELEMENTS", 7 * V)
    hidden, weight, _, sets = problem(torch.float32)
    base_NV = torch.randn(N, V, generator=rng(7))
    (w,) = leaves(weight)
    with NothingRead():
        outside_N = frozen_outside(lambda chunk: base_NV[chunk], sets, V)
        frozen_tail_cross_entropy(hidden, OutputHead(w), sets, outside_N).backward()
    assert w.grad.any()


@pytest.mark.parametrize("loss", get_args(Loss))
def test_every_loss_by_its_name(loss, monkeypatch):
    """Of a micro-batch, in several chunks of positions."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_ELEMENTS", 7 * V)
    hidden, weight, _, sets = problem(torch.float32)
    h, w = leaves(hidden[None], weight)
    zeros, places = torch.zeros(N, dtype=torch.int64), torch.arange(N)
    where = LossPositions(zeros, places, sets, torch.rand(N, generator=rng(8)))
    batch = SimpleNamespace(supervised=where, anchored=where)
    base_NV = torch.randn(N, V, generator=rng(9))
    settings = LossSettings(loss, 0, 0.5, seed=0, base_kl_weight=0.3)
    with NothingRead():
        sums = loss_sums(h, OutputHead(w), batch, settings, None, lambda chunk: base_NV[chunk])
        sum(sums).backward()
    assert h.grad.any()
    assert w.grad.any()


@pytest.mark.parametrize("is_planned", [False, True])
def test_rows_of_a_range_are_those_rows(is_planned):
    _, _, _, sets = problem(torch.float32)
    sets = sets if is_planned else sets.rows(torch.arange(N))
    for start, stop in ((0, N), (0, 3), (4, 5), (7, 7), (11, N)):
        found, expected = sets.between(start, stop), sets.rows(torch.arange(start, stop))
        for name in ("offsets", "token_ids", "logprobs", "gold_ids"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


READS = {
    "item": lambda x: x.item(),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "unique": torch.unique,
    "consecutive": torch.unique_consecutive,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: x.long().bincount(),
}


@pytest.mark.parametrize("name", READS)
def test_the_mode_refuses(name):
    values = torch.ones(1) if name == "item" else torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), NothingRead():
        READS[name](values)
    READS[name](values)  # and nothing is left of it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_planned_sets_give_what_others_do(way, tail, monkeypatch):
    """In blocks of rows and at once, with gold by its place and by sums."""
    found = []
    for plans in (False, True):
        hidden, weight, _, sets = problem(torch.float32)
        hidden, weight = leaves(hidden, weight)
        monkeypatch.setattr(candidate_sets, "takes_sums", lambda values_E, plans=plans: plans)
        monkeypatch.setattr(candidate_logits, "BLOCK_ELEMENTS", 10**9 if plans else 3 * D)
        sets = sets if plans else sets.rows(torch.arange(N))
        loss = restricted_cross_entropy(
            hidden, OutputHead(weight), sets, tail=TAILS[tail], backend=way
        )
        (loss + anchor_kl(hidden, OutputHead(weight), sets, backend=way)).backward()
        found.append((loss, hidden.grad, weight.grad))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("way", WAYS)
def test_a_tail_of_all_candidates_and_of_equal_tokens_has_finite_gradients(way):
    """Where S holds the whole tail, there is no tail, and no NaN of a difference of infinities."""
    hidden, weight, _, sets = problem(torch.float64)
    hidden, weight = leaves(hidden, weight)
    row = sets.rows(torch.tensor([0]))
    tail = Tail(row.token_ids[:1].long().repeat(3), torch.zeros(3))
    loss = functools.partial(restricted_cross_entropy, backend=way)
    value = loss(hidden[:1], OutputHead(weight), row, tail=tail)
    value.backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(value, loss(hidden[:1], OutputHead(weight), row))


def test_batches_are_planned_where_a_loss_reads_candidates():
    def reads(loss: str, anchor: float) -> bool:
        return LossSettings(loss, 0, anchor, seed=0).reads_candidates

    assert reads("restricted", 0.0)
    assert reads("soft", 0.0)
    assert reads("frozen_tail", 0.0)
    assert reads("asft", 0.0)
    assert reads("full", 0.5)
    assert not reads("full", 0.0)
    assert not reads("kl_to_base", 0.0)
