"""Adapters on all that can have one, against the merged model, on tiny models of other families."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from benchmarks.tiny_models import causal_types, make
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, TrainingError
from lrmc_ray.models.loading import load_model
from lrmc_ray.train.learner import Learner
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


def works_with_adapters():
    """Types that the table says can have them."""
    page = Path(__file__).parents[2] / "docs" / "models.md"
    rows = re.findall(r"\| `([\w-]+)` \|[^|]*\|[^|]*\| (\d+)% \|", page.read_text("utf-8"))
    return [name for name, share in rows if int(share) and name in causal_types()]


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
        ("gemma3n_text", "correction_coefs", "is never called"),  # in training
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


def loss(logits_BTV):
    """Mean cross-entropy of the next token."""
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()
    )


def assert_exported_as_trained(model_type, directory):
    """Each target by itself: trained for a step, saved, loaded; and those that are refused."""
    directory.mkdir()
    base = make(model_type, **DENSE_FIRST.get(model_type, {}))
    base.save_pretrained(directory)
    trained = 0
    for target in sorted({name.rpartition(".")[2] for name, _ in weights_of(base)}):
        settings = TrainSettings(lora_rank=2, lora_targets=(target,), lr=1e-2)
        try:
            TrainableModel(load_model(directory), settings).adapters.try_out()  # as commands do
            learner = Learner(settings, directory, torch.device("cpu"))
        except ConfigError:
            continue
        draw(learner.trainable)
        before = logits_of(learner.model)
        learner.model.train()
        logits_BTV = learner.model(input_ids=IDS_BT, use_cache=False).logits.float()
        logits_BTV.logsumexp(-1).mean().backward()
        assert any(p.grad is not None for p in learner.trainable.parameters.values()), target
        learner.optimizer.step()
        stepped = logits_of(learner.model)
        # Queries of a decoder whose attention is all but even change little: 3e-5 of logits.
        assert (stepped - before).abs().max() > 1e-6 * before.abs().max(), target
        learner.save(directory / "exported")
        exported = logits_of(load_model(directory / "exported"))
        torch.testing.assert_close(loss(exported), loss(stepped), atol=1e-4, rtol=1e-4, msg=target)
        trained += 1
    return trained


def weights_of(model):
    """Names of modules and stacked tensors that hold a matrix."""
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if own == "weight" and parameter.ndim == 2:
                yield name, parameter
            elif parameter.ndim == 3 and "expert" in name:
                yield f"{name}.{own}", parameter


@pytest.mark.parametrize(
    ("model_type", "targets"), [("llama", 7), ("gpt2", 3), ("gpt_oss", 6), ("mamba2", 1)]
)
def test_each_target_is_exported_as_it_was_trained(model_type, targets, tmp_path):
    """The output head and embeddings, tied or not, are refused."""
    assert assert_exported_as_trained(model_type, tmp_path / "base") == targets


@pytest.mark.slow
@pytest.mark.parametrize("model_type", works_with_adapters())
def test_each_target_of_every_type_is_exported_as_it_was_trained(model_type, tmp_path):
    assert assert_exported_as_trained(model_type, tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_have_none(target, tied):
    model = make("llama", tie_word_embeddings=tied)
    with pytest.raises(ConfigError, match=f"'{target}', which is (the output head|an embedding)"):
        TrainableModel(model, TrainSettings(lora_rank=2, lora_targets=(target,)))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_adapters_beside_the_model_are_loaded_by_peft(model_type, tmp_path):
    make(model_type).save_pretrained(tmp_path / "base")
    learner = Learner(TrainSettings(lora_rank=2), tmp_path / "base", torch.device("cpu"))
    draw(learner.trainable)
    adapted = logits_of(learner.model)
    learner.save(tmp_path / "model")
    base = load_model(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    torch.testing.assert_close(logits_of(loaded), adapted)
    # Transformers takes the merged model by itself, not the adapters on top of it.
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "model")), adapted, atol=1e-4, rtol=1e-4
    )


def test_a_base_in_bf16_is_merged_and_saved_in_float32(tmp_path):
    """In bf16 an update of a thousandth of the weights would be lost."""
    make("llama").bfloat16().save_pretrained(tmp_path / "base")
    settings = TrainSettings(lora_rank=2, precision="bf16")
    learner = Learner(settings, tmp_path / "base", torch.device("cpu"))
    draw(learner.trainable)
    with torch.no_grad():
        for name, parameter in learner.trainable.parameters.items():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    adapted = logits_of(learner.model)
    base = logits_of(load_model(tmp_path / "base"))
    learner.save(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    merged = logits_of(load_model(tmp_path / "model"))
    assert (merged - adapted).norm() < 1e-2 * (adapted - base).norm()
    rounded = logits_of(load_model(tmp_path / "model").bfloat16()).float()
    assert (rounded - adapted).norm() > (adapted - base).norm()


def test_adapters_are_tried_out():
    """One that changes nothing, one that gets no gradient, and one whose merge is another model."""
    with_adapters("llama").adapters.try_out()
    chosen = with_adapters("llama", lora_targets=("down_proj",))
    for layer in chosen.model.model.layers:
        forward = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x, forward=forward: forward(x).detach()
    with pytest.raises(ConfigError, match=r"a llama model with .* no gradient reaches them"):
        chosen.adapters.try_out()
    ineffective = with_adapters("llama", lora_targets=("down_proj",))
    for layer in ineffective.model.model.layers:
        layer.mlp.down_proj.forward = layer.mlp.down_proj.base_layer.forward
    with pytest.raises(ConfigError, match=r"a llama model with .* they change hidden states by 0"):
        ineffective.adapters.try_out()
    wrong = with_adapters("llama")
    layer = wrong.model.model.layers[0].mlp.down_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(ConfigError, match=r"their merge changes hidden states by"):
        wrong.adapters.try_out()
