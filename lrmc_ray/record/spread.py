"""Which device holds which part of a model that no single one holds.

Whole layers, in their order: the first ones and the embedding on the first device, the last ones
and the output head on the last. A head that is the embedding's own weight is there once, on the
first device. What flows from one device to the next is a hidden state for each token; hooks of
accelerate move it, and the weights are read straight to their devices.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lrmc_ray.errors import ConfigError
from lrmc_ray.models.loading import empty_model
from lrmc_ray.models.parts import layers_of

Device = int | str

LOGITS_ELEMENTS = 2**24
"""Logits that exist at a time while candidates are selected: 64 MiB in float32."""

SELECTION = 1.5
"""What a selection takes, in logits' bytes: 1.1 was measured on a CPU; a GPU makes float64 of a
quarter of them."""


class Spread(NamedTuple):
    """A model over several devices."""

    device_map: dict[str, Device]
    """Device of every part of the model, by the part's name."""
    loads: list[int]
    """Bytes of weights and of the selection on each device."""


def spread(
    directory: Path, devices: Sequence[Device], precision: Literal["fp32", "bf16"]
) -> Spread:
    """Divide the model of ``directory``; of its files ``config.json`` alone is read.

    Args:
        directory: of the model.
        devices: one name for each.
        precision: of the weights.

    Raises:
        ConfigError: it has fewer layers than there are devices, or none that can be told.
        DataError: transformers does not know the model.
    """
    return spread_model(empty_model(directory), devices, precision)


def spread_model(
    model: Any, devices: Sequence[Device], precision: Literal["fp32", "bf16"]
) -> Spread:
    """Divide a model, which may be on the meta device; see :func:`spread`."""
    itemsize = 2 if precision == "bf16" else 4
    head = model.get_output_embeddings()
    selection = round(4 * LOGITS_ELEMENTS * SELECTION)
    selection += 4 * head.weight.numel() * (precision == "bf16")  # the head in float32
    if len(devices) == 1:
        weights = itemsize * sum(parameter.numel() for parameter in model.parameters())
        return Spread({"": devices[0]}, [weights + selection])
    layers = layers_of(model)
    if not layers:
        raise _refusal(model, devices, "transformers does not say what its layers are", 1)
    if len(devices) > len(layers):
        raise _refusal(model, devices, f"it has {len(layers)} layers", len(layers))
    place_of_layer = {id(layer): place for place, layer in enumerate(layers)}
    first, last, of_layers = 0, 0, [0] * len(layers)
    ends: dict[str, bool] = {}  # whether a part that is no layer is on the last device
    layer_of: dict[str, int] = {}
    owner: dict[int, str] = {}
    for name, part in _parts(model, place_of_layer):
        parameters = list(part.parameters()) if hasattr(part, "parameters") else [part]
        shared = {owner[id(p)] for p in parameters if id(p) in owner}
        new = itemsize * sum(p.numel() for p in parameters if id(p) not in owner)
        owner.update({id(p): name for p in parameters if id(p) not in owner})
        if id(part) in place_of_layer:
            if shared:
                raise _refusal(model, devices, "some layers share a weight", 1)
            layer_of[name] = place_of_layer[id(part)]
            of_layers[layer_of[name]] += new
        elif shared & layer_of.keys():
            raise _refusal(model, devices, f"{name} shares a weight with a layer", 1)
        else:
            ends[name] = ends[min(shared)] if shared else bool(layer_of and parameters)
            first, last = first + new * (not ends[name]), last + new * ends[name]
    is_head_last = ends[owner[id(head.weight)]]
    first, last = first + selection * (not is_head_last), last + selection * is_head_last
    places = divide(of_layers, first, last, len(devices))
    loads = [first, *[0] * (len(devices) - 2), last]
    for place, size in zip(places, of_layers, strict=True):
        loads[place] += size
    device_map = {name: devices[-1 if is_last else 0] for name, is_last in ends.items()}
    device_map |= {name: devices[places[layer]] for name, layer in layer_of.items()}
    return Spread(device_map, loads)


def divide(layers: Sequence[int], first: int, last: int, devices: int) -> list[int]:
    """Device of each layer, such that the fullest device holds as little as it can.

    Activations come on top of every device alike, so that they change nothing.

    Args:
        layers: bytes of each layer, in their order; at least as many as devices.
        first: bytes beside the layers on the first device.
        last: likewise on the last one.
        devices: how many there are.
    """
    sums = [0, *accumulate(layers)]
    # Of the first i layers on the devices so far: the fullest one's bytes, and where each begins.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * len(layers)]
    for device in range(devices):
        extra = first * (device == 0) + last * (device == devices - 1)
        longer: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for i in range(1, len(layers) + 1):
            ways = ((max(best[j][0], extra + sums[i] - sums[j]), best[j][1], j) for j in range(i))
            fullest, starts, start = min(ways)
            longer.append((fullest, (*starts, start)))
        best = longer
    starts = best[-1][1]
    return [sum(start <= layer for start in starts) - 1 for layer in range(len(layers))]


def _parts(model: Any, layers: Mapping[int, int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and module of every layer and of all that is beside them, each as a whole."""
    own = chain(model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    yield from ((prefix + name, tensor) for name, tensor in own)
    for name, child in model.named_children():
        if id(child) not in layers and any(id(part) in layers for part in child.modules()):
            yield from _parts(child, layers, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _refusal(model: Any, devices: Sequence[Device], reason: str, most: int) -> ConfigError:
    return ConfigError(
        f"resources.gpus_per_actor must be at most {most} for a {model.config.model_type} model, "
        f"got {len(devices)}: {reason}; lower it"
    )
