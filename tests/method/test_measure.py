"""What is only measured: the outside mass of the current model, and the held-out loss."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from lrmc_ray.method import measure
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel
from lrmc_ray.method.measure import held_out_batches, held_out_nll, outside_mass
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from tests.support.method_inputs import inside, leaves, logits_problem, rng
from tests.support.moclip_paths import CAPS, random, train
from tests.support.plain_training import random_samples, tiny_llama

torch.set_num_threads(1)


def test_rho_of_the_recording_model_stays_below_one_minus_tau():
    logits_NV, weight_VD, _ = logits_problem(1)
    head = OutputHead(weight_VD)
    for tau in (0.3, 0.8, 0.99):
        sets = select_candidates(logits_NV, torch.zeros(6, dtype=torch.int64), tau=tau)
        measured = outside_mass(logits_NV, head, sets, num_positions=6, seed=0)
        assert measured.mean <= 1 - tau
        assert measured.mean <= float(sets.outside_mass().mean())


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_probe_measures_the_outside_mass_of_the_current_model(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", 30 * rows_per_chunk)
    logits_NV, weight_VD, sets = logits_problem(11, n=20)
    bias_V = torch.randn(30, generator=rng(0), dtype=torch.float64)
    shaped_NV = 2.5 * torch.tanh(0.8 * (logits_NV + bias_V) / 2.5)
    rho_N = (shaped_NV.softmax(-1) * ~inside(sets, 30)).sum(-1).numpy()
    head = OutputHead(weight_VD, bias_V, logit_scale=0.8, softcap=2.5)
    measured = outside_mass(logits_NV, head, sets, num_positions=100, seed=0)
    assert measured.num_positions == 20
    assert measured.mean == pytest.approx(rho_N.mean(), abs=1e-12)
    assert measured.stderr == pytest.approx(rho_N.std(ddof=1) / math.sqrt(20), abs=1e-12)


def test_probe_of_a_sample_is_one_of_the_positions_and_repeatable():
    logits_NV, weight_VD, sets = logits_problem(12, n=20)
    head = OutputHead(weight_VD)
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
    logits_NV, weight_VD, sets = logits_problem(13)
    hidden, weight = leaves(logits_NV.bfloat16(), weight_VD.bfloat16())
    measured = outside_mass(hidden, OutputHead(weight), sets, num_positions=6, seed=0)
    rho_N = (hidden.detach().double().softmax(-1) * ~inside(sets, 30)).sum(-1)
    assert measured.mean == pytest.approx(float(rho_N.mean()), abs=1e-6)
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize(("rows", "num_positions"), [(6, 0), (0, 5)])
def test_probe_of_nothing_is_refused(rows, num_positions):
    logits_NV, weight_VD, sets = logits_problem()
    head = OutputHead(weight_VD)
    index = torch.arange(rows)
    with pytest.raises(ValueError, match=f"got {num_positions} of {rows}"):
        outside_mass(logits_NV[index], head, sets.rows(index), num_positions=num_positions, seed=0)


# Held-out loss


def model_of(model) -> LanguageModel:
    return LanguageModel(lambda batch: batch_hidden_states(model, batch), head_of(model))


def test_held_out_nll_is_the_mean_over_all_supervised_positions():
    """Against the whole logits of each sample alone, whatever its candidates are."""
    model = tiny_llama()
    samples = random_samples(7, seed=4)
    total, count = 0.0, 0
    for sample in samples:
        logits_TV = model(input_ids=sample.input_ids_T[None]).logits[0].detach()
        for position in sample.positions_P[sample.is_supervised_P].tolist():
            gold = sample.input_ids_T[position + 1]
            total -= float(logits_TV[position].log_softmax(0)[gold])
            count += 1
    batches = held_out_batches(samples)
    found = held_out_nll(model_of(model), batches, WorkerGroup())
    assert found == pytest.approx(total / count, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())
    single = model_of(tiny_llama(dtype=torch.float32))
    rounded = held_out_nll(single, batches, WorkerGroup(), autocast=torch.bfloat16)
    assert 1e-6 < abs(rounded / found - 1) < 0.02


def test_held_out_nll_of_nothing_is_zero():
    assert held_out_batches([]) == []
    assert held_out_nll(model_of(tiny_llama()), [], WorkerGroup()) == 0.0
    sample = random_samples(1)[0]
    sample = dataclasses.replace(sample, is_supervised_P=torch.zeros_like(sample.is_supervised_P))
    batches = held_out_batches([sample])
    assert held_out_nll(model_of(tiny_llama()), batches, WorkerGroup()) == 0.0


def test_held_out_batches_hold_samples_of_like_length_within_the_limit(monkeypatch):
    monkeypatch.setattr(measure, "BATCH_TOKENS", 60)
    samples = random_samples(20, seed=1)
    batches = held_out_batches(samples)
    lengths = sorted(len(sample.input_ids_T) for sample in samples)
    shapes = [tuple(batch.input_ids_BT.shape) for batch in batches]
    assert sum(rows for rows, _ in shapes) == 20
    assert max(rows for rows, _ in shapes) > 2
    # In order of length; one more would not have fitted.
    start = 0
    for rows, width in shapes:
        assert width <= lengths[start + rows - 1]  # the last token is only predicted
        assert rows == 1 or rows * lengths[start + rows - 1] <= 60
        if start + rows < 20:
            assert (rows + 1) * lengths[start + rows] > 60
        start += rows


# Angles


def test_angle_statistics_by_hand():
    """Angles of 90, 180 and 0 degrees in tensors of 2, 2 and 4 elements, cap 100 degrees."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 2, 4)]
    firsts = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.ones(4)]
    seconds = [torch.tensor([0.0, 3.0]), torch.tensor([-2.0, 0.0]), torch.ones(4)]
    optimizer = MoClip(params, lr=0.1, delta_max=100.0)
    for gradients in (firsts, seconds):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
    statistics = optimizer.angle_statistics()
    assert statistics.num_angles == 3
    assert statistics.mean_deg == pytest.approx(90.0, abs=1e-5)
    assert statistics.clipped_share == pytest.approx(1 / 3)
    assert statistics.clipped_element_share == pytest.approx(2 / 8)
    assert len(statistics.histogram) == measure.NUM_ANGLE_BINS == 36
    assert {i: n for i, n in enumerate(statistics.histogram) if n} == {0: 1, 18: 1, 35: 1}
    empty = optimizer.angle_statistics()
    assert empty.num_angles == sum(empty.histogram) == 0
    assert math.isnan(empty.mean_deg)
    assert math.isnan(empty.clipped_share)


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize(("delta_max", "share"), [(1.0, 1.0), (179.0, 0.0)])
def test_a_cap_that_always_or_never_binds_shows(clip, delta_max, share):
    param = torch.nn.Parameter(torch.zeros(30))
    optimizer = MoClip([param], lr=0.1, clip=clip, delta_max=delta_max, betas=(0.5, 0.99))
    train(optimizer, param, [100.0**i * random(30, seed=i).float() for i in range(5)])
    statistics = optimizer.angle_statistics()
    assert statistics.num_angles == 4
    assert statistics.clipped_share == statistics.clipped_element_share == share
