"""Whether a kernel touches what it is given and nothing else; by Triton's interpreter."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lrmc_ray.method.fast.chunk_table import ChunkTable

_OF_ROWS = "loss", "dlogits", "dhidden", "tail_logits", "state", "scaled", "rests"
_OF_WEIGHTS = "target", "bias_target", "partial", "partial_bias", "dots", "counts"
OUTPUTS = frozenset((*_OF_ROWS, *_OF_WEIGHTS))
"""Names of the arguments that kernels may write to. What a table points to is written as well, but
for the second tensor of four, which is a gradient."""


def addresses(tensor: Tensor) -> np.ndarray:
    """Of every byte-aligned element of ``tensor``, and of nothing between them."""
    places = np.zeros(1, dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * np.arange(size)).ravel()
    return (tensor.data_ptr() + tensor.element_size() * places).astype(np.uint64)


def sorted_addresses(tensors: Iterable[Tensor]) -> np.ndarray:
    """Of the elements of all tensors, rising."""
    found = [addresses(tensor) for tensor in tensors]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


class KernelMemory:
    """Fails where a program reads or writes beside the tensors of its launch.

    Checked are the lanes that a mask lets through, before the access, which those beside do not
    make. So a mask that lets too many through is an assertion and no crash.
    """

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        """Those that ran."""
        self.faults: list[str] = []
        """What was touched that may not be."""
        self._pointed: list[Tensor] = []
        self._pointed_to_write: list[Tensor] = []
        self._readable = self._writable = sorted_addresses([])

    @contextlib.contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Watch every launch within."""
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store
        prepare, point_to = executor._init_args_hst, ChunkTable.point_to

        def checked_load(found: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            mask = self._checked("reads", self._readable, pointers, mask)
            return load(found, pointers, mask, *rest)

        def checked_store(found: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            mask = self._checked("writes", self._writable, pointers, mask)
            return store(found, pointers, value, mask, *rest)

        def prepared(found: Any, arguments: Any, named: Any) -> Any:
            by_place = zip(found.arg_names, arguments, strict=False)
            self._launch(found.fn.__name__, {**dict(by_place), **named})
            return prepare(found, arguments, named)

        def pointed(table: ChunkTable, groups: Any) -> Tensor:
            self._pointed = list(itertools.chain(*groups))
            self._pointed_to_write = [
                x for g in groups for place, x in enumerate(g) if len(g) == 4 and place != 1
            ]
            return point_to(table, groups)

        with monkeypatch.context() as patches:
            patches.setattr(builder, "create_masked_load", checked_load)
            patches.setattr(builder, "create_masked_store", checked_store)
            patches.setattr(executor, "_init_args_hst", prepared)
            patches.setattr(ChunkTable, "point_to", pointed)
            yield
        assert not self.faults, self.faults[0]

    def _launch(self, name: str, arguments: dict[str, Any]) -> None:
        self._kernel = name
        self.kernels.add(name)
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        # Of a kernel of pointers alone, which has a table, the others are not in question.
        pointed, to_write = self._pointed, self._pointed_to_write
        if "table" not in tensors:
            pointed, to_write = [], []
        self._readable = sorted_addresses([*tensors.values(), *pointed])
        self._writable = sorted_addresses(
            [*(v for k, v in tensors.items() if k in OUTPUTS), *to_write]
        )

    def _checked(self, does: str, allowed: np.ndarray, pointers: Any, mask: Any) -> Any:
        """The mask without the lanes that are beside the tensors."""
        asked = np.asarray(pointers.data).astype(np.uint64)
        wanted = np.asarray(mask.data, dtype=bool)
        places = np.minimum(np.searchsorted(allowed, asked), max(len(allowed) - 1, 0))
        is_there = allowed[places] == asked if len(allowed) else np.zeros_like(wanted)
        if number := int((wanted & ~is_there).sum()):
            self.faults.append(
                f"{self._kernel} {does} {number} of {int(wanted.sum())} elements beside its tensors"
            )
            return type(mask)(wanted & is_there, mask.dtype)
        return mask


def spread(tensor: Tensor, gap: int = 3) -> Tensor:
    """``tensor`` [V, D] with rows ``gap`` elements apart, a leaf where it was one."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + gap), torch.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor.detach()
    return wide[:, : tensor.shape[1]]
