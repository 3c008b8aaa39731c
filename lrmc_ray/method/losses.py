"""The losses by name, and what each of them needs: the sampled tail, the anchor, the base model."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lrmc_ray.method.baselines.vocabulary_loss import (
    active_only_cross_entropy,
    asft_cross_entropy,
    dft_cross_entropy,
    eaft_cross_entropy,
    full_cross_entropy,
    kl_regularized_cross_entropy,
    weighted_cross_entropy,
)
from lrmc_ray.method.frozen_tail import frozen_outside, frozen_tail_cross_entropy
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.microbatch import Activity, LossPositions, MicroBatch
from lrmc_ray.method.names import NEED_BASE, ON_CANDIDATES, Loss
from lrmc_ray.method.restricted_loss import (
    Tail,
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from lrmc_ray.method.shards import ShardedModel
from lrmc_ray.method.shared_prefix import SplitForward
from lrmc_ray.method.vocabulary_rows import HeadRows


@dataclass(frozen=True)
class LossSettings:
    """Which loss is taken; names as in the settings of ``train``."""

    loss: Loss
    tail_samples: int
    """R; of a smaller vocabulary every token is taken, once."""
    anchor_weight: float
    seed: int
    base_kl_weight: float = 1.0

    @property
    def activity(self) -> Activity:
        """Which positions can have a loss other than zero."""
        sees_only_inside = self.loss in ("soft", "active_only") or (
            self.loss == "restricted" and self.tail_samples == 0
        )
        anchor = math.inf if self.anchor_weight == 0 else 1 if self.tail_samples else 2
        return Activity(supervised=2 if sees_only_inside else 1, prompt=anchor)

    @property
    def reads_candidates(self) -> bool:
        """Whether the candidates are looked at one by one, so that their sets are worth a plan."""
        reads = self.loss in ON_CANDIDATES or self.loss in ("frozen_tail", "asft")
        return reads or self.anchor_weight > 0

    def tail_on_host(self, step: int, head: OutputHead) -> Tail | None:
        """The sampled tail of an optimizer step, on the CPU; None without one."""
        if not self.tail_samples:
            return None
        num_samples = min(self.tail_samples, head.vocabulary_size)
        return draw_tail(num_samples, head.vocabulary_size, seed=self.seed, step=step)

    def tail_of_step(self, step: int, head: OutputHead) -> Tail | None:
        """The same on the device of ``head``."""
        tail = self.tail_on_host(step, head)
        return None if tail is None else tail.to(head.weight_VD.device)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model as the method sees it: hidden states, and a head on top of them."""

    forward: Callable[[MicroBatch], Tensor]
    """Last hidden states [B, T, D] of a micro-batch."""
    head: OutputHead
    split: SplitForward | None = None
    """The same in two parts, for ``StepOptions.share_prefix_up_to``."""
    rows: HeadRows | None = None
    """Where some rows of the head are trained in place of all: the losses are taken from them."""
    shards: ShardedModel | None = None
    """Where its weights are in shards. The weight of ``head`` has a shape and no content then."""

    @contextmanager
    def with_whole_head(self) -> Iterator["LanguageModel"]:
        """The same with all rows of the head; of one in shards all workers enter together."""
        if self.shards is None:
            yield self
            return
        with self.shards.vocabulary.whole() as head:
            yield dataclasses.replace(self, head=head)

    @torch.no_grad()
    def frozen_logits(self, batch: MicroBatch) -> Callable[[slice], Tensor]:
        """Its logits at the supervised positions of ``batch``, some of them at a time."""
        where = batch.supervised
        hidden_ND = self.forward(batch)[where.row_N, where.column_N]
        return lambda chunk: head_logits(hidden_ND[chunk], self.head)


def loss_sums(
    hidden_BTD: Tensor,
    head: OutputHead,
    batch: MicroBatch,
    settings: LossSettings,
    tail: Tail | None,
    base_logits: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss over supervised and the summed KL over prompt positions, in nats.

    Args:
        hidden_BTD: Last hidden states of the micro-batch.
        head: The output head.
        batch: The micro-batch.
        settings: Which loss.
        tail: The sampled tail of this step.
        base_logits: The base model's logits [n, V] at a slice of the supervised positions, for
            losses of ``NEED_BASE``.

    Raises:
        ValueError: A loss that needs the base model, without it.
    """
    main = _main_sum(hidden_BTD, head, batch.supervised, settings, tail, base_logits)
    if settings.anchor_weight == 0 or not len(batch.anchored.row_N):
        return main, main.new_zeros(())
    where = batch.anchored
    hidden_ND = hidden_BTD[where.row_N, where.column_N]
    return main, anchor_kl(hidden_ND, head, where.candidates, tail=tail)


def _main_sum(
    hidden_BTD: Tensor,
    head: OutputHead,
    where: LossPositions,
    settings: LossSettings,
    tail: Tail | None,
    base_logits: Callable[[slice], Tensor] | None,
) -> Tensor:
    """The summed loss over supervised positions; arguments as above."""
    if settings.loss in NEED_BASE and base_logits is None:
        raise ValueError(f"the loss {settings.loss} needs the base model, got none")
    hidden_ND = hidden_BTD[where.row_N, where.column_N]
    sets = where.candidates
    match settings.loss:
        case "restricted":
            return restricted_cross_entropy(hidden_ND, head, sets, tail=tail)
        case "frozen_tail":
            assert base_logits is not None
            outside_N = frozen_outside(base_logits, sets, head.vocabulary_size)
            return frozen_tail_cross_entropy(hidden_ND, head, sets, outside_N)
        case "soft":
            return soft_cross_entropy(hidden_ND, head, sets)
        case "full":
            return full_cross_entropy(hidden_ND, head, sets.gold_ids)
        case "active_only":
            return active_only_cross_entropy(hidden_ND, head, sets)
        case "dft":
            return dft_cross_entropy(hidden_ND, head, sets.gold_ids)
        case "asft":
            return asft_cross_entropy(hidden_ND, head, sets, kl_weight=settings.base_kl_weight)
        case "eaft":
            return eaft_cross_entropy(hidden_ND, head, sets.gold_ids)
        case "flow":
            return weighted_cross_entropy(hidden_ND, head, sets.gold_ids, where.weight_N)
        case "kl_to_base":
            assert base_logits is not None
            return kl_regularized_cross_entropy(
                hidden_ND, head, sets.gold_ids, base_logits, kl_weight=settings.base_kl_weight
            )
