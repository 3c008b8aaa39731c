"""Settings that a model cannot fulfil are refused before anything is recorded."""

import pytest

from benchmarks.tiny_models import make_config
from lrmc_ray.config import RunSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError
from lrmc_ray.train import command
from lrmc_ray.train.checks import check_settings
from tests.support.tiny import make_data


def settings_for(directory, **train):
    return RunSettings.model_validate({"model": {"name": str(directory)}, "train": train})


def test_a_router_loss_without_routers(tiny_model, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"router_loss must be 0 for a llama model"):
        check_settings(settings_for(tiny_model, router_loss=0.1))
    check_settings(settings_for(tiny_model, gradient_checkpointing="full"))
    check_settings(settings_for(tmp_path / "nowhere"))  # nothing to look at
    # The command says so before Ray starts, and records nothing.
    data = make_data(tmp_path / "train.jsonl", num_rows=4)
    arguments = ["--model", str(tiny_model), "--train-data", str(data)]
    arguments += ["--output", str(tmp_path / "runs"), "train.router_loss=0.1"]
    assert run_command(command.main, arguments) == ConfigError.exit_code
    assert "router_loss must be 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_has_routers(tiny_model, tmp_path):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    make_config("qwen3_moe").save_pretrained(tmp_path)
    check_settings(settings_for(tmp_path, router_loss=0.1, gradient_checkpointing="selective"))
