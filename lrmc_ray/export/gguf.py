"""One GGUF file of a model, by llama.cpp's own converter."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrmc_ray.errors import IncompleteArtifactError, LrmcError
from lrmc_ray.export.weights import Dtype

CONVERTER = "convert_hf_to_gguf.py"
FOLDER = "LLAMA_CPP"
"""Names a clone of llama.cpp."""

CODE = "auto_map"
"""Key under which files of a model name classes, of itself or of another repository of the Hub."""

_OUT_TYPES: dict[Dtype, str] = {"float32": "f32", "bf16": "bf16"}


def find_converter() -> Path:
    """llama.cpp's converter.

    Raises:
        IncompleteArtifactError: it is not there.
    """
    folder = os.environ.get(FOLDER)
    found = str(Path(folder) / CONVERTER) if folder else shutil.which(CONVERTER)
    if found is None or not Path(found).is_file():
        where = f"it is not in {FOLDER}={folder}" if folder else "it is not on the PATH"
        raise IncompleteArtifactError(
            f"--gguf needs llama.cpp's {CONVERTER}, and {where}; clone "
            f"https://github.com/ggml-org/llama.cpp, set {FOLDER} to that folder, and install its "
            "requirements/requirements-convert_hf_to_gguf.txt"
        )
    return Path(found)


def convert(converter: Path, directory: Path, name: str, *, dtype: Dtype) -> Path:
    """Write ``name`` as GGUF into ``directory``, from the model there.

    The converter runs code of the Hub that a model's files name, so it sees none of these names,
    and no network.

    Args:
        converter: llama.cpp's.
        directory: of the model.
        name: of the file, without its ending.
        dtype: of the weights.

    Raises:
        LrmcError: the converter failed; the message has its last line.
    """
    path = directory / f"{name}-{_OUT_TYPES[dtype]}.gguf"
    with _without_code(directory, name) as source:
        command = [sys.executable, str(converter), str(source), "--outfile", str(path)]
        result = subprocess.run(
            [*command, "--outtype", _OUT_TYPES[dtype]],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode or not path.is_file():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise LrmcError(
            f"{converter} must write {path.name}, it failed: "
            f"{lines[-1].strip() if lines else f'exit code {result.returncode}'}; export without "
            "--gguf, or see whether it knows this kind of model"
        )
    return path


@contextlib.contextmanager
def _without_code(directory: Path, name: str) -> Iterator[Path]:
    """The model as a directory called ``name`` that holds no code, and names none."""
    with tempfile.TemporaryDirectory(prefix=".", dir=directory) as folder:
        source = Path(folder) / name
        source.mkdir()
        for path in directory.iterdir():
            if not path.is_file() or path.suffix == ".py":
                continue
            if path.suffix == ".json" and CODE in (text := path.read_text(encoding="utf-8")):
                cleared = json.dumps(_cleared(json.loads(text)), ensure_ascii=False)
                (source / path.name).write_text(cleared, encoding="utf-8")
            else:
                (source / path.name).symlink_to(path.resolve())
        yield source


def _cleared(value: Any) -> Any:
    """``value`` of a JSON file, without what names code."""
    if isinstance(value, dict):
        # In a vocabulary it may be a token, with a number.
        return {
            key: _cleared(part)
            for key, part in value.items()
            if key != CODE or isinstance(part, int)
        }
    return [_cleared(part) for part in value] if isinstance(value, list) else value
