"""A model in shards (FSDP2): of every weight, each worker holds some rows, with their moments.

``torch.distributed.fsdp.fully_shard`` has each layer gather its weights before it computes, and
hand back the sum of all workers' gradients, to each worker the part of its own rows. It divides
dimension 0 as ``torch.chunk`` does; a worker may be left without any rows of a small tensor.

The optimizer does not see any of this: it takes the local rows as ordinary tensors
(:attr:`Shard.own`), which share memory with what FSDP gathers. What it has to know of whole tensors
it gets by sums over the workers, see ``reduce_dots`` of MoClip.

Where the forward pass runs under autocast of bf16, layers gather in bf16 what it multiplies: half
of the traffic and of the memory, and no short copy of every layer that waits for the backward pass.
The numbers are those of autocast over float32 weights, which it rounds alike. All else of a layer,
such as norms, is gathered in float32 with the body. Shards, sums of gradients and moments are
float32.

Shards may be offloaded: they, their gradients and moments are in the host's memory then, pinned,
and the optimizer's step is made there. A device holds what is gathered and the activations.

Embedding and output head are in ``sharded_rows``, since a step needs a part of them alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lrmc_ray.method.microbatch import NO_CANDIDATES, Activity, MicroBatch, Sample, collate
from lrmc_ray.method.names import HOST_AND_GPU
from lrmc_ray.method.sharded_rows import IDLE_TOKEN, ShardedVocabulary, bounds_of
from lrmc_ray.method.workers import WorkerGroup


@dataclass(frozen=True)
class Shard:
    """What one worker holds of a parameter."""

    own: nn.Parameter
    """The rows that are here, maybe none."""
    shape: torch.Size
    """Of the whole."""
    first: int
    """Number of the first row that is here."""

    @property
    def first_element(self) -> int:
        """Place of the first element that is here, among those of the whole."""
        return self.first * math.prod(self.shape[1:])


def mesh_of(group: WorkerGroup, device: torch.device) -> DeviceMesh:
    """All workers in a row. A worker alone makes the process group that FSDP wants."""
    if not dist.is_initialized():
        if group.world_size > 1:
            raise RuntimeError("several workers need torch.distributed.init_process_group first")
        backend = HOST_AND_GPU if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (group.world_size,))


class ShardedModel:
    """The weights of a model, in shards."""

    def __init__(
        self,
        body: nn.Module,
        layers: Iterable[nn.Module],
        vocabulary: ShardedVocabulary,
        group: WorkerGroup,
        *,
        device: torch.device,
        ignored: Iterable[nn.Parameter] = (),
        short: Iterable[nn.Parameter] = (),
        offload: bool = False,
    ) -> None:
        """Shard ``body`` in place.

        Args:
            body: what is called for hidden states. Its parameters may be on the meta device: then
                no worker ever holds all of it, and the shards have no values yet.
            layers: parts of it that gather their weights by themselves, one after the other.
            vocabulary: embedding and output head.
            group: this worker and the others.
            device: where everything is.
            ignored: parameters that stay as they are, such as those that stand in the model in
                place of what ``vocabulary`` holds.
            short: parameters of the layers that are gathered in bf16. Every pass must be under
                autocast then.
            offload: whether shards are in the host's memory, else they are on ``device``.
        """
        self.vocabulary = vocabulary
        self.device = device
        self.mesh = mesh_of(group, device)
        self.group = group
        self._idle = _idle_batch().to(device)
        self._whole: list[tuple[DTensor, Shard]] = []
        policy = OffloadPolicy()
        if offload:
            policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for unit in _units(body, list(layers), self.mesh, set(ignored), set(short), policy):
            # A sum, since losses are divided by the numbers of the global batch. gloo has no mean.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # One worker may have no gradient where others do: of an expert, or if it is idle.
            unit.set_reduce_scatter_unused_params(True)
        # Rows of what is on the meta device have no values yet, and get memory of their own.
        if any(parameter.is_meta for parameter in body.parameters()):
            home = torch.device("cpu") if offload else device
            body._apply(  # type: ignore[no-untyped-call]
                lambda t: torch.empty_like(t, device=home) if t.is_meta else t
            )

    def shard_of(self, whole: Tensor) -> Shard:
        """This worker's rows of a parameter of the body, in the memory that FSDP gathers from."""
        assert isinstance(whole, DTensor)
        own = nn.Parameter(whole.to_local().detach(), whole.requires_grad)
        first = bounds_of(whole.shape[0], self.group.world_size)[self.group.rank]
        shard = Shard(own, whole.shape, first)
        self._whole.append((whole, shard))
        return shard

    def run_idle(self, forward: Callable[[MicroBatch], Tensor]) -> Callable[[], None]:
        """Take part in a forward pass of the others, with one token; returns its backward pass.

        The gradient is zero. Without one there is no backward pass.
        """
        hidden_BTD = forward(self._idle)

        def backward() -> None:
            if hidden_BTD.requires_grad:
                (hidden_BTD.sum() * 0.0).backward()  # type: ignore[no-untyped-call]

        return backward

    def gradients_of(self, value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """This worker's rows of the gradients of ``value``, summed over all; they ask together.

        Args:
            value: a number.
            parameters: some of the body's.
        """
        self.clear_gradients()
        asked = {id(parameter) for parameter in parameters}
        hooks = [
            whole.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
            for whole, _ in self._whole
            if whole.requires_grad and id(whole) not in asked
        ]
        value.backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        found = [p.grad.to_local() if isinstance(p.grad, DTensor) else None for p in parameters]
        self.clear_gradients()
        return found

    def clear_gradients(self) -> None:
        """Forget the gradients of the step before."""
        for whole, shard in self._whole:
            whole.grad = shard.own.grad = None
        for rows in self.vocabulary.weights:
            rows.own_XD.grad = None

    def take_gradients(self) -> None:
        """Give every shard the gradient that FSDP left, and the vocabulary its own; together."""
        self.vocabulary.reduce()
        for whole, shard in self._whole:
            if whole.grad is not None:
                assert isinstance(whole.grad, DTensor)
                shard.own.grad = whole.grad.to_local()


def _units(
    body: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    ignored: set[nn.Parameter],
    short: set[nn.Parameter],
    offload: OffloadPolicy,
) -> list[FSDPModule]:
    """What is gathered at a time: layers, and the body with what they leave."""
    exact = MixedPrecisionPolicy()
    in_layers = exact
    if short:
        # Activations stay as autocast has them: the residual stream in float32.
        in_layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def sharded(module: nn.Module, policy: MixedPrecisionPolicy, but: set[nn.Parameter]) -> Any:
        # Without being told, the body would keep its own weights behind a pass without gradients,
        # and not see what a checkpoint brings.
        return fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=but,
        )

    if not short:
        units = [sharded(layer, exact, ignored) for layer in layers]
        return [*units, sharded(body, exact, ignored)]
    # The body first: it takes nothing of a layer that is sharded already.
    units = [sharded(body, exact, ignored | short)]
    taken = {p for p in body.parameters() if isinstance(p, DTensor)}
    return [*units, *(sharded(layer, in_layers, ignored | taken) for layer in layers)]


def _forget_gradient(whole: Tensor) -> None:
    whole.grad = None


def _idle_batch() -> MicroBatch:
    """One token, without a loss."""
    sample = Sample(
        sample_id="",
        input_ids_T=IDLE_TOKEN,
        positions_P=torch.zeros(0, dtype=torch.int64),
        is_supervised_P=torch.zeros(0, dtype=torch.bool),
        candidates=NO_CANDIDATES,
    )
    return collate([sample], Activity(supervised=1, prompt=1), trim=False)
