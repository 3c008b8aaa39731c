"""The parts of a loaded model: its body, which is all but the output head, and its layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
