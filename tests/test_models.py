import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import make, make_config
from lrmc_ray import models
from lrmc_ray.config import ModelSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.method.head import head_logits
from lrmc_ray.model_borders import longest_packed
from lrmc_ray.models import (
    added_mask,
    attention_cost,
    batch_hidden_states,
    cache_directory,
    differing_text,
    dropped_parts,
    head_of,
    hidden_states,
    load_model,
    load_tokenizer,
    local_directory,
    model_fingerprint,
    save_model,
    tokenizer_fingerprint,
    vocabulary_size,
)
from tests.support.chat_templates import tokenizer_for
from tests.support.operators import NoHostSync

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large logits, so that a forgotten softcap shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(architecture: str, **options):
    """A small model of a transformers architecture, every weight and bias random."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


MODELS = {
    "tied Llama": ("Llama", {"tie_word_embeddings": True}),
    "untied Llama": ("Llama", {"tie_word_embeddings": False}),
    "Gemma 2, softcap": (
        "Gemma2",
        {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16},
    ),
    "Cohere, logit scale": ("Cohere", {"logit_scale": 0.0625}),
    "Granite, logits scaling": ("Granite", {"logits_scaling": 8.0}),
    "Phi, bias": ("Phi", {}),
}
EXPECTED_OPTIONS = {
    "Gemma 2, softcap": (False, 1.0, 5.0),
    "Cohere, logit scale": (False, 0.0625, None),
    "Granite, logits scaling": (False, 0.125, None),
    "Phi, bias": (True, 1.0, None),
}


@pytest.fixture
def copy_of_model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


# The head


@pytest.mark.parametrize("name", MODELS)
def test_head_of_gives_the_models_own_logits(name):
    architecture, options = MODELS[name]
    model = random_model(architecture, **options)
    head = head_of(model)
    assert head.weight_VD is model.get_output_embeddings().weight
    expected_options = EXPECTED_OPTIONS.get(name, (False, 1.0, None))
    assert (head.bias_V is not None, head.logit_scale, head.softcap) == expected_options

    ids_BT = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTV = model(input_ids=ids_BT).logits
        actual_BTV = head_logits(hidden_states(model, ids_BT), head)
        plain_BTV = hidden_states(model, ids_BT) @ head.weight_VD.T
    torch.testing.assert_close(actual_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    # What makes the model special matters.
    is_plain = torch.allclose(plain_BTV, expected_BTV, rtol=1e-2, atol=1e-2)
    assert is_plain == (architecture == "Llama")


def test_padding_on_the_right_needs_no_mask():
    model = random_model("Llama")
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(128, (4, 17), generator=generator)
    mask_BT = torch.arange(17) < torch.tensor([[17], [3], [9], [1]])
    with torch.no_grad():
        expected_BTD = model.base_model(
            input_ids=ids_BT, attention_mask=mask_BT.long()
        ).last_hidden_state
        actual_BTD = hidden_states(model, torch.where(mask_BT, ids_BT, 0))
    torch.testing.assert_close(actual_BTD[mask_BT], expected_BTD[mask_BT])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_does_not_mislead_the_check_and_the_mode_stays(training):
    model = random_model("Llama", attention_dropout=0.5).train(training)
    assert head_of(model).weight_VD is model.lm_head.weight
    assert model.training is training


def test_a_head_that_cannot_be_expressed_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    class ShiftedByPosition(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            shift_T = torch.arange(output.logits.shape[1]) * 0.05
            output.logits = output.logits + shift_T[:, None]
            return output

    model = ShiftedByPosition(LlamaConfig(**SIZES)).eval()
    with pytest.raises(DataError, match=r"the head of ShiftedByPosition .*differ"):
        head_of(model)


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


def test_a_model_without_an_output_head_is_refused():
    from transformers import LlamaConfig, LlamaModel

    with pytest.raises(DataError, match=r"LlamaModel .* has no output head; a causal LM"):
        head_of(LlamaModel(LlamaConfig(**SIZES)))


# Loading and saving


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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_gives_the_same_bits_and_the_same_tokens(tied, tiny_model, tmp_path):
    torch.manual_seed(3)
    model = load_model(tiny_model)
    if not tied:
        config = model.config.__class__(**{**model.config.to_dict(), "tie_word_embeddings": False})
        model = type(model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    save_model(model, tiny_model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")

    ids_BT = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, loaded(input_ids=ids_BT).logits)
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == tied
    assert not list((tmp_path / "saved").glob("*.bin"))

    assert tokenizer_fingerprint(tmp_path / "saved") == tokenizer_fingerprint(tiny_model)
    ours, theirs = load_tokenizer(tmp_path / "saved"), load_tokenizer(tiny_model)
    text = "SELECT name FROM city WHERE 2 > 1; ÄÖ 日本 <|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    messages = [{"role": "user", "content": "How many?"}]
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


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


# Fingerprints


def test_the_model_fingerprint_is_that_of_the_content(tiny_model, copy_of_model):
    before = model_fingerprint(tiny_model)
    for path in copy_of_model.iterdir():
        os.utime(path, (1, 1))
    (copy_of_model / "README.md").write_text("A note changes nothing.")
    assert model_fingerprint(copy_of_model) == before
    assert len(before) == 64
    assert set(before) <= set("0123456789abcdef")


def test_one_flipped_bit_of_one_weight_changes_the_model_fingerprint(tiny_model, copy_of_model):
    before, tokenizer = model_fingerprint(tiny_model), tokenizer_fingerprint(tiny_model)
    weights = copy_of_model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(copy_of_model) != before
    assert tokenizer_fingerprint(copy_of_model) == tokenizer


def test_every_weight_file_and_the_configuration_count(tiny_model, copy_of_model):
    before = model_fingerprint(tiny_model)
    save_file({"extra": torch.zeros(1)}, copy_of_model / "model-2.safetensors")
    with_shard = model_fingerprint(copy_of_model)
    config = copy_of_model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with_config = model_fingerprint(copy_of_model)
    assert len({before, with_shard, with_config}) == 3


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizer_fingerprint_covers_template_and_vocabulary(name, tiny_model, copy_of_model):
    before, model = tokenizer_fingerprint(tiny_model), model_fingerprint(tiny_model)
    assert tokenizer_fingerprint(copy_of_model) == before
    path = copy_of_model / name
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_stop|>"))
    assert tokenizer_fingerprint(copy_of_model) != before
    assert model_fingerprint(copy_of_model) == model


# Where a model is


def test_a_directory_is_taken_as_it_is(tiny_model, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    assert local_directory(ModelSettings(name=tiny_model.name)) == tiny_model.resolve()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json; save the model with save_pretrained"),
        ("model.safetensors", r"has no \*\.safetensors; save the weights as safetensors"),
        ("tokenizer.json", r"has no tokenizer\.json or .*; save its tokenizer there as well"),
    ],
)
def test_an_incomplete_directory_names_what_it_lacks(missing, message, copy_of_model):
    (copy_of_model / missing).unlink()
    with pytest.raises(DataError, match=message) as caught:
        local_directory(ModelSettings(name=str(copy_of_model)))
    assert caught.value.exit_code == 4


NEITHER = (
    "the model must be a directory, or a name on the Hugging Face Hub such as Qwen/Qwen3-4B, got"
)


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        (
            "no-one/no-such-model",
            "model no-one/no-such-model is neither a directory nor to be",
            "check the name, log in with `hf auth login`, or give a directory",
        ),
        ("./no/such/directory", f"{NEITHER} ./no/such/directory", "where nothing is; correct it"),
        ("no such: name", f"{NEITHER} no such: name", "where nothing is; correct it"),
    ],
)
def test_what_is_neither_a_directory_nor_on_the_hub_is_refused_without_network(name, begin, end):
    code = (
        "import sys\n"
        "from lrmc_ray.config import ModelSettings\n"
        "from lrmc_ray.models import local_directory\n"
        "try:\n"
        f"    local_directory(ModelSettings(name={name!r}))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.exit_code, error)\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    error, uses_torch = result.stdout.splitlines()
    assert error.startswith(f"{IncompleteArtifactError.__name__} 3 {begin}")
    assert error.endswith(end)
    assert uses_torch == "False"


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LRMC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "lrmc_ray"


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


PACKED = {
    "llama": ({}, 200),
    # Its layers cut windows by places in the row; this one is beyond what is tried.
    "gpt_neo": ({"window_size": 100}, 0),
    "doge": ({"keep_window_size": 16}, 16),
    "mistral": ({"sliding_window": 16}, 16),
    "gemma3_text": ({"sliding_window": 16}, 16),
    "gpt_oss": ({"sliding_window": 16}, 16),
    "llama4_text": ({"attention_chunk_size": 16}, 16),
    "deepseek_v2": ({}, 200),
    "deepseek_v3": ({}, 200),
    "glm4_moe_lite": ({}, 200),
    "minicpm3": ({}, 200),
    "mamba2": ({}, 0),
    "bloom": ({}, 0),
}
"""Types, options, and the tokens of the longest sample that is packed, of 200 at most."""


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "mamba2"])
def test_bf16_is_packed_as_well_unless_tokens_see_others(model_type, monkeypatch):
    options, longest = PACKED[model_type]
    model = make(model_type, **options).bfloat16()
    assert math.isfinite(attention_cost(model)) == (longest > 0)
    if longest:

        def causal(model, is_visible_QT):
            return added_mask(model, torch.ones_like(is_visible_QT).tril())

        monkeypatch.setattr(models, "added_mask", causal)
        assert attention_cost(model) == math.inf


@pytest.mark.parametrize("model_type", PACKED)
def test_samples_are_packed_where_that_is_exact_and_only_there(model_type):
    """Samples as long as the window and one longer, against every sample alone."""
    options, longest = PACKED[model_type]
    model = make(model_type, **options)
    cost = 0.0 if longest else math.inf
    assert math.isfinite(attention_cost(model)) == (longest > 0)
    rng = torch.Generator().manual_seed(1)
    for length in sorted({longest or 16, 17, 200}):
        stem_T = torch.randint(3, 120, (length - 4,), generator=rng)
        ends = [torch.randint(3, 120, (n,), generator=rng) for n in (4, 2, 3)]
        sequences = [torch.cat([stem_T, end_T]) for end_T in ends]
        layout = lay_out(sequences, cost, longest_packed(model.config))
        assert (layout.is_visible_TT is not None) == (length <= longest)
        if model_type == "doge" and length > longest:
            continue  # its own selection of keys sees what comes behind, padding included
        with torch.no_grad():
            hidden_BTD = batch_hidden_states(model, layout)
            for ids_T, row, columns_T in zip(sequences, layout.rows, layout.columns, strict=True):
                alone_TD = hidden_states(model, ids_T[None])[0]
                error = (hidden_BTD[row, columns_T] - alone_TD).norm() / alone_TD.norm()
                assert error < 1e-5, (length, float(error))


def test_it_is_said_that_a_composite_model_becomes_its_text_part(tmp_path):
    make_config("qwen3_5").save_pretrained(tmp_path)
    said = dropped_parts(make("qwen3_5"), tmp_path)
    assert "holds a qwen3_5 model, of which transformers loads the text part alone" in said
    assert "saved, as a qwen3_5_text model" in said
    make_config("gemma3").save_pretrained(tmp_path)
    assert dropped_parts(make("gemma3"), tmp_path) is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_whoever_the_umask_lets_read_can_read_the_weights(tiny_model, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(load_model(tiny_model), tiny_model, tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()}
    assert modes["model.safetensors"] == mode, modes
    assert set(modes.values()) == {mode}


def test_the_padding_token_keeps_its_embedding(tmp_path):
    """Youtu's class sets it to zero at every loading; the head is the same weight."""
    model = make("youtu")
    with torch.no_grad():
        model.lm_head.weight[0] = 0.5
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.model.embed_tokens.weight is loaded.lm_head.weight


def test_padded_rows_run_without_waiting_and_as_transformers_runs_them(tiny_model):
    """Transformers' look at positions for packed sequences is spared here, and here alone."""
    model = load_model(tiny_model).eval()
    ids_BT = torch.randint(3, 500, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with NoHostSync():
            found_BTD = hidden_states(model, ids_BT)
        expected_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        assert torch.equal(found_BTD, expected_BTD)
        # Positions that begin anew are two sequences to others, as before.
        positions_BT = torch.cat([torch.arange(9), torch.arange(8)])[None]
        packed_BTD = model.model(
            input_ids=ids_BT[:1], position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        alone_BTD = hidden_states(model, ids_BT[:1, 9:])
    torch.testing.assert_close(packed_BTD[:, 9:], alone_BTD)
