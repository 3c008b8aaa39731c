"""Magma against NumPy, AdamW itself, and cases by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch

from lrmc_ray.method.baselines.magma import Magma
from lrmc_ray.method.optimizers import make_optimizer
from tests.support.method_inputs import rng

OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def magma(start, grads, kept, *, lr, beta1, beta2, weight_decay):
    """One tensor by hand, in float64 NumPy; ``kept`` says of every step whether it moves."""
    w, m, v, s = np.array(start), np.zeros(start.shape), np.zeros(start.shape), 1.0
    for step, (grad, moves) in enumerate(zip(grads, kept, strict=True), start=1):
        g = np.array(grad)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        cosine = (m * g).sum() / np.sqrt((m**2).sum() * (g**2).sum())
        s = 0.9 * s + 0.1 / (1 + np.exp(-cosine / 2))
        update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8)
        w = w - lr * weight_decay * w - lr * s * moves * update
    return w


def train(optimizer, params, grads):
    """Steps with the given gradients; which tensors each of them moved, decay aside."""
    moved = []
    for step in grads:
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        decay = 1 - optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"]
        moved.append([not torch.equal(p, b * decay) for p, b in zip(params, before, strict=True)])
    return moved


def random_tensors(shapes, seed):
    generator = rng(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_steps_follow_the_float64_reference():
    shapes = [(7, 9), (63,), (3, 4, 5), (1,)]
    starts = random_tensors(shapes, 1)
    grads = [random_tensors(shapes, 2 + step) for step in range(12)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = make_optimizer("magma", params, betas=(0.8, 0.95), seed=5, **OPTIONS)
    kept = train(optimizer, params, grads)
    assert 12 < sum(map(sum, kept)) < 36
    for number, (param, start) in enumerate(zip(params, starts, strict=True)):
        expected = magma(
            start.numpy(),
            [step[number].numpy() for step in grads],
            [step[number] for step in kept],
            lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.1,
        )  # fmt: skip
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-10)
        assert optimizer.state[param]["step"] == 12


def test_a_first_step_that_is_kept_goes_a_known_part_of_adamws():
    """Momentum and gradient point the same way at first: 0.9 + 0.1 sigmoid(1 / 2) of its length."""
    ours, plain = (torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64)) for _ in range(2))
    grad = torch.randn(4, 5, generator=rng(1), dtype=torch.float64)
    for param, optimizer in (
        (ours, Magma([ours], lr=0.1, kept_share=1.0)),
        (plain, torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)),
    ):
        param.grad = grad.clone()
        optimizer.step()
    share = 0.9 + 0.1 / (1 + np.exp(-0.5))
    torch.testing.assert_close(ours.data, share * plain.data, rtol=1e-9, atol=0)


def test_a_gradient_against_the_momentum_shortens_the_step():
    """By hand: 30 gradients that agree, cosine 1; then one that does not turn m, cosine -1."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Magma([param], lr=0.1)
    for _ in range(30):
        param.grad = torch.ones(3)
        optimizer.step()
    agreeing = 0.6225 + 0.9**30 * (1 - 0.6225)
    assert float(optimizer.state[param]["alignment"]) == pytest.approx(agreeing, abs=1e-4)
    param.grad = -torch.ones(3)
    optimizer.step()
    opposed = 0.9 * agreeing + 0.1 * 0.3775
    assert float(optimizer.state[param]["alignment"]) == pytest.approx(opposed, abs=1e-4)


def test_about_half_of_the_blocks_move_other_ones_in_each_step_and_by_seed():
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(400)]
    grads = [[torch.ones(1) for _ in params] for _ in range(10)]
    kept = np.array(train(make_optimizer("magma", params, lr=0.1, seed=1), params, grads))
    assert 0.46 < kept.mean() < 0.54
    assert all(0.4 < (a == b).mean() < 0.6 for a, b in itertools.pairwise(kept))
    other = np.array(train(make_optimizer("magma", params, lr=0.1, seed=2), params, grads))
    assert 0.4 < (kept == other).mean() < 0.6
    again = np.array(train(make_optimizer("magma", params, lr=0.1, seed=1), params, grads))
    assert (kept == again).all()


def test_it_goes_on_from_its_state_bit_for_bit():
    shapes = [(6, 7), (5,)]
    whole = [torch.nn.Parameter(tensor.float()) for tensor in random_tensors(shapes, 99)]
    grads = [[g.float() for g in random_tensors(shapes, step)] for step in range(8)]
    optimizer = make_optimizer("magma", whole, seed=3, **OPTIONS)
    train(optimizer, whole, grads[:3])
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in whole]
    again = make_optimizer("magma", resumed, seed=3, **OPTIONS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, whole, grads[3:])
    train(again, resumed, grads[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_zero_gradient_has_no_angle_and_moves_nothing():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Magma([param], lr=0.1, kept_share=1.0)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]
    assert float(optimizer.state[param]["alignment"]) == pytest.approx(0.9 + 0.1 * 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept_share": 0.0}, r"kept_share must be in \(0, 1\], got 0.0"),
        ({"kept_share": 1.5}, r"kept_share must be in \(0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Magma([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **options)
