"""Settings that a model cannot fulfil, found before anything is recorded."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil

from lrmc_ray.config import (
    ModelSettings,
    ResourceSettings,
    RunSettings,
    TrainSettings,
    trial_settings,
)
from lrmc_ray.errors import ConfigError
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.loading import empty_model, load_model

_log = logging.getLogger(__name__)

_SEARCHED = ("gradient_checkpointing", "router_loss", "lora_rank", "lora_targets", "parallel")
"""Settings of ``train`` that some models cannot fulfil."""
_MEMORY_SHARE = 0.6
"""Of the free memory, what the weights of a model that is tried out may take."""


def check_settings(settings: RunSettings) -> None:
    """Look at the settings of a run, or of every trial of a search; see :func:`check_training`."""
    trials = [settings.train]
    for name in _SEARCHED:
        if (searched := settings.parameters.get(name)) is not None:
            values = searched.choices or (searched.low, searched.high)
            trials += [
                trial_settings(settings.train, {name: value})
                for value in values
                if value is not None
            ]
    offload = settings.parameters.get("offload")
    _check_offload(settings.resources, (offload and offload.choices) or ())
    check_training(settings.model, trials, settings.resources)


def check_training(
    model: ModelSettings, trials: Collection[TrainSettings], resources: ResourceSettings
) -> None:
    """Refuse adapters, recomputation, a router loss, shards or offload that cannot be.

    Adapters and the ways are tried on a few tokens with the model's own weights, since some models
    only show there what they do not stand. A model that does not fit into the free memory is tried
    when training starts.

    Args:
        model: the base model.
        trials: the settings with which it will be trained.
        resources: of a worker.

    Raises:
        ConfigError: a setting asks for what the model or a worker cannot have.
        DataError: transformers cannot make the model.
    """
    _check_offload(resources, [train.offload for train in trials])
    asked = list({_asked(train): train for train in trials if _asks(train)}.values())
    if not asked:
        return
    # They need torch, and these settings are rare.
    from lrmc_ray.train.recompute import Recomputation
    from lrmc_ray.train.routers import Routers
    from lrmc_ray.train.sharding import check_shardable

    directory = local_directory(model)
    empty = empty_model(directory)
    for train in asked:
        Recomputation(empty, train.gradient_checkpointing)
        Routers(empty, train.router_loss)
        if train.parallel == "shard":
            check_shardable(empty)
    tried = [train for train in asked if train.lora_rank or _names_a_way(train)]
    if tried and not _fits_in_memory(empty):
        _log.info(
            "%s is too large to be tried with the free memory here; training does it", model.name
        )
        return
    for train in tried:
        _try_out(directory, train)


def _check_offload(resources: ResourceSettings, asked: Collection[object]) -> None:
    if "cpu" in asked and not resources.gpus_per_worker:
        raise ConfigError(
            "train.offload must be 'none' where workers have no GPU, got 'cpu': all is in the "
            "host's memory there; leave it out, or set resources.gpus_per_worker to 1"
        )


def _asks(train: TrainSettings) -> bool:
    is_sharded = train.parallel == "shard"
    return bool(train.lora_rank or train.router_loss or is_sharded or _names_a_way(train))


def _names_a_way(train: TrainSettings) -> bool:
    return train.gradient_checkpointing not in ("auto", False)


def _asked(train: TrainSettings) -> tuple[Any, ...]:
    """What two trials must have in common for one look at both."""
    return (
        train.gradient_checkpointing,
        train.router_loss > 0,
        train.lora_targets if train.lora_rank else None,
        train.parallel,
    )


def _fits_in_memory(empty: Any) -> bool:
    size = sum(4 * parameter.numel() for parameter in empty.parameters())
    return bool(size <= _MEMORY_SHARE * psutil.virtual_memory().available)


def _try_out(directory: Path, train: TrainSettings) -> None:
    """Load the model as training does, and run a few tokens through it."""
    from lrmc_ray.train.recompute import Recomputation
    from lrmc_ray.train.sharding import check_shardable
    from lrmc_ray.train.trainable import TrainableModel

    trainable = TrainableModel(load_model(directory), train)
    if _names_a_way(train):
        Recomputation(trainable.model, train.gradient_checkpointing).try_out()
    if trainable.adapters is not None:
        trainable.adapters.try_out()
    if train.parallel == "shard":
        check_shardable(trainable.model)
