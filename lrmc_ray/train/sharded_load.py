"""Weights of a model directory, read when the model is in shards: a worker reads its own rows.

The model is built on the meta device, where it has shapes and no memory. Once it is in shards, each
worker reads from the safetensors files the rows that it holds. So no worker ever holds all of it.

Transformers renames some weights as it loads them, and puts some together, such as the experts of a
mixture. Its own rules are followed here. Of a weight under its own or another name only the rows
are read, and of stacked experts only those that the worker holds. What is cut or turned otherwise
is made whole, a parameter at a time. Where the rules say something that cannot be followed, the
model is loaded whole on every worker, which :class:`NotByRowsError` gives the reason for.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lrmc_ray.method.sharded_rows import bounds_of
from lrmc_ray.method.shards import Shard
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.loading import empty_model

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class NotByRowsError(Exception):
    """A model's weights cannot be read a part at a time; the message has the reason."""


class _Files:
    """The tensors in the files of a directory."""

    def __init__(self, directory: Path) -> None:
        path, index = directory / _ONE_FILE, directory / _INDEX
        if path.is_file():  # it wins over an index, for transformers too
            names = [path.name]
        elif index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        else:
            raise NotByRowsError(f"{directory} has neither {_ONE_FILE} nor {_INDEX}")
        self._of: dict[str, Any] = {}
        for name in names:
            file = safe_open(directory / name, framework="pt")
            self._of |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> list[str]:
        return list(self._of)

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self._of[key].get_slice(key).get_shape())

    def rows(self, key: str, first: int, last: int) -> Tensor:
        return self._of[key].get_slice(key)[first:last]  # type: ignore[no-any-return]

    def whole(self, key: str) -> Tensor:
        return self._of[key].get_tensor(key)  # type: ignore[no-any-return]


@dataclasses.dataclass
class _Source:
    """What one or more parameters are made of."""

    keys: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Names in the files, by the pattern of transformers' rule that they fit."""
    rule: Any = None
    """That rule; None: the parameter is the tensor."""

    @property
    def is_stacked(self) -> bool:
        """Whether row i is made of the i-th tensor of every pattern, and of nothing else."""
        if self.rule is None or type(self.rule.operations[0]).__name__ != "MergeModulelist":
            return False
        first, *others = self.rule.operations
        dims = [getattr(op, name, 1) for op in others for name in ("dim", "dim0", "dim1")]
        known = all(type(op).__name__ in ("Concatenate", "Transpose") for op in others)
        return known and first.dim == 0 and all(dim > 0 for dim in dims)

    def made(
        self, tensors: Mapping[str, list[Tensor]], model: Any, target: str
    ) -> dict[str, Tensor]:
        """What the rule makes of ``tensors``, by the parameters' names."""
        rule = copy.deepcopy(self.rule)
        for pattern, parts in tensors.items():
            for part in parts:
                rule.add_tensor(target, target, pattern, part)
        found = rule.convert(target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


class RowsOfFiles:
    """The weights of a model that is on the meta device."""

    def __init__(self, model: Any, directory: Path) -> None:
        """Find out where every parameter and every saved buffer is; nothing is read.

        Args:
            model: as :func:`lrmc_ray.models.loading.empty_model` gives it, without adapters.
            directory: it is from there.

        Raises:
            NotByRowsError: it must be loaded whole.
        """
        self._model = model
        self._files = _Files(directory)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._sources: dict[str, _Source] = {}
        self._first_target: dict[str, str] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        for first, source in self._collected().items():
            for name in self._targets(first, source):
                self._sources[name] = source
                self._first_target[name] = first
        self._find_tied()

    def _collected(self) -> dict[str, _Source]:
        """The sources of all parameters, by the name of the first that each makes."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )
        except ImportError as error:  # no public interface
            raise NotByRowsError(
                f"this version of transformers has other rules ({error})"
            ) from None
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, known = self._model.base_model_prefix, self._model.state_dict()
        found: dict[str, _Source] = {}
        for key in sorted(self._files.keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in known:
                continue  # more than the model has
            source = found.setdefault(name, _Source(rule=pattern and of_pattern[pattern]))
            source.keys.setdefault(pattern or key, []).append(key)
        # Saving undoes the rules that were used.
        self._model._weight_conversions = [rule for rule in rules if rule.was_used()]
        return found

    def _targets(self, first: str, source: _Source) -> list[str]:
        """The parameters that ``source`` makes, whose shapes are checked."""
        shapes = {first: self._files.shape(next(iter(source.keys.values()))[0])}
        if source.rule is not None:
            on_meta = {
                pattern: [torch.empty(self._files.shape(key), device="meta") for key in keys]
                for pattern, keys in source.keys.items()
            }
            try:
                made = source.made(on_meta, self._model, first)
            except Exception as error:  # whatever a rule says of tensors that it does not know
                raise NotByRowsError(f"{first} is made in an unknown way ({error})") from error
            shapes = {name: tensor.shape for name, tensor in made.items()}
        known = self._model.state_dict()
        for name, shape in shapes.items():
            if name not in known or shape != known[name].shape:
                raise NotByRowsError(f"the files have {name} in another shape, {tuple(shape)}")
        return list(shapes)

    def _find_tied(self) -> None:
        """Let tied weights share a source; all that are left must have one."""
        first_of: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            names.setdefault(first_of.setdefault(id(tensor), name), []).append(name)
        self._same: list[list[str]] = []
        for together in names.values():
            there = [name for name in together if name in self._sources]
            if not there:
                raise NotByRowsError(f"{together[0]} is not in the files")
            if len(there) > 1:
                self._same.append(there)
            for name in together:
                self._sources.setdefault(name, self._sources[there[0]])
                self._first_target.setdefault(name, self._first_target[there[0]])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a parameter, from number ``first`` up to ``last``, in the model's dtype.

        Args:
            name: the model's name for it.
            first: number of the first row.
            last: number of the one behind the last.
        """
        source, target, dtype = self._sources[name], self._first_target[name], self._dtypes[name]
        if source.rule is None:
            ((key,),) = source.keys.values()
            return self._files.rows(key, first, last).to(dtype)
        if source.is_stacked:
            if first == last:
                return torch.empty(0, dtype=dtype)
            parts = {p: self._read(keys[first:last], dtype) for p, keys in source.keys.items()}
            return source.made(parts, self._model, target)[name]
        if self._made[0] != target:
            parts = {p: self._read(keys, dtype) for p, keys in source.keys.items()}
            self._made = (target, source.made(parts, self._model, target))
        return self._made[1][name][first:last]

    def _read(self, keys: Iterable[str], dtype: torch.dtype) -> list[Tensor]:
        return [self._files.whole(key).to(dtype) for key in keys]

    def check_tied(self, group: WorkerGroup) -> None:
        """Compare weights that are one in the model and several in the files; all together.

        Raises:
            NotByRowsError: they differ, so transformers would not tie them.
        """
        shapes = {name: tensor.shape for name, tensor in self._model.state_dict().items()}
        for one, *others in self._same:
            first, last = bounds_of(shapes[one][0], group.world_size)[group.rank :][:2]
            own = self.rows(one, first, last)
            same = all(torch.equal(own, self.rows(other, first, last)) for other in others)
            if not all(group.gather(same)):
                raise NotByRowsError(f"{one} and {others[0]} are tied and differ in the files")

    def fill(self, shards: Mapping[str, Shard], drawn: Mapping[str, Tensor]) -> None:
        """Read what this worker holds into the memory of its shards.

        Args:
            shards: by the model's names.
            drawn: whole adapters, by their names; they are not in the files.
        """
        with torch.no_grad():
            for name, shard in shards.items():
                last = shard.first + len(shard.own)
                if name in drawn:
                    shard.own.copy_(drawn[name][shard.first : last])
                elif shard.own.numel():
                    known = name.replace(".base_layer.", ".")
                    shard.own.copy_(self.rows(known, shard.first, last))
        self._made = ("", {})

    def make_buffers(self, device: torch.device) -> None:
        """Give the model its buffers: read where they are saved, else computed as it does."""
        for tensor in self._model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for prefix, module in self._model.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                full = f"{prefix}.{name}".lstrip(".").replace(".base_layer.", ".")
                made = torch.empty_like(buffer, device="cpu")
                if full in self._sources:
                    source = self._sources[full]
                    if source.rule is not None:
                        raise NotByRowsError(f"the buffer {full} is made of several")
                    ((key,),) = source.keys.values()
                    made = self._files.whole(key).to(made.dtype)
                    made._is_hf_initialized = True  # type: ignore[attr-defined]
                module._buffers[name] = made
        self._model.initialize_weights()
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)


def model_to_fill(directory: Path) -> tuple[Any, RowsOfFiles]:
    """A float32 model on the meta device, as it is loaded, and where its weights are.

    Raises:
        NotByRowsError: it must be loaded whole.
        DataError: transformers does not know it, or not without code of its own.
    """
    from transformers import GenerationConfig

    if (directory / "adapter_config.json").is_file():
        raise NotByRowsError("there are adapters beside its weights")
    model = empty_model(directory)
    if getattr(model.config, "quantization_config", None) is not None:
        raise NotByRowsError("its weights are quantized")
    model.config.name_or_path = str(directory)
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval(), RowsOfFiles(model, directory)
