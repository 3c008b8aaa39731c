"""The method's formulas once more: slow, plain NumPy, float64, one row at a time.

The tests compare the package with these. Nothing here imports the package, so a mistake would
have to be made twice, in two different ways, to go unseen.

Shape suffixes: those of ``lrmc_ray.method``. Losses are sums over positions, in nats;
whoever calls divides by the number of positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class Row(NamedTuple):
    """One position's candidates: descending probability, gold last where it was appended."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float16]
    gold_id: int


class MoClipResult(NamedTuple):
    """One tensor after its last step; the state is named as in torch.optim."""

    param: FloatArray
    exp_avg: FloatArray
    exp_avg_sq: FloatArray


# Stage 0: the subset


def round_down_float16(x: ArrayLike) -> NDArray[np.float16]:
    """The largest float16 that is not above ``x``; below the range that is -inf."""
    exact = np.asarray(x, dtype=np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float16)
        below = np.nextafter(nearest, np.float16(-np.inf))
    return np.where(nearest.astype(np.float64) > exact, below, nearest)


def logsumexp(values: ArrayLike) -> float:
    """``log sum exp(values)``; -inf for no values."""
    exact = np.asarray(values, dtype=np.float64)
    if exact.size == 0 or exact.max() == -np.inf:
        return -np.inf
    return float(exact.max() + np.log(np.exp(exact - exact.max()).sum()))


def log_softmax(logits_NV: ArrayLike) -> FloatArray:
    """Log-probabilities in nats, row by row."""
    exact = np.asarray(logits_NV, dtype=np.float64)
    return np.stack([row - logsumexp(row) for row in exact])


def _num_kept(stored: NDArray[np.float16], tau: float, k_min: int, k_max: int) -> int:
    """``clip(K_tau, k_min, k_max)``, and never more tokens than there are.

    K_tau is the smallest k whose first k stored probabilities sum to tau or more. Where tau is
    never reached, K_tau counts as larger than any k_max.
    """
    mass = 0.0
    k_tau = len(stored) + k_max
    for k, logprob in enumerate(stored, start=1):
        mass += float(np.exp(np.float64(logprob)))
        if mass >= tau:
            k_tau = k
            break
    return min(max(k_tau, k_min), k_max, len(stored))


def select_candidates(
    logits_NV: ArrayLike, gold_N: ArrayLike, *, tau: float, k_min: int = 1, k_max: int = 1024
) -> list[Row]:
    """The first ``clip(K_tau, k_min, k_max)`` tokens of each row, and its gold token.

    Tokens with equal logits stand in ascending order of their ids.
    """
    logits = np.asarray(logits_NV, dtype=np.float64)
    rows = []
    for logits_V, logprobs_V, gold in zip(
        logits, log_softmax(logits), np.asarray(gold_N), strict=True
    ):
        gold_id = int(gold)
        ranked = np.argsort(-logits_V, kind="stable").tolist()
        stored_V = round_down_float16(logprobs_V)
        kept = ranked[: _num_kept(stored_V[ranked], tau, k_min, k_max)]
        if gold_id not in kept:
            kept.append(gold_id)
        rows.append(Row(np.array(kept), stored_V[kept], gold_id))
    return rows


def cut(rows: Sequence[Row], tau: float, *, k_min: int = 1) -> list[Row]:
    """Trim recorded rows to a smaller tau, from the stored values alone.

    An appended gold token needs no special case: a row's mass reaches tau at that last entry, or
    not at all, only where the cap had bound, and then the whole row stays. ``k_min`` must not
    exceed the one of the recording: tokens that were not recorded cannot come back.
    """
    trimmed = []
    for row in rows:
        kept = list(range(_num_kept(row.logprobs, tau, k_min, k_max=len(row.token_ids))))
        gold_at = row.token_ids.tolist().index(row.gold_id)
        if gold_at not in kept:
            kept.append(gold_at)
        trimmed.append(Row(row.token_ids[kept], row.logprobs[kept], row.gold_id))
    return trimmed


# Stage 1: the losses


def full_cross_entropy(logits_NV: ArrayLike, gold_N: ArrayLike) -> float:
    """Sum of ``-log p(gold)`` over the whole vocabulary."""
    logprobs_NV = log_softmax(logits_NV)
    return float(-sum(row[gold] for row, gold in zip(logprobs_NV, np.asarray(gold_N), strict=True)))


def restricted_loss(logits_NV: ArrayLike, rows: Sequence[Row]) -> float:
    """Sum of ``logsumexp_{i in S} z_i - z_gold``."""
    logits = np.asarray(logits_NV, dtype=np.float64)
    return sum(
        logsumexp(z[row.token_ids]) - float(z[row.gold_id])
        for z, row in zip(logits, rows, strict=True)
    )


def restricted_loss_gradient(logits_NV: ArrayLike, rows: Sequence[Row]) -> FloatArray:
    """d restricted_loss / d logits, [N, V]: softmax over S minus onehot(gold), 0 outside S."""
    logits = np.asarray(logits_NV, dtype=np.float64)
    gradient_NV = np.zeros_like(logits)
    for z, row, gradient_V in zip(logits, rows, gradient_NV, strict=True):
        gradient_V[row.token_ids] = np.exp(z[row.token_ids] - logsumexp(z[row.token_ids]))
        gradient_V[row.gold_id] -= 1.0
    return gradient_NV


def _tail_log_mass(z: FloatArray, row: Row, tail_ids: ArrayLike, tail_weights: ArrayLike) -> float:
    """``log sum_{r not in S} w_r exp(z_r)``; a token drawn twice counts twice."""
    recorded = set(row.token_ids.tolist())
    pairs = zip(np.asarray(tail_ids).tolist(), np.asarray(tail_weights).tolist(), strict=True)
    return logsumexp([z[r] + np.log(w) for r, w in pairs if r not in recorded])


def tail_loss(
    logits_NV: ArrayLike, rows: Sequence[Row], tail_ids: ArrayLike, tail_weights: ArrayLike
) -> float:
    """Sum of ``logaddexp(lse_S(z), log sum_{r not in S} w_r exp(z_r)) - z_gold``.

    ``tail_ids`` and ``tail_weights`` are shared by all rows. The weights are the inverse sampling
    probabilities themselves, not their logarithms.
    """
    logits = np.asarray(logits_NV, dtype=np.float64)
    total = 0.0
    for z, row in zip(logits, rows, strict=True):
        tail = _tail_log_mass(z, row, tail_ids, tail_weights)
        total += float(np.logaddexp(logsumexp(z[row.token_ids]), tail) - z[row.gold_id])
    return total


def _kl(base_logprobs: FloatArray, model_logprobs: FloatArray) -> float:
    """``KL(base || model)``; what the base gives probability 0 adds nothing."""
    pairs = zip(base_logprobs.tolist(), model_logprobs.tolist(), strict=True)
    return float(sum(np.exp(b) * (b - m) for b, m in pairs if b > -np.inf))


def soft_loss(logits_NV: ArrayLike, rows: Sequence[Row]) -> float:
    """Sum of ``KL(recorded || model)``, both renormalized over S."""
    logits = np.asarray(logits_NV, dtype=np.float64)
    total = 0.0
    for z, row in zip(logits, rows, strict=True):
        base, model = row.logprobs.astype(np.float64), z[row.token_ids]
        total += _kl(base - logsumexp(base), model - logsumexp(model))
    return total


def anchor_kl(
    logits_NV: ArrayLike,
    rows: Sequence[Row],
    tail_ids: ArrayLike | None = None,
    tail_weights: ArrayLike | None = None,
) -> float:
    """Sum of ``KL(base || model)`` over the recorded candidates of prompt positions.

    Without a tail, both are renormalized over S: the same as ``soft_loss``. With a tail, all that
    is outside S is one more outcome. The base gives it one minus the stored mass, the model the
    sampled tail's share of the estimated normalizer. A row whose S holds every sampled token has
    no such estimate (it would be 0, and the KL infinite): it counts as without a tail.
    """
    if tail_ids is None or tail_weights is None:
        return soft_loss(logits_NV, rows)
    total = 0.0
    for z, row in zip(np.asarray(logits_NV, dtype=np.float64), rows, strict=True):
        tail = _tail_log_mass(z, row, tail_ids, tail_weights)
        if tail == -np.inf:
            total += soft_loss(z[None], [row])
            continue
        stored = row.logprobs.astype(np.float64)
        outside = max(0.0, 1.0 - float(np.exp(stored).sum()))
        base = np.append(stored, np.log(outside) if outside > 0 else -np.inf)
        model = np.append(z[row.token_ids], tail)
        total += _kl(base, model - logsumexp(model))
    return total


# MoClip


def angle_deg(a: FloatArray, b: FloatArray) -> float:
    """Angle between two nonzero vectors; exact near 0 and 180 degrees, where arccos is not."""
    a_unit, b_unit = a / np.linalg.norm(a), b / np.linalg.norm(b)
    halves = np.linalg.norm(a_unit - b_unit), np.linalg.norm(a_unit + b_unit)
    return float(np.degrees(2 * np.arctan2(*halves)))


def cap_gradient(
    gradient: FloatArray, momentum: FloatArray, *, beta1: float, delta_max: float, clip: str
) -> FloatArray:
    """g' = cap(g, m, delta_max), for vectors and delta_max in degrees. The rules at the edges:

    - m = 0 (the first step), g = 0 or theta <= delta_max: g' = g.
    - theta = 180 degrees, where g has no part across m: "scale" and "momentum" follow their
      formulas (s = delta / 180; s = the gradient that just brings the momentum to 0). "project"
      and "rotate" have no direction to turn towards: g' = 0 for every delta_max < 180.
    - One element: theta is 0 or 180. "scale" and "momentum" follow their formulas. "project" and
      "rotate" do not cap: with g' = 0 the momentum could never change its sign again.

    "momentum": beta1 m, (1 - beta1) s g and their sum form a triangle. Where the sum is delta away
    from m, it is theta - delta away from g, and the law of sines gives s. Nothing in this needs
    delta < 90 degrees: the sum's angle grows with s from 0 towards theta, so it holds below 180.
    """
    g_norm, m_norm = float(np.linalg.norm(gradient)), float(np.linalg.norm(momentum))
    if clip == "none" or g_norm == 0 or m_norm == 0:
        return gradient
    theta_deg = angle_deg(gradient, momentum)
    if theta_deg <= delta_max:
        return gradient
    theta, delta = np.radians(theta_deg), np.radians(delta_max)
    if clip in ("scale", "cautious"):
        return gradient * (delta / theta)
    if clip == "momentum":
        limit = beta1 * m_norm * np.sin(delta) / ((1 - beta1) * g_norm * np.sin(theta - delta))
        return gradient * min(1.0, limit)
    if clip not in ("project", "rotate"):
        raise ValueError(f"unknown clip: {clip}")
    if gradient.size == 1:
        return gradient
    m_unit = momentum / m_norm
    across = gradient - (gradient @ m_unit) * m_unit
    across_norm = float(np.linalg.norm(across))
    if across_norm <= 1e-14 * g_norm or (clip == "project" and theta - delta >= np.pi / 2):
        return np.zeros_like(gradient)
    edge = np.cos(delta) * m_unit + np.sin(delta) * across / across_norm
    return edge * g_norm * (np.cos(theta - delta) if clip == "project" else 1.0)


def moclip(
    start: ArrayLike,
    gradients: Sequence[ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    delta_max: float = 45.0,
    clip: str = "cautious",
    second_moment: str = "raw",
    atan2_scale: float = 1.0,
) -> MoClipResult:
    """One tensor after one step per gradient; ``cap_gradient`` states the rules at the edges.

    "cautious" is "scale", and weights that would move against their gradient stay where they are.
    """
    if second_moment not in ("raw", "capped"):
        raise ValueError(f"unknown second_moment: {second_moment}")
    beta1, beta2 = betas
    w = np.array(start, dtype=np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, dtype=np.float64)
        capped = cap_gradient(g.ravel(), m.ravel(), beta1=beta1, delta_max=delta_max, clip=clip)
        capped = capped.reshape(g.shape)
        m = beta1 * m + (1 - beta1) * capped
        v = beta2 * v + (1 - beta2) * (g if second_moment == "raw" else capped) ** 2
        direction = np.arctan2(m / (1 - beta1**step), np.sqrt(v / (1 - beta2**step)))
        if clip == "cautious" and delta_max < 180:
            for at in np.ndindex(w.shape):
                if g[at] < 0 < m[at] or m[at] < 0 < g[at]:
                    direction[at] = 0.0
        w = w * (1 - lr * weight_decay) - lr * atan2_scale * direction
    return MoClipResult(w, m, v)


def moclip_global(
    starts: Sequence[ArrayLike], gradients: Sequence[Sequence[ArrayLike]], **settings: Any
) -> list[MoClipResult]:
    """Several tensors with one angle over all of them: they are one long tensor to ``moclip``.

    ``gradients[t][i]`` is tensor i's gradient at step t; ``settings`` are those of ``moclip``.
    """

    def joined(tensors: Sequence[ArrayLike]) -> FloatArray:
        return np.concatenate([np.asarray(x, dtype=np.float64).ravel() for x in tensors])

    whole = moclip(joined(starts), [joined(step) for step in gradients], **settings)
    shapes = [np.shape(start) for start in starts]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = zip(*(np.split(x, ends) for x in whole), strict=True)
    return [
        MoClipResult(*(x.reshape(shape) for x in part))
        for part, shape in zip(parts, shapes, strict=True)
    ]
