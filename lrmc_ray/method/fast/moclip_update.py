"""MoClip's step in fewer passes over memory and fewer calls; the plain way is ``moclip``.

- On a CPU, each float32 tensor goes through the two loops of ``moclip_kernel``.
- Tensors of other dtypes and layouts there go piece by piece through torch's operators, while the
  piece is in the cache.
- On a GPU with Triton, the kernels of ``moclip_triton`` take all of them, if all are contiguous.
- Elsewhere, tensors whose moments are bf16 go the plain way.
- Elsewhere many tensors go through an operation in one call: a call costs more there than its
  arithmetic, and a model has hundreds of tensors.

By torch's operators the weights are those of the plain way to the last bit, but for the dot
products of tensors in several pieces, whose float64 sums are rounded elsewhere.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrmc_ray.method.angle_cap import CappedGradient
from lrmc_ray.method.dot_products import dot_products
from lrmc_ray.method.fast import moclip_kernel, moclip_launch
from lrmc_ray.method.moclip import MoClip, is_cautious, update_
from lrmc_ray.method.names import SecondMoment

_Item = TypeVar("_Item")

CACHED_BYTES = 1 << 19
"""Of one operand per thread that a CPU takes through all operations at a time: operands and
temporaries stay in its caches, so that main memory is passed over once. Less costs more calls."""
DEVICE_BYTES = 1 << 27
"""The same on other devices, where only the memory of the temporaries matters."""


class FastMoClip(MoClip):
    """:class:`lrmc_ray.method.moclip.MoClip`, sooner."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """See :class:`lrmc_ray.method.moclip.MoClip`."""
        self._launches = moclip_launch.Launches()
        super().__init__(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        # Its tables are of this optimizer's own tensors.
        return {**super().__getstate__(), "_launches": moclip_launch.Launches()}

    def take_step(self) -> None:
        """Cap the angles of all groups, then move the weights."""
        if not self._can_launch():
            super().take_step()
            return
        stepped = [param for param in self.params() if param.grad is not None]
        for param in stepped:
            self.state[param]["step"] += 1
        num_rows = sum(len(group["params"]) for group in self.param_groups)
        is_capped = any(group["clip"] != "none" for group in self.param_groups)
        self._launches.step(
            list(self._updates()),
            num_rows,
            sum(len(group["params"]) for group in self.param_groups if is_global(group)),
            self._angles.rows(num_rows, stepped[0].device),
            self.reduce_dots if is_capped else None,
        )

    def _can_launch(self) -> bool:
        """Whether the kernels take every parameter that has a gradient, on one device."""
        kinds = [is_global(group) for group in self.param_groups]
        if self.reduce_dots is not None and kinds != sorted(kinds, reverse=True):
            return False  # a worker without gradients adds up rows in the order of the groups
        found = [param for param in self.params() if param.grad is not None]
        return len({param.device for param in found}) == 1 and all(
            moclip_launch.can_take(param, state["exp_avg"], state["exp_avg_sq"])
            for param in found
            for state in (self.state[param],)
        )

    def _updates(self) -> Iterator[moclip_launch.Update]:
        """Of all parameters with a gradient; their rows begin with those of one angle."""
        groups = list(zip(self.param_groups, self.rounding_keys(), strict=True))
        row = 0
        for group, keys in sorted(groups, key=lambda found: not is_global(found[0])):
            for param, key in zip(group["params"], keys, strict=True):
                if param.grad is not None:
                    state = self.state[param]
                    yield moclip_launch.Update(
                        row,
                        (param, param.grad, state["exp_avg"], state["exp_avg_sq"]),
                        step_scalars(group, state["step"].tolist()),
                        key,
                        group["clip"],
                        math.radians(group["delta_max"]),
                        group["betas"][0],
                        is_global(group),
                        group["second_moment"] == "capped",
                        is_cautious(group),
                    )
                row += 1

    def dots_of(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """``dot_products`` of the gradient and the momentum of each parameter."""
        found: dict[int, Tensor] = {}
        together: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for index, param in enumerate(params):
            assert param.grad is not None
            grad, exp_avg = param.grad, self.state[param]["exp_avg"]
            if moclip_kernel.can_take(param, exp_avg):
                found[index] = moclip_kernel.dot_products(grad, exp_avg)
            elif param.is_cpu:
                found[index] = torch.zeros(3, dtype=torch.float64)
                for pieces in _pieces((grad.flatten(), exp_avg.flatten()), torch.float64):
                    found[index] += dot_products(*pieces)
            else:
                together[param.device].append((index, grad.flatten(), exp_avg.flatten()))
        for on_device in together.values():
            indices, grads, momenta = zip(*on_device, strict=True)
            found |= zip(indices, foreach_dot_products(grads, momenta).unbind(), strict=True)
        return [found[index] for index in range(len(params))]

    def update_group(
        self, group: dict[str, Any], capped: CappedGradient | None, keys: Sequence[int]
    ) -> None:
        """Move the parameters of one group; see ``MoClip``."""
        options = group["second_moment"], is_cautious(group)
        by_operators = []
        scalars = functools.cache(functools.partial(step_scalars, group))
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            state = self.state[param]
            moments = state["exp_avg"], state["exp_avg_sq"]
            numbers = scalars(state["step"].tolist())
            p, q = (None, None) if capped is None else capped.of(index, param.device)
            update = TensorUpdate(param, param.grad, *moments, p, q, numbers)
            if moclip_kernel.can_take(param, *moments):
                _update_by_kernel_(update, *options, keys[index])
            elif moments[0].dtype == torch.bfloat16:
                update_(param, state, group, p, q, keys[index])
            else:
                by_operators.append(update)
        for batch in _batches(by_operators):
            foreach_update_(batch, *options)


def foreach_dot_products(grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> Tensor:
    """[G, 3], the ``dot_products`` of G pairs of flat vectors on one device, in few calls."""
    pairs = list(zip(grads, momenta, strict=True))
    pieces = [list(_pieces(pair, torch.float64)) for pair in pairs]
    rows_X3 = torch.cat(
        [
            _piece_dot_products(*zip(*batch, strict=True))
            for batch in by_size(
                itertools.chain.from_iterable(pieces), lambda pair: pair[0].numel(), torch.float64
            )
        ]
    )
    if len(rows_X3) == len(pairs):
        return rows_X3
    by_pair = torch.split(rows_X3, [len(of_pair) for of_pair in pieces])
    return torch.stack([rows_x3.sum(0) for rows_x3 in by_pair])


def _piece_dot_products(grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> Tensor:
    sizes = [grad.numel() for grad in grads]
    wide = []
    for vectors in (grads, momenta):
        buffer = torch.empty(sum(sizes), dtype=torch.float64, device=grads[0].device)
        wide.append(list(torch.split(buffer, sizes)))
        torch._foreach_copy_(wide[-1], list(vectors))
    products = torch._foreach_mul(*wide)
    # There is no sum of many tensors, but a sum of magnitudes: of the terms above 0 and below it.
    below = torch._foreach_clamp_max(products, 0.0)
    torch._foreach_clamp_min_(products, 0.0)
    gg_X, mm_X = (torch.stack(torch._foreach_norm(vectors, 2)).square() for vectors in wide)
    above_X, below_X = (torch.stack(torch._foreach_norm(x, 1)) for x in (products, below))
    return torch.stack((gg_X, above_X - below_X, mm_X), dim=1)


def is_global(group: dict[str, Any]) -> bool:
    """Whether the tensors of a group are a part of the one vector that has an angle."""
    return bool(group["angle"] == "global" and group["clip"] != "none")


class TensorUpdate(NamedTuple):
    """All that the update of one tensor takes."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    p: Tensor | None
    """0-d; None is 1."""
    q: Tensor | None
    """0-d; None is 0."""
    scalars: moclip_kernel.StepScalars


def step_scalars(group: dict[str, Any], step: float) -> moclip_kernel.StepScalars:
    """The numbers of one step of a parameter group."""
    beta1, beta2 = group["betas"]
    return moclip_kernel.StepScalars(
        first_rate=1 - beta1,
        second_rate=1 - beta2,
        first_scale=1 / (1 - beta1**step),
        second_scale=1 / (1 - beta2**step),
        decay=1 - group["lr"] * group["weight_decay"],
        step_size=group["lr"] * group["atan2_scale"],
    )


def foreach_update_(
    updates: Sequence[TensorUpdate], second_moment: SecondMoment, is_cautious: bool
) -> None:
    """``moclip.update_`` for tensors of one group, by torch's operators."""
    params, grads, exp_avgs, exp_avg_sqs, ps, qs, scalars = map(list, zip(*updates, strict=True))
    first_rate, second_rate, _, _, decay, step_size = scalars[0]
    # Neither copies anything where the dtypes agree.
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    wide_params = [w.to(m.dtype) for w, m in zip(params, exp_avgs, strict=True)]
    capped = grads if ps[0] is None else torch._foreach_mul(grads, ps)
    if qs[0] is not None:
        torch._foreach_add_(capped, torch._foreach_mul(exp_avgs, qs))
    seen = capped if second_moment == "capped" else grads
    torch._foreach_lerp_(exp_avgs, capped, first_rate)
    torch._foreach_lerp_(exp_avg_sqs, torch._foreach_mul(seen, seen), second_rate)
    directions = torch._foreach_mul(exp_avgs, [s.first_scale for s in scalars])
    roots = torch._foreach_mul(exp_avg_sqs, [s.second_scale for s in scalars])
    torch._foreach_sqrt_(roots)
    for direction, root in zip(directions, roots, strict=True):
        direction.atan2_(root)
    if is_cautious:
        signs = torch._foreach_sign(grads)
        torch._foreach_mul_(signs, exp_avgs)
        for direction, sign in zip(directions, signs, strict=True):
            direction.masked_fill_(sign < 0, 0.0)
    if decay != 1:
        torch._foreach_mul_(wide_params, decay)
    torch._foreach_add_(wide_params, directions, alpha=-step_size)
    for param, wide in zip(params, wide_params, strict=True):
        if param is not wide:
            param.copy_(wide)


def _update_by_kernel_(
    update: TensorUpdate, second_moment: SecondMoment, is_cautious: bool, key: int
) -> None:
    p = 1.0 if update.p is None else float(update.p)
    q = 0.0 if update.q is None else float(update.q)
    moclip_kernel.update_(
        *update[:4],
        p,
        q,
        update.scalars,
        sees_capped=second_moment == "capped",
        is_cautious=is_cautious,
        key=key,
    )


def _pieces(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one size, flat and in pieces whose copies in ``dtype`` are small."""
    is_cpu = tensors[0].is_cpu
    num_bytes = CACHED_BYTES * torch.get_num_threads() if is_cpu else DEVICE_BYTES
    size = num_bytes // dtype.itemsize
    if tensors[0].numel() <= size:
        return iter([tuple(tensor.view(-1) for tensor in tensors)])
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)


def by_size(
    items: Iterable[_Item], numel: Callable[[_Item], int], dtype: torch.dtype
) -> Iterator[list[_Item]]:
    """The items in order, as many at a time as have small temporaries in ``dtype``; at least 1."""
    batch: list[_Item] = []
    num_bytes = 0
    for item in items:
        size = numel(item) * dtype.itemsize
        if batch and num_bytes + size > DEVICE_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(item)
        num_bytes += size
    if batch:
        yield batch


def _batches(updates: Iterable[TensorUpdate]) -> Iterator[list[TensorUpdate]]:
    """What goes into one foreach call: a cached piece on a CPU, many tensors on other devices."""
    rest = []
    for update in updates:
        tensors = update[:4]
        if update.param.is_cpu and all(tensor.is_contiguous() for tensor in tensors):
            for pieces in _pieces(tensors, update.exp_avg.dtype):
                yield [TensorUpdate._make((*pieces, *update[4:]))]
        else:
            rest.append(update)
    yield from by_size(rest, lambda update: update.param.numel(), torch.float32)
