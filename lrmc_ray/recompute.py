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
