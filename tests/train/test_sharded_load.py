"""Rows that are read from the files are those of the model that transformers loads, to the bit."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import make
from lrmc_ray.config import validate
from lrmc_ray.method.sharded_rows import bounds_of
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.loading import load_model
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.sharded_load import NotByRowsError, model_to_fill
from tests.train.sharded_loads import CPU, outcomes, settings_of

pytestmark = pytest.mark.timeout(900)

WORLD_SIZES = (1, 2, 3)
LARGE = {
    "vocab_size": 256,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 48,
}
LAYER = 4 * (4 * 384 * 384 + 3 * 384 * 1152 + 2 * 384)
"""Bytes in float32."""
WEIGHTS = 24 * LAYER + 4 * (2 * 256 * 384 + 384)


def saved(directory, model_type, dtype=torch.bfloat16, shard="60KB", **options):
    """A model in several files with an index, in bf16 or float32."""
    model = make(model_type, **options).to(dtype)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {
        "llama": saved(place / "llama", "llama", tie_word_embeddings=True),
        "qwen3": saved(place / "qwen3", "qwen3", torch.float32, tie_word_embeddings=False),
        "gemma3": saved(place / "gemma3", "gemma3_text", torch.float32, shard="1GB"),
        "mixture": saved(place / "mixture", "qwen3_moe", tie_word_embeddings=False),
        "gpt2": saved(place / "gpt2", "gpt2"),
        "small": saved(place / "small", "llama", tie_word_embeddings=False),
        "large": saved(place / "large", "llama", shard="1GB", tie_word_embeddings=False, **LARGE),
    }


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("outcomes"), models, WORLD_SIZES)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, (first, rows) in one.items():
        assert first == other[name][0]
        assert rows.dtype == other[name][1].dtype == torch.float32
        assert torch.equal(rows, other[name][1]), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixture", "gpt2"])
def test_rows_are_those_of_the_model_that_transformers_loads(name, world_size, found, models):
    model = load_model(models[name])
    for rank, outcomes_of_rank in enumerate(found[world_size]):
        outcome = outcomes_of_rank[name]
        assert_same(outcome["read"], outcome["cut"])
        for parameter, weight in model.named_parameters():
            first, last = bounds_of(len(weight), world_size)[rank : rank + 2]
            assert torch.equal(outcome["read"][parameter][1], weight[first:last])
        assert outcome["generation"] == outcome["expected generation"]
        assert outcome["generation"]["temperature"] == 0.5
        buffers = outcome["buffers read"]
        assert buffers.keys() == outcome["buffers cut"].keys() == dict(model.named_buffers()).keys()
        for buffer, value in model.named_buffers():
            assert torch.equal(buffers[buffer], value)


def test_what_is_tried_over_shards_is_found_as_on_a_whole_model(found, models):
    for name in ("llama", "qwen3", "gemma3", "mixture"):
        alone = Learner(
            settings_of().model_copy(update={"parallel": "replicate"}), models[name], CPU
        )
        alone.recomputation.try_out()
        for outcome in (o[name] for size in WORLD_SIZES for o in found[size]):
            assert outcome["way"] == alone.recomputation.way is not None
            assert outcome["attention_cost"] == alone.attention_cost
            assert math.isfinite(outcome["attention_cost"])


def test_adapters_are_drawn_as_on_a_whole_model(found):
    for outcome in (ranks["adapters"] for ranks in found[2]):
        assert_same(outcome["read"], outcome["cut"])
        drawn = [rows for name, (_, rows) in outcome["read"].items() if "lora_A" in name]
        assert drawn
        assert all(rows.abs().max() > 0 for rows in drawn if rows.numel())


def test_a_rank_of_two_holds_half_of_the_weights_and_some_layers(found):
    """A second copy of its rows, or one of the whole, would be seen."""
    for outcome in found[2]:
        print("most of two", outcome["peak"], "of", WEIGHTS)
        assert 0.45 * WEIGHTS < outcome["peak"] < WEIGHTS / 2 + 4.5 * LAYER
    assert WEIGHTS / 2 + 4.5 * LAYER < 0.7 * WEIGHTS


def rows_of(directory):
    return model_to_fill(directory)[1]


@pytest.fixture
def copied(models, tmp_path):
    def copy(name):
        shutil.copytree(models[name], tmp_path / name)
        return tmp_path / name

    return copy


def test_tied_weights_that_differ_in_the_files_are_not_tied(copied):
    directory = copied("gemma3")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})
    rows_of(directory).check_tied(WorkerGroup())
    weights["lm_head.weight"][5, 3] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NotByRowsError, match="tied and differ in the files"):
        rows_of(directory).check_tied(WorkerGroup())


def test_a_tied_weight_may_be_under_the_name_of_the_head_alone(copied):
    directory = copied("gemma3")
    path = directory / "model.safetensors"
    weights = load_file(path)
    expected = weights.pop("model.embed_tokens.weight")
    save_file({**weights, "lm_head.weight": expected}, path, metadata={"format": "pt"})
    rows = rows_of(directory)
    assert torch.equal(rows.rows("model.embed_tokens.weight", 3, 9), expected[3:9])


def test_an_older_single_file_wins_as_for_transformers(copied):
    directory = copied("qwen3")
    weights: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        weights |= load_file(path)
    weights = {name: weight + 1 for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_model(directory).get_parameter(name)
    assert torch.equal(rows_of(directory).rows(name, 1, 4), whole[1:4])
    assert torch.equal(whole, weights[name])


def without_a_weight(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def of_another_shape(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})


def quantized(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config))


def adapted(directory):
    (directory / "adapter_config.json").write_text("{}")


def without_files(directory):
    (directory / "model.safetensors").rename(directory / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_weight, r"layers\.1\.mlp\.up_proj\.weight is not in the files"),
        (of_another_shape, r"up_proj\.weight in another shape, \(3, 3\)"),
        (quantized, "its weights are quantized"),
        (adapted, "adapters beside its weights"),
        (without_files, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_what_cannot_be_read_by_rows_is_loaded_whole_with_its_reason(change, reason, copied):
    directory = copied("gemma3")
    change(directory)
    with pytest.raises(NotByRowsError, match=reason):
        model_to_fill(directory)


def test_a_learner_says_that_it_loads_the_whole_model(copied, caplog, monkeypatch):
    directory = copied("gemma3")
    reason = "it is not to be"

    def never(_):
        raise NotByRowsError(reason)

    monkeypatch.setattr("lrmc_ray.train.loaded_model.model_to_fill", never)
    settings = validate(type(settings_of()), settings_of().model_dump(), "train")
    learner = Learner(settings, directory, CPU)
    assert learner.sharding is not None
    assert f"every worker loads the whole model at first: {reason}" in caplog.text
