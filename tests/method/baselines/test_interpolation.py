"""Models between two others: both forms by hand."""

import pytest
import torch

from lrmc_ray.method.baselines.interpolation import blend_weights, interpolate

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.experts.7.weight",
    "model.layers.1.mlp.experts.0.weight",
    "model.layers.4.norm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_an_even_blend_goes_the_same_part_everywhere():
    assert blend_weights(NAMES, 0.3, "even") == dict.fromkeys(NAMES, 0.3)


def test_by_depth_the_part_grows_from_lambda_in_the_first_layer_to_1_in_the_last():
    """Five layers, of which two have no parameter here: 0.2 + 0.8 l / 4."""
    weights = blend_weights(NAMES, 0.2, "depth")
    assert list(weights.values()) == pytest.approx([0.2, 0.2, 0.4, 1.0, 0.2, 0.2])
    assert blend_weights(NAMES[::-1], 0.2, "depth") == weights


def test_two_stacks_have_two_depths_and_a_single_layer_is_the_first():
    weights = blend_weights(
        ["vision.blocks.0.w", "vision.blocks.1.w", "text.layers.0.w", "text.layers.2.w", "x.0.w"],
        0.5,
        "depth",
    )
    assert list(weights.values()) == pytest.approx([0.5, 1.0, 0.5, 1.0, 0.5])


@pytest.mark.parametrize("form", ["even", "depth"])
def test_parameters_are_moved_in_place_and_in_float32(form):
    base = {"a.0.w": torch.tensor([1.0, 2.0]), "a.1.w": torch.tensor([4.0]), "b": torch.zeros(1)}
    tuned = {
        "a.0.w": torch.tensor([3.0, 0.0]),
        "a.1.w": torch.tensor([8.0]),
        "b": torch.ones(1, dtype=torch.bfloat16),
    }
    interpolate(tuned, base, 0.25, form)
    assert tuned["a.0.w"].tolist() == [1.5, 1.5]
    assert tuned["a.1.w"].tolist() == ([5.0] if form == "even" else [8.0])
    assert tuned["b"].dtype == torch.bfloat16
    assert tuned["b"].item() == 0.25
    assert base["a.0.w"].tolist() == [1.0, 2.0]


def test_the_ends_are_the_models_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    base, whole = (torch.randn(1000, generator=generator) for _ in range(2))
    for weight, expected in ((0.0, base), (1.0, whole)):
        tuned = {"w": whole.clone()}
        interpolate(tuned, {"w": base}, weight)
        assert torch.equal(tuned["w"], expected)


def test_other_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="same weights as the tuned model, 2 differ, first a"):
        interpolate({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match="form must be one of even, depth, got 'odd'"):
        blend_weights(["a"], 0.5, "odd")
