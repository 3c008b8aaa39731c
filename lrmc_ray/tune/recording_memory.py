"""The memory that recording takes, and over how many GPUs of a size, from ``config.json`` alone.

    fullest GPU = its weights, its share of the vocabulary and of the selection + activations

Weights are divided as the actor divides them (:mod:`lrmc_ray.record.spread`). Activations are the
most that is alive in one forward pass of a batch, on tensors that have a shape and no memory. They
are counted whole on every GPU, since each runs whole layers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lrmc_ray.errors import ConfigError
from lrmc_ray.models.loading import empty_model, unweighted_model
from lrmc_ray.models.parts import body_of, layers_of
from lrmc_ray.record.candidates import BATCH_TOKENS
from lrmc_ray.record.spread import spread_model
from lrmc_ray.train.live_bytes import counting, without_values


def recording_memory(
    directory: Path,
    precision: Literal["fp32", "bf16"],
    *,
    length: int,
    cards_gb: Sequence[float],
    usable: float,
) -> dict[str, Any]:
    """Bytes of one GPU that holds all, and how many of each size it takes; None: none do.

    Args:
        directory: has the ``config.json`` of the model.
        precision: ``record.precision``.
        length: tokens of the longest samples.
        cards_gb: sizes of GPUs, in gigabytes.
        usable: share of a GPU's memory that may be used.

    Raises:
        DataError: transformers does not know the model, or its pass needs the values of tensors.
    """
    activations = activation_bytes(directory, precision, length)
    model = empty_model(directory)
    numbers = range(1, max(1, len(layers_of(model))) + 1)
    fullest: list[int] = []

    def loads() -> Iterator[int]:
        yield from fullest
        with contextlib.suppress(ConfigError):  # it cannot be divided
            for number in numbers[len(fullest) :]:
                fullest.append(max(spread_model(model, range(number), precision).loads))
                yield fullest[-1]

    devices = {}
    for card in cards_gb:
        room = usable * card * 1e9 - activations
        fitting = (number for number, load in enumerate(loads(), 1) if load <= room)
        devices[str(card)] = next(fitting, None)
    return {
        "precision": precision,
        "weights_and_selection": fullest[0],
        "activations": activations,
        "total": fullest[0] + activations,
        "devices": devices,
    }


def activation_bytes(directory: Path, precision: Literal["fp32", "bf16"], length: int) -> int:
    """The most that is alive over the weights in one forward pass of a batch.

    Args:
        directory: has the ``config.json`` of the model.
        precision: of the weights.
        length: tokens of the longest samples.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = max(1, BATCH_TOKENS // length)
    with counting() as live, torch.no_grad():
        model = unweighted_model(directory, dtype=dtype).eval()
        live.begin()
        before = live.now
        ids_BT = torch.ones(rows, length, dtype=torch.long)
        instead = "record some samples and look"
        with without_values(model, whose="forward pass needs", instead=instead):
            body_of(model)(input_ids=ids_BT, use_cache=False)
        return live.most - before
