"""How evenly tokens are spread over experts, against transformers and by hand."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lrmc_ray.method.load_balance import balance_loss, busiest_load, expert_counts
from tests.support.operators import NoHostSync


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_is_that_of_transformers(top_k):
    """Padding in two rows of three."""
    rng = torch.Generator().manual_seed(top_k)
    logits = [torch.randn(3 * 7, 5, generator=rng, requires_grad=True) for _ in range(2)]
    mask_BT = torch.ones(3, 7)
    mask_BT[1, 4:] = mask_BT[2, 6:] = 0
    theirs = load_balancing_loss_func(tuple(logits), 5, top_k, mask_BT)
    expected = torch.autograd.grad(theirs, logits)
    ours = balance_loss(logits, mask_BT.reshape(-1).bool(), top_k=top_k)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, logits), expected, strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().max() > 1e-4


def test_an_even_load_gives_the_number_of_chosen_experts():
    logits_XE = 20 * torch.eye(4).repeat(3, 1)
    loss = balance_loss([logits_XE], torch.ones(12, dtype=torch.bool), top_k=1)
    assert float(loss) == pytest.approx(1.0, rel=1e-6)
    one_sided = balance_loss(
        [logits_XE[:1].repeat(12, 1)], torch.ones(12, dtype=torch.bool), top_k=1
    )
    assert float(one_sided) == pytest.approx(4.0, rel=1e-6)


def test_the_busiest_expert_by_hand():
    counts_E = expert_counts(
        torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]]), 4, torch.tensor([1, 1, 1, 0]).bool()
    )
    assert counts_E.tolist() == [3, 2, 1, 0]
    # 3 of a mean of 1.5, and 2 of a mean of 1; a layer that saw nothing does not count.
    counts_LE = torch.stack([counts_E, torch.tensor([2.0, 1, 1, 0]), torch.zeros(4)])
    assert busiest_load(counts_LE) == pytest.approx((2 + 2) / 2)
    assert math.isnan(busiest_load(torch.zeros(2, 4)))


def test_padding_counts_nothing_and_the_host_waits_for_no_device():
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(5, 4, generator=generator).requires_grad_() for _ in range(2)]
    padding = torch.full((3, 4), math.nan)
    together = [torch.cat((x.detach(), padding)).requires_grad_() for x in tokens]
    is_token_X = torch.arange(8) < 5
    with NoHostSync():
        ours = balance_loss(together, is_token_X, top_k=2)
        ours.backward()
    alone = balance_loss(tokens, torch.ones(5, dtype=torch.bool), top_k=2)
    alone.backward()
    torch.testing.assert_close(ours, alone)
    for one, other in zip(together, tokens, strict=True):
        torch.testing.assert_close(one.grad[:5], other.grad)
        assert not one.grad[5:].any()
