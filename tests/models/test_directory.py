"""Where a model is, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from lrmc_ray.config import ModelSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.models.directory import local_directory


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
        "from lrmc_ray.models.directory import local_directory\n"
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
