"""Stage 1 without Ray: fixed micro-batches, one gradient, one update.

    L = (sum over supervised positions of the loss) / number of supervised positions
      + anchor_weight * (sum over prompt positions of the anchor) / number of prompt positions

Both numbers are those of the whole global batch, over all workers and micro-batches, so the result
does not depend on how the batch is divided. A global batch is M fixed micro-batches, dealt in turn
to the W workers, each with its own random seed. Those without an active position are left out.

- ``strict``: the gradients of the micro-batches are added in the order 0 .. M-1 on every worker.
  Floating-point addition is not associative, so only a fixed order gives the same bits for every W.
- ``fast``: each worker adds its own, then one all-reduce; equal up to rounding.

With a model in shards (``shards``) every backward pass adds up the gradients of all workers, so all
of them make their passes together, and it is always ``fast``.
"""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel, LossSettings, loss_sums
from lrmc_ray.method.microbatch import Activity, MicroBatch, Sample, divide
from lrmc_ray.method.names import ON_CANDIDATES, Reduction
from lrmc_ray.method.shards import ShardedModel
from lrmc_ray.method.shared_prefix import SharedPrefix, share_prefix
from lrmc_ray.method.step_result import Gradients, StepResult, summarize
from lrmc_ray.method.vocabulary_rows import HeadRows
from lrmc_ray.method.workers import WorkerGroup, add_in_order, sum_gradients, waves

_Prepared = TypeVar("_Prepared")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How steps are taken; the defaults are the plain way."""

    num_micro_batches: int = 1
    """M, at least the largest number of workers."""
    reduction: Reduction = "strict"
    """See the module."""
    autocast: torch.dtype | None = None
    """Type of the forward pass, None for that of the weights."""
    trim: bool = True
    """Leave out tokens without an influence on the gradient, see ``collate``."""
    attention_cost: float = math.inf
    """What it costs a token to see one more, see ``collate``; infinity pads every sequence."""
    pack_up_to: float = math.inf
    """Tokens of the longest sequence that may be packed, see ``lay_out``."""
    share_prefix_up_to: float = 0
    """Tokens of the longest packed micro-batch of which the beginning that all samples of the step
    share is computed apart, once; see ``shared_prefix``. 0 where the model cannot, and with a
    ``base`` or a ``balance_loss``, which see a micro-batch whole."""
    lengths: int = 1
    """Rows of a micro-batch are filled up with padding to a multiple of so many tokens, so that
    shapes repeat. Not where a beginning is computed apart."""
    plans_losses: bool = False
    """Sort the candidates for a GPU while batches are made, and put batches into pinned memory; see
    ``fast.loss_plan``. Without it the host waits for the GPU at a loss on candidates, whether by
    kernels or not."""
    prepares_ahead: bool = False
    """Make the batch of the next step, in a thread, while this one is computed. Only where a batch
    does not depend on the weights."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm; None leaves them."""
    max_bad_steps: int = 5
    """Steps in a row without a finite loss and gradient after which training fails."""
    base: LanguageModel | None = None
    """The base model, frozen and without dropout, for losses of ``NEED_BASE``. It costs the memory
    of its weights, and one more forward pass of every micro-batch."""
    probe: Callable[[int, Tensor, MicroBatch], None] | None = None
    """Called with the step and the hidden states of the first micro-batch that has an active
    supervised position, on the worker that computes it."""
    probes_at: Callable[[int], bool] = lambda step: False
    """Whether ``probe`` looks at all rows of the head at a step, which are gathered then where they
    are in shards."""
    balance_loss: Callable[[MicroBatch], Tensor | None] | None = None
    """A loss of the forward pass over a micro-batch, a mean over its tokens: that of
    the routers of a mixture of experts. Micro-batches count by their tokens."""
    penalize: Callable[[], None] | None = None
    """Adds the gradient of a penalty on the weights to theirs."""
    after_update: Callable[[float], None] | None = None
    """Called with the learning rate behind every update."""

    def divide(self, samples: Sequence[Sample], activity: Activity) -> list[MicroBatch]:
        """The fixed micro-batches of a global batch."""
        batches = divide(
            samples,
            self.num_micro_batches,
            activity,
            trim=self.trim,
            attention_cost=self.attention_cost,
            pack_up_to=self.pack_up_to,
        )
        if self.share_prefix_up_to and math.isfinite(self.attention_cost):
            batches = share_prefix(batches, self.share_prefix_up_to, self.pack_up_to)
        if self.lengths > 1:
            batches = [batch.filled_up(self.lengths) for batch in batches]
        return [batch.planned() for batch in batches] if self.plans_losses else batches


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The random seed of one micro-batch, whoever computes it."""
    return ((seed * 1_000_003 + step) * 1_009 + index) % 2**63


def compute_gradients(
    model: LanguageModel,
    parameters: Sequence[nn.Parameter],
    micro_batches: list[MicroBatch],
    loss: LossSettings,
    options: StepOptions,
    group: WorkerGroup,
    *,
    step: int,
) -> Gradients:
    """Leave the gradient of the global batch in ``parameters``, the same on every worker.

    Args:
        model: Gives the hidden states of a micro-batch, and the head for them.
        parameters: What is trained.
        micro_batches: All M parts of the global batch, on every worker.
        loss: Which loss.
        options: How; see there.
        group: This worker and the others.
        step: Optimizer step, from 0; seeds dropout and the sampled tail.
    """
    if model.shards is not None:
        return _gradients_in_shards(
            model, model.shards, micro_batches, loss, options, group, step=step
        )
    head = model.rows.head if model.rows else model.head
    device = head.weight_VD.device
    one = _Pass(model, model.rows, head, micro_batches, loss, options, step)
    total: dict[Tensor, Tensor] = {}
    sums_M2 = torch.zeros(len(micro_batches), 2, dtype=torch.float64, device=device)
    busy = _busy(micro_batches)
    for parameter in parameters:
        parameter.grad = None
    prefix = _run_prefix(model, micro_batches, loss, options, step)
    leaves = prefix.leaves if prefix and options.reduction == "strict" else []
    ordered = _added_in_order(parameters, head, options, group)
    for wave in waves(busy, group.world_size):
        if group.rank < len(wave):
            index = wave[group.rank]
            sums_M2[index] = one.run(index, prefix.hidden_states if prefix else model.forward)
        add_in_order(total, [*ordered, *leaves], group, sources=len(wave))
    if prefix:
        _end_prefix(prefix, total, ordered, group, options)
    _leave_gradients(parameters, total)
    if options.reduction == "fast":
        sum_gradients(parameters, group)
    return _summed(sums_M2, micro_batches, group)


def _gradients_in_shards(
    model: LanguageModel,
    shards: ShardedModel,
    micro_batches: list[MicroBatch],
    loss: LossSettings,
    options: StepOptions,
    group: WorkerGroup,
    *,
    step: int,
) -> Gradients:
    """The same, each worker with the gradient of its own rows; arguments as there."""
    shards.clear_gradients()
    tail = loss.tail_on_host(step, model.head)
    whole_head = loss.loss not in ON_CANDIDATES or options.probes_at(step)
    sums_M2 = torch.zeros(len(micro_batches), 2, dtype=torch.float64, device=shards.device)
    with contextlib.ExitStack() as gathered:
        rows = gathered.enter_context(
            shards.vocabulary.of_step(micro_batches, tail, whole_head=whole_head)
        )
        if options.base is not None:
            base = gathered.enter_context(options.base.with_whole_head())
            options = dataclasses.replace(options, base=base)
        one = _Pass(model, rows, rows.head, micro_batches, loss, options, step)
        for wave in waves(_busy(micro_batches), group.world_size):
            if group.rank < len(wave):
                index = wave[group.rank]
                sums_M2[index] = one.run(index, model.forward)
            else:
                one.run_idle(shards)
        shards.take_gradients()
    return _summed(sums_M2, micro_batches, group)


class _Pass:
    """Forward and backward through one micro-batch of a step."""

    def __init__(
        self,
        model: LanguageModel,
        rows: HeadRows | None,
        head: OutputHead,
        micro_batches: Sequence[MicroBatch],
        loss: LossSettings,
        options: StepOptions,
        step: int,
    ) -> None:
        self._model, self._rows, self._head = model, rows, head
        self._micro_batches, self._loss, self._options = micro_batches, loss, options
        self._step = step
        self._num_supervised = max(1, sum(batch.num_supervised for batch in micro_batches))
        self._num_prompt = max(1, sum(batch.num_prompt for batch in micro_batches))
        tail = loss.tail_of_step(step, head)
        self._tail = rows.tail(tail) if tail and rows else tail
        found = (i for i, batch in enumerate(micro_batches) if len(batch.supervised.row_N))
        self._probed = next(found, None)

    def run(self, index: int, forward: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Add to the gradients; returns the sums of loss and anchor, [2]."""
        device = self._head.weight_VD.device
        loss, options = self._loss, self._options
        batch = self._micro_batches[index].to(device)
        torch.manual_seed(micro_batch_seed(loss.seed, self._step, index))
        with torch.autocast(device.type, options.autocast, options.autocast is not None):
            hidden_BTD = forward(batch)
            base_logits = options.base.frozen_logits(batch) if options.base else None
        if options.probe is not None and index == self._probed:
            options.probe(self._step, hidden_BTD.detach(), batch)
        if self._rows:
            batch = self._rows.batch(batch)
        main, anchor = loss_sums(hidden_BTD, self._head, batch, loss, self._tail, base_logits)
        mean = main / self._num_supervised + loss.anchor_weight * anchor / self._num_prompt
        (mean + _balance_loss(options, batch, self._micro_batches, index)).backward()  # type: ignore[no-untyped-call]
        return torch.stack([main, anchor]).detach()

    def run_idle(self, shards: ShardedModel) -> None:
        """Take part in the passes of the other workers."""
        device, options = shards.device, self._options
        base = options.base
        with torch.autocast(device.type, options.autocast, options.autocast is not None):
            backward = shards.run_idle(self._model.forward)
            if base is not None and base.shards is not None:
                with torch.no_grad():
                    base.shards.run_idle(base.forward)
            backward()


def _busy(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Those with a token."""
    return [index for index, batch in enumerate(micro_batches) if len(batch.input_ids_BT)]


def _summed(sums_M2: Tensor, micro_batches: list[MicroBatch], group: WorkerGroup) -> Gradients:
    group.sum_(sums_M2)  # each row is zero on all workers but one, so this is exact
    loss_sum, anchor_sum = sums_M2.sum(dim=0).tolist()
    return Gradients(loss_sum, anchor_sum, micro_batches)


def _leave_gradients(parameters: Sequence[nn.Parameter], total: dict[Tensor, Tensor]) -> None:
    for parameter in parameters:
        if parameter in total:
            parameter.grad = total[parameter]
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _run_prefix(
    model: LanguageModel,
    micro_batches: Sequence[MicroBatch],
    loss: LossSettings,
    options: StepOptions,
    step: int,
) -> SharedPrefix | None:
    """The beginning that all micro-batches share, where they do; every worker runs it."""
    batch = next((batch for batch in micro_batches if batch.num_prefix), None)
    if batch is None:
        return None
    assert model.split is not None
    device = model.head.weight_VD.device
    torch.manual_seed(micro_batch_seed(loss.seed, step, len(micro_batches)))
    with torch.autocast(device.type, options.autocast, options.autocast is not None):
        return SharedPrefix(model.split, batch.input_ids_BT[:, : batch.num_prefix].to(device))


def _end_prefix(
    prefix: SharedPrefix,
    total: dict[Tensor, Tensor],
    ordered: Sequence[Tensor],
    group: WorkerGroup,
    options: StepOptions,
) -> None:
    """Add the gradients of the beginning to those of the micro-batches."""
    if options.reduction == "fast":
        prefix.backward()  # each worker with the part of its own: the sum comes later
        return
    for leaf in prefix.leaves:
        leaf.grad = total[leaf]
    if group.rank == 0:
        prefix.backward()
    add_in_order(total, ordered, group, sources=1)


def _added_in_order(
    parameters: Sequence[nn.Parameter],
    head: OutputHead,
    options: StepOptions,
    group: WorkerGroup,
) -> Sequence[Tensor]:
    """Parameters whose gradients of the micro-batches are kept apart and added in their order.

    With one worker backward itself adds the micro-batches in order, each to ``.grad`` at once, but
    the head's gradient comes in several parts: of candidates, tail and anchor.
    """
    if options.reduction != "strict":
        return []
    return [p for p in parameters if group.world_size > 1 or p is head.weight_VD]


def _balance_loss(
    options: StepOptions, batch: MicroBatch, micro_batches: Sequence[MicroBatch], index: int
) -> Tensor | float:
    """The part of ``batch``, the one at ``index``, in the mean over all tokens."""
    found = options.balance_loss(batch) if options.balance_loss is not None else None
    if found is None:
        return 0.0
    # Those of ``batch`` may lie on a GPU, for which the host would wait.
    tokens_M = [int(other.is_token_BT.sum()) for other in micro_batches]
    return found * (tokens_M[index] / sum(tokens_M))


def train(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch_of_step: Callable[[int], list[Sample]],
    loss: LossSettings,
    options: StepOptions,
    group: WorkerGroup,
    *,
    steps: range,
    lr_of_step: Callable[[int], float],
    bad_steps: int = 0,
) -> Iterator[StepResult]:
    """Take the given steps and yield after each.

    Args:
        model: Gives the hidden states of a micro-batch, and the head for them.
        optimizer: Of all that is trained.
        batch_of_step: The global batch of a step.
        loss: Which loss.
        options: How; see there.
        group: This worker and the others.
        steps: Which ones; a run begins with step 0.
        lr_of_step: The learning rate of a step.
        bad_steps: How many steps before the first of these were left out in a row.

    Raises:
        FloatingPointError: ``max_bad_steps`` steps in a row had no finite loss and gradient.
    """
    parameters = [p for g in optimizer.param_groups for p in g["params"]]

    def prepare(step: int) -> tuple[int, list[Sample], list[MicroBatch]]:
        samples = batch_of_step(step)
        return step, samples, options.divide(samples, loss.activity)

    for step, samples, micro_batches in _one_ahead(prepare, steps, options.prepares_ahead):
        gradients = compute_gradients(
            model, parameters, micro_batches, loss, options, group, step=step
        )
        if options.penalize is not None:
            options.penalize()
        over = group if model.shards is not None else None
        grad_norm = clip_gradients(parameters, options.max_grad_norm, over)
        lr = lr_of_step(step)
        if math.isfinite(grad_norm) and math.isfinite(gradients.loss_sum):
            bad_steps = 0
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            optimizer.step()
            if options.after_update is not None:
                options.after_update(lr)
        else:
            bad_steps += 1
            if bad_steps >= options.max_bad_steps:
                raise FloatingPointError(
                    f"{bad_steps} steps in a row without a finite loss and gradient (step {step}: "
                    f"loss sum {gradients.loss_sum}, gradient norm {grad_norm}); lower train.lr, "
                    "or look for broken samples at this step in ledger.jsonl"
                )
        optimizer.zero_grad(set_to_none=True)
        yield summarize(step, samples, gradients, grad_norm, lr, bad_steps)


def _one_ahead(
    prepare: Callable[[int], _Prepared], steps: range, prepares_ahead: bool
) -> Iterator[_Prepared]:
    """What ``prepare`` returns for each step; where asked, it works on the next one meanwhile."""
    if not prepares_ahead:
        yield from map(prepare, steps)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming: deque[Future[_Prepared]] = deque()
        for step in steps:
            coming.append(pool.submit(prepare, step))
            if len(coming) > 1:
                yield coming.popleft().result()
        for prepared in coming:
            yield prepared.result()


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float | None, shards: WorkerGroup | None = None
) -> float:
    """The norm of all gradients together, which are then scaled down to ``max_norm``.

    Args:
        parameters: Those with the gradients.
        max_norm: None leaves them.
        shards: The workers that hold the other rows of the parameters, where there are some.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if shards is not None:
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        shards.sum_(squares)
        norm = squares.sqrt().to(norm.dtype)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
