"""Adapters on all that can have one, against the merged model, on tiny models of other families."""

import pytest
import torch

from benchmarks.tiny_models import make
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, TrainingError
from lrmc_ray.train.trainable import TrainableModel

IDS_BT = torch.randint(5, 120, (2, 40), generator=torch.Generator().manual_seed(1))

EXPECTED = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_oss": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "mamba2": {"in_proj"},
    "jamba": {"in_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj"}
    | {"q_proj", "k_proj", "v_proj", "o_proj"},
}
"""Last parts of the names of what has an adapter."""


DENSE_FIRST = {"deepseek_v3": {"first_k_dense_replace": 1}}


def with_adapters(model_type, **settings):
    model = make(model_type, **DENSE_FIRST.get(model_type, {}))
    return TrainableModel(model, TrainSettings(lora_rank=2, **settings))


def names(trainable):
    return {name.split(".lora_")[0].removesuffix(".base_layer") for name in trainable.parameters}


def draw(trainable):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.copy_(0.1 * torch.randn_like(parameter))


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT).logits


@pytest.mark.parametrize(
    "model_type",
    [*EXPECTED, "qwen2_moe", "deepseek_v3", "granitemoe", "zamba", "longcat_flash", "phimoe"],
)
def test_the_merged_model_is_the_one_that_was_trained(model_type):
    base = logits_of(make(model_type, **DENSE_FIRST.get(model_type, {})))
    trainable = with_adapters(model_type)
    torch.testing.assert_close(logits_of(trainable.model), base)  # B is zero in the beginning
    draw(trainable)
    adapted = logits_of(trainable.model)
    assert not torch.allclose(adapted, base, atol=1e-2)
    torch.testing.assert_close(logits_of(trainable.merged()), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_what_has_an_adapter(model_type):
    """Experts have one per stacked tensor, which PEFT nests; of a Mamba mixer, the first layer."""
    trainable = with_adapters(model_type)
    found = {
        module.parameter_name if hasattr(module, "parameter_name") else name.rpartition(".")[2]
        for name, module in trainable.model.named_modules()
        if hasattr(module, "lora_A")
    }
    found = {name for name in found if name != "base_layer"}
    assert found - {"experts"} == EXPECTED[model_type] - {"experts"}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "glm4_moe", "qwen3_next"])
def test_dense_and_shared_layers_have_one_beside_the_experts(model_type):
    found = names(with_adapters(model_type))
    assert any(".experts" in name for name in found)
    assert any("shared_expert" in name and name.endswith("down_proj") for name in found)
    if model_type in ("deepseek_v3", "glm4_moe"):  # their first layers are dense
        assert any(name.endswith("layers.0.mlp.down_proj") for name in found)


def test_the_share_of_weights_with_an_adapter():
    """GPT-OSS: all but embeddings, head, norms, biases, sinks and routers."""
    model = make("gpt_oss")
    total = sum(p.numel() for p in model.parameters())
    adapted = 0
    for name, parameter in model.named_parameters():
        is_product = name.endswith(("_proj.weight", "gate_up_proj", "down_proj"))
        adapted += parameter.numel() if is_product else 0
    trainable = TrainableModel(model, TrainSettings(lora_rank=2))
    assert trainable.adapters.share == pytest.approx(adapted / total)
    assert 0.5 < trainable.adapters.share < 0.95


@pytest.mark.parametrize(
    ("model_type", "target", "said"),
    [
        ("llama", "query", "which fits none; a llama model has down_proj, gate_proj"),
        ("jamba", "dt_proj", "has a weight that Mamba's kernels read by themselves"),
        ("longcat_flash", "classifier", "is never called"),
        ("phimoe", "router", "is a PhimoeTopKRouter, which computes more than a product"),
    ],
)
def test_a_target_that_cannot_have_one_is_refused(model_type, target, said):
    with pytest.raises(ConfigError, match=f"lora_targets must name linear layers .*{said}"):
        with_adapters(model_type, lora_targets=(target,))


def test_experts_alone():
    trainable = with_adapters("gpt_oss", lora_targets=("experts.down_proj",))
    assert all(".experts" in name for name in trainable.parameters)
    assert len(trainable.parameters) == 2 * 2


def test_a_merge_that_changes_the_model_is_refused():
    """An adapter that a layer goes past, as if it had read its weight by itself."""
    trainable = with_adapters("llama")
    draw(trainable)
    layer = trainable.model.model.layers[0].mlp.down_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(TrainingError, match="llama model differ by"):
        trainable.merged()
