"""What is loaded from a directory, what is refused there, and that none of its code runs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import make, make_config
from lrmc_ray.errors import DataError
from lrmc_ray.models.loading import (
    differing_text,
    dropped_parts,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from tests.support.chat_templates import tokenizer_for


def test_the_vocabulary_is_read_from_the_class_where_the_file_does_not_say(tmp_path):
    """As Gemma 3 4B and 27B are published."""
    from transformers import Gemma3TextConfig

    text = {"model_type": "gemma3_text", "hidden_size": 2560}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert vocabulary_size(tmp_path) == Gemma3TextConfig().vocab_size == 262_208
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": {"vocab_size": 77}}))
    assert vocabulary_size(tmp_path) == 77
    file.write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(DataError, match="configuration"):
        vocabulary_size(tmp_path)


def test_loading_gives_float32_in_evaluation_mode_unless_told_otherwise(tiny_model):
    model = load_model(tiny_model)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    saved = load_file(tiny_model / "model.safetensors")
    torch.testing.assert_close(
        model.get_input_embeddings().weight.detach(), saved["model.embed_tokens.weight"]
    )
    half = load_model(tiny_model, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_damaged_weight_file_is_bad_data(copy_of_model):
    weights = copy_of_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"choose another model, or save this one again"):
        load_model(copy_of_model)


def test_missing_weights_are_refused_rather_than_random(copy_of_model):
    weights = load_file(copy_of_model / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del weights[name]
    save_file(weights, copy_of_model / "model.safetensors", metadata={"format": "pt"})
    message = r"2 are missing, first model\.layers\.1\.mlp\.up_proj\.weight.*save the model again"
    with pytest.raises(DataError, match=message):
        load_model(copy_of_model)


def test_weights_of_other_shapes_are_refused(copy_of_model):
    weights = load_file(copy_of_model / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(63)
    save_file(weights, copy_of_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="must hold a causal LM"):
        load_model(copy_of_model)


def test_a_damaged_tokenizer_file_is_bad_data(copy_of_model):
    path = copy_of_model / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(DataError, match=r"must hold a tokenizer .* or save this one again"):
        load_tokenizer(copy_of_model)


def test_weights_that_are_no_safetensors_are_refused(copy_of_model):
    """A pickle could run code when it is read."""
    weights = load_file(copy_of_model / "model.safetensors")
    (copy_of_model / "model.safetensors").unlink()
    torch.save(weights, copy_of_model / "pytorch_model.bin")
    with pytest.raises(DataError, match="transformers knows"):
        load_model(copy_of_model)


@pytest.mark.parametrize("is_known_architecture", [True, False])
def test_code_in_a_model_directory_never_runs(is_known_architecture, copy_of_model, monkeypatch):
    """Not even when whoever sits at the terminal would say yes to it."""
    marker = copy_of_model / "ran"
    (copy_of_model / "planted.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    config = json.loads((copy_of_model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    tokenizer = json.loads((copy_of_model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "planted.Tokenizer"]}
    if not is_known_architecture:
        config["model_type"] = "planted"
        tokenizer["tokenizer_class"] = "PlantedTokenizer"
    (copy_of_model / "config.json").write_text(json.dumps(config))
    (copy_of_model / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    asked: list[str] = []

    def answer(question=""):
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    if is_known_architecture:
        assert type(load_model(copy_of_model)).__module__.startswith("transformers.models.llama")
        assert type(load_tokenizer(copy_of_model)).__module__.startswith("transformers.")
    else:
        with pytest.raises(DataError, match="without code of its own") as caught:
            load_model(copy_of_model)
        assert caught.value.exit_code == 4
        with pytest.raises(DataError, match="without code of its own"):
            load_tokenizer(copy_of_model)
    assert asked == []
    assert not marker.exists()


@pytest.mark.parametrize(
    ("tokenizer_class", "found"), [("PreTrainedTokenizerFast", None), ("Qwen2Tokenizer", "Two Ohm")]
)
def test_a_class_that_ignores_the_tokenizers_file_is_noticed(tmp_path, tokenizer_class, found):
    from tokenizers import Tokenizer, normalizers

    tokenizer_for(None).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    lower = Tokenizer.from_file(str(file))
    lower.normalizer = normalizers.Lowercase()
    lower.save(str(file))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = tokenizer_class
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    is_lower = loaded("Two Ohm")["input_ids"] == loaded("two ohm")["input_ids"]
    assert is_lower == (found is None)
    assert differing_text(tmp_path, loaded, ["two", "Two Ohm"]) == found


def test_it_is_said_that_a_composite_model_becomes_its_text_part(tmp_path):
    make_config("qwen3_5").save_pretrained(tmp_path)
    said = dropped_parts(make("qwen3_5"), tmp_path)
    assert "holds a qwen3_5 model, of which transformers loads the text part alone" in said
    assert "saved, as a qwen3_5_text model" in said
    make_config("gemma3").save_pretrained(tmp_path)
    assert dropped_parts(make("gemma3"), tmp_path) is None


def test_the_padding_token_keeps_its_embedding(tmp_path):
    """Youtu's class sets it to zero at every loading; the head is the same weight."""
    model = make("youtu")
    with torch.no_grad():
        model.lm_head.weight[0] = 0.5
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.model.embed_tokens.weight is loaded.lm_head.weight
