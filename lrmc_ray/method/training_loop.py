"""Stage 1 without Ray: fixed micro-batches, one gradient, one update.

    L = sum over supervised positions of loss / N  +  anchor_weight * sum over prompt positions / P

N and P count the positions of the whole global batch, over all workers and micro-batches, so the
result does not depend on how the batch is divided. A global batch is M fixed micro-batches, dealt
in turn to the W workers, each with its own random seed. Those without an active position are left
out.

- ``strict``: the gradients of the micro-batches are added in the order 0 .. M-1 on every worker.
  Floating-point addition is not associative, so only a fixed order gives the same bits for every W.
- ``fast``: each worker adds its own, then one all-reduce; equal up to rounding.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrmc_ray.method.candidate_logits import HeadOptions
from lrmc_ray.method.microbatch import Activity, MicroBatch, Sample, collate, deal
from lrmc_ray.method.restricted_loss import (
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from lrmc_ray.method.vocabulary_loss import (
    active_only_cross_entropy,
    dft_cross_entropy,
    full_cross_entropy,
    head_logits,
    kl_regularized_cross_entropy,
)

_BUCKET_ELEMENTS = 2**22  # of one collective: 16 MiB in float32


@dataclass(frozen=True)
class LossSettings:
    """Which loss is taken; names as in the settings of ``train``."""

    loss: Literal["restricted", "full", "soft", "active_only", "dft", "kl_to_base"]
    tail_samples: int
    """R; of a smaller vocabulary every token is taken, once."""
    anchor_weight: float
    seed: int
    base_kl_weight: float = 1.0

    @property
    def activity(self) -> Activity:
        """Which positions can have a loss other than zero."""
        sees_outside = self.loss in ("full", "dft", "kl_to_base") or (
            self.loss == "restricted" and self.tail_samples > 0
        )
        anchor = math.inf if self.anchor_weight == 0 else 1 if self.tail_samples else 2
        return Activity(supervised=1 if sees_outside else 2, prompt=anchor)


@dataclass(frozen=True)
class OutputHead:
    """How hidden states become logits: ``softcap(scale * (hidden @ weight.T + bias))``."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> HeadOptions:
        """All but the weight, as the losses take it."""
        return {"bias_V": self.bias_V, "logit_scale": self.logit_scale, "softcap": self.softcap}


@dataclass(frozen=True)
class FrozenBase:
    """The base model beside the one that is trained, for ``kl_to_base``.

    It costs the memory of its weights, and one more forward pass of every micro-batch.
    """

    forward: Callable[[MicroBatch], Tensor]
    """Hidden states [B, T, D] of a micro-batch, without dropout."""
    head: OutputHead

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Callable[[slice], Tensor]:
        """Its logits at the supervised positions of ``batch``, some of them at a time."""
        where = batch.supervised
        hidden_ND = self.forward(batch)[where.row_N, where.column_N]
        return lambda chunk: head_logits(hidden_ND[chunk], self.head.weight_VD, **self.head.options)


@dataclass(frozen=True)
class WorkerGroup:
    """Who computes what; W = 1 needs no process group."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, *tensors: Tensor) -> None:
        """Add every tensor over the workers, in place."""
        if self.world_size > 1:
            _as_one_vector(tensors, dist.all_reduce)

    def gather(self, own: Any) -> list[Any]:
        """What every worker has of some picklable kind, by rank."""
        if self.world_size == 1:
            return [own]
        together: list[Any] = [None] * self.world_size
        dist.all_gather_object(together, own)
        return together

    def broadcast_(self, *tensors: Tensor, source: int) -> None:
        """Give every worker the tensors of worker ``source``, in place."""
        if self.world_size > 1:
            _as_one_vector(tensors, functools.partial(dist.broadcast, src=source))


def _as_one_vector(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run ``collective`` once, in place: to start it costs more than to copy small tensors."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    collective(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, divided where more than ``_BUCKET_ELEMENTS`` would come together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in [*bucket, tensor]) > _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@dataclass(frozen=True)
class StepResult:
    """What one step did; sums are over the global batch."""

    step: int
    sample_ids: list[str]
    loss: float
    """Mean over supervised positions, in nats."""
    anchor: float
    """Mean over prompt positions of the KL to the base model, in nats."""
    grad_norm: float
    lr: float
    num_supervised: int
    num_active: int
    num_tokens: int
    num_processed: int
    num_padded: int
    """Token slots of the forward passes."""
    num_shared: int
    """Processed tokens of prefixes that another sequence of the micro-batch brought along."""
    mean_candidates: float
    """Mean size of the candidate sets of active supervised positions."""
    is_applied: bool
    """False if the gradient was not finite and the update was left out."""
    bad_steps: int
    """Steps in a row, this one the last, whose update was left out."""


@dataclass(frozen=True)
class Gradients:
    """What the backward passes of one global batch leave beside the gradients themselves."""

    loss_sum: float
    anchor_sum: float
    micro_batches: list[MicroBatch]


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: int,
    schedule: Literal["constant", "linear", "cosine"],
) -> float:
    """The learning rate of ``step`` (from 0): a linear warm-up, then the schedule.

    Linear and cosine reach 0 at ``steps``, one after the last.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order never above the peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The random seed of one micro-batch, whoever computes it."""
    return ((seed * 1_000_003 + step) * 1_009 + index) % 2**63


def loss_sums(
    hidden_BTD: Tensor,
    head: OutputHead,
    batch: MicroBatch,
    settings: LossSettings,
    tail: tuple[Tensor, Tensor] | None,
    base_logits: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss over supervised and the summed KL over prompt positions, in nats."""
    tail_ids, tail_logweights = tail if tail is not None else (None, None)
    options = head.options
    where = batch.supervised
    hidden_ND = hidden_BTD[where.row_N, where.column_N]
    match settings.loss:
        case "restricted":
            main = restricted_cross_entropy(
                hidden_ND,
                head.weight_VD,
                where.candidates,
                tail_ids=tail_ids,
                tail_logweights=tail_logweights,
                **options,
            )
        case "soft":
            main = soft_cross_entropy(hidden_ND, head.weight_VD, where.candidates, **options)
        case "full":
            main = full_cross_entropy(
                hidden_ND, head.weight_VD, where.candidates.gold_ids, **options
            )
        case "active_only":
            main = active_only_cross_entropy(hidden_ND, head.weight_VD, where.candidates, **options)
        case "dft":
            main = dft_cross_entropy(
                hidden_ND, head.weight_VD, where.candidates.gold_ids, **options
            )
        case "kl_to_base":
            if base_logits is None:
                raise ValueError("the loss kl_to_base needs the base model, got none")
            main = kl_regularized_cross_entropy(
                hidden_ND,
                head.weight_VD,
                where.candidates.gold_ids,
                base_logits,
                kl_weight=settings.base_kl_weight,
                **options,
            )
    if settings.anchor_weight == 0 or not len(batch.anchored.row_N):
        return main, main.new_zeros(())
    where = batch.anchored
    anchor = anchor_kl(
        hidden_BTD[where.row_N, where.column_N],
        head.weight_VD,
        where.candidates,
        tail_ids=tail_ids,
        tail_logweights=tail_logweights,
        **options,
    )
    return main, anchor


def compute_gradients(
    forward: Callable[[MicroBatch], Tensor],
    head: OutputHead,
    parameters: Sequence[nn.Parameter],
    micro_batches: list[MicroBatch],
    settings: LossSettings,
    group: WorkerGroup,
    *,
    step: int,
    reduction: Literal["strict", "fast"],
    autocast: torch.dtype | None = None,
    probe: Callable[[Tensor, MicroBatch], None] | None = None,
    base: FrozenBase | None = None,
) -> Gradients:
    """Leave the gradient of the global batch in ``parameters``, the same on every worker.

    Args:
        forward: hidden states [B, T, D] of a micro-batch.
        head: the output head.
        parameters: what is trained.
        micro_batches: all M parts of the global batch, on every worker.
        settings: the loss.
        group: this worker and the others.
        step: optimizer step, from 0; seeds dropout and the sampled tail.
        reduction: see the module.
        autocast: type of the forward pass, none for that of the weights.
        probe: called with the hidden states of the first part that has an active supervised
            position, on the worker that computes that part.
        base: the base model, which ``kl_to_base`` needs.
    """
    device = head.weight_VD.device
    supervised = sum(batch.num_supervised for batch in micro_batches)
    prompt = max(1, sum(batch.num_prompt for batch in micro_batches))
    tail = None
    if settings.tail_samples:
        vocabulary_size = head.weight_VD.shape[0]
        num_samples = min(settings.tail_samples, vocabulary_size)
        ids, logweights = draw_tail(num_samples, vocabulary_size, seed=settings.seed, step=step)
        tail = ids.to(device), logweights.to(device)
    # With one worker backward itself adds the micro-batches in order, each to ``.grad`` at once,
    # but the head's gradient comes in several parts: of candidates, tail and anchor.
    ordered: Sequence[Tensor] = []
    if reduction == "strict":
        ordered = [p for p in parameters if group.world_size > 1 or p is head.weight_VD]
    total: dict[Tensor, Tensor] = {}
    sums_M2 = torch.zeros(len(micro_batches), 2, dtype=torch.float64, device=device)
    busy = [index for index, batch in enumerate(micro_batches) if len(batch.input_ids_BT)]
    probed = next((i for i, batch in enumerate(micro_batches) if len(batch.supervised.row_N)), None)
    for parameter in parameters:
        parameter.grad = None
    for wave in waves(busy, group.world_size):
        if group.rank < len(wave):
            index = wave[group.rank]
            batch = micro_batches[index].to(device)
            torch.manual_seed(micro_batch_seed(settings.seed, step, index))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                hidden_BTD = forward(batch)
                base_logits = base.logits(batch) if base is not None else None
            if probe is not None and index == probed:
                probe(hidden_BTD.detach(), batch)
            main, anchor = loss_sums(hidden_BTD, head, batch, settings, tail, base_logits)
            loss = main / supervised + settings.anchor_weight * anchor / prompt
            loss.backward()  # type: ignore[no-untyped-call]
            sums_M2[index, 0] = main.detach()
            sums_M2[index, 1] = anchor.detach()
        _add_in_order(total, ordered, group, sources=len(wave))
    for tensor, gradient in total.items():
        tensor.grad = gradient
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if reduction == "fast":
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            group.sum_(*bucket)
    group.sum_(sums_M2)  # each row is zero on all workers but one, so this is exact
    loss_sum, anchor_sum = sums_M2.sum(dim=0).tolist()
    return Gradients(loss_sum, anchor_sum, micro_batches)


def waves(parts: Sequence[int], world_size: int) -> list[Sequence[int]]:
    """``parts`` in rounds: in each, the worker of rank r computes the one at place r, if any."""
    return [parts[first : first + world_size] for first in range(0, len(parts), world_size)]


def _add_in_order(
    total: dict[Tensor, Tensor], tensors: Sequence[Tensor], group: WorkerGroup, *, sources: int
) -> None:
    """Add the gradients of the first ``sources`` workers to ``total``, in turn, and clear them."""
    for bucket in _buckets(tensors):
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
            tensor.grad = None


def train(
    forward: Callable[[MicroBatch], Tensor],
    head: OutputHead,
    optimizer: torch.optim.Optimizer,
    batch_of_step: Callable[[int], list[Sample]],
    settings: LossSettings,
    group: WorkerGroup,
    *,
    first_step: int,
    steps: int,
    num_micro_batches: int,
    lr_of_step: Callable[[int], float],
    reduction: Literal["strict", "fast"] = "strict",
    max_grad_norm: float | None = None,
    max_bad_steps: int = 5,
    autocast: torch.dtype | None = None,
    trim: bool = True,
    attention_cost: float = math.inf,
    probe: Callable[[int, Tensor, MicroBatch], None] | None = None,
    bad_steps: int = 0,
    base: FrozenBase | None = None,
    penalize: Callable[[], None] | None = None,
) -> Iterator[StepResult]:
    """Take the steps ``first_step`` .. ``steps - 1`` and yield after each.

    ``bad_steps`` steps before the first one were left out in a row; see ``compute_gradients`` for
    ``probe``, which is called with the step as well, and for ``base``, ``collate`` for
    ``attention_cost``. ``penalize`` adds the gradient of a penalty on the weights to theirs.

    Raises:
        FloatingPointError: ``max_bad_steps`` steps in a row had no finite loss and gradient.
    """
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(first_step, steps):
        samples = batch_of_step(step)
        activity = settings.activity
        parts = deal(samples, num_micro_batches, activity)
        micro_batches = [
            collate([samples[i] for i in part], activity, trim=trim, attention_cost=attention_cost)
            for part in parts
        ]

        gradients = compute_gradients(
            forward,
            head,
            parameters,
            micro_batches,
            settings,
            group,
            step=step,
            reduction=reduction,
            autocast=autocast,
            probe=functools.partial(probe, step) if probe is not None else None,
            base=base,
        )
        if penalize is not None:
            penalize()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        grad_norm = float(norm)
        lr = lr_of_step(step)
        is_finite = math.isfinite(grad_norm) and math.isfinite(gradients.loss_sum)
        if is_finite:
            bad_steps = 0
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            optimizer.step()
        else:
            bad_steps += 1
            if bad_steps >= max_bad_steps:
                raise FloatingPointError(
                    f"{bad_steps} steps in a row without a finite loss and gradient (step {step}: "
                    f"loss sum {gradients.loss_sum}, gradient norm {grad_norm}); lower train.lr, "
                    "or look for broken samples at this step in ledger.jsonl"
                )
        optimizer.zero_grad(set_to_none=True)
        yield _summarize(step, samples, gradients, grad_norm, lr, bad_steps)


def _summarize(
    step: int,
    samples: list[Sample],
    gradients: Gradients,
    grad_norm: float,
    lr: float,
    bad_steps: int,
) -> StepResult:
    batches = gradients.micro_batches
    supervised = sum(batch.num_supervised for batch in batches)
    prompt = sum(batch.num_prompt for batch in batches)
    active = sum(len(batch.supervised.row_N) for batch in batches)
    candidates = sum(len(batch.supervised.candidates.token_ids) for batch in batches)
    return StepResult(
        step=step,
        sample_ids=[sample.sample_id for sample in samples],
        loss=gradients.loss_sum / supervised,
        anchor=gradients.anchor_sum / max(1, prompt),
        grad_norm=grad_norm,
        lr=lr,
        num_supervised=supervised,
        num_active=active,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_processed=sum(batch.num_processed for batch in batches),
        num_padded=sum(batch.input_ids_BT.numel() for batch in batches),
        num_shared=sum(batch.num_shared for batch in batches),
        mean_candidates=candidates / max(1, active),
        is_applied=bad_steps == 0,
        bad_steps=bad_steps,
    )
