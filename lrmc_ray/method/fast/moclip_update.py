"""MoClip's step in fewer passes over memory and fewer calls; the plain way is ``moclip``.

- On a CPU, a piece of each tensor goes through all operations while it is in the cache.
- On other devices, many tensors go through an operation in one call: a call costs more there than
  its arithmetic, and a model has hundreds of tensors.
- With ``compiled=True`` torch.compile makes one pass of the update of every large tensor.

Without ``compiled`` the weights are those of the plain way to the last bit, but for the dot
products of tensors in several pieces, whose float64 sums are rounded elsewhere. The compiled update
rounds by itself: its arctangent is right to 5e-7.
"""

import functools
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrmc_ray.method.angle_cap import CappedGradient
from lrmc_ray.method.dot_products import dot_products
from lrmc_ray.method.moclip import MoClip, is_cautious
from lrmc_ray.method.names import SecondMoment

_Item = TypeVar("_Item")

CACHED_BYTES = 1 << 19
"""Of one operand per thread that a CPU takes through all operations at a time: operands and
temporaries stay in its caches, so that main memory is passed over once. Less costs more calls."""
DEVICE_BYTES = 1 << 27
"""The same on other devices, where only the memory of the temporaries matters."""
MIN_COMPILED_ELEMENTS = 1 << 14
"""In smaller tensors, calling a compiled function costs more than it saves."""
MIN_COMPILED_DEVICE_ELEMENTS = 1 << 22
"""The same on other devices: there the call alone takes the time of some million elements."""


class FastMoClip(MoClip):
    """:class:`lrmc_ray.method.moclip.MoClip`, sooner.

    Args:
        *args: As there.
        compiled: Compile the update by ``torch.compile`` at the first step. Without a working
            compiler, warns and goes on uncompiled.
        **options: As there.
    """

    def __init__(self, *args: Any, compiled: bool = False, **options: Any) -> None:
        self.compiled = compiled
        super().__init__(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}

    def dots_of(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """``dot_products`` of the gradient and the momentum of each parameter."""
        found: dict[int, Tensor] = {}
        together: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for index, param in enumerate(params):
            assert param.grad is not None
            vectors = _flat(param.grad), _flat(self.state[param]["exp_avg"])
            if self._is_compiled(param):
                found[index] = self._run_compiled(dot_products, *vectors)
            elif param.is_cpu:
                found[index] = torch.zeros(3, dtype=torch.float64)
                for pieces in _pieces(vectors, torch.float64):
                    found[index] += dot_products(*pieces)
            else:
                together[param.device].append((index, *vectors))
        for on_device in together.values():
            indices, grads, momenta = zip(*on_device, strict=True)
            found |= zip(indices, foreach_dot_products(grads, momenta).unbind(), strict=True)
        return [found[index] for index in range(len(params))]

    def update_group(self, group: dict[str, Any], capped: CappedGradient | None) -> None:
        """Move the parameters of one group; ``capped`` is None where it has no cap."""
        options = group["second_moment"], is_cautious(group)
        uncompiled = []
        scalars = functools.cache(functools.partial(step_scalars, group))
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            state = self.state[param]
            p, q = (None, None) if capped is None else capped.of(index, param.device)
            moments = state["exp_avg"], state["exp_avg_sq"]
            update = TensorUpdate(
                param, param.grad, *moments, p, q, scalars(state["step"].tolist())
            )
            if self._is_compiled(param):
                self._run_compiled(_store_update_, _for_compiler(update), *options)
            else:
                uncompiled.append(update)
        for batch in _batches(uncompiled):
            foreach_update_(batch, *options)

    def _is_compiled(self, param: Tensor) -> bool:
        least = MIN_COMPILED_ELEMENTS if param.is_cpu else MIN_COMPILED_DEVICE_ELEMENTS
        return self.compiled and param.is_contiguous() and param.numel() >= least

    def _run_compiled(self, function: Callable[..., Any], *args: Any) -> Any:
        from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

        try:
            return compiled_once(function)(*args)
        except BackendCompilerFailed as error:
            self.compiled = False
            warnings.warn(
                f"compiled=True needs a compiler that torch.compile can use, got "
                f"{str(error).splitlines()[0]}; going on uncompiled",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*args)


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


class StepScalars(NamedTuple):
    """The numbers of one step: floats, or 0-d tensors for a compiled function."""

    first_rate: float | Tensor
    """1 - beta1"""
    second_rate: float | Tensor
    """1 - beta2"""
    first_scale: float | Tensor
    """1 / (1 - beta1^t)"""
    second_scale: float | Tensor
    """1 / (1 - beta2^t)"""
    decay: float | Tensor
    """1 - lr weight_decay"""
    step_size: float | Tensor
    """lr a"""


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
    scalars: StepScalars


def step_scalars(group: dict[str, Any], step: float) -> StepScalars:
    """The numbers of one step of a parameter group."""
    beta1, beta2 = group["betas"]
    return StepScalars(
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
    """``moclip.update_`` for tensors of one group, by torch's uncompiled kernels."""
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


def compilable_update(
    update: TensorUpdate, second_moment: SecondMoment, is_cautious: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The new ``(param, exp_avg, exp_avg_sq)`` of one tensor, for torch.compile.

    ``is_cautious`` leaves weights where they are that would move against their gradient.
    """
    param, grad, exp_avg, exp_avg_sq, p, q, scalars = update
    capped = grad = grad.to(exp_avg.dtype)
    if p is not None:
        capped = p * grad
    if q is not None:
        capped = capped + q * exp_avg
    seen = capped if second_moment == "capped" else grad
    exp_avg = exp_avg + scalars.first_rate * (capped - exp_avg)
    exp_avg_sq = exp_avg_sq + scalars.second_rate * (seen * seen - exp_avg_sq)
    direction = arctan2_nonnegative(
        scalars.first_scale * exp_avg, (scalars.second_scale * exp_avg_sq).sqrt()
    )
    if is_cautious:
        # The product of both could be too small for float32, and would have no sign then.
        direction = torch.where(grad.sign() * exp_avg < 0, 0.0, direction)
    new_param = scalars.decay * param.to(exp_avg.dtype) - scalars.step_size * direction
    return new_param.to(param.dtype), exp_avg, exp_avg_sq


def _store_update_(update: TensorUpdate, second_moment: SecondMoment, is_cautious: bool) -> None:
    """``compilable_update`` in place."""
    old = update.param, update.exp_avg, update.exp_avg_sq
    for tensor, new in zip(old, compilable_update(update, second_moment, is_cautious), strict=True):
        tensor.copy_(new)


def arctan2_nonnegative(y: Tensor, x: Tensor) -> Tensor:
    """``atan2(y, x)`` for finite y and x >= 0; in float32 with a relative error below 5e-7.

    torch.atan2 covers four quadrants to the last bit, and would take half of a compiled step. Where
    both are below 1e-30, the float32 angle is too small.
    """
    if y.dtype != torch.float32:
        return torch.atan2(y, x)
    # atan(r) / r - 1 in powers r^2, r^4, ...: minimax fit on [0, 1], relative error of atan 1.1e-7.
    # They stand here because torch.compile takes floats of a module for inputs that can change.
    coefficients = (
        -0.3333239155999517,
        0.1997421377925786,
        -0.14041326814428545,
        0.09968471672476224,
        -0.060203114669943915,
        0.024734049977873446,
        -0.004822528846739724,
    )
    height = y.abs()
    is_steep = height > x
    # The smallest normal number, so that (0, 0) has the angle 0; no change above 1e-30.
    longer = torch.where(is_steep, height, x) + torch.finfo(torch.float32).tiny
    r = torch.where(is_steep, x, height) / longer
    r_squared = r * r
    series = torch.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = series * r_squared + coefficient
    octant = r + r * (r_squared * series)
    angle = torch.where(is_steep, math.pi / 2 - octant, octant)
    # copysign would cost a sixth of the whole compiled update on a CPU.
    return torch.where(y < 0, -angle, angle)


@functools.cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for tensors of every size, compiled at its first call."""
    return torch.compile(function, dynamic=True)


def _for_compiler(update: TensorUpdate) -> TensorUpdate:
    """Flat tensors and no floats, so that one compilation serves all shapes and steps."""
    dtype = update.exp_avg.dtype
    one = torch.ones((), dtype=dtype, device=update.param.device)
    return TensorUpdate._make(
        (
            *(_flat(tensor) for tensor in update[:4]),
            one if update.p is None else update.p.to(dtype),
            torch.zeros_like(one) if update.q is None else update.q.to(dtype),
            _scalar_tensors(update.scalars, dtype),
        )
    )


def _flat(tensor: Tensor) -> Tensor:
    # .data, because a view is compiled anew for each rank of the tensor it was taken of.
    return tensor.reshape(-1).data


@functools.lru_cache(maxsize=16)
def _scalar_tensors(scalars: StepScalars, dtype: torch.dtype) -> StepScalars:
    return StepScalars(*torch.tensor(scalars, dtype=dtype).unbind())


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
