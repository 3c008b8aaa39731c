"""The names, what each of them does in three steps, and the learning rate of a step."""

import functools

import adam_atan2_pytorch
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.optimizers import learning_rate, make_optimizer

OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def three_steps(make, shape=(20,)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make([param])
    for _ in range(3):
        param.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(
    ("name", "peer", "default_betas"),
    [
        ("moclip", MoClip, (0.9, 0.99)),
        ("adamw", torch.optim.AdamW, (0.9, 0.999)),
        ("adam_atan2", functools.partial(adam_atan2_pytorch.AdamAtan2, a=1.0), (0.9, 0.99)),
    ],
)
@pytest.mark.parametrize("betas", [None, (0.8, 0.95)])
def test_a_name_makes_the_steps_of_its_optimizer(name, peer, default_betas, betas):
    actual = three_steps(lambda params: make_optimizer(name, params, betas=betas, **OPTIONS))
    expected = three_steps(lambda params: peer(params, betas=betas or default_betas, **OPTIONS))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_options_reach_moclip_and_no_option_puts_a_cap_on_adam_atan2():
    tight = {**OPTIONS, "delta_max": 5.0, "clip": "project"}
    capped = three_steps(lambda params: make_optimizer("moclip", params, **tight))
    alone = three_steps(lambda params: MoClip(params, **tight))
    torch.testing.assert_close(capped, alone, rtol=2e-6, atol=2e-7)
    plain = three_steps(lambda params: make_optimizer("adam_atan2", params, **OPTIONS))
    assert not torch.equal(capped, plain)
    assert torch.equal(
        three_steps(lambda params: make_optimizer("adam_atan2", params, **tight)), plain
    )


def test_an_unknown_name_is_refused_with_the_names_there_are():
    message = "optimizer must be one of moclip, adamw, adam_atan2, c_adamw, mofo, magma, got 'adam'"
    with pytest.raises(ValueError, match=message):
        make_optimizer("adam", [torch.nn.Parameter(torch.zeros(1))], lr=0.1)


# The learning rate


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
