"""Which activations of a layer wait in memory for the backward pass, and which are computed again.

The backward pass needs most of what the forward pass has computed, and at some thousand tokens
that is most of the memory. Both ways give up a part of it and end in the same bits:

- ``selective`` keeps what is expensive, the results of matrix products and of attention, and
  computes the rest again: norms, rotary embeddings, activation functions, sums and products of
  single elements. They are hardly any work, and half of what is kept otherwise.
- ``full`` keeps the input of every layer alone, and computes each layer a second time.
- ``auto`` is ``selective`` for micro-batches of ``MANY_TOKENS`` and more, where transformers can do
  it. Below that activations are small beside weights, gradients and the optimizer's state, and to
  compute them again costs more than to keep them.

Random numbers, those of dropout, are drawn again as they were. Both are PyTorch's own
(``torch.utils.checkpoint``); only the choice of operators is ours. A model that is not in training
mode, or computes no gradient, is as it was.
"""

import functools
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext


import fnmatch
from typing import TYPE_CHECKING

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn


_EXPENSIVE = re.compile(r"\w+\.\w*(mm|linear|conv|attention|attn)")
"""Products of matrices, under whatever name a device has for them: ``aten.addmm.default``,
``aten._scaled_dot_product_flash_attention.default``, ``flash_attn._flash_attn_forward.default``."""


MANY_TOKENS = 2048
"""Of a micro-batch, from which ``auto`` computes activations again."""


def recompute_activations(model: Any, which: Literal["auto", "selective", "full"]) -> None:
    """Have every layer of a transformers model compute activations again, from now on.

    Raises:
        ValueError: transformers cannot do this with the model; not for ``auto``.
    """
    if which == "auto" and not model.supports_gradient_checkpointing:
        return
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    options: dict[str, Any] = {"use_reentrant": False}
    if which != "full":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    with warnings.catch_warnings():
        # Transformers 5 has a new name for it as well, which its earlier versions lack.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if which == "auto":
        layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

        def choose(_module: Any, _args: Any, arguments: dict[str, Any]) -> None:
            for layer in layers:
                layer.gradient_checkpointing = arguments["input_ids"].numel() >= MANY_TOKENS

        model.base_model.register_forward_pre_hook(choose, with_kwargs=True)


def _policy(
    _context: "SelectiveCheckpointContext", operator: "OpOverload", *_: Any, **__: Any
) -> "CheckpointPolicy":
    from torch.utils.checkpoint import CheckpointPolicy

    return (
        CheckpointPolicy.MUST_SAVE if _is_expensive(operator) else CheckpointPolicy.PREFER_RECOMPUTE
    )


@functools.cache
def _is_expensive(operator: "OpOverload") -> bool:
    return _EXPENSIVE.match(str(operator)) is not None


class TrainableModel:
    """A causal LM in training mode, and the parameters of it that change."""

    def __init__(self, model: Any, settings: TrainSettings) -> None:
        """Prepare ``model``, in place.

        Raises:
            ConfigError: a pattern fits no parameter or layer, or nothing is left to train.
        """
        self._peft: Any = None
        if settings.lora_rank:
            self._peft = _with_adapters(model, settings)
            model = self._peft.get_base_model()
        else:
            _freeze(model, settings.freeze)
        if settings.gradient_checkpointing:
            recompute_activations(model, settings.gradient_checkpointing)
        self.model = model.train()
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        """What is trained, by name; tied ones once."""
        if not self.parameters:
            raise ConfigError(
                f"train.freeze must leave something to train, got {list(settings.freeze)}, which "
                "fits every parameter"
            )

    def state(self) -> "dict[str, Tensor]":
        """The trained parameters, not copied."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, state: "dict[str, Tensor]") -> None:
        """Set the trained parameters.

        Raises:
            DataError: ``state`` is that of other parameters.
        """
        import torch

        if {k: v.shape for k, v in state.items()} != {
            k: v.shape for k, v in self.parameters.items()
        }:
            raise DataError("the checkpoint holds other parameters than those that are trained")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def merged(self) -> Any:
        """The model to save, adapters merged into its weights; training cannot go on after it."""
        return self.model if self._peft is None else self._peft.merge_and_unload()


def _freeze(model: Any, patterns: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"train.freeze must fit names of parameters, {pattern!r} fits none of "
                f"{len(names)}; they are like {names[0]} and {names[len(names) // 2]}"
            )
    for name, parameter in model.named_parameters():
        is_frozen = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(not is_frozen)


def _with_adapters(model: Any, settings: TrainSettings) -> Any:
    import torch

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            f"train.lora_rank = {settings.lora_rank} needs the package peft, which is not "
            "installed; run `pip install 'lrmc-ray[lora]'`, or set it to 0"
        ) from None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_targets) or "all-linear",
    )
    torch.manual_seed(settings.seed)  # every worker draws the same adapters
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"train.lora_targets must name linear layers, got {list(settings.lora_targets)}: "
            f"{str(error).splitlines()[0]}"
        ) from None
