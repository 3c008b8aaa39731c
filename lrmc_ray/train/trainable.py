"""The model in training, and what of it changes: all weights, some, or adapters."""

import fnmatch
from typing import TYPE_CHECKING, Any

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.train.adapters import Adapters

if TYPE_CHECKING:
    from torch import Tensor, nn


class TrainableModel:
    """A causal LM in training mode, and the parameters of it that change."""

    def __init__(self, model: Any, settings: TrainSettings) -> None:
        """Prepare ``model``, in place.

        Raises:
            ConfigError: a pattern fits no parameter or layer, or nothing is left to train.
        """
        self.adapters: Adapters | None = None
        if settings.lora_rank:
            self.adapters = Adapters(model, settings)
        else:
            _freeze(model, settings.freeze)
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
        """The model to save, adapters merged into its weights; training cannot go on after it.

        Raises:
            TrainingError: the merged model computes something else.
        """
        return self.model if self.adapters is None else self.adapters.merge()


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
