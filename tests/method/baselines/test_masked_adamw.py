"""AdamW with masked updates, against NumPy, AdamW itself and small cases by hand."""

import copy

import numpy as np
import pytest
import torch

from lrmc_ray.method.optimizers import make_optimizer
from tests.support.method_inputs import rng

OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def masked_adamw(start, grads, mask, *, lr, beta1, beta2, weight_decay):
    """One tensor by hand, in float64 NumPy; ``mask(m, g)`` is what the update is multiplied by."""
    w, m, v = np.array(start), np.zeros(start.shape), np.zeros(start.shape)
    for step, grad in enumerate(grads, start=1):
        g = np.array(grad)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8)
        w = w - lr * weight_decay * w - lr * update * mask(m, g)
    return w


def cautious(m, g):
    kept = (m * g > 0).astype(float)
    return kept / max(kept.mean(), 1e-3)


def largest_fifteenth(m, g):
    """The 15 % largest, by sorting; no two are equal."""
    if m.ndim < 2:
        return np.ones(m.shape)
    kept = np.zeros(m.size)
    kept[np.argsort(-np.abs(m).ravel())[: int(0.15 * m.size)]] = 1
    return kept.reshape(m.shape)


@pytest.mark.parametrize("shape", [(7, 9), (63,), (3, 4, 5)])
@pytest.mark.parametrize(("name", "mask"), [("c_adamw", cautious), ("mofo", largest_fifteenth)])
def test_masked_steps_follow_the_float64_reference(name, mask, shape):
    start = torch.randn(shape, generator=rng(1), dtype=torch.float64)
    grads = [torch.randn(shape, generator=rng(2 + s), dtype=torch.float64) for s in range(8)]
    param = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(name, [param], betas=(0.8, 0.95), **OPTIONS)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    expected = masked_adamw(
        start.numpy(), [g.numpy() for g in grads], mask,
        lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-11)
    assert optimizer.state[param]["step"] == 8


def test_mofo_that_moves_everything_is_adamw():
    ours, plain = (torch.nn.Parameter(torch.randn(4, 5, generator=rng(0))) for _ in range(2))
    optimizers = [
        make_optimizer("mofo", [ours], mofo_share=1.0, **OPTIONS),
        torch.optim.AdamW([plain], betas=(0.9, 0.999), **OPTIONS),
    ]
    for step in range(3):
        ours.grad = plain.grad = torch.randn(4, 5, generator=rng(1 + step))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.data, plain.data, rtol=1e-6, atol=1e-7)


def test_mofo_moves_as_many_as_it_says_and_no_others():
    param = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = make_optimizer("mofo", [param], lr=0.1, mofo_share=0.013)
    param.grad = torch.randn(40, 50, generator=rng(0))
    optimizer.step()
    moved = param.detach() != 0
    assert int(moved.sum()) == 26
    assert param.grad[moved].abs().min() > param.grad[~moved].abs().max()


def test_a_step_against_the_momentum_is_left_out_and_its_share_made_up_for():
    """Four elements; the second gradient turns one around: it stays, the others go 4/3 as far."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = make_optimizer("c_adamw", [param], lr=1.0, betas=(0.9, 0.0))
    param.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    first = param.detach().clone()
    param.grad = torch.tensor([1.0, 1.0, 1.0, -0.5], dtype=torch.float64)
    optimizer.step()
    moved = (first - param.detach()).tolist()
    assert moved == pytest.approx([4 / 3, 4 / 3, 4 / 3, 0.0], rel=1e-7)


@pytest.mark.parametrize("name", ["c_adamw", "mofo"])
def test_a_masked_optimizer_goes_on_from_its_state_bit_for_bit(name):
    def steps(optimizer, param, first, last):
        for step in range(first, last):
            param.grad = torch.randn(6, 7, generator=rng(step))
            optimizer.step()

    whole = torch.nn.Parameter(torch.randn(6, 7, generator=rng(99)))
    optimizer = make_optimizer(name, [whole], mofo_share=0.3, **OPTIONS)
    steps(optimizer, whole, 0, 3)
    resumed = torch.nn.Parameter(whole.detach().clone())
    again = make_optimizer(name, [resumed], mofo_share=0.3, **OPTIONS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, whole, 3, 6)
    steps(again, resumed, 3, 6)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mofo_share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"mofo_share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer("mofo", [torch.nn.Parameter(torch.zeros(1))], lr=0.1, **options)
