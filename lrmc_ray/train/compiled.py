"""Layers that torch compiles: fewer and larger calls, which a small model on a GPU waits for.

Every layer is compiled by itself (``torch.compile``), so what is compiled for one serves all that
are alike. The compiler makes code for the shapes that it sees; so the rows of a micro-batch are
filled up with padding to a multiple of ``LENGTHS`` tokens. The result is the same up to rounding:
the compiler fuses operations, and adds in another order.
"""

from typing import Any

import torch
from torch import nn

from lrmc_ray.errors import ConfigError
from lrmc_ray.method.layout import pad
from lrmc_ray.models.borders import attention_borders
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.parts import body_of
from lrmc_ray.train.routers import routers_of

LENGTHS = 64
"""Rows are as many tokens long, or a multiple."""
BACKEND = "inductor"
"""Of ``torch.compile``. It takes a C++ compiler on a CPU, and Triton on a GPU."""
_TRIED_TOKENS = 24
_TOLERANCE = 1e-3
"""Of hidden states, relative to their norm."""


def compile_layers(model: Any) -> None:
    """Compile the layers of ``model``, and try them on a few tokens.

    Raises:
        ConfigError: they cannot be compiled here, or give other hidden states then.
    """
    if routers_of(model):
        raise _refusal("what its routers choose decides which shapes there are")
    if attention_borders(model.config).side(10**9):
        raise _refusal("its rotary frequencies depend on the length, which padding changes")
    if any(isinstance(m, nn.Embedding) and "pos" in n for n, m in model.named_modules()):
        raise _refusal("it has an embedding of positions, which padding may exceed")
    layers = getattr(body_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _refusal(f"a {model.config.model_type} model does not have its layers in one list")
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(weight.shape[0], (_TRIED_TOKENS,), generator=generator)
    layout = pad([ids_T]).to(weight.device)
    was_training = model.training
    model.eval()  # without dropout
    try:
        with torch.no_grad():
            plain_BTD = batch_hidden_states(model, layout)
            for layer in layers:
                # Random numbers as without the compiler.
                options = {"options": {"fallback_random": True}} if BACKEND == "inductor" else {}
                layer.compile(backend=BACKEND, **options)
            compiled_BTD = batch_hidden_states(model, layout)
    except Exception as error:  # whatever the compiler, or the one that it calls, raises
        # The first line names the backend, the second one what has happened.
        reason = " ".join(str(error).split("\n")[:2])
        raise _refusal(f"torch cannot compile its layers here: {reason}") from error
    finally:
        model.train(was_training)
    difference = float((compiled_BTD - plain_BTD).norm() / plain_BTD.norm())
    if not difference < _TOLERANCE:
        raise _refusal(f"compiled layers give hidden states that differ by {difference:.1g}")


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"train.compile_layers must be false for this model, since {reason}; set it to false"
    )
