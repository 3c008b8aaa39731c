"""A Hugging Face model in shards: what is gathered at a time, and what cannot be sharded."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from lrmc_ray.errors import ConfigError
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.sharded_rows import ShardedVocabulary
from lrmc_ray.method.shards import Shard, ShardedModel
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.borders import attention_borders
from lrmc_ray.models.parts import body_of, layers_of


def check_shardable(model: Any) -> None:
    """Refuse a model that cannot be sharded; it may be on the meta device.

    Raises:
        ConfigError: says why.
    """
    embedding, layer = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _refusal(model, f"its embedding is a {type(embedding).__name__}")
    if embedding.max_norm is not None or embedding.sparse:
        raise _refusal(model, "its embedding changes its own weight, or has sparse gradients")
    if getattr(layer, "bias", None) is not None:
        raise _refusal(model, "its output head has a bias")
    if attention_borders(model.config).rope_border is not None:
        raise _refusal(model, "how often its layers run depends on the lengths in a micro-batch")
    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        raise _refusal(model, "there are adapters on its experts (name layers in lora_targets)")
    layers = layers_of(model)
    if not layers:
        raise _refusal(model, "transformers does not say what its layers are")
    weights = {id(embedding.weight), id(layer.weight)}
    inside = {id(parameter) for parameter in body_of(model).parameters()}
    unit_of: dict[int, nn.Module | None] = {}
    for unit in layers:
        for parameter in unit.parameters():
            if unit_of.setdefault(id(parameter), unit) is not unit:
                raise _refusal(model, "some layers share a weight")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise _refusal(model, f"{name} is a single number, which has no rows")
        if id(parameter) not in weights | inside:
            raise _refusal(model, f"{name} is neither in its body nor its head's weight")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in weights and module is not embedding and module is not layer:
                raise _refusal(model, f"a {type(module).__name__} reads the vocabulary's {name}")


class Sharding(NamedTuple):
    """What :func:`shard_model` makes."""

    model: ShardedModel
    head: OutputHead
    """The output head, whose weight has a shape alone."""
    shards: dict[str, Shard]
    """What this worker holds of every parameter, by name; tied ones once."""
    units: list[list[str]]
    """Names of parameters that are gathered at a time, all of them once."""


def shard_model(
    model: Any,
    head: OutputHead,
    group: WorkerGroup,
    device: torch.device,
    *,
    under_autocast: bool = False,
    offload: bool = False,
) -> Sharding:
    """Shard ``model`` in place; all workers call it together, with the same one.

    Args:
        model: a causal LM, what is not trained without ``requires_grad``. On the meta device its
            shards have no values yet.
        head: its output head.
        group: this worker and the others.
        device: where everything is.
        under_autocast: all passes will be under autocast of bf16; then what they multiply is
            gathered in bf16.
        offload: whether shards are in the host's memory.

    Raises:
        ConfigError: it cannot be sharded.
    """
    check_shardable(model)
    layers = layers_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = [[names.pop(id(p)) for p in layer.parameters() if id(p) in names] for layer in layers]
    units += [[name] for name in names.values()]
    vocabulary = ShardedVocabulary(
        model.get_input_embeddings(), head, group, device, offload=offload
    )
    shards, empty = _leave_vocabulary(model, vocabulary, device)
    head = dataclasses.replace(head, weight_VD=model.get_output_embeddings().weight)
    sharded = ShardedModel(
        body_of(model),
        layers,
        vocabulary,
        group,
        device=device,
        ignored=empty,
        short=multiplied(layers) if under_autocast else (),
        offload=offload,
    )
    for name, parameter in model.named_parameters():
        if name not in shards:
            shards[name] = sharded.shard_of(parameter)
    return Sharding(sharded, head, shards, units)


def _leave_vocabulary(
    model: Any, vocabulary: ShardedVocabulary, device: torch.device
) -> tuple[dict[str, Shard], list[nn.Parameter]]:
    """Leave shapes without memory in place of embedding and head.

    Returns:
        What this worker holds of both, by name, and what is in their places.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows_of = {id(embedding.weight): vocabulary.embedding, id(output.weight): vocabulary.output}
    shards: dict[str, Shard] = {}
    empty: dict[int, nn.Parameter] = {}
    for name, weight in model.named_parameters():
        if rows := rows_of.get(id(weight)):
            shards[name] = Shard(rows.own_XD, weight.shape, rows.first)
            # Code of the model may look at its shape, type and device.
            shape_alone = torch.zeros(1, dtype=weight.dtype, device=device).expand(weight.shape)
            empty[id(weight)] = nn.Parameter(shape_alone, requires_grad=False)
    for module in (embedding, output):
        module.weight = empty[id(module.weight)]
    return shards, list(empty.values())


def multiplied(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of layers that autocast rounds to bf16 before it reads them: the most of them.

    And the stacked experts of a mixture, which autocast leaves as they are.
    """
    from transformers.pytorch_utils import Conv1D

    products = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    found: list[nn.Parameter] = []
    for layer in layers:
        for name, module in layer.named_modules():
            own = list(module.parameters(recurse=False))
            is_expert = "expert" in f"{name} {type(module).__name__}".lower()
            if isinstance(module, products) or (is_expert and any(p.ndim == 3 for p in own)):
                found += own
    return found


def _refusal(model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"train.parallel must be 'replicate' for a {model.config.model_type} model, got 'shard': "
        f"{reason}; use adapters (train.lora_rank) if it does not fit one device"
    )
