"""Which model and tokenizer a directory holds, whatever it is called: digests of its files."""

import hashlib
from pathlib import Path

from lrmc_ray.files.artifacts import content_digest
from lrmc_ray.models.names import TOKENIZER_FILES, WEIGHT_SUFFIX


def model_fingerprint(directory: Path) -> str:
    """SHA-256 of the configuration and the weights, whatever the directory is called."""
    digest = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob(f"*{WEIGHT_SUFFIX}"))]:
        digest.update(content_digest(path).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(directory: Path) -> str:
    """SHA-256 of the tokenizer's files, the chat template among them."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(f"{name} {content_digest(directory / name)}\n".encode())
    return digest.hexdigest()
