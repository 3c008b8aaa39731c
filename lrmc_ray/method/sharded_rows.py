"""Weights of the vocabulary in shards: of each, every worker holds some rows, and gets others.

A step of the restricted loss touches the rows of its tokens, of their candidates and of the sampled
tail. Every worker knows all micro-batches of a step, so it knows which rows those are without
asking. They are gathered once per step, by broadcasts from their owners, and their gradients go
back once, each to the owner of the row, who gets the sum over all workers. Where a step touches
most rows, or a loss is over the whole vocabulary, it is the whole weight.

Rows are divided as ``torch.chunk`` does, so that the first workers have the longer shards.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrmc_ray.method.fast.chunk_table import to_device
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.restricted_loss import Tail
from lrmc_ray.method.vocabulary_rows import EmbeddingLookup, HeadRows, checked_places
from lrmc_ray.method.workers import WorkerGroup

LARGEST_SHARE = 0.6
"""Of the rows. A step that touches more of them gets them all."""

IDLE_TOKEN = torch.zeros(1, dtype=torch.int64)
"""What a worker without a micro-batch runs through the model, so that the others can."""


def bounds_of(num_rows: int, world_size: int) -> list[int]:
    """W + 1 numbers: the worker of rank r holds the rows from number r up to number r + 1."""
    size = -(-num_rows // world_size)
    return [min(rank * size, num_rows) for rank in range(world_size + 1)]


class ShardedRows:
    """A weight [V, D] of which this worker holds some rows."""

    def __init__(
        self,
        weight_VD: Tensor,
        group: WorkerGroup,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        """Keep the rows of this worker, as a copy; the whole weight may be freed then.

        Args:
            weight_VD: the weight; rows of one on the meta device have no values yet.
            group: this worker and the others.
            device: where rows are gathered.
            offload: whether this worker's own are in the host's memory, else they are there too.
        """
        self._group = group
        self._bounds = bounds_of(len(weight_VD), group.world_size)
        first, last = self._bounds[group.rank : group.rank + 2]
        self.first = first
        """Number of the first row that is here."""
        self.num_rows = len(weight_VD)
        """V."""
        part_XD = weight_VD.detach()[first:last]
        own_XD = torch.empty_like(
            part_XD,
            device="cpu" if offload else device,
            pin_memory=offload and device.type == "cuda",
        )
        if not part_XD.is_meta:
            own_XD.copy_(part_XD)
        self.own_XD = nn.Parameter(own_XD, weight_VD.requires_grad)
        """The rows that are here."""
        self._edges = self._bounds
        self._asked_X: Tensor | None = None
        self._place_V: Tensor | None = None
        self._is_gathered = False
        self._none_XD = own_XD.new_empty(0, *own_XD.shape[1:], device=device)
        self.rows_XD: Tensor = self._none_XD
        """The rows that are gathered, a leaf; in a step they get the gradient of this worker."""

    @contextmanager
    def gathered(self, token_ids: Tensor | None = None) -> Iterator[None]:
        """Have the rows of ``token_ids`` here, None: all. All workers ask together for the same.

        Args:
            token_ids: distinct and ascending, int64, on the host, which waits for no GPU then.
        """
        device, rank = self._none_XD.device, self._group.rank
        if token_ids is None or len(token_ids) > LARGEST_SHARE * self.num_rows:
            self._asked_X, self._place_V = None, None
            edges = self._bounds
        else:
            edges = torch.searchsorted(token_ids, torch.tensor(self._bounds)).tolist()
            own_X = token_ids[edges[rank] : edges[rank + 1]] - self.first
            self._asked_X = to_device(own_X, self.own_XD.device)
            token_ids = to_device(token_ids, device)
            self._place_V = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)
            self._place_V[token_ids] = torch.arange(
                len(token_ids), dtype=torch.int32, device=device
            )
        self._edges = edges
        rows_XD = self._none_XD.new_empty(edges[-1], *self.own_XD.shape[1:])
        own_XD = self.own_XD.detach()
        rows_XD[edges[rank] : edges[rank + 1]] = (
            own_XD if self._asked_X is None else own_XD[self._asked_X]
        )
        for source, part in self._parts(rows_XD):
            dist.broadcast(part, src=source)
        self.rows_XD = rows_XD.requires_grad_(self.own_XD.requires_grad)
        self._is_gathered = True
        try:
            yield
        finally:
            self.rows_XD = self._none_XD
            self._is_gathered, self._place_V, self._asked_X = False, None, None

    def places(self, token_ids: Tensor) -> Tensor:
        """Where the rows of tokens are in :attr:`rows_XD`, in the tokens' dtype.

        Raises:
            RuntimeError: none is gathered.
            IndexError: that of a token is not; on a GPU an assertion of the device fails.
        """
        if not self._is_gathered:
            raise RuntimeError("rows of the vocabulary are read before they are gathered")
        if self._place_V is None:
            return token_ids
        return checked_places(self._place_V, token_ids, "the row of token {} was not gathered")

    def reduce(self) -> None:
        """Leave the sum of all workers' gradients in ``own_XD.grad``; all ask together."""
        rows_XD = self.rows_XD
        gradient_XD = torch.zeros_like(rows_XD) if rows_XD.grad is None else rows_XD.grad
        rows_XD.grad = None
        for owner, part in self._parts(gradient_XD):
            dist.reduce(part, dst=owner)
        rank = self._group.rank
        first, last = self._edges[rank : rank + 2]
        part_XD = gradient_XD[first:last].to(self.own_XD.device)
        if self._asked_X is None:
            self.own_XD.grad = part_XD.clone()
            return
        self.own_XD.grad = torch.zeros_like(self.own_XD)
        self.own_XD.grad[self._asked_X] = part_XD

    def _parts(self, rows_XD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The rows of each worker that has some; nothing to send where there is one worker."""
        for owner in range(self._group.world_size if self._group.world_size > 1 else 0):
            part = rows_XD[self._edges[owner] : self._edges[owner + 1]]
            if len(part):
                yield owner, part


class ShardedVocabulary:
    """Embedding and output head of a model, both in shards; one weight where they are tied."""

    def __init__(
        self,
        embedding: nn.Embedding,
        head: OutputHead,
        group: WorkerGroup,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        """Take the weights' rows; the embedding looks them up here from now on.

        Args:
            embedding: whose ``weight`` may be replaced by anything afterwards.
            head: the output head, without a bias.
            group: this worker and the others.
            device: where rows are gathered.
            offload: whether this worker's own are in the host's memory.
        """
        assert head.bias_V is None
        self._head = head
        self.is_tied = head.weight_VD is embedding.weight
        self.embedding = ShardedRows(embedding.weight, group, device, offload=offload)
        """The embedding's weight."""
        self.output = self.embedding
        if not self.is_tied:
            self.output = ShardedRows(head.weight_VD, group, device, offload=offload)
        """That of the head."""
        _Lookup(embedding, self.embedding)

    @property
    def weights(self) -> list[ShardedRows]:
        """Each weight once."""
        return [self.embedding] if self.is_tied else [self.embedding, self.output]

    @contextmanager
    def of_step(
        self, micro_batches: Sequence[MicroBatch], tail: Tail | None, *, whole_head: bool
    ) -> Iterator[HeadRows]:
        """Have the rows that a step touches; all workers enter together.

        Args:
            micro_batches: all of the step, on the host.
            tail: the sampled tail, on the host.
            whole_head: the loss, or something that looks at it, needs the logits of all tokens.
        """
        inputs = _distinct([IDLE_TOKEN, *(batch.input_ids_BT for batch in micro_batches)])
        outputs = None if whole_head else _outputs(micro_batches, tail)
        if self.is_tied:
            tokens = None if outputs is None else _distinct([inputs, outputs])
            with self.embedding.gathered(tokens):
                yield HeadRows(self._head, self.output)
            return
        with self.embedding.gathered(inputs), self.output.gathered(outputs):
            yield HeadRows(self._head, self.output)

    @contextmanager
    def whole(self) -> Iterator[OutputHead]:
        """Have all rows, of the head and of the embedding; all workers enter together."""
        with self.embedding.gathered():
            if self.is_tied:
                yield dataclasses.replace(self._head, weight_VD=self.output.rows_XD)
                return
            with self.output.gathered():
                yield dataclasses.replace(self._head, weight_VD=self.output.rows_XD)

    def reduce(self) -> None:
        """Bring the gradients of the step to the rows' owners, where there are any."""
        for weight in self.weights:
            if weight.own_XD.requires_grad:
                weight.reduce()


class _Lookup(EmbeddingLookup):
    """Has an embedding look up rows that are gathered; its own weight is not read."""

    def _begin(self, embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # What stands in for the weight has come after this object.
        self._weight_VD = embedding._parameters["weight"]
        return self.look_up(embedding, inputs)


def _distinct(token_ids: Sequence[Tensor]) -> Tensor:
    distinct: Tensor = torch.unique(torch.cat([ids.flatten().long() for ids in token_ids]))
    return distinct


def _outputs(micro_batches: Sequence[MicroBatch], tail: Tail | None) -> Tensor:
    """Candidates of all positions, and the tail."""
    sets = [
        where.candidates for batch in micro_batches for where in (batch.supervised, batch.anchored)
    ]
    found = [part for s in sets for part in (s.token_ids, s.gold_ids)]
    return _distinct([*found, *([] if tail is None else [tail.ids_R])])
