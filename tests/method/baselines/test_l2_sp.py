"""The pull towards the starting weights, by hand and within a step."""

import torch

from lrmc_ray.method.baselines.l2_sp import StartingPoint
from tests.support.method_training import PAPER, run
from tests.support.plain_training import (
    largest_difference,
    plain_gradients,
    random_samples,
    tiny_llama,
)


def test_the_gradient_is_alpha_times_the_distance_from_the_start():
    moved, frozen = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(2))
    penalty = StartingPoint([moved, frozen], 0.5)
    moved.data += torch.tensor([4.0, -1.0])
    moved.grad = torch.tensor([0.25, 0.25])
    penalty.add_gradient()
    assert moved.grad.tolist() == [0.25 + 0.5 * 4.0, 0.25 - 0.5 * 1.0]
    assert frozen.grad is None


def test_a_penalty_is_within_the_gradient_that_is_clipped_and_taken():
    """L2-SP by hand: two steps of gradient descent in float64, clipped to norm 0.01."""
    model, plain = tiny_llama(), tiny_llama()
    start = [p.detach().clone() for p in plain.parameters()]
    samples = [random_samples(4, seed=step) for step in range(2)]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    penalty = StartingPoint(parameters, 0.3)
    list(
        run(
            model,
            optimizer,
            samples.__getitem__,
            steps=2,
            lr_of_step=lambda step: 1.0,
            max_grad_norm=0.01,
            penalize=penalty.add_gradient,
        )
    )
    for step in range(2):
        gradients = plain_gradients(plain, samples[step], PAPER)
        with torch.no_grad():
            whole = [
                g + 0.3 * (p - p0)
                for g, p, p0 in zip(gradients, plain.parameters(), start, strict=True)
            ]
            norm = torch.stack([g.norm() for g in whole]).norm()
            for parameter, gradient in zip(plain.parameters(), whole, strict=True):
                parameter.sub_(gradient * 0.01 / (norm + 1e-6))
    weights = [[p.detach() for p in m.parameters()] for m in (model, plain)]
    assert largest_difference(*weights) < 1e-12
