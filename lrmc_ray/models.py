"""Load, identify and save Hugging Face causal language models.

A model is always a local directory here: an id on the Hub is downloaded first, and the demo's
model is made from what is installed. Code from a model's repository is never run
(``trust_remote_code`` stays off), and weights come from safetensors.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.chat.template import PLAIN_FORMAT
from lrmc_ray.config import DEMO, GEMMA, ModelSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import (
    cache_directory,
    content_digest,
    fingerprint,
)
from lrmc_ray.files.hub_calls import limit_hub_calls
from lrmc_ray.files.place import Place
from lrmc_ray.model_borders import attention_borders, longest_packed, text_config
from lrmc_ray.model_checks import check_causal, differs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lrmc_ray.method.head import OutputHead
    from lrmc_ray.method.layout import Layout
    from lrmc_ray.method.microbatch import MicroBatch


def send_model(place: Place, directory: Path) -> str:
    """Bring a base model to where all nodes see it; returns what ``place.here`` takes there.

    Its name says what it is, so that a model is kept once, whoever sends it.
    """

    def name() -> str:
        identity = fingerprint([model_fingerprint(directory), tokenizer_fingerprint(directory)])
        return f"models/{identity}"

    return place.send(directory, name)


WEIGHT_SUFFIX = ".safetensors"


_OF_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""How names on the Hub look."""

_TOKENIZERS = ["tokenizer.json", "tokenizer.model", "vocab.json"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Of a model that takes images: kept beside the tokenizer, and not used here."""


def _first_line(error: Exception) -> str:
    """The first line of an error's message; its class where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
            f"({_first_line(error)}); check the name, log in with `hf auth login`, or give a "
            "directory"
        ) from None


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


def _chat_template(directory: Path) -> Any:
    """The chat template, wherever the tokenizer keeps it; None without.

    Raises:
        DataError: the file that holds it is not readable.
    """
    template: Any = None
    try:
        if (file := directory / "chat_template.jinja").is_file():
            template = file.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if template is None and (file := directory / name).is_file():
                template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is not readable ({error}); save the tokenizer again") from None
    return template


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of a model directory says how a conversation is written."""
    return bool(_chat_template(directory))


def template_fingerprint(directory: Path, options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of the chat template, wherever the tokenizer keeps it, and of what it is given.

    Without a template it is that of the plain format that stands in for one.

    Raises:
        DataError: the file that holds it is not readable.
    """
    rendered = _chat_template(directory) or PLAIN_FORMAT
    if options:
        rendered = [rendered, dict(options)]
    return hashlib.sha256(json.dumps(rendered, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _reading(what: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise classes of their own
        raise DataError(
            f"{directory} must hold a {what} that transformers knows, without code of its own: "
            f"{_first_line(error)}; choose another model, or save this one again"
        ) from error


def load_config(directory: Path) -> Any:
    """The configuration of a model directory.

    Raises:
        DataError: transformers does not know it, or not without code of its own.
    """
    from transformers import AutoConfig

    with _reading("configuration", directory):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


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
    _restore_padding_row(model, directory)
    if attention_borders(model.config).is_dynamic_ntk:
        body_of(model).register_forward_pre_hook(forget_lengths)
    return model.eval()


def _restore_padding_row(model: Any, directory: Path) -> None:
    """Give the padding token the embedding that it was saved with.

    Some classes of transformers set it to zero whenever they are loaded (Youtu). Where the output
    head is the same weight, training has changed it.
    """
    import torch
    from safetensors import safe_open

    embeddings = model.get_input_embeddings()
    row = getattr(embeddings, "padding_idx", None)
    if row is None or bool(embeddings.weight[row].any()):
        return
    name = next((n for n, p in model.named_parameters() if p is embeddings.weight), "")
    for path in sorted(directory.glob(f"*{WEIGHT_SUFFIX}")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # it is no dictionary
                with torch.no_grad():
                    embeddings.weight[row] = file.get_slice(name)[row].to(embeddings.weight)


def forget_lengths(body: Any, _arguments: Any = None) -> None:
    """Make dynamic NTK scaling forget the longest sequence that ``body`` has seen.

    Its rotary frequencies would stay those of that sequence, for shorter ones as well.
    """
    ending = "max_seq_len_cached"
    for module in body.modules():
        for name in [name for name in vars(module) if name.endswith(ending)]:
            kind = name.removesuffix(ending)  # one for each kind of layer, or the empty one
            original = getattr(module, f"{kind}original_inv_freq", None)
            if original is not None and int(getattr(module, name)) > module.original_max_seq_len:
                current = getattr(module, f"{kind}inv_freq")
                setattr(module, f"{kind}inv_freq", original.to(current.device))
                setattr(module, name, module.original_max_seq_len)


_SOFT_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
"""Names under which configurations say the bound on the logits."""


def described_head(model: Any) -> "OutputHead":
    """The output head of a model as its configuration has it; :func:`head_of` checks that.

    Raises:
        DataError: the model has none.
    """
    from lrmc_ray.method.head import OutputHead

    config = text_config(model.config)
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise DataError(f"{_described(model)} has no output head; a causal LM is needed")
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    caps = [value for cap in _SOFT_CAPS if (value := getattr(config, cap, None)) is not None]
    return OutputHead(
        weight_VD=layer.weight,
        bias_V=getattr(layer, "bias", None),
        logit_scale=scale,
        softcap=float(caps[0]) if caps else None,
    )


def _described(model: Any) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def head_of(model: Any) -> "OutputHead":
    """The output head of a causal model, checked against the model's own logits.

    Raises:
        DataError: the model is not causal, or hidden states times head do not give its logits, so
            neither the recorded sets nor the sparse loss would be right.
    """
    import torch

    from lrmc_ray.method.head import head_logits

    name, head = _described(model), described_head(model)
    check_causal(model)
    ids_BT = torch.arange(1, 9, device=head.weight_VD.device)[None] % head.vocabulary_size
    was_training = model.training
    model.eval()  # dropout would make two forward passes differ
    try:
        with torch.no_grad():
            expected_TV = model(input_ids=ids_BT, use_cache=False).logits[0]
            hidden_TD = hidden_states(model, ids_BT)[0].to(head.weight_VD.device)
            actual_TV = head_logits(hidden_TD, head)
        difference = differs(model, expected_TV, actual_TV)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the body of {name} does not give hidden states for its head: {_first_line(error)}; "
            "choose another model"
        ) from error
    finally:
        model.train(was_training)
    if difference is not None:
        raise DataError(
            f"the head of {name} is not supported: logits made from its hidden states differ from "
            f"its own by {difference:.2g} of their spread; choose another model"
        )
    return head


def body_of(model: Any) -> Any:
    """The part of a causal LM that gives the hidden states, without its output head.

    Some classes are not named in their own checkpoints, and are their own ``base_model`` then
    (the text model of Llama 4).
    """
    body = model.base_model
    return getattr(model, "model", model) if body is model else body


def layers_of(model: Any) -> "list[torch.nn.Module]":
    """The layers of the body, which transformers may compute again one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = []
    within: set[int] = set()
    for module in body_of(model).modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in within:
            found.append(module)
            within |= {id(part) for part in module.modules()}
    return found


def hidden_states(model: Any, input_ids_BT: "Tensor") -> "Tensor":
    """Final hidden states [B, T, D], the input of the output head.

    Sequences are padded on the right: in a causal model nothing before the padding sees it, so no
    mask is needed.
    """
    with one_sequence_a_row():
        output = body_of(model)(input_ids=input_ids_BT, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Spare transformers the look at positions for sequences packed in a row: a GPU waits for it.

    Without a mask every row is one sequence here, of which that look finds nothing.
    """
    _let_the_look_be_spared()
    before = _is_one_a_row.set(True)
    try:
        yield
    finally:
        _is_one_a_row.reset(before)


_is_one_a_row: ContextVar[bool] = ContextVar("is_one_a_row", default=False)


@functools.cache
def _let_the_look_be_spared() -> None:
    """Once in a process, and for threads apart; nothing where transformers has no such look."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    look = getattr(masking_utils, name, None)
    if look is not None:
        setattr(masking_utils, name, lambda *x, **y: None if _is_one_a_row.get() else look(*x, **y))


def _padded_hidden_states(
    model: Any, input_ids_BT: "Tensor", full_lengths: Sequence[int]
) -> "Tensor":
    """Hidden states [B, T, D] of padded rows, those of every row as if it were alone and whole.

    Where rotary frequencies depend on the length, rows of one side of the border run together, as
    wide as they are before trimming: what stands in the padding is never seen.
    """
    import torch
    import torch.nn.functional as F

    borders = attention_borders(model.config)
    sides: dict[int, list[int]] = {}
    for row, length in enumerate(full_lengths):
        sides.setdefault(borders.side(length), []).append(row)
    if not any(sides):
        return hidden_states(model, input_ids_BT)
    width = input_ids_BT.shape[1]
    parts = []
    for rows in sides.values():
        longest = max(full_lengths[row] for row in rows)
        ids_BT = F.pad(input_ids_BT[rows][:, :longest], (0, max(0, longest - width)))
        part_BTD = hidden_states(model, ids_BT)[:, :width]
        parts.append(F.pad(part_BTD, (0, 0, 0, width - part_BTD.shape[1])))
    order = torch.tensor([row for rows in sides.values() for row in rows]).argsort()
    rows_BTD = torch.cat(parts)
    return rows_BTD[order.to(rows_BTD.device)]


def added_mask(model: Any, is_visible_QT: "Tensor") -> "Tensor":
    """What is added to the scores of attention, [1, 1, Q, T]: every implementation takes it.

    On a CPU, torch's own implementation leaves out pairs that are hidden by it.
    """
    import torch

    from lrmc_ray.method.fast.attention_blocks import divide

    _let_attention_be_divided()
    dtype = model.dtype
    if torch.is_autocast_enabled(is_visible_QT.device.type):
        dtype = torch.get_autocast_dtype(is_visible_QT.device.type)
    mask_QT = torch.zeros(is_visible_QT.shape, dtype=dtype, device=is_visible_QT.device)
    mask_11QT = mask_QT.masked_fill_(~is_visible_QT, torch.finfo(dtype).min)[None, None]
    divide(mask_11QT, is_visible_QT)
    return mask_11QT


@functools.cache
def _let_attention_be_divided() -> None:
    """Once in a process: attention with a mask that has blocks goes block by block."""
    import torch
    from transformers import AttentionInterface

    from lrmc_ray.method.fast.attention_blocks import attend_in_blocks, divided

    whole = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

    def attention(
        module: Any,
        query: "Tensor",
        key: "Tensor",
        value: "Tensor",
        attention_mask: "Tensor | None",
        **options: Any,
    ) -> Any:
        is_plain = options.get("position_bias") is None and options.get("cache") is None
        blocks = None
        if attention_mask is not None and is_plain and not torch.compiler.is_compiling():
            blocks = divided(attention_mask)
        if blocks is None or (query.shape[2], key.shape[2]) != blocks.shape:
            return whole(module, query, key, value, attention_mask, **options)

        def attend(*one: "Tensor") -> "Tensor":
            found: Tensor = whole(module, *one, **options)[0]
            return found

        return attend_in_blocks(attend, query, key, value, blocks), None

    AttentionInterface.register("sdpa", attention)


def batch_hidden_states(model: Any, batch: "MicroBatch | Layout") -> "Tensor":
    """Final hidden states [B, T, D] of a batch, padded or packed."""
    if batch.is_visible_TT is None:
        return _padded_hidden_states(model, batch.input_ids_BT, batch.full_lengths)
    output = body_of(model)(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        attention_mask=added_mask(model, batch.is_visible_TT),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


_TRIED_TOKENS = 64
_FEWEST_TOKENS = 4
"""Of a sequence with which packing is tried, and below which it is never worth it."""
_ROUNDED = 0.1
"""What bf16 moves hidden states by at most, as a share of their length; another neighbour moves
them by more."""


def attention_cost(model: Any) -> float:
    """What it costs a token to see one more, in units of its matrix products with the weights.

    Infinity where sequences cannot be packed: the model does not take a mask and positions of our
    own. Those longer than :func:`lrmc_ray.model_borders.longest_packed` cannot be packed either.
    """
    import torch

    from lrmc_ray.method.fast.packing import pack
    from lrmc_ray.method.layout import pad

    if not may_be_packed(model):
        return float("inf")
    config = model.config.get_text_config()
    length = int(min(longest_packed(config), _TRIED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (2 * length,), generator=generator)
    # Two sequences with a common beginning, of unequal lengths.
    common = length // 2
    other_T = torch.cat([ids_T[:common], ids_T[length : 2 * length - common - 1]])
    sequences = [ids_T[:length], other_T]
    was_training = model.training
    model.eval()
    found = []
    try:
        for layout in (pad(sequences), pack(sequences)):
            with torch.no_grad():
                hidden_BTD = batch_hidden_states(model, layout.to(model.device)).float()
            found.append(
                torch.cat(
                    [
                        hidden_BTD[row, columns_T]
                        for row, columns_T in zip(layout.rows, layout.columns, strict=True)
                    ]
                )
            )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return float("inf")  # it does not take such arguments
    finally:
        model.train(was_training)
    if not _are_alike(*found, is_rounded=model.dtype.itemsize < 4):
        return float("inf")
    return price_of_attention(model)


def _are_alike(padded_ND: "Tensor", packed_ND: "Tensor", *, is_rounded: bool) -> bool:
    """Whether hidden states differ by no more than rounding does, at every position.

    Args:
        padded_ND: of each sequence alone.
        packed_ND: of both in one row.
        is_rounded: whether the model computes in a shorter format than float32. Then the lengths of
            differences are compared, not single numbers.
    """
    import torch

    if is_rounded:
        difference_N = (padded_ND - packed_ND).norm(dim=-1)
        return bool((difference_N <= _ROUNDED * padded_ND.norm(dim=-1)).all())
    scale = float(padded_ND.abs().max())
    return torch.allclose(padded_ND, packed_ND, atol=1e-3 * scale, rtol=1e-3)


def price_of_attention(model: Any) -> float:
    """The number that :func:`attention_cost` gives where sequences can be packed."""
    config = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return float(2 * config.num_hidden_layers * config.hidden_size / weights)


_WITH_STATE = ("conv", "linear_attention")
"""Layers of models that transformers does not call stateful as a whole, whose state is no cache of
keys and values."""
_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)
"""Functions of transformers that make windows and chunks, and pass on a mask that is given."""


def may_be_packed(model: Any) -> bool:
    """Whether sequences may be packed, by the model's structure; :func:`attention_cost` tries it.

    It needs no weights. State-space models and others with a state that goes from token to token
    cannot be packed: a token would take it over from its neighbour in the row. Nor can those that
    count positions by themselves, as BLOOM and MPT do: no part of them is told any.
    """
    config = model.config.get_text_config()
    length = min(longest_packed(config), _TRIED_TOKENS)
    layers = getattr(config, "layer_types", None) or ()
    has_state = model._is_stateful or any(kind in _WITH_STATE for kind in layers)
    if length < _FEWEST_TOKENS or has_state or _has_windows_of_its_own(model):
        return False
    forwards = (type(module).forward for module in body_of(model).modules())
    return any("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def _has_windows_of_its_own(model: Any) -> bool:
    """Whether the model's code cuts windows by places in the row, whatever mask it is given."""
    borders = attention_borders(model.config)
    kinds = type(body_of(model)).__mro__  # the first is torch's own where the model is in shards
    code = sys.modules[next(k.__module__ for k in kinds if not k.__module__.startswith("torch."))]
    return bool(borders.windows or borders.chunks) and not any(hasattr(code, n) for n in _MASKS)


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


def hide_bars() -> None:
    """Let transformers draw no progress bars of its own for weights that it reads or writes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


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
