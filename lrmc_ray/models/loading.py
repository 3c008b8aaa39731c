"""The configuration, the tokenizer and the model of a directory, as transformers loads them.

Code from a model's repository is never run (``trust_remote_code`` stays off), and weights come from
safetensors.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.errors import DataError, first_line
from lrmc_ray.models.borders import attention_borders, text_config
from lrmc_ray.models.parts import body_of
from lrmc_ray.models.repairs import forget_lengths, restore_padding_row

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _reading(what: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise classes of their own
        raise DataError(
            f"{directory} must hold a {what} that transformers knows, without code of its own: "
            f"{first_line(error)}; choose another model, or save this one again"
        ) from error


def load_config(directory: Path) -> Any:
    """The configuration of a model directory.

    Raises:
        DataError: transformers does not know it, or not without code of its own.
    """
    from transformers import AutoConfig

    with _reading("configuration", directory):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def vocabulary_size(directory: Path) -> int:
    """Rows of the output head: the tokenizer's tokens, and padding behind them.

    Raises:
        DataError: the configuration does not say.
    """
    file = directory / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    size = written.get("vocab_size", written.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):  # some are saved without it, as their class has a default
        size = getattr(text_config(load_config(directory)), "vocab_size", None)
    if not isinstance(size, int):
        raise DataError(f"{file} has no vocab_size; save the model again")
    return size


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        DataError: transformers cannot load it, or not without code of its own.
    """
    from transformers import AutoTokenizer

    # trust_remote_code=None, the default, asks whoever is at the terminal, and y runs the code.
    with _reading("tokenizer", directory):
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )


def differing_text(directory: Path, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """The first of ``texts`` that ``tokenizer.json`` by itself gives other tokens for.

    Some tokenizer classes of transformers build the normalizer and the pre-tokenizer themselves and
    ignore those of the file, which other programs use.
    """
    file = directory / "tokenizer.json"
    if not file.is_file() or not getattr(tokenizer, "is_fast", False):
        return None
    from tokenizers import Tokenizer

    with _reading("tokenizer", directory):
        by_itself = Tokenizer.from_file(str(file))
    by_itself.no_truncation()
    by_itself.no_padding()
    theirs = by_itself.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, theirs, strict=True):
        if encoding.ids != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
            return text
    return None


def _class_of(directory: Path) -> Any:
    """What loads the model: that of causal LMs, or of those that take images beside the text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    known = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    if [type(config) in mapping for mapping in known] == [False, True]:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def empty_model(directory: Path) -> Any:
    """The model of a directory without its weights, for questions about its parts.

    Raises:
        DataError: transformers does not know it, or not without code of its own.
    """
    import torch

    with torch.device("meta"):
        return unweighted_model(directory)


def unweighted_model(directory: Path, *, dtype: "torch.dtype | None" = None) -> Any:
    """The model of a ``config.json``, with weights that nobody has set to anything.

    Args:
        directory: has the ``config.json``.
        dtype: of the weights; float32 unless told otherwise.

    Raises:
        DataError: transformers does not know it, or not without code of its own.
    """
    import torch

    config = load_config(directory)
    with _reading("causal LM", directory):
        return _class_of(directory).from_config(config, dtype=dtype or torch.float32)


def load_model(
    directory: Path,
    *,
    dtype: "torch.dtype | None" = None,
    device_map: Mapping[str, int | str] | None = None,
) -> Any:
    """The causal LM of a model directory, in evaluation mode.

    Args:
        directory: of the model.
        dtype: of the weights; float32 unless told otherwise.
        device_map: device of every part, by its name. Each weight is read straight to its device,
            and what a part is given is moved there. None for the memory of the host.

    Raises:
        DataError: transformers cannot load it, not without code of its own, or weights are missing.
    """
    import torch

    hide_bars()
    with _reading("causal LM", directory):
        loaded: Any = _class_of(directory).from_pretrained(
            directory,
            dtype=dtype or torch.float32,
            device_map=None if device_map is None else dict(device_map),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise DataError(
            f"{directory} must hold all weights of its model, {len(missing)} are missing, first "
            f"{missing[0]}: they would be random; save the model again"
        )
    restore_padding_row(model, directory)
    if attention_borders(model.config).is_dynamic_ntk:
        body_of(model).register_forward_pre_hook(forget_lengths)
    return model.eval()


def hide_bars() -> None:
    """Let transformers draw no progress bars of its own for weights that it reads or writes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def dropped_parts(model: Any, directory: Path) -> str | None:
    """What is said where ``model`` is only the text part of the one in ``directory``."""
    whole = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    if whole == model.config.model_type:
        return None
    return (
        f"{directory} holds a {whole} model, of which transformers loads the text part alone; that "
        f"is what is trained and saved, as a {model.config.model_type} model without the other "
        "parts"
    )
