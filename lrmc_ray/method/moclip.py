"""MoClip: AdamW with a cap on the angle between gradient and momentum, and an arctan2 step.

The optimizer of "Logits Replay + MoClip" (arXiv 2510.09152), as this project reads it. Per
parameter tensor, with gradient g, first moment m (``exp_avg`` *before* the step), second moment v
(``exp_avg_sq``), both zero at the start, and t = 1, 2, ... (``step``)::

    theta = angle(g, m)                            the tensors taken as vectors
    g'    = cap(g, m, delta_max)                   see the readings
    m     = beta1 m + (1 - beta1) g'
    v     = beta2 v + (1 - beta2) g^2              g'^2 with second_moment="capped"
    w     = w (1 - lr weight_decay) - lr a atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t)))

The arctan2 step is that of Adam-atan2 (arXiv 2407.05872, where a = 1.27 and b = 1; here a = 1 by
default, since another a is no more than another learning rate). It needs no epsilon, does not
change when all gradients are scaled, and bounds what is added to the decayed weight:
|dw_i| <= lr a pi / 2.

That the angle is capped is the paper's; its formula could not be read. Each reading is a value of
``clip``, and the default is our choice. Where theta <= delta = ``delta_max``, g' = g; beyond it,
with x^ = x / ||x||:

- ``"scale"``: g' = (delta / theta) g. The direction stays, a misaligned gradient counts less.
- ``"cautious"`` (default): ``"scale"``, and once more weight by weight, where the angle is 0 or 180
  degrees: a weight whose g and new m are opposed does not move in this step, but for its decay; m
  and v go on as ever. The mask is that of "Cautious Optimizers" (arXiv 2411.16085), which lengthens
  the steps of the other weights by what it leaves out. Where only some rows of a tensor have a
  gradient (an embedding, with a restricted loss), that is many times the learning rate; it is not
  done here.
- ``"momentum"``: g' = s g with the largest s in [0, 1] for which the *momentum* turns by at most
  delta: s = min(1, beta1 ||m|| sin(delta) / ((1 - beta1) ||g|| sin(theta - delta))). Binds on
  outlier batches only.
- ``"rotate"``: g turned towards m until the angle is delta, its norm kept. Can inflate the
  momentum and diverge.
- ``"project"``: the nearest point to g in the cone of half-angle delta around m, which is the
  rotated g times max(0, cos(theta - delta)). Never ascends, but feeds m to itself.
- ``"none"``: g' = g at every angle. This is Adam-atan2; bit for bit ``AdamAtan2`` of the package
  adam-atan2-pytorch, whose ``decoupled_wd=True`` would divide ``weight_decay`` by the first lr.

All of them are g' = p g + q m, where p and q depend on <g, g>, <g, m> and <m, m> alone: one pass
over memory for the dot products, one for the update.

Where there is no angle, or no direction to turn to:

- m = 0 (the first step) or g = 0: no angle. g' = g; the statistics leave the tensor out. A zero
  gradient still decays both moments, and the weight still moves.
- theta = 180 degrees: ``scale`` and ``momentum`` follow their formulas (s = delta / 180; m stops
  at zero). ``project`` and ``rotate`` find no edge of the cone nearer than another: g' = 0.
- One element cannot turn: ``project`` and ``rotate`` leave it alone, because with g' = 0 its
  momentum could never change sign. ``scale`` and ``momentum`` follow their formulas.
- delta_max = 180: bit-identical with ``clip="none"``, but the angles are measured.
- A gradient that is not finite has no angle: it goes through, as in torch's optimizers.
"""

import functools
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrmc_ray.method.names import Angle, Clip, SecondMoment, check_choice

# Shape suffix (this file): P = parameters, or vectors in general.

_Item = TypeVar("_Item")

NUM_ANGLE_BINS = 36
"""Bins of the histogram of theta, 5 degrees each."""

# Below this sine of theta, rounding decides to which side of the axis g lies.
_COLLINEAR_SINE = 1e-6
# Bytes of one operand per thread that a CPU takes through all operations at a time: operands and
# temporaries stay in its caches, so that main memory is passed over once. Less costs more calls.
_CACHED_BYTES = 1 << 19
# The same on other devices, where only the memory of the temporaries matters.
_DEVICE_BYTES = 1 << 27
# In smaller tensors, calling a compiled function costs more than it saves.
_MIN_COMPILED_ELEMENTS = 1 << 14
# The same on other devices: there the call alone takes the time of some million elements.
_MIN_COMPILED_DEVICE_ELEMENTS = 1 << 22


class CappedGradient(NamedTuple):
    """The capped gradients of P vectors: g' = ``p_P`` g + ``q_P`` m."""

    p_P: Tensor
    q_P: Tensor
    theta_P: Tensor
    """Angle between g and m before the cap, in radians; NaN where there is none."""


def dot_products(grad: Tensor, momentum: Tensor) -> Tensor:
    """``[<g, g>, <g, m>, <m, m>]`` of two vectors, in float64.

    With a float32 cosine the angle would be off by up to 0.03 degrees near 0 and 180.
    """
    g, m = grad.double(), momentum.double()
    return torch.stack((g.dot(g), g.dot(m), m.dot(m)))


def foreach_dot_products(grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> Tensor:
    """[P, 3], the ``dot_products`` of P pairs of flat vectors on one device, in few calls.

    On a GPU a call costs more than its arithmetic, and a model has hundreds of tensors.
    """
    pairs = list(zip(grads, momenta, strict=True))
    pieces = [list(_pieces(pair, torch.float64)) for pair in pairs]
    rows_X3 = torch.cat(
        [
            _piece_dot_products(*zip(*batch, strict=True))
            for batch in _by_size(
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


def cap_angle(
    dots_P3: Tensor, numel_P: Tensor, *, delta_max: float, clip: Clip, beta1: float
) -> CappedGradient:
    """Cap the angle of P gradients to their momenta (see the module's docstring).

    Args:
        dots_P3: Their ``dot_products``.
        numel_P: Their numbers of elements.
        delta_max: The cap, in degrees.
        clip: The reading of the cap.
        beta1: Decay of the first moment; matters to ``"momentum"`` only.
    """
    delta = math.radians(delta_max)
    gg_P, gm_P, mm_P = dots_P3.unbind(-1)
    g_norm_P, m_norm_P = gg_P.sqrt(), mm_P.sqrt()
    # 0 / 0 where g or m is zero, and NaN is never above delta.
    theta_P = (gm_P / (g_norm_P * m_norm_P)).clamp(-1.0, 1.0).acos()
    excess_P = theta_P - delta
    is_capped_P = excess_P > 0
    # "none" keeps these; the other readings overwrite them.
    p_P, q_P = torch.ones_like(theta_P), torch.zeros_like(theta_P)
    if clip in ("scale", "cautious"):
        p_P = delta / theta_P
    elif clip == "momentum":
        # Law of sines in the triangle of beta1 m, (1 - beta1) s g and their sum.
        turned_P = beta1 * m_norm_P * math.sin(delta)
        p_P = (turned_P / ((1 - beta1) * g_norm_P * excess_P.sin())).clamp(max=1.0)
    elif clip in ("project", "rotate"):
        # The point at angle delta on the arc from m^ to g^, as in spherical interpolation.
        sine_P = theta_P.sin()
        share_P = excess_P.cos().clamp(min=0.0) if clip == "project" else torch.ones_like(sine_P)
        length_P = torch.where(sine_P > _COLLINEAR_SINE, share_P / sine_P, 0.0)
        p_P = length_P * math.sin(delta)
        q_P = length_P * excess_P.sin() * g_norm_P / m_norm_P
        is_capped_P &= numel_P > 1
    # torch.where, not `if`: an `if` on a CUDA tensor would wait for the device.
    return CappedGradient(
        torch.where(is_capped_P, p_P, 1.0), torch.where(is_capped_P, q_P, 0.0), theta_P
    )


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


def moclip_update(
    update: TensorUpdate, second_moment: SecondMoment, is_cautious: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The new ``(param, exp_avg, exp_avg_sq)`` of one tensor, whose g' is p g + q m.

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


def store_moclip_update_(
    update: TensorUpdate, second_moment: SecondMoment, is_cautious: bool
) -> None:
    """``moclip_update`` in place."""
    old = update.param, update.exp_avg, update.exp_avg_sq
    for tensor, new in zip(old, moclip_update(update, second_moment, is_cautious), strict=True):
        tensor.copy_(new)


def foreach_moclip_update_(
    updates: Sequence[TensorUpdate], second_moment: SecondMoment, is_cautious: bool
) -> None:
    """``moclip_update`` in place for tensors of one group, by torch's uncompiled kernels."""
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
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for tensors of every size, compiled at its first call."""
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class AngleStatistics:
    """Angles between gradient and momentum, before the cap, since the last report.

    A count is one tensor in one step. Tensors without an angle (first step, zero gradient) and
    groups with ``clip="none"`` are left out. Means are NaN where nothing was counted.
    """

    num_angles: int
    mean_deg: float
    clipped_share: float
    """Share of the counted tensors that the cap changed. 0: it never binds; 1: it always does."""
    clipped_element_share: float
    """The same, each tensor weighted by its number of elements."""
    histogram: tuple[int, ...]
    """Counts of the angles in ``NUM_ANGLE_BINS`` bins from 0 to 180 degrees."""


class MoClip(Optimizer):
    """MoClip (see the module's docstring).

    State per parameter: ``step`` (0-d float32, on the host), ``exp_avg`` and ``exp_avg_sq``
    (float32 for bf16 and fp16 parameters). All arguments from ``lr`` to ``atan2_scale`` can be set
    per parameter group. A half-precision parameter is rounded once per step, so an update below
    half its last bit is lost: keep float32 parameters for small learning rates.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the first and the second moment, in [0, 1).
        weight_decay: Decoupled, as in AdamW: per step the weight shrinks by ``lr * weight_decay``.
        delta_max: Largest angle between gradient and momentum, in degrees, in (0, 180].
        clip: Reading of the cap.
        angle: ``"tensor"``: each tensor has its own angle. ``"global"``: the tensors of all groups
            that say so, and have a cap, are one long vector with one angle.
        second_moment: Whether v sees the ``"raw"`` or the ``"capped"`` gradient.
        atan2_scale: a, the factor of the arctan2 step.
        reduce_dots: For sharded parameters. Sums a float64 tensor of four numbers per parameter
            over the shards, in place, e.g. ``torch.distributed.all_reduce``. Every step calls it
            once, on every shard, before any weight moves. The parameters are the local shards.
        compiled: Compile the update by ``torch.compile`` at the first step. Without a working
            compiler, warns and goes on uncompiled.

    Raises:
        ValueError: A value is out of range.
    """

    _angle_totals: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        delta_max: float = 90.0,
        clip: Clip = "cautious",
        angle: Angle = "tensor",
        second_moment: SecondMoment = "raw",
        atan2_scale: float = 1.0,
        *,
        reduce_dots: Callable[[Tensor], object] | None = None,
        compiled: bool = False,
    ) -> None:
        self.reduce_dots = reduce_dots
        self.compiled = compiled
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "delta_max": delta_max,
            "clip": clip,
            "angle": angle,
            "second_moment": second_moment,
            "atan2_scale": atan2_scale,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its values go before the constructor's."""
        _check_settings(**{**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the result of ``closure``.

        Raises:
            TypeError: A gradient is sparse. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in self._params():
            _check_gradient(param)
        for param in self._params():
            if param.grad is not None and not self.state[param]:
                dtype = torch.promote_types(param.dtype, torch.float32)
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param, dtype=dtype),
                    "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
                }
        caps = self._cap_angles()
        for group, capped in zip(self.param_groups, caps, strict=True):
            self._update(group, capped)
        return loss

    def angle_statistics(self) -> AngleStatistics:
        """Report the angles since the last call. Waits for the device, as ``step`` never does."""
        totals = [0.0] * (NUM_ANGLE_BINS + 5)
        if self._angle_totals is not None:
            totals = self._angle_totals.tolist()
            self._angle_totals = None
        *histogram, num_angles, sum_deg, num_clipped, elements, clipped_elements = totals
        return AngleStatistics(
            num_angles=int(num_angles),
            mean_deg=sum_deg / num_angles if num_angles else math.nan,
            clipped_share=num_clipped / num_angles if num_angles else math.nan,
            clipped_element_share=clipped_elements / elements if elements else math.nan,
            histogram=tuple(map(int, histogram)),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state; the moments keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        # torch casts the moments to the parameter's dtype, float32 ones to bf16, and shares `step`
        # with the optimizer that saved it.
        saved_ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for saved_id, param in zip(saved_ids, self._params(), strict=True):
            if saved := state_dict["state"].get(saved_id):
                state = self.state[param]
                state["step"] = saved["step"].to("cpu", copy=True)
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = torch.empty_like(param, dtype=saved[name].dtype, requires_grad=False)
                    state[name] = moment.copy_(saved[name])

    def __getstate__(self) -> dict[str, Any]:
        # torch would drop both from a deep copy or a pickle.
        kept = {"reduce_dots": self.reduce_dots, "compiled": self.compiled}
        return {**super().__getstate__(), **kept}

    def _params(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def _cap_angles(self) -> list[CappedGradient | None]:
        """One entry per group; None where its gradients are not capped."""
        if all(group["clip"] == "none" for group in self.param_groups):
            return [None] * len(self.param_groups)
        measured_P4 = self._measure()
        if self.reduce_dots is not None:
            self.reduce_dots(measured_P4)
        by_group = torch.split(measured_P4, [len(group["params"]) for group in self.param_groups])
        global_4 = measured_P4.new_zeros(4)
        for group_P4, group in zip(by_group, self.param_groups, strict=True):
            if group["angle"] == "global":
                global_4 += group_P4.sum(0)
        caps: list[CappedGradient | None] = []
        for group_P4, group in zip(by_group, self.param_groups, strict=True):
            if group["clip"] == "none":
                caps.append(None)
                continue
            vectors_P4 = global_4.expand_as(group_P4) if group["angle"] == "global" else group_P4
            capped = cap_angle(
                vectors_P4[:, :3],
                vectors_P4[:, 3],
                delta_max=group["delta_max"],
                clip=group["clip"],
                beta1=group["betas"][0],
            )
            self._count_angles(capped, group_P4[:, 3])
            caps.append(capped)
        return caps

    def _measure(self) -> Tensor:
        """[P, 4], dot products and number of elements; zeros where there is nothing to cap.

        One row per parameter, with or without a gradient: all shards must sum the same shape.
        """
        clips = [group["clip"] for group in self.param_groups for _ in group["params"]]
        params = list(self._params())
        numels = [0] * len(params)
        rows: list[Tensor | None] = [None] * len(params)
        together: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for index, (param, clip) in enumerate(zip(params, clips, strict=True)):
            if param.grad is None or clip == "none":
                continue
            numels[index] = param.numel()
            vectors = _flat(param.grad), _flat(self.state[param]["exp_avg"])
            if self._is_compiled(param):
                rows[index] = self._run_compiled(dot_products, *vectors)
            elif param.is_cpu:
                dots_3 = torch.zeros(3, dtype=torch.float64)
                for pieces in _pieces(vectors, torch.float64):
                    dots_3 += dot_products(*pieces)
                rows[index] = dots_3
            else:
                together[param.device].append((index, *vectors))
        for on_device in together.values():
            indices, grads, momenta = zip(*on_device, strict=True)
            rows_P3 = foreach_dot_products(grads, momenta)
            for index, row_3 in zip(indices, rows_P3.unbind(), strict=True):
                rows[index] = row_3
        nothing = torch.zeros(3, dtype=torch.float64, device=params[0].device)
        dots_P3 = torch.stack([nothing if row is None else row.to(nothing.device) for row in rows])
        numel_P = torch.tensor(numels, dtype=torch.float64).to(nothing.device)
        return torch.cat((dots_P3, numel_P[:, None]), dim=1)

    def _count_angles(self, capped: CappedGradient, numel_P: Tensor) -> None:
        has_angle_P = (numel_P > 0) & capped.theta_P.isfinite()
        theta_deg_P = torch.where(has_angle_P, capped.theta_P.rad2deg(), 0.0)
        is_clipped_P = has_angle_P & ((capped.p_P != 1) | (capped.q_P != 0))
        bins_P = (theta_deg_P * (NUM_ANGLE_BINS / 180)).long().clamp(max=NUM_ANGLE_BINS - 1)
        counts_5P = torch.stack(
            (has_angle_P, theta_deg_P, is_clipped_P, numel_P * has_angle_P, numel_P * is_clipped_P)
        )
        if self._angle_totals is None:
            self._angle_totals = numel_P.new_zeros(NUM_ANGLE_BINS + 5)
        self._angle_totals.index_add_(0, bins_P, counts_5P[0])
        self._angle_totals[NUM_ANGLE_BINS:] += counts_5P.sum(1)

    def _update(self, group: dict[str, Any], capped: CappedGradient | None) -> None:
        """Move the parameters of one group."""
        second_moment: SecondMoment = group["second_moment"]
        is_cautious = group["clip"] == "cautious" and group["delta_max"] < 180
        ps: Sequence[Tensor | None] = [None] * len(group["params"])
        qs = ps
        if capped is not None:
            ps = capped.p_P.unbind()
            if group["clip"] in ("project", "rotate"):
                qs = capped.q_P.unbind()
        uncompiled = []
        scalars = functools.cache(functools.partial(_step_scalars, group))
        for param, p, q in zip(group["params"], ps, qs, strict=True):
            if param.grad is None:
                continue
            state = self.state[param]
            state["step"] += 1
            update = TensorUpdate(
                param,
                param.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                p if p is None else p.to(param.device),
                q if q is None else q.to(param.device),
                scalars(state["step"].tolist()),
            )
            if self._is_compiled(param):
                self._run_compiled(
                    store_moclip_update_, _for_compiler(update), second_moment, is_cautious
                )
            else:
                uncompiled.append(update)
        for batch in _batches(uncompiled):
            foreach_moclip_update_(batch, second_moment, is_cautious)

    def _is_compiled(self, param: Tensor) -> bool:
        least = _MIN_COMPILED_ELEMENTS if param.is_cpu else _MIN_COMPILED_DEVICE_ELEMENTS
        return self.compiled and param.is_contiguous() and param.numel() >= least

    def _run_compiled(self, function: Callable[..., Any], *args: Any) -> Any:
        from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

        try:
            return _compile(function)(*args)
        except BackendCompilerFailed as error:
            self.compiled = False
            warnings.warn(
                f"compiled=True needs a compiler that torch.compile can use, got "
                f"{str(error).splitlines()[0]}; going on uncompiled",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*args)


def _step_scalars(group: dict[str, Any], step: float) -> StepScalars:
    beta1, beta2 = group["betas"]
    return StepScalars(
        first_rate=1 - beta1,
        second_rate=1 - beta2,
        first_scale=1 / (1 - beta1**step),
        second_scale=1 / (1 - beta2**step),
        decay=1 - group["lr"] * group["weight_decay"],
        step_size=group["lr"] * group["atan2_scale"],
    )


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
    num_bytes = _CACHED_BYTES * torch.get_num_threads() if is_cpu else _DEVICE_BYTES
    size = num_bytes // dtype.itemsize
    if tensors[0].numel() <= size:
        return iter([tuple(tensor.view(-1) for tensor in tensors)])
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)


def _by_size(
    items: Iterable[_Item], numel: Callable[[_Item], int], dtype: torch.dtype
) -> Iterator[list[_Item]]:
    """The items in order, as many at a time as have small temporaries in ``dtype``; at least 1."""
    batch: list[_Item] = []
    num_bytes = 0
    for item in items:
        size = numel(item) * dtype.itemsize
        if batch and num_bytes + size > _DEVICE_BYTES:
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
    yield from _by_size(rest, lambda update: update.param.numel(), torch.float32)


def _check_gradient(param: Tensor) -> None:
    if param.grad is not None and param.grad.layout != torch.strided:
        raise TypeError(
            f"MoClip needs dense gradients, got {param.grad.layout} for a parameter of shape "
            f"{tuple(param.shape)}; build an nn.Embedding with sparse=False"
        )


def _check_settings(
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    delta_max: float,
    clip: str,
    angle: str,
    second_moment: str,
    atan2_scale: float,
    **_: object,
) -> None:
    if not 0.0 < delta_max <= 180.0:
        raise ValueError(
            f"delta_max must be in (0, 180] degrees, got {delta_max}; 180 switches the cap off"
        )
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    numbers = {"lr": lr, "weight_decay": weight_decay, "atan2_scale": atan2_scale}
    for name, number in numbers.items():
        if not 0.0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {number}")
    check_choice("clip", clip, Clip)
    check_choice("angle", angle, Angle)
    check_choice("second_moment", second_moment, SecondMoment)
