"""Rounding to bf16 at random: unbiased, the same every time, and enough for the moments."""

import math

import pytest
import torch

from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.stochastic_rounding import random_bits, round_to_bf16, rounding_key

CPU = torch.device("cpu")
N = 1 << 16


def rounded(value: float, key: int = 7) -> torch.Tensor:
    values = torch.full((N,), value)
    return round_to_bf16(values, random_bits(values.shape, key, CPU) & 0xFFFF).double()


@pytest.mark.parametrize("value", [1.001, -3.3, 1e-30, 6.5e37, 2.0 - 1e-6])
def test_the_mean_is_the_number_itself(value):
    """Its error is that of N draws, at most half a bf16 bit each: five standard errors."""
    found = rounded(value)
    exact = float(torch.tensor(value))
    assert abs(float(found.mean()) - exact) < 5 * 2**-8 * abs(exact) / math.sqrt(N)
    assert len(found.unique()) == 2
    assert (found - exact).abs().max() < 2**-7 * abs(exact)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, math.inf, -math.inf])
def test_what_bf16_holds_stays(value):
    assert (rounded(value) == value).all()


def test_not_a_number_stays_none():
    assert rounded(math.nan).isnan().all()


def test_bits_are_evenly_spread_and_belong_to_tensor_step_and_place():
    bits = random_bits(torch.Size([N]), rounding_key(0, 1), CPU)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    for shift in range(32):
        assert abs(float((bits >> shift & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(N)
    low, high = (bits & 0xFFFF).double(), (bits >> 16).double()
    others = [random_bits(torch.Size([N]), rounding_key(*k), CPU) for k in ((0, 2), (1, 1))]
    for other in [high, low.roll(1), *((other & 0xFFFF).double() for other in others)]:
        assert abs(float(torch.corrcoef(torch.stack([low, other]))[0, 1])) < 5 / math.sqrt(N)
    again = random_bits(torch.Size([N // 4, 4]), rounding_key(0, 1), CPU)
    assert torch.equal(again.flatten(), bits)


def trained(optimizer_class, steps=1000, seed=0, **options):
    """Least squares with noisy gradients: what is found, and the mean of its last hundred steps."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(256, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(256))
    optimizer = optimizer_class([weight], lr=3e-3, betas=(0.9, 0.999), **options)
    total = torch.zeros(256)
    for step in range(steps):
        noise = torch.randn(256, generator=generator)
        weight.grad = weight.detach() - target + 0.3 * noise
        optimizer.step()
        total += weight.detach() * (step >= steps - 100) / 100
    return total, optimizer.state[weight], target


@pytest.mark.parametrize("optimizer_class", [MoClip, FastMoClip])
def test_a_thousand_steps_end_where_float32_ends(optimizer_class, monkeypatch):
    expected, exact, target = trained(optimizer_class)
    found, state, _ = trained(optimizer_class, state_dtype=torch.bfloat16)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    error = (expected - target).norm()
    assert (found - target).norm() < 1.1 * error
    drift = (state["exp_avg_sq"].float() / exact["exp_avg_sq"]).log()
    assert abs(float(drift.mean())) < 0.02
    # Rounded to the nearest, the second moment stands still: beta2 asks for a thousandth.
    monkeypatch.setattr(
        "lrmc_ray.method.moclip.round_to_bf16", lambda values, bits: values.bfloat16()
    )
    _, nearest, _ = trained(MoClip, state_dtype=torch.bfloat16)
    stuck = (nearest["exp_avg_sq"].float() / exact["exp_avg_sq"]).log()
    assert abs(float(stuck.mean())) > 0.1
