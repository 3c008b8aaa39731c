"""Packed rows of whole models: attention in blocks is there, and changes nothing but rounding."""

import pytest
import torch

from lrmc_ray.method.fast import attention_blocks
from lrmc_ray.method.fast.packing import pack
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.loading import load_model
from lrmc_ray.train.recompute import Recomputation
from lrmc_ray.train.split_forward import SplitModel
from tests.support.operators import Counted
from tests.support.tiny import make_model_of_type

torch.set_num_threads(1)

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def packed():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (6, 60), generator=generator)
    ids[:, :20] = ids[0, :20]
    return pack(list(ids))


def gradients(model, forward, layout):
    model.zero_grad()
    with Counted() as counted:
        hidden = forward(layout)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weights.sin()).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), grads, counted.calls


@pytest.fixture(params=["llama", "gemma3_text", "qwen3"])
def model(request, tmp_path):
    model = load_model(make_model_of_type(request.param, tmp_path), dtype=torch.float64).train()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7  # another than torch's own
    return model


def test_a_packed_row_goes_in_blocks_to_the_same_result(model, monkeypatch):
    layout = packed()
    forward = lambda one: batch_hidden_states(model, one)  # noqa: E731
    hidden, grads, calls = gradients(model, forward, layout)
    monkeypatch.setattr(attention_blocks, "LARGEST_SHARE", 0.0)
    expected, theirs, whole = gradients(model, forward, layout)
    num_layers = model.config.num_hidden_layers
    assert sum(n for name, n in whole.items() if "scaled_dot_product" in name) == num_layers
    assert sum(n for name, n in calls.items() if "scaled_dot_product" in name) == 6 * num_layers
    torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", ["selective", "full"])
def test_activations_are_computed_again_in_the_same_blocks(model, way):
    layout = packed()
    _, expected, _ = gradients(model, lambda one: batch_hidden_states(model, one), layout)
    again = Recomputation(model, way)
    _, found, _ = gradients(model, again.forward, layout)
    assert again.way == way
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("model", ["llama", "qwen3"], indirect=True)  # gemma's window is shorter
def test_the_rest_behind_a_beginning_goes_in_blocks_as_well(model):
    layout = packed()
    split = SplitModel(model)
    states = split.beginning(layout.input_ids_BT[:, :20])
    with Counted() as counted:
        rest = split.rest(layout, states)
    calls = sum(n for name, n in counted.calls.items() if "scaled_dot_product" in name)
    assert calls == 6 * model.config.num_hidden_layers
    whole = batch_hidden_states(model, layout)
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-10, atol=1e-10)
