"""Several workers that compute one global batch, and what they tell each other."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BUCKET_ELEMENTS = 2**22
"""Of one collective: 16 MiB in float32."""


@dataclass(frozen=True)
class WorkerGroup:
    """Who computes what; W = 1 needs no process group."""

    rank: int = 0
    world_size: int = 1
    channel: dist.ProcessGroup | None = None
    """By which they talk, None: the default one. A thread needs another one than the training."""

    def sum_(self, *tensors: Tensor) -> None:
        """Add every tensor over the workers, in place."""
        if self.world_size > 1:
            _as_one_vector(tensors, functools.partial(dist.all_reduce, group=self.channel))

    def gather(self, own: Any) -> list[Any]:
        """What every worker has of some picklable kind, by rank."""
        if self.world_size == 1:
            return [own]
        together: list[Any] = [None] * self.world_size
        dist.all_gather_object(together, own, group=self.channel)
        return together

    def together(self, do: Callable[[], T]) -> list[T]:
        """What ``do`` returns on every worker, by rank; where it fails on one, it fails on all.

        Raises:
            Exception: what it raised here, or an ``OSError`` of another worker.
            RuntimeError: it raised something else there.
        """
        own, failure = None, None
        try:
            own = do()
        except Exception as error:
            failure = error
        known = isinstance(failure, OSError | None)
        told = failure if known else RuntimeError(f"{type(failure).__name__}: {failure}")
        outcomes = self.gather((own, told))
        for theirs in (failure, *(error for _, error in outcomes)):
            if theirs is not None:
                raise theirs
        return [result for result, _ in outcomes]

    def broadcast_(self, *tensors: Tensor, source: int) -> None:
        """Give every worker the tensors of worker ``source``, in place."""
        if self.world_size > 1:
            send = functools.partial(dist.broadcast, src=source, group=self.channel)
            _as_one_vector(tensors, send)


def _as_one_vector(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run ``collective`` once, in place: to start it costs more than to copy small tensors."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    collective(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, divided where more than ``BUCKET_ELEMENTS`` would come together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in [*bucket, tensor]) > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sum_gradients(parameters: Sequence[Tensor], group: WorkerGroup) -> None:
    """Add the gradients of ``parameters`` over the workers, in place."""
    for bucket in buckets([p.grad for p in parameters if p.grad is not None]):
        group.sum_(*bucket)


def waves(parts: Sequence[int], world_size: int) -> list[Sequence[int]]:
    """``parts`` in rounds: in each, the worker of rank r computes the one at place r, if any."""
    return [parts[first : first + world_size] for first in range(0, len(parts), world_size)]


def add_in_order(
    total: dict[Tensor, Tensor], tensors: Sequence[Tensor], group: WorkerGroup, *, sources: int
) -> None:
    """Add the gradients of the first ``sources`` workers to ``total``, in turn, and clear them.

    A worker alone keeps their memory, filled with zeros, for the next ones.
    """
    for bucket in buckets(tensors):
        for source in range(sources):
            own = [tensor.grad if source == group.rank else None for tensor in bucket]
            gradients = [
                torch.zeros_like(tensor) if gradient is None else gradient
                for tensor, gradient in zip(bucket, own, strict=True)
            ]
            group.broadcast_(*gradients, source=source)
            for tensor, gradient in zip(bucket, gradients, strict=True):
                if tensor in total:
                    total[tensor].add_(gradient)
                else:
                    total[tensor] = gradient
        for tensor in bucket:
            is_kept = group.world_size == 1 and tensor.grad is not total.get(tensor)
            tensor.grad = tensor.grad.zero_() if is_kept and tensor.grad is not None else None
