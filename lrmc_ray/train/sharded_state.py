"""Weights and moments in shards: to files and back, for another number of workers as well.

``torch.distributed.checkpoint`` writes them. Every worker writes what it holds, and reads the rows
that it needs from whatever files they are in; nothing is gathered. What is no tensor of rows, such
as the number of steps, is in the checkpoint's ``state.pt``.
"""

import contextlib
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.method.shards import Shard
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train.checkpoints import METADATA, SHARDS

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64"},
    "pathlib": {"Path", "PosixPath"},
}
"""What the metadata of these checkpoints are made of, by module."""


class ShardedState:
    """The trained parameters of a run, in shards, and their optimizer's state."""

    def __init__(
        self,
        shards: Mapping[str, Shard],
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        group: WorkerGroup,
    ) -> None:
        """Look at nothing yet.

        Args:
            shards: of the trained parameters by name, in the optimizer's order.
            optimizer: of them.
            mesh: all workers.
            group: this worker and the others.
        """
        self._shards = dict(shards)
        self._optimizer = optimizer
        self._mesh = mesh
        self._group = group

    def rest(self) -> dict[str, Any]:
        """What :meth:`write` leaves out, the same on every worker."""
        state = self._optimizer.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        moments: dict[str, dict[str, torch.dtype]] = {}
        for index, (name, shard) in enumerate(self._shards.items()):
            for key, value in state["state"].get(index, {}).items():
                if _is_moment(value, shard):
                    moments.setdefault(name, {})[key] = value.dtype
                else:
                    numbers.setdefault(name, {})[key] = value
        return {"groups": state["param_groups"], "numbers": numbers, "moments": moments}

    def write(self, partial: Path) -> dict[str, str]:
        """Write weights and moments below ``partial``; all workers do it together.

        Returns:
            The files of all workers, with their SHA-256.
        """
        directory = partial / SHARDS
        state = self._optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {}
        for index, (name, shard) in enumerate(self._shards.items()):
            tensors[f"model/{name}"] = self._whole(shard.own.detach(), shard)
            for key, value in state.get(index, {}).items():
                if _is_moment(value, shard):
                    tensors[f"{key}/{name}"] = self._whole(value, shard)
        with _quiet():
            save(tensors, storage_writer=FileSystemWriter(directory, sync_files=True))
        own = list(directory.glob(f"__{self._group.rank}_*"))
        if self._group.rank == 0:
            own.append(directory / METADATA)
        digests: dict[str, str] = {}
        for theirs in self._group.gather(
            {os.fspath(path.relative_to(partial)): file_digest(path) for path in own}
        ):
            digests |= theirs
        return digests

    def read(self, checkpoint: Path, rest: Mapping[str, Any]) -> None:
        """Go on from ``checkpoint``, whose files have been verified; all workers do it together.

        Args:
            checkpoint: its directory.
            rest: what :meth:`rest` returned when it was saved.
        """
        moments: dict[str, dict[str, Tensor]] = {}
        for name, dtypes in rest["moments"].items():
            own = self._shards[name].own.detach()
            moments[name] = {
                key: torch.empty_like(own, dtype=dtype) for key, dtype in dtypes.items()
            }
        self._read(checkpoint, moments)
        names = list(self._shards)
        self._optimizer.load_state_dict(
            {
                "state": {
                    index: {**moments.get(name, {}), **rest["numbers"].get(name, {})}
                    for index, name in enumerate(names)
                    if name in moments or name in rest["numbers"]
                },
                "param_groups": rest["groups"],
            }
        )

    def read_weights(self, checkpoint: Path) -> None:
        """Take the weights of ``checkpoint`` alone; as above."""
        self._read(checkpoint, {})

    def _read(self, checkpoint: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, shard in self._shards.items():
            tensors[f"model/{name}"] = self._whole(shard.own.detach(), shard)
            for key, value in moments.get(name, {}).items():
                tensors[f"{key}/{name}"] = self._whole(value, shard)
        check_metadata(checkpoint / SHARDS / METADATA)
        with _quiet():
            load(tensors, storage_reader=FileSystemReader(checkpoint / SHARDS))

    def _whole(self, own: Tensor, shard: Shard) -> Tensor:
        """The tensor of which ``own`` is this worker's part, sharing its memory."""
        stride = torch.empty(shard.shape, device="meta").stride()
        return DTensor.from_local(
            own, self._mesh, [ByRows(0)], run_check=False, shape=shard.shape, stride=stride
        )


def check_metadata(path: Path) -> None:
    """Refuse metadata that hold anything but sizes and places: torch reads them by pickle.

    Raises:
        DataError: something in it would run code.
    """
    try:
        with path.open("rb") as file:
            _Metadata(file).load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} must hold sizes and places of tensors alone, {error}; it was not written by "
            "this program: remove that checkpoint"
        ) from None


class _Metadata(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _KNOWN.get(module_name, ()):
            raise pickle.UnpicklingError(f"got {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _is_moment(value: Any, shard: Shard) -> bool:
    return isinstance(value, Tensor) and value.shape == shard.own.shape


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns of its own plans for these functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
