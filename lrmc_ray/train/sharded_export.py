"""The plain Hugging Face directory of a model in shards, written without the whole model anywhere.

A layer after the other is gathered on rank 0, which writes a file whenever it has enough. Readers
take such a directory as that of any other model.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrmc_ray.method.shards import Shard
from lrmc_ray.method.workers import WorkerGroup

FILE_BYTES = 2 * 10**9
"""Of the tensors of a file, beyond which a new one begins. Rank 0 holds as much, and a layer."""


def gathered(shard: Shard, group: WorkerGroup) -> Tensor | None:
    """The whole parameter on rank 0's host, None on others; all workers ask together."""
    if group.world_size == 1:
        return shard.own.detach().cpu()
    own = shard.own.detach()
    longest = -(-shard.shape[0] // group.world_size)
    padded = own.new_zeros(longest, *shard.shape[1:])
    padded[: len(own)] = own
    if group.rank != 0:
        dist.gather(padded, dst=0)
        return None
    parts = [torch.empty_like(padded) for _ in range(group.world_size)]
    dist.gather(padded, parts, dst=0)
    return torch.cat([part.cpu() for part in parts])[: shard.shape[0]]


def write_model(
    model: Any,
    shards: Mapping[str, Shard],
    units: Iterable[Sequence[str]],
    group: WorkerGroup,
    directory: Path,
) -> None:
    """Write configuration and weights; rank 0 writes, all workers take part.

    Args:
        model: that is sharded.
        shards: what this worker holds of every parameter.
        units: names of parameters that are gathered at a time, all of them once.
        group: this worker and the others.
        directory: a fresh one.
    """
    files = _Files(directory) if group.rank == 0 else None
    for names in units:
        tensors = {name: gathered(shards[name], group) for name in names}
        if files is not None:
            files.add(_as_saved(model, {n: t for n, t in tensors.items() if t is not None}))
    if files is not None:
        ignored = set(model._keys_to_ignore_on_save or ())
        files.add(_as_saved(model, {n: b for n, b in _buffers(model) if n not in ignored}))
        files.finish(model)


def _as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names and in the shapes that the model's files have."""
    from transformers.core_model_loading import revert_weight_conversion

    merged = merge_adapters(model, tensors)
    saved: dict[str, Tensor] = revert_weight_conversion(model, merged) if merged else {}
    return saved


def merge_adapters(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the adapters of PEFT in their weights, under the names without them."""
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        layer, has_adapter, ending = name.rpartition(".base_layer.")
        if has_adapter and ending == "weight":
            scale = model.get_submodule(layer).scaling["default"]
            down = tensors[f"{layer}.lora_A.default.weight"]
            tensor = tensor + scale * (tensors[f"{layer}.lora_B.default.weight"] @ down)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Those that are saved with the model."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer.detach().cpu()


class _Files:
    """Files of a model, one after the other, that are named when their number is known."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._file_of: dict[str, int] = {}
        self._count = 0
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what is pending if ``tensors`` are too much beside it."""
        more = sum(tensor.nbytes for tensor in tensors.values())
        pending = sum(tensor.nbytes for tensor in self._pending.values())
        if self._pending and pending + more > FILE_BYTES:
            self._write()
        self._pending |= tensors

    def finish(self, model: Any) -> None:
        """Name the files, and write the index and the configuration."""
        self._write()
        names = {1: "model.safetensors"} if self._count == 1 else {}
        for number in range(1, self._count + 1):
            name = names.setdefault(number, f"model-{number:05d}-of-{self._count:05d}.safetensors")
            self._unnamed(number).rename(self._directory / name)
        if self._count > 1:
            index = {
                "metadata": {"total_size": self._bytes},
                "weight_map": {name: names[number] for name, number in self._file_of.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            path = self._directory / "model.safetensors.index.json"
            path.write_text(text, encoding="utf-8")
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(self._directory)
        if model.can_generate():
            model.generation_config.save_pretrained(self._directory)

    def _write(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        self._count += 1
        tensors = {name: tensor.contiguous() for name, tensor in self._pending.items()}
        save_file(tensors, self._unnamed(self._count), metadata={"format": "pt"})
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._file_of |= dict.fromkeys(tensors, self._count)
        self._pending = {}

    def _unnamed(self, number: int) -> Path:
        return self._directory / f"model-{number:05d}"
