"""Whether two models have the same vocabulary, without which their scores cannot be compared."""

import json
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.names import MADE_BY
from lrmc_ray.files.artifacts import fingerprint, read_manifest
from lrmc_ray.models.identity import tokenizer_fingerprint
from lrmc_ray.models.loading import vocabulary_size


def vocabulary_of(model_directory: Path) -> dict[str, Any]:
    """What two models must share for their log-probabilities to be comparable.

    Read from the files where they say: transformers would cost the caller seconds and memory.

    Raises:
        DataError: neither the configuration nor its class says how many tokens there are.
    """
    size = vocabulary_size(model_directory)
    path = model_directory / "tokenizer.json"
    if not path.is_file():
        return {"size": size, "tokens": tokenizer_fingerprint(model_directory)}
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"].get("vocab")
    added = [[token["content"], token["id"]] for token in tokenizer.get("added_tokens") or []]
    return {"size": size, "tokens": fingerprint([vocabulary, added])}


def check_vocabulary(model_directory: Path, base: Path) -> None:
    """Refuse a model that cannot be compared with its base, before it is scored.

    Args:
        model_directory: the model.
        base: the base model's scores.

    Raises:
        DataError: the vocabularies differ.
    """
    theirs = read_manifest(base, made_by=MADE_BY)["vocabulary"]
    own = vocabulary_of(model_directory)
    if own != theirs:
        differ = (
            f"{own['size']} tokens against {theirs['size']}"
            if own["size"] != theirs["size"]
            else "other tokens"
        )
        raise DataError(
            f"{model_directory} must have its base's vocabulary, but has {differ}: neither its "
            "cross-entropy per token nor its drift means anything beside the base's; give the base "
            "that it was made from"
        )
