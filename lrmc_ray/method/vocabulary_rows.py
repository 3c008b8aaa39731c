"""Rows of the vocabulary that a run never touches: no gradient, no moments, the same weights.

With the restricted loss, a row of the embedding has a gradient only where its token is in a sample,
and a row of the output head only where its token is among the candidates or in the sampled tail.
All other rows have a gradient of exactly zero in every step. Their moments stay zero, so the
optimizer leaves them where they are, but for weight decay, which multiplies each of them by
1 - lr * weight_decay per step. Zeros add nothing to dot products and norms either.

So the rows that a run touches, which are known before it, are parameters of their own
(:class:`TrainedRows`), and gradients, moments, clipping, checkpoints and the sum over workers are
of them alone. The whole weight stays in the model for all that looks at it without a gradient, and
gets the new rows behind every step. Training all rows is the reference, with the same bits: what
is done to a row does not depend on the others. (Sums over a whole tensor are made of the same
numbers without the zeros, but in another grouping. They could differ in their last bit: dot
products in that of float64, the norm for clipping in that of float32.)
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast.candidate_logits import take_rows
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.microbatch import Activity, LossPositions, MicroBatch, Sample
from lrmc_ray.method.restricted_loss import Tail


class Rows(Protocol):
    """Some rows of a weight [V, D], in the order of their tokens."""

    @property
    def rows_XD(self) -> Tensor:  # noqa: N802
        """The rows, a leaf."""

    def places(self, token_ids: Tensor) -> Tensor:
        """Where the rows of tokens are, in their dtype."""


def checked_places(place_V: Tensor, token_ids: Tensor, missing: str) -> Tensor:
    """``place_V`` of tokens, in their dtype.

    Raises:
        IndexError: that of a token is negative; the message is ``missing``, with the token for its
            braces. On a GPU, for which the host does not wait, an assertion of the device ends the
            process.
    """
    places = place_V[token_ids.long()]
    if places.device.type != "cpu":
        torch._assert_async((places >= 0).all())
    elif places.numel() and int(places.min()) < 0:
        raise IndexError(missing.format(int(token_ids[places < 0][0])))
    return places.to(token_ids.dtype)


class TrainedRows:
    """Some rows of a weight [V, D], trained in its place."""

    def __init__(self, weight_VD: nn.Parameter, token_ids: Tensor) -> None:
        """Take the rows of ``token_ids``; the weight itself is no longer trained."""
        self.weight_VD = weight_VD.requires_grad_(False)
        self.token_ids_X = torch.unique(token_ids).to(weight_VD.device)
        """Ascending, so that the order of tokens is that of the rows."""
        self.rows_XD = nn.Parameter(weight_VD.detach()[self.token_ids_X])
        self._place_V = torch.full(
            (len(weight_VD),), -1, dtype=torch.int32, device=weight_VD.device
        )
        self._place_V[self.token_ids_X] = torch.arange(
            len(self.token_ids_X), dtype=torch.int32, device=weight_VD.device
        )

    def places(self, token_ids: Tensor) -> Tensor:
        """Where the rows of tokens are, in their dtype.

        Raises:
            IndexError: a token has none. On a GPU, for which the host does not wait, an assertion
                of the device ends the process.
        """
        missing = f"token {{}} is not among the {len(self.token_ids_X)} trained ones"
        return checked_places(self._place_V, token_ids, missing)

    @torch.no_grad()
    def write_back(self, decay: float = 1.0) -> None:
        """Put the rows into the whole weight, whose others shrink to ``decay``."""
        if decay != 1:
            self.weight_VD.mul_(decay)
        self.weight_VD.index_copy_(0, self.token_ids_X, self.rows_XD)


class EmbeddingLookup:
    """Has an embedding add its gradient to the rows it has looked up, and to no others.

    By itself it makes a gradient of all rows in every backward pass, nearly all of it zeros. Here
    it sees the distinct rows of the batch alone, as ``fast.candidate_logits`` takes them out of the
    weight. In evaluation, or where no gradient is computed, it is as it was.
    """

    def __init__(self, embedding: nn.Embedding, rows: Rows | None = None) -> None:
        """Watch ``embedding``; ``rows`` are trained in place of its weight."""
        self._rows = rows
        self._weight_VD: Any = embedding.weight
        self._padding = embedding.padding_idx
        embedding.register_forward_pre_hook(self._begin)
        embedding.register_forward_hook(self._end, always_call=True)

    def distinct(self, token_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct tokens, ascending, and the place of each token among them.

        The host does not wait for a GPU to count them, so there they are as many as there are
        tokens: the last one follows again and again, and nothing has its place there.
        """
        if token_ids_BT.device.type != "cpu":
            return distinct_padded(token_ids_BT)
        tokens_X, index_BT = torch.unique(token_ids_BT, return_inverse=True)
        return tokens_X, index_BT

    def _begin(self, embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (embedding.training and torch.is_grad_enabled()):
            return None
        if self._rows is None and not inputs:
            return None  # called with a keyword; it makes its gradient by itself
        return self.look_up(embedding, inputs)

    def look_up(self, embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Have ``embedding`` look up the rows of its tokens alone; what it looks up instead."""
        tokens_X, index_BT = self.distinct(inputs[0])
        taken_XD = (
            take_rows(self._weight_VD, tokens_X)
            if self._rows is None
            else take_rows(self._rows.rows_XD, self._rows.places(tokens_X))
        )
        if self._padding is not None:
            # Padding has no gradient; where its row is now, the host does not know.
            is_padding_X1 = (tokens_X == self._padding)[:, None]
            taken_XD = torch.where(is_padding_X1, taken_XD.detach(), taken_XD)
            embedding.padding_idx = None  # type: ignore[assignment]
        embedding._parameters["weight"] = taken_XD  # type: ignore[assignment]
        return (index_BT, *inputs[1:])

    def _end(self, embedding: nn.Module, _inputs: Any, _output: Any) -> None:
        embedding._parameters["weight"] = self._weight_VD
        embedding.padding_idx = self._padding  # type: ignore[assignment]


def distinct_padded(token_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """See :meth:`EmbeddingLookup.distinct`; on any device."""
    sorted_X, order_X = token_ids_BT.flatten().sort(stable=True)
    is_new_X = torch.zeros_like(sorted_X, dtype=torch.bool)
    is_new_X[1:] = sorted_X[1:] != sorted_X[:-1]
    place_X = is_new_X.cumsum(0)
    tokens_X = sorted_X[-1:].repeat(len(sorted_X)).scatter_(0, place_X, sorted_X)
    index_X = torch.empty_like(place_X).scatter_(0, order_X, place_X)
    return tokens_X, index_X.view_as(token_ids_BT)


class HeadRows:
    """An output head of trained rows alone, and the batches of a step as it takes them."""

    def __init__(self, head: OutputHead, rows: Rows) -> None:
        """Take the rows in place of the weight of ``head``, which has no bias."""
        assert head.bias_V is None
        self._rows = rows
        self.head = dataclasses.replace(
            head, weight_VD=rows.rows_XD, whole_size=head.vocabulary_size
        )

    def tail(self, tail: Tail) -> Tail:
        """The sampled tail by places of rows."""
        return Tail(self._rows.places(tail.ids_R), tail.logweights_R)

    def batch(self, batch: MicroBatch) -> MicroBatch:
        """``batch`` with its candidates by places of rows; its tokens stay as they are."""
        return dataclasses.replace(
            batch,
            supervised=self._positions(batch.supervised),
            anchored=self._positions(batch.anchored),
        )

    def _positions(self, where: LossPositions) -> LossPositions:
        sets = where.candidates
        candidates = CandidateSets(
            sets.offsets,
            self._rows.places(sets.token_ids),
            sets.logprobs,
            self._rows.places(sets.gold_ids),
            # Places rise with the tokens, so what is planned by token is so by place.
            None if sets.plan is None else sets.plan.renamed(self._rows.places),
        )
        return dataclasses.replace(where, candidates=candidates)


def tokens_of(samples: Iterable[Sample], activity: Activity) -> tuple[Tensor, Tensor]:
    """The distinct tokens whose embedding is looked up, and those among active candidates."""
    inputs = [torch.zeros(1, dtype=torch.int64)]  # what padding is made of
    outputs = [torch.zeros(0, dtype=torch.int64)]
    for sample in samples:
        inputs.append(torch.unique(sample.input_ids_T))
        active = sample.candidates.rows(activity.of(sample))
        outputs.append(torch.unique(active.token_ids).long())
    return torch.unique(torch.cat(inputs)), torch.unique(torch.cat(outputs))
