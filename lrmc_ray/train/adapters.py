"""Low-rank adapters (LoRA) on every weight that can have one, by way of PEFT.

By default those are all linear layers but the output head, and the experts of a mixture, which are
stacked in one tensor. Left out is what would be wrong after the merge: a layer whose weight the
model reads itself, past the layer's own forward pass, trains without its adapter and is saved with
it. So a forward pass shows which layers are called.
"""

import collections
import fnmatch
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, TrainingError
from lrmc_ray.models import body_of

_KERNEL_LAYERS = ("x_proj", "dt_proj", "out_proj")
"""Of a Mamba mixer; its kernels on GPUs take their weights, past the layers."""
_SEEN_TOKENS = 32
_TOLERANCE = 1e-3
"""Relative difference of hidden states before and after the merge that is rounding."""


@dataclass(frozen=True)
class _Places:
    """Full names of what can have an adapter, and of what cannot, with the reason."""

    layers: dict[str, int]
    """Linear layers, with the elements of their weights."""
    experts: dict[str, int]
    """Stacked weights of experts, likewise."""
    refused: dict[str, str]


class Adapters:
    """Adapters on a model, in place."""

    def __init__(self, model: Any, settings: TrainSettings) -> None:
        """Put them there; every worker draws the same.

        Raises:
            ConfigError: PEFT is not installed, or cannot do this with the model, or
                ``lora_targets`` fits nothing that can have an adapter.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ConfigError(
                f"train.lora_rank = {settings.lora_rank} needs the package peft, which is not "
                "installed; run `pip install 'lrmc-ray[lora]'`, or set it to 0"
            ) from None
        self._model = model
        total = sum(parameter.numel() for parameter in model.parameters())
        places = _chosen(_places(model), settings.lora_targets, model.config.model_type)
        self.share = sum([*places.layers.values(), *places.experts.values()]) / total
        """Of the model's weights, those that have an adapter."""
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=[f"body.{name}" for name in places.layers],
            target_parameters=[f"body.{name}" for name in places.experts] or None,
        )
        torch.manual_seed(settings.seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # In a shell, since PEFT rewrites the names of layers of some mixtures of experts,
                # and leaves out their dense and shared layers then.
                self._peft: Any = get_peft_model(_Shell(model), config)
        except Exception as error:  # PEFT's own are of any class
            raise ConfigError(
                f"train.lora_rank must be 0 for a {model.config.model_type} model, got "
                f"{settings.lora_rank}: PEFT says {' '.join(str(error).split())[:200]}; train the "
                "weights, or name other layers with train.lora_targets"
            ) from error

    def merge(self) -> Any:
        """The model with the adapters in its weights; training cannot go on after it.

        Raises:
            TrainingError: the merged model computes something else.
        """
        self._model.eval()
        before = _seen(self._model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = self._peft.merge_and_unload().body
        after = _seen(merged)
        difference = float((after - before).norm() / before.norm())
        if not difference <= _TOLERANCE:
            raise TrainingError(
                f"adapters must stay the same when they are merged, the hidden states of the "
                f"{self._model.config.model_type} model differ by {difference:.1e}; the newest "
                "checkpoint is kept; name fewer layers with train.lora_targets"
            )
        return merged


class _Shell(nn.Module):
    """A module without a configuration, around a model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


def _chosen(places: _Places, targets: Iterable[str], model_type: str) -> _Places:
    """The places that fit ``targets``, by the ends of their names; all without any."""
    targets = tuple(targets)
    if not targets:
        if not places.layers and not places.experts:
            raise ConfigError(
                f"train.lora_rank must be 0 for a {model_type} model, none of whose layers can "
                f"have an adapter ({_some_reason(places)}); train the weights"
            )
        return places

    def fitting(names: dict[str, int]) -> dict[str, int]:
        return {name: size for name, size in names.items() if any(_fits(name, t) for t in targets)}

    for target in targets:
        if any(_fits(name, target) for name in [*places.layers, *places.experts]):
            continue
        reason = next((why for n, why in places.refused.items() if _fits(n, target)), None)
        known = sorted({n.rpartition(".")[2] for n in [*places.layers, *places.experts]})
        raise ConfigError(
            f"train.lora_targets must name linear layers or experts, got {target!r}, which "
            f"{reason or 'fits none'}; a {model_type} model has {', '.join(known)}"
        )
    return _Places(fitting(places.layers), fitting(places.experts), places.refused)


def _fits(name: str, target: str) -> bool:
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def _some_reason(places: _Places) -> str:
    return next(iter(places.refused.values()), "there are none")


def _places(model: Any) -> _Places:
    """What of ``model`` can have an adapter."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    called = _called(model)
    shared = _shared_weights(model)
    layers, experts, refused = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            if module is head:
                continue
            mixer = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
            if not _is_product(module):
                refused[name] = f"is a {type(module).__name__}, which computes more than a product"
            elif id(module.weight) in shared:
                refused[name] = "shares its weight with another layer"
            elif "mamba" in mixer and name.endswith(_KERNEL_LAYERS):
                refused[name] = "has a weight that Mamba's kernels read by themselves"
            elif _pattern(name) not in called:
                refused[name] = "is never called: the model reads its weight itself, or not at all"
            else:
                layers[name] = module.weight.numel()
            continue
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3 or not parameter.is_floating_point():
                continue
            place = f"{name}.{own}"
            if id(parameter) in shared:
                refused[place] = "shares its weight with another layer"
            elif _pattern(name) in called:
                experts[place] = parameter.numel()
            else:
                refused[place] = "is in a module that is never called"
    return _Places(layers, experts, refused)


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether a linear layer, of whatever class, computes its product and nothing else."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    input_ND = layer.weight.new_ones(2, layer.weight.shape[1])
    try:
        output: Any = layer(input_ND)
        return torch.allclose(output, F.linear(input_ND, layer.weight, layer.bias), rtol=1e-3)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it takes or gives something else


def _shared_weights(model: Any) -> set[int]:
    """Ids of parameters that several modules have: each would add its own adapter to them."""
    owners = collections.Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    return {parameter for parameter, count in owners.items() if count > 1}


def _called(model: Any) -> set[str]:
    """Patterns of the names of all modules that a forward pass calls.

    Layers of one kind have the same pattern: a token does not meet every expert.
    """
    seen: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        pattern = _pattern(name)
        handles.append(
            module.register_forward_pre_hook(lambda *_, pattern=pattern: seen.add(pattern))
        )
    was_training = model.training
    try:
        _seen(model.eval())
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@torch.no_grad()
def _seen(model: Any) -> Tensor:
    """Hidden states [1, T, D] of a few tokens."""
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(1, 1 + _SEEN_TOKENS, device=device)[None] * 7 % size
    hidden_BTD: Tensor = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD.float()
