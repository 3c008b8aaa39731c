"""A model and its tokenizer, saved as a directory that loads like the one they came from."""

import shutil
from pathlib import Path
from typing import Any

from lrmc_ray.models.names import TOKENIZER_FILES

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Of a model that takes images: kept beside the tokenizer, and not used here."""


def save_model(model: Any, tokenizer_directory: Path, directory: Path) -> None:
    """Save ``model`` as safetensors beside a copy of the tokenizer in ``tokenizer_directory``."""
    model.save_pretrained(directory, safe_serialization=True)
    # Weights are written for their owner alone, whatever the umask allows.
    mode = (directory / "config.json").stat().st_mode
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)
    copy_tokenizer(tokenizer_directory, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Put a copy of the tokenizer in ``source`` beside a model."""
    for name in (*TOKENIZER_FILES, *_PROCESSOR_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
