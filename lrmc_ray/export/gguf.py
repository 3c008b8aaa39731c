"""One GGUF file of a model, by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lrmc_ray.errors import IncompleteArtifactError, LrmcError
from lrmc_ray.export.weights import Dtype

CONVERTER = "convert_hf_to_gguf.py"
FOLDER = "LLAMA_CPP"
"""Names a clone of llama.cpp."""

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

    Args:
        converter: llama.cpp's.
        directory: of the model.
        name: of the file, without its ending.
        dtype: of the weights.

    Raises:
        LrmcError: the converter failed; the message has its last line.
    """
    path = directory / f"{name}-{_OUT_TYPES[dtype]}.gguf"
    command = [sys.executable, str(converter), str(directory), "--outfile", str(path)]
    result = subprocess.run(
        [*command, "--outtype", _OUT_TYPES[dtype]], capture_output=True, text=True, check=False
    )
    if result.returncode or not path.is_file():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise LrmcError(
            f"{converter} must write {path.name}, it failed: "
            f"{lines[-1].strip() if lines else f'exit code {result.returncode}'}; export without "
            "--gguf, or see whether it knows this kind of model"
        )
    return path
