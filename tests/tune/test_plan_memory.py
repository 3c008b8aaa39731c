"""``lrmc plan --memory``: from config.json alone."""

import json

import pytest

from benchmarks.tiny_models import make_config
from lrmc_ray.config import TrainSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.record.spread import spread
from lrmc_ray.train.memory import training_memory
from lrmc_ray.tune.plan import main
from lrmc_ray.tune.plan_memory import CARDS_GB, USABLE, show_memory
from lrmc_ray.tune.recording_memory import activation_bytes, recording_memory

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
"""Its published shapes; a layer is as the others."""


@pytest.fixture
def directory(tmp_path):
    make_config("llama", **SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_with_a_configuration_alone_is_planned(directory, tmp_path, capsys):
    flags = ["--max-length", "64", "--precision", "bf16", "--lora-rank", "4", "--output", "none"]
    assert run_command(main, ["--model", str(directory), *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["length"], planned["precision"]) == (64, "bf16")
    first, *others = planned["ways"]
    assert 0 < first["trained"] < first["parameters"]
    assert [way["settings"] for way in others] == [
        {"micro_batches": 8, "gradient_checkpointing": "full"}
    ]
    assert others[0]["total"] < first["total"]
    assert first["fits_gb"] == list(CARDS_GB)
    assert not (tmp_path / "none").exists()


def test_the_text_names_every_term_and_what_takes_less(directory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(main, ["--model", str(directory), "--max-length", "64"]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "gradients", "moments", "activations", "loss", "at most"):
        assert word in text
    for way in ("as asked", "train.state_dtype=bf16", "train.lora_rank=16"):
        assert way in text
    assert "2 x 64 tokens and train.precision=fp32" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


SHARDS = ["--parallel", "shard", "--reduction", "fast", "--precision", "fp32"]


def test_shards_are_forecast_for_every_card(directory, capsys, monkeypatch):
    """The least number of devices whose worker fits, found by asking for each."""
    monkeypatch.setattr("lrmc_ray.tune.plan_memory.CARDS_GB", (0.0012, 0.0016, 80, 141))
    flags = ["--model", str(directory), "--max-length", "64", "--memory", *SHARDS]
    assert run_command(main, [*flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    first = planned["ways"][0]
    assert planned["parallel"] == "shard"
    assert planned["workers"] == first["devices"]["80"] == 1
    train = TrainSettings(parallel="shard", reduction="fast", precision="fp32")
    totals = [training_memory(directory, train, length=64, workers=n).total for n in range(1, 65)]
    assert first["total"] == totals[0]
    for card, number in first["devices"].items():
        fitting = [n for n, total in enumerate(totals, 1) if total <= USABLE * float(card) * 1e9]
        assert number == (fitting[0] if fitting else None)
    assert run_command(main, [*flags, "resources.workers=[1, 3]"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "One of 3 workers" in text
    assert "layers and vocabulary, whole for a while" in text
    assert "of the host's memory" in text
    assert "train.offload=cpu, and 0.0 GB of the host" in text


def test_what_cannot_be_sharded_is_refused_by_name(tmp_path, capsys):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    make_config("llama", **SIZES, rope_parameters=rope).save_pretrained(tmp_path)
    assert run_command(main, ["--model", str(tmp_path), "--memory", *SHARDS]) == 2
    assert "must be 'replicate' for a llama model, got 'shard'" in capsys.readouterr().err


def test_without_its_configuration_a_directory_is_refused(tmp_path, capsys):
    assert run_command(main, ["--memory", "--model", str(tmp_path)]) == 4
    assert "has no config.json" in capsys.readouterr().err


def test_a_layer_of_the_real_sizes(tmp_path):
    """Of Qwen3-4B: parameters by hand, memory by the terms, in no memory at all."""
    for layers in (1, 2):
        config = make_config("qwen3", **QWEN3_4B, num_hidden_layers=layers)
        config.save_pretrained(tmp_path / f"{layers}")
    rows = [training_memory(tmp_path / str(n), TrainSettings(), length=1024) for n in (1, 2)]
    layer = 2560 * (32 + 2 * 8) * 128 + 32 * 128 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert rows[1].parameters - rows[0].parameters == layer
    assert rows[0].parameters == layer + 151_936 * 2560 + 2560
    whole = rows[0].parameters + 35 * layer
    assert whole == 4_022_468_096  # as published
    assert rows[0].moments == 8 * rows[0].parameters


def test_what_fits_nowhere_is_said(capsys):
    row = {"parameters": 1, "trained": 1, "total": 10**12, "settings": {}}
    row["devices"] = dict.fromkeys(map(str, CARDS_GB))
    terms = [
        *("weights", "gradients", "moments", "copies", "gathered"),
        *("activations", "loss", "step", "host"),
    ]
    recording = {"precision": "fp32", "total": 1, "activations": 1, "devices": row["devices"]}
    planned = {
        "recording": recording,
        "ways": [row | dict.fromkeys(terms, 1)],
        "rows_of_micro_batch": 1,
    }
    planned |= {"parallel": "replicate", "workers": 1}
    show_memory(planned | {"length": 8, "precision": "fp32"})
    assert "Nothing fits" in capsys.readouterr().out
    assert 0.8 <= USABLE < 1


def test_adapters_are_counted_on_linear_layers_of_the_model_s_own_class(tmp_path):
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    layers = AutoModelForCausalLM.from_config(config).transformer.h
    linear = [x for x in layers.modules() if type(x).__name__ == "FalconLinear"]
    assert len(linear) == 8
    found = training_memory(tmp_path, TrainSettings(lora_rank=4), length=16)
    assert found.trained == 4 * sum(sum(x.weight.shape) for x in linear)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recording_is_forecast_for_every_card(tmp_path, precision, capsys):
    """The least number of GPUs of which the fullest fits; activations as two real passes take."""
    make_config("llama", **SIZES | {"num_hidden_layers": 4}).save_pretrained(tmp_path)
    loads = [max(spread(tmp_path, range(n), precision).loads) for n in range(1, 5)]
    activations = activation_bytes(tmp_path, precision, 64)
    # The widest moment of a layer: 64 x 32 tokens, at least three tensors of its inner width.
    itemsize = 2 if precision == "bf16" else 4
    assert 3 * itemsize * 2048 * 160 <= activations <= 12 * itemsize * 2048 * 160
    fits = [(load + activations) / 0.9e9 for load in loads]
    found = recording_memory(
        tmp_path, precision, length=64, cards_gb=[fits[0], fits[2], fits[3] / 2], usable=0.9001
    )
    assert found["total"] == loads[0] + activations
    assert list(found["devices"].values()) == [1, loads.index(loads[2]) + 1, None]
    settings = [f"record.precision={precision}"]
    assert run_command(main, ["--model", str(tmp_path), "--max-length", "64", *settings]) == 0
    assert f"record.precision={precision} takes" in " ".join(capsys.readouterr().out.split())


def test_a_model_whose_layers_cannot_be_divided_fits_one_gpu_or_none(tmp_path):
    """Nobody has asked for several; Zamba's layers share a weight."""
    make_config("zamba2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="some layers share a weight"):
        spread(tmp_path, range(2), "fp32")
    need = max(spread(tmp_path, range(1), "fp32").loads) + activation_bytes(tmp_path, "fp32", 64)
    cards = [0.9 * need / 1e9, 1.1 * need / 1e9]
    found = recording_memory(tmp_path, "fp32", length=64, cards_gb=cards, usable=1.0)
    assert list(found["devices"].values()) == [None, 1]


def test_a_type_that_looks_at_values_is_refused_with_a_remedy_for_recording(tmp_path):
    make_config("dbrx").save_pretrained(tmp_path / "dbrx")
    with pytest.raises(DataError) as caught:
        activation_bytes(tmp_path / "dbrx", "fp32", 64)
    begin, _, end = str(caught.value).partition(", got ")
    assert begin == (
        "dbrx must be a type whose forward pass needs no values of tensors for its memory to be "
        "forecast"
    )
    assert end.endswith("; record some samples and look")
    assert "\n" not in end
