"""Where a model's files are: in a directory, on the Hub, or made by the demo.

A model is always a local directory here: an id on the Hub is downloaded first, and the demo's
model is made from what is installed.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.config import DEMO, GEMMA, ModelSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError, first_line
from lrmc_ray.files.artifacts import cache_directory, fingerprint
from lrmc_ray.files.hub_calls import limit_hub_calls
from lrmc_ray.files.place import Place
from lrmc_ray.models.identity import model_fingerprint, tokenizer_fingerprint
from lrmc_ray.models.names import TOKENIZER_FILES, WEIGHT_SUFFIX

_OF_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""How names on the Hub look."""

_TOKENIZERS = ["tokenizer.json", "tokenizer.model", "vocab.json"]


def tokenizer_directory(settings: ModelSettings) -> Path:
    """The directory that holds the model's tokenizer; a local one needs no weights.

    Raises:
        IncompleteArtifactError: it is no directory and the Hub does not have it or is out of reach.
        DataError: the directory lacks a tokenizer.
    """
    if settings.name in (DEMO, GEMMA) or not Path(settings.name).is_dir():
        return local_directory(settings)
    directory = Path(settings.name).resolve()
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise DataError(
            f"model {settings.name} has no {' or '.join(_TOKENIZERS)}; save its tokenizer there"
        )
    return directory


def local_directory(settings: ModelSettings) -> Path:
    """The directory that holds the model, made or downloaded where needed.

    Raises:
        IncompleteArtifactError: it is no directory and the Hub does not have it or is out of reach.
        ConfigError: its terms are not accepted.
        DataError: the directory lacks a configuration, weights or a tokenizer.
    """
    if settings.name == DEMO:
        from lrmc_ray.tasks.demo.base_model import demo_base_model

        directory = demo_base_model(cache_directory())
    elif settings.name == GEMMA:
        from lrmc_ray.tasks.demo.gemma_model import gemma_base_model

        directory = gemma_base_model(cache_directory())
    elif Path(settings.name).is_dir():
        directory = Path(settings.name).resolve()
    else:
        directory = _download(settings, [f"*{WEIGHT_SUFFIX}", "*.json", *TOKENIZER_FILES])
    check_files(settings.name, directory)
    return directory


def config_directory(settings: ModelSettings) -> Path:
    """The directory that holds the model's ``config.json``, be there weights or not.

    Raises:
        IncompleteArtifactError: it is no directory and the Hub does not have it or is out of reach.
        DataError: the directory lacks it.
    """
    if settings.name in (DEMO, GEMMA):
        return local_directory(settings)
    if not Path(settings.name).is_dir():
        return _download(settings, ["config.json"])
    directory = Path(settings.name).resolve()
    if not (directory / "config.json").is_file():
        raise DataError(f"model {settings.name} has no config.json; put the model's own there")
    return directory


def check_files(name: str, directory: Path) -> None:
    """Refuse a directory that is no model's.

    Raises:
        DataError: the model ``name`` lacks a configuration, weights or a tokenizer there.
    """
    for needed, remedy in (
        (["config.json"], "save the model with save_pretrained"),
        ([f"*{WEIGHT_SUFFIX}"], "save the weights as safetensors with save_pretrained"),
        (_TOKENIZERS, "save its tokenizer there as well"),
    ):
        if not any(any(directory.glob(pattern)) for pattern in needed):
            raise DataError(f"model {name} has no {' or '.join(needed)}; {remedy}")


def check_name(name: str) -> None:
    """Refuse what is no directory and cannot be a name on the Hub.

    Raises:
        IncompleteArtifactError: says which names there are.
    """
    if not _OF_HUB.fullmatch(name):
        raise IncompleteArtifactError(
            f"the model must be a directory, or a name on the Hugging Face Hub such as "
            f"Qwen/Qwen3-4B, got {name}, where nothing is; correct it"
        )


def _download(settings: ModelSettings, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    check_name(settings.name)
    limit_hub_calls()
    try:
        return Path(
            snapshot_download(
                settings.name,
                revision=settings.revision,
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise IncompleteArtifactError(
            f"model {settings.name} is neither a directory nor to be had from the Hugging Face Hub "
            f"({first_line(error)}); check the name, log in with `hf auth login`, or give a "
            "directory"
        ) from None


def send_model(place: Place, directory: Path) -> str:
    """Bring a base model to where all nodes see it; returns what ``place.here`` takes there.

    Its name says what it is, so that a model is kept once, whoever sends it.
    """

    def name() -> str:
        identity = fingerprint([model_fingerprint(directory), tokenizer_fingerprint(directory)])
        return f"models/{identity}"

    return place.send(directory, name)
