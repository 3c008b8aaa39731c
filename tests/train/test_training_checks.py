"""Settings that a model cannot fulfil are refused before anything is recorded."""

import logging
import shutil
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.tiny_models import make
from lrmc_ray.compare import command as compare_command
from lrmc_ray.config import RunSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError
from lrmc_ray.train import command as train_command
from lrmc_ray.train.checks import check_settings
from lrmc_ray.tune import command as tune_command
from tests.support.tiny import make_data

CANNOT = r"gradient_checkpointing must be one that \w+ \({}\) can do, got 'selective'"


def settings_for(directory, *, parameters=None, **train):
    values = {"model": {"name": str(directory)}, "train": train, "parameters": parameters or {}}
    return RunSettings.model_validate(values)


@pytest.fixture
def saved(tmp_path, tiny_model):
    """Saves a tiny model of a type with a tokenizer."""

    def save(model_type, **options):
        directory = tmp_path / model_type
        shutil.copytree(tiny_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        make(model_type, **options).save_pretrained(directory)
        return directory

    return save


def test_nothing_is_loaded_for_settings_that_every_model_fulfils(tmp_path):
    check_settings(settings_for(tmp_path / "nowhere"))
    check_settings(settings_for(tmp_path / "nowhere", gradient_checkpointing=False))


def test_shards_of_a_model_whose_head_has_a_bias(tiny_model, saved):
    with pytest.raises(ConfigError, match=r"'replicate' for a phi model.* its output head has a"):
        check_settings(settings_for(saved("phi"), parallel="shard", reduction="fast"))
    check_settings(settings_for(tiny_model, parallel="shard", reduction="fast"))


def test_nothing_is_offloaded_where_there_is_no_gpu(tiny_model):
    settings = settings_for(tiny_model, parallel="shard", reduction="fast", offload="cpu")
    with pytest.raises(ConfigError, match=r"train\.offload must be 'none' .* got 'cpu'.*leave it"):
        check_settings(settings)
    resources = settings.resources.model_copy(update={"gpus_per_worker": 1})
    check_settings(settings.model_copy(update={"resources": resources}))
    searched = settings_for(
        tiny_model, parallel="shard", reduction="fast", parameters={"offload": {"choices": ["cpu"]}}
    )
    with pytest.raises(ConfigError, match=r"train\.offload must be 'none'"):
        check_settings(searched)


def test_a_router_loss_without_routers(tiny_model, saved):
    with pytest.raises(ConfigError, match=r"router_loss must be 0 for a llama model"):
        check_settings(settings_for(tiny_model, router_loss=0.1))
    check_settings(settings_for(saved("qwen3_moe"), router_loss=0.1))


@pytest.mark.parametrize(
    ("model_type", "target", "said"),
    [
        ("llama", "lm_head", "is the output head, whose weight the loss over candidates reads"),
        ("llama", "embed_tokens", "is an embedding, which may be the output head's weight"),
        ("mamba2", "out_proj", "has a weight that Mamba's kernels read"),
        ("gpt2", "wte", "is an embedding"),
    ],
)
def test_a_layer_that_cannot_have_an_adapter(model_type, target, said, saved):
    settings = settings_for(saved(model_type), lora_rank=2, lora_targets=(target,))
    with pytest.raises(ConfigError, match=rf"lora_targets must name .*'{target}', which {said}"):
        check_settings(settings)


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3n_text"])
def test_a_way_of_computing_again_that_changes_gradients(model_type, saved):
    """They add to the result of a product in place, or keep what a later layer changes."""
    directory = saved(model_type)
    with pytest.raises(ConfigError, match=CANNOT.format(model_type)):
        check_settings(settings_for(directory, gradient_checkpointing="selective"))
    check_settings(settings_for(directory, gradient_checkpointing="full"))
    check_settings(settings_for(directory, gradient_checkpointing="full", lora_rank=2))


def test_what_a_search_may_choose(saved):
    """Every choice, though the run itself does not ask for it."""
    directory = saved("gpt_oss")
    ways = {"gradient_checkpointing": {"choices": ["auto", "selective"]}}
    with pytest.raises(ConfigError, match=CANNOT.format("gpt_oss")):
        check_settings(settings_for(directory, parameters=ways))
    ranks = {"lora_rank": {"choices": [0, 4]}}
    with pytest.raises(ConfigError, match="'wk', which fits none"):
        check_settings(settings_for(directory, parameters=ranks, lora_targets=("wk",)))
    losses = {"router_loss": {"low": 0.0, "high": 0.1}}
    with pytest.raises(ConfigError, match="router_loss must be 0 for a llama"):
        check_settings(settings_for(saved("llama"), parameters=losses))


def test_a_model_that_is_too_large_to_be_tried_is_left_to_training(saved, monkeypatch, caplog):
    directory = saved("gpt_oss")
    few = SimpleNamespace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    with caplog.at_level(logging.INFO):
        check_settings(settings_for(directory, gradient_checkpointing="selective"))
    assert "is too large to be tried" in caplog.text
    with pytest.raises(ConfigError, match="router_loss must be 0"):  # that needs no weights
        check_settings(settings_for(saved("llama"), router_loss=0.1, lora_rank=2))


TASKS = ("--domain-tasks", "capitals", "--general-tasks", "plain_english")


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (train_command, ()),
        (tune_command, TASKS),
        (compare_command, ("--methods", "lora", *TASKS, "evaluate.limit=6")),
    ],
    ids=["train", "tune", "compare"],
)
def test_the_commands_say_so_and_record_nothing(command, more, tiny_model, tmp_path, capsys):
    data = make_data(tmp_path / "train.jsonl", num_rows=4)
    arguments = ["--model", str(tiny_model), "--train-data", str(data), *more]
    arguments += ["--output", str(tmp_path / "runs"), "train.lora_targets=['lm_head']"]
    if command is not compare_command:
        arguments.append("train.lora_rank=4")
    assert run_command(command.main, arguments) == ConfigError.exit_code
    assert "'lm_head', which is the output head" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/records/*"))
