"""The beginning that all samples of a step share, computed once for all micro-batches.

Packing computes a common beginning once per micro-batch (``fast.packing``). Here it is once per
step, and exactly so. Let s be all that later tokens see of the beginning: the keys and values of
every layer; and with them its last hidden states, of which losses may be taken. A micro-batch's
loss is L_m(w, s), where s = s(w) depends on the weights w. By the chain rule::

    d/dw sum_m L_m(w, s(w)) = sum_m dL_m/dw at fixed s  +  (ds/dw)' sum_m dL_m/ds

So each micro-batch is differentiated with s as a constant of its own, the gradients of s are added
up over the micro-batches, and one backward pass through the beginning takes their sum. Attention
to the beginning is to the same keys and values as before: the result is the same up to rounding.

Strict reduction stays strict. Every worker computes s for itself, by the same operations on the
same tokens with the same seed. The gradients of s are added in the order of the micro-batches, as
those of the weights are. The first worker alone goes back through the beginning, and what it finds
comes last in the sum, whatever the number of workers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lrmc_ray.method.microbatch import MicroBatch

FEWEST_TOKENS = 16
"""Of a beginning that is worth a pass of its own: its gradients of all weights have to be added to
those of the micro-batches, which costs about as much as so many tokens."""


class SplitForward(Protocol):
    """A model's forward pass in two parts."""

    def beginning(self, input_ids_1X: Tensor) -> list[Tensor]:
        """The last hidden states [1, X, D] of the first tokens; then what later tokens see."""
        ...

    def rest(self, batch: MicroBatch, states: Sequence[Tensor]) -> Tensor:
        """The last hidden states of the packed ``batch`` behind its beginning, [1, T - X, D]."""
        ...


class SharedPrefix:
    """The beginning in one step, on one worker."""

    def __init__(self, forward: SplitForward, input_ids_1X: Tensor) -> None:
        """Run the beginning; the caller has set the random seed."""
        self._forward = forward
        self._states = forward.beginning(input_ids_1X)
        self._leaves = [
            state.detach().requires_grad_(state.requires_grad) for state in self._states
        ]

    @property
    def leaves(self) -> list[Tensor]:
        """What the micro-batches leave gradients in."""
        return [leaf for leaf in self._leaves if leaf.requires_grad]

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Last hidden states [1, T, D] of a micro-batch, those of the beginning included."""
        return torch.cat([self._leaves[0], self._forward.rest(batch, self._leaves)], dim=1)

    def backward(self) -> None:
        """Go back through the beginning with the gradients that are in the leaves by now."""
        pairs = [
            (state, leaf.grad)
            for state, leaf in zip(self._states, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        if pairs:
            states, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(states, gradients)


def share_prefix(
    batches: Sequence[MicroBatch], longest: float, pack_up_to: float
) -> list[MicroBatch]:
    """``batches`` with the length of the beginning that they share, where there is a long one.

    Args:
        batches: All micro-batches of a step.
        longest: Tokens of the longest micro-batch that may be divided.
        pack_up_to: Tokens, before trimming, of the longest sequence that may be packed.
    """
    busy = [index for index, batch in enumerate(batches) if len(batch.input_ids_BT)]
    packed = [_as_packed(batches[index]) for index in busy]
    if len(busy) < 2 or not all(
        batch.is_visible_TT is not None
        and batch.input_ids_BT.shape[1] <= longest
        and max(batch.full_lengths) <= pack_up_to
        for batch in packed
    ):
        return list(batches)
    length = min(map(_length_of_trunk, packed))
    first_X, *others = [batch.input_ids_BT[0, :length] for batch in packed]
    for ids_X in others:
        length = min(length, int((ids_X == first_X).long().cumprod(0).sum()))
    if length < FEWEST_TOKENS:
        return list(batches)
    shared = list(batches)
    for index, batch in zip(busy, packed, strict=True):
        shared[index] = dataclasses.replace(batch, num_prefix=length)
    return shared


def _as_packed(batch: MicroBatch) -> MicroBatch:
    """A sequence alone in its row has no mask, since it needs none; here it gets one."""
    if batch.is_visible_TT is not None or len(batch.input_ids_BT) != 1:
        return batch
    places_T = torch.arange(batch.input_ids_BT.shape[1])
    return dataclasses.replace(
        batch, position_ids_BT=places_T[None], is_visible_TT=places_T[:, None] >= places_T
    )


def _length_of_trunk(batch: MicroBatch) -> int:
    """Tokens that all later ones of the row see, the last token of the row left out."""
    assert batch.is_visible_TT is not None
    is_seen_T = (batch.is_visible_TT | ~torch.ones_like(batch.is_visible_TT).tril()).all(0)
    return int(is_seen_T[:-1].long().cumprod(0).sum())
