"""Masses as integers, against their definition in Python's own numbers."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from lrmc_ray.method.stored_mass import (
    MASS_UNIT,
    first_reaching,
    mass_goal,
    mass_of,
    round_down,
    running_mass,
)

torch.set_num_threads(1)


EVERY_LOGPROB = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
EVERY_LOGPROB = EVERY_LOGPROB[EVERY_LOGPROB <= 0]


def test_the_mass_of_every_stored_value_follows_the_definition():
    expected = [math.floor(math.exp(float(x)) * 2**40) for x in EVERY_LOGPROB.numpy()]
    assert mass_of(EVERY_LOGPROB).tolist() == expected
    assert MASS_UNIT == 2**40


def test_masses_run_up_to_the_sum_of_all():
    logprobs = torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float16)
    masses = [math.floor(math.exp(x) * 2**40) for x in (-1.0, -0.5, -3.0)]
    expected = [0, masses[0], masses[0] + masses[1], sum(masses)]
    assert running_mass(logprobs).tolist() == expected


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.999, 1.0, 1e-13])
def test_the_goal_is_the_least_integer_that_reaches_tau(tau):
    goal = mass_goal(tau)
    assert goal / 2**40 >= tau > (goal - 1) / 2**40


def test_first_reaching_counts_entries_and_one_more_where_all_do_not_do():
    unit = 2**40
    mass_nK = torch.tensor([[unit // 2, unit // 4, unit // 8], [unit // 8, unit // 8, unit // 8]])
    assert first_reaching(0.5, mass_nK).tolist() == [1, 4]
    assert first_reaching(0.5 + 2**-40, mass_nK).tolist() == [2, 4]
    assert first_reaching(0.375, mass_nK).tolist() == [1, 3]


def test_rounding_down_gives_the_largest_float16_not_above():
    exact = -torch.logspace(-9, 4.5, 4000, dtype=torch.float64)
    rounded = round_down(exact)
    assert rounded.dtype == torch.float16
    assert (rounded.double() <= exact)[exact >= -65504].all()
    above = np.nextafter(rounded.numpy(), np.float16(np.inf)).astype(np.float64)
    assert (above > exact.numpy()).all()
    assert round_down(torch.tensor([1e-9, -1e9])).tolist() == [0.0, -65504.0]


def test_what_was_first_looked_up_in_inference_mode_serves_outside_of_it():
    spec = importlib.util.find_spec("lrmc_ray.method.stored_mass")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with torch.inference_mode():
        fresh.mass_of(torch.zeros(1, dtype=torch.float16))
    masses = fresh.mass_of(EVERY_LOGPROB).double().requires_grad_()
    masses.sum().backward()
    assert torch.equal(masses.detach(), mass_of(EVERY_LOGPROB).double())
