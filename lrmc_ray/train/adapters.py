"""Low-rank adapters (LoRA) on every weight that can have one, by way of PEFT.

By default those are all linear layers but the output head, and the experts of a mixture, which are
stacked in one tensor. Left out is what would be wrong after the merge: a layer whose weight the
model reads itself, past the layer's own forward pass, trains without its adapter and is saved with
it. So a forward pass in training and one out of it show which layers are called.
"""

import collections
import contextlib
import copy
import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, TrainingError
from lrmc_ray.models.forward import one_sequence_a_row
from lrmc_ray.models.parts import body_of

_KERNEL_LAYERS = ("x_proj", "dt_proj", "out_proj")
"""Of a Mamba mixer; its kernels on GPUs take their weights, past the layers."""
_BODY = "body"
"""Of the shell that PEFT sees, the model."""
_SEEN_TOKENS = 32
_TOLERANCE = 1e-3
"""Relative difference of hidden states before and after the merge that is rounding."""
_ROUNDING = 1e-5
"""What repeated forward passes may differ by."""
_TRIED_DEVIATION = 0.05
"""Of the numbers with which adapters are tried out: they move the weights by some tenths."""


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

        On a model on the meta device they have values, and its weights have none.

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
            target_modules=[f"{_BODY}.{name}" for name in places.layers],
            target_parameters=[f"{_BODY}.{name}" for name in places.experts] or None,
        )
        torch.manual_seed(settings.seed)
        # PEFT moves what it has drawn to where the weights are, and values are lost on meta.
        stay: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if next(model.parameters()).is_meta:
            stay = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
        try:
            with warnings.catch_warnings(), stay:
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

        The weights are float32 in training, so nothing of a small update is lost.

        Raises:
            TrainingError: the merged model computes something else.
        """
        merged, difference = self._merged()
        if not difference <= _TOLERANCE:
            raise TrainingError(
                f"adapters must stay the same when they are merged, the hidden states of the "
                f"{self._model.config.model_type} model differ by {difference:.1e}; the newest "
                "checkpoint is kept; name fewer layers with train.lora_targets"
            )
        return merged

    def try_out(self) -> None:
        """Draw adapters that are not zero and merge them; the model is of no use after it.

        Raises:
            ConfigError: they change nothing, no gradient reaches them, or the merged model computes
                something else.
        """
        self._model.eval()
        base = _seen(self._model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self._peft.named_parameters():
                if "lora_B" in name:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(_TRIED_DEVIATION * drawn)
        change = float((_seen(self._model) - base).norm() / base.norm())
        # What only chooses, as the scores of an indexer do, changes the output and has no gradient.
        learns = self._gradient_norm(generator) > 0.0
        _, difference = self._merged()
        # An adapter on one layer of many changes little; its merge must be right all the same.
        is_right = difference <= min(_TOLERANCE, _ROUNDING + 0.1 * change)
        if is_right and change > _ROUNDING and learns:
            return
        reason = f"their merge changes hidden states by {difference:.1e}"
        if change <= _ROUNDING:
            reason = f"they change hidden states by {change:.1e} alone"
        elif not learns:
            reason = "no gradient reaches them"
        raise ConfigError(
            f"train.lora_rank must be 0 for a {self._model.config.model_type} model with adapters "
            f"on these layers, got {self._peft.peft_config['default'].r}: {reason}; train the "
            "weights, or name other layers with train.lora_targets"
        )

    def _gradient_norm(self, generator: torch.Generator) -> float:
        """Of some projection of the hidden states, in training."""
        with torch.random.fork_rng():  # dropout draws
            seen_1TD = _hidden(self._model.train())
        if not seen_1TD.requires_grad:
            return 0.0
        trained = [p for p in self._peft.parameters() if p.requires_grad]
        # Not the sum of squares, which a norm at the end keeps as it is.
        projected = (seen_1TD * torch.randn(seen_1TD.shape, generator=generator)).sum()
        found = torch.autograd.grad(projected, trained, allow_unused=True)
        return sum(float(gradient.norm()) for gradient in found if gradient is not None)

    def save(self, directory: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapters by themselves, as PEFT loads them onto the base model.

        Args:
            directory: where to.
            whole: their weights by the model's names, where the model holds shards of them.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        known = None
        if whole is not None:
            known = {f"base_model.model.{_BODY}.{name}": tensor for name, tensor in whole.items()}
        state = {
            name.replace(f"base_model.model.{_BODY}.", "base_model.model.", 1): tensor.contiguous()
            for name, tensor in get_peft_model_state_dict(self._peft, state_dict=known).items()
        }
        save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self._peft.peft_config["default"])
        prefix = f"{_BODY}."
        config.target_modules = {name.removeprefix(prefix) for name in config.target_modules}
        if config.target_parameters:
            config.target_parameters = [n.removeprefix(prefix) for n in config.target_parameters]
        config.inference_mode = True
        config.save_pretrained(directory)

    def _merged(self) -> tuple[Any, float]:
        """The merged model, and by how much its hidden states differ."""
        self._model.eval()
        before = _seen(self._model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = getattr(self._peft.merge_and_unload(), _BODY)
        return merged, float((_seen(merged) - before).norm() / before.norm())


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
    layers, experts, refused, outer = {}, {}, {}, {}
    for name, module in model.named_modules():
        if module is head:
            outer[name] = "is the output head, whose weight the loss over candidates reads itself"
            continue
        if isinstance(module, nn.Embedding):
            outer[name] = "is an embedding, which may be the output head's weight as well"
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
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
    return _Places(layers, experts, refused | outer)


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether a linear layer, of whatever class, computes its product and nothing else.

    It is tried with a weight of its shape: its own may be on the meta device, or a fake one.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    with _disable_current_modes():
        # Of one sign, so that no sum cancels.
        shape = layer.weight.shape
        weight = torch.linspace(0.5, 1.5, shape.numel()).view(shape)
        bias = None if layer.bias is None else weight[:, 0].clone()
        probe = copy.copy(layer)
        probe._parameters = {
            "weight": nn.Parameter(weight),
            "bias": None if bias is None else nn.Parameter(bias),
        }
        input_ND = torch.linspace(0.5, 1.5, 2 * shape[1]).view(2, shape[1])
        try:
            output: Any = probe(input_ND)
            return torch.allclose(output, F.linear(input_ND, weight, bias), rtol=1e-3)
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
    """Patterns of the names of all modules that a forward pass calls, in training and out of it.

    Layers of one kind have the same pattern: a token does not meet every expert. Gemma 3n reads
    weights past their layers in training alone.
    """
    was_training = model.training
    with torch.random.fork_rng():  # dropout draws
        called = _called_now(model.eval()) & _called_now(model.train())
    model.train(was_training)
    return called


def _called_now(model: Any) -> set[str]:
    seen: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        pattern = _pattern(name)
        handles.append(
            module.register_forward_pre_hook(lambda *_, pattern=pattern: seen.add(pattern))
        )
    try:
        _seen(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _hidden(model: Any) -> Tensor:
    """Hidden states [1, T, D] of a few tokens."""
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(1, 1 + _SEEN_TOKENS, device=device)[None] * 7 % size
    with one_sequence_a_row():
        hidden_BTD: Tensor = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD.float()


@torch.no_grad()
def _seen(model: Any) -> Tensor:
    """Those of :func:`_hidden`, without what a gradient needs."""
    return _hidden(model)
