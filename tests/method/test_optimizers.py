"""The names, and what each of them does in three steps."""

import adam_atan2_pytorch
import pytest
import torch

from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.optimizers import NAMES, make_optimizer

OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def three_steps(make) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(20, generator=rng))
    optimizer = make([param])
    for _ in range(3):
        param.grad = torch.randn(20, generator=rng)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(
    ("name", "peer", "default_betas"),
    [
        ("moclip", MoClip, (0.9, 0.99)),
        ("adamw", torch.optim.AdamW, (0.9, 0.999)),
        ("adam_atan2", adam_atan2_pytorch.AdamAtan2, (0.9, 0.99)),
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
    assert torch.equal(capped, three_steps(lambda params: MoClip(params, **tight)))
    plain = three_steps(lambda params: make_optimizer("adam_atan2", params, **OPTIONS))
    assert not torch.equal(capped, plain)
    assert torch.equal(
        three_steps(lambda params: make_optimizer("adam_atan2", params, **tight)), plain
    )


def test_an_unknown_name_is_refused_with_the_names_there_are():
    assert NAMES == ("moclip", "adamw", "adam_atan2")
    message = "optimizer must be one of moclip, adamw, adam_atan2, got 'adam'"
    with pytest.raises(ValueError, match=message):
        make_optimizer("adam", [torch.nn.Parameter(torch.zeros(1))], lr=0.1)
