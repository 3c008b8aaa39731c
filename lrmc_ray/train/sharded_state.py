"""Weights and moments in shards: to files and back, for another number of workers as well.

``torch.distributed.checkpoint`` writes them. Every worker writes what it holds, and reads the rows
that it needs from whatever files they are in; nothing is gathered. What is no tensor of rows, such
as the number of steps, is in the checkpoint's ``state.pt``.

Files are written while training goes on, from a copy of what the worker holds, in the memory of the
host: for float32 weights and two moments, 12 bytes for each of the trained elements that it has.
"""

import contextlib
import dataclasses
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
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
        channel = dist.new_group(backend="gloo")
        self.writers = dataclasses.replace(group, channel=channel)
        """The same workers, who talk of what they write while they talk of training elsewhere."""
        self._host_mesh = DeviceMesh.from_group(channel, "cpu")
        self._staged: dict[str, DTensor] = {}

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

    def stage(self) -> None:
        """Copy what this worker holds into the host's memory, for :meth:`write`.

        That memory is kept for the next time.
        """
        state = self._optimizer.state_dict()["state"]
        for index, (name, shard) in enumerate(self._shards.items()):
            self._stage(f"model/{name}", shard.own.detach(), shard)
            for key, value in state.get(index, {}).items():
                if _is_moment(value, shard):
                    self._stage(f"{key}/{name}", value, shard)
        if any(shard.own.is_cuda for shard in self._shards.values()):
            torch.cuda.synchronize()

    def _stage(self, key: str, own: Tensor, shard: Shard) -> None:
        if key not in self._staged:
            copy = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
            self._staged[key] = _whole(copy, shard, self._host_mesh)
        self._staged[key].to_local().copy_(own, non_blocking=True)

    def write(self, partial: Path) -> dict[str, str]:
        """Write what is staged below ``partial``, in any thread; all workers do it together.

        Returns:
            The files of this worker, with their SHA-256.

        Raises:
            Exception: what one of them found, such as a full disk; all raise it.
        """
        if not dist.is_initialized():  # torch would save as if there were one worker
            raise RuntimeError("the workers have parted")
        directory = partial / SHARDS
        try:
            save(
                self._staged,
                storage_writer=FileSystemWriter(directory, sync_files=True),
                process_group=self.writers.channel,
            )
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        own = list(directory.glob(f"__{self.writers.rank}_*"))
        if self.writers.rank == 0:
            own.append(directory / METADATA)
        return {os.fspath(path.relative_to(partial)): file_digest(path) for path in own}

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
            # A DTensor takes its part to the device of its mesh.
            mesh = self._mesh if shard.own.is_cuda else self._host_mesh
            tensors[f"model/{name}"] = _whole(shard.own.detach(), shard, mesh)
            for key, value in moments.get(name, {}).items():
                tensors[f"{key}/{name}"] = _whole(value, shard, mesh)
        check_metadata(checkpoint / SHARDS / METADATA)
        with _quiet():
            load(tensors, storage_reader=FileSystemReader(checkpoint / SHARDS))


def _whole(own: Tensor, shard: Shard, mesh: DeviceMesh) -> DTensor:
    """The tensor of which ``own`` is this worker's part, sharing its memory."""
    stride = torch.empty(shard.shape, device="meta").stride()
    return DTensor.from_local(
        own, mesh, [ByRows(0)], run_check=False, shape=shard.shape, stride=stride
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
