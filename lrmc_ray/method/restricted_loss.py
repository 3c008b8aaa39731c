r"""Stage 1: the losses. Every one is a sum over positions, in nats; the caller divides.

With the logits z at a position, its candidate set S, the gold token g, the current model's
softmax p over all V tokens, q over S, and the outside mass rho = 1 - p(S)::

    restricted    L_S = logsumexp_{i in S} z_i - z_g            the paper's
    full          L   = logsumexp_{i in V} z_i - z_g            ordinary fine-tuning
    active_only   L where |S| > 1, else 0
    soft          KL(b || q), b = recorded probabilities renormalized over S

What follows for the restricted loss:

1. dL_S/dz = q - onehot(g), zero outside S. Its bias against the full loss, q - p, has L1 norm
   exactly 2 rho.
2. L - L_S = -log(1 - rho): nothing pushes mass back into S once it has left. ``probe`` measures it.
3. |S| = 1 gives loss 0 and gradient 0, exactly.

**Sampled tail.** R tokens r, shared by all positions, with weights w_r (inverse sampling
probabilities) estimate the outside part of the normalizer; those inside S do not count::

    logaddexp(logsumexp_{i in S} z_i, log sum_{r not in S} w_r exp(z_r)) - z_g

The estimate of the normalizer is unbiased. With R = V, each token once at weight 1, this is the
full loss. The cost is (K + R) / V of the full loss's.

**Anchor.** On prompt positions, KL(base || model) holds the model to what the base model said.
Without a tail it is the soft loss. With a tail, all tokens outside S are one more outcome: the
base gives it 1 - stored mass, the model the tail's share of the estimated normalizer.

Source: the restricted loss is that of Logits Replay + MoClip, arXiv 2510.09152, Stage 1; the
tail, the anchor and the control losses are this project's.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_logits import (
    Backend,
    HeadOptions,
    candidate_logits,
    segment_logsumexp,
    shape_logits,
    token_logits,
)
from lrmc_ray.method.subsets import CandidateSets

# Shape suffixes (this file):
#   N = positions, D = hidden size, V = vocabulary size, R = sampled tail tokens, n = positions of
#   one chunk. Entries of candidate sets are flat, [nnz].

Reduction = Literal["sum", "mean", "none"]

_CHUNK_ELEMENTS = 2**24  # of the [n, V] logits of the full loss: 64 MiB in float32


def restricted_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    bias_V: Tensor | None = None,
    tail_ids: Tensor | None = None,
    tail_logweights: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of the gold token over its candidate set, in nats.

    Args:
        hidden_ND: [N, D] last hidden states at the positions of ``candidates``.
        weight_VD: [V, D] weight of the output head; where its gradient goes, see
            ``candidate_logits``.
        candidates: N candidate sets, on the same device.
        bias_V: see ``HeadOptions``.
        tail_ids: [R] sampled token ids of ``draw_tail``; None for the paper's loss.
        tail_logweights: [R] logarithms of their weights.
        logit_scale: see ``HeadOptions``.
        softcap: see ``HeadOptions``.
        reduction: ``"sum"``, ``"mean"`` (over all N rows), or ``"none"`` for [N].
        backend: see ``candidate_logits``.

    Returns:
        float32, or float64 if an input is.

    Raises:
        ValueError: an unknown reduction or backend, sizes that do not agree, or a tail without
            its weights.
    """
    head: HeadOptions = {"bias_V": bias_V, "logit_scale": logit_scale, "softcap": softcap}
    logits = candidate_logits(hidden_ND, weight_VD, candidates, backend=backend, **head)
    normalizer_N = segment_logsumexp(logits, candidates)
    if tail_ids is not None:
        tail_N = _tail_logsumexp(
            hidden_ND, weight_VD, candidates, tail_ids, tail_logweights, **head
        )
        normalizer_N = torch.logaddexp(normalizer_N, tail_N)
    loss_N = normalizer_N - logits[candidates.is_gold]
    if reduction == "none":
        return loss_N
    if reduction == "mean":
        return loss_N.mean()
    if reduction == "sum":
        return loss_N.sum()
    raise ValueError(f"reduction must be sum, mean or none, got {reduction!r}")


def soft_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    backend: Backend = "auto",
    **head: Unpack[HeadOptions],
) -> Tensor:
    """Sum of KL(recorded || model), both renormalized over S; arguments as above."""
    return anchor_kl(hidden_ND, weight_VD, candidates, backend=backend, **head)


def anchor_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    tail_ids: Tensor | None = None,
    tail_logweights: Tensor | None = None,
    backend: Backend = "auto",
    **head: Unpack[HeadOptions],
) -> Tensor:
    """Sum of KL(base || model) on the recorded candidates, in nats; arguments as above.

    A row whose candidates include every sampled token has no estimate of its outside mass: it
    counts as without a tail.
    """
    logits = candidate_logits(hidden_ND, weight_VD, candidates, backend=backend, **head)
    inside_N = segment_logsumexp(logits, candidates)
    rows = candidates.row_ids
    base = candidates.logprobs.to(logits.dtype)
    base_inside_N = segment_logsumexp(base, candidates)
    if tail_ids is None:
        base = base - base_inside_N[rows]
        return (base.exp() * (base - logits + inside_N[rows])).sum()

    tail_N = _tail_logsumexp(hidden_ND, weight_VD, candidates, tail_ids, tail_logweights, **head)
    has_tail_N = tail_N > -math.inf
    # Without a sampled token outside S there is no such outcome: the base is renormalized over S.
    base_outside_N = candidates.outside_mass().to(logits.dtype) * has_tail_N
    base = base - torch.where(has_tail_N, 0.0, base_inside_N)[rows]
    normalizer_N = torch.logaddexp(inside_N, tail_N)
    inside_kl = (base.exp() * (base - logits + normalizer_N[rows])).sum()
    outside_logprob_N = torch.where(has_tail_N, tail_N, 0.0) - normalizer_N
    outside_kl = torch.xlogy(base_outside_N, base_outside_N) - base_outside_N * outside_logprob_N
    return inside_kl + outside_kl.sum()


def full_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    gold_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the gold tokens' cross-entropy over the whole vocabulary, in nats.

    The logits exist for one chunk of positions at a time. Gradients are computed with them, in
    the forward pass, so nothing is computed twice. The weight's gradient is an ordinary dense one.

    Args:
        hidden_ND: [N, D] last hidden states.
        weight_VD: [V, D] weight of the output head.
        gold_N: [N] gold token ids, any integer dtype.
        bias_V: see ``HeadOptions``.
        logit_scale: see ``HeadOptions``.
        softcap: see ``HeadOptions``.
    """
    total: Tensor = _FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, gold_N, logit_scale, softcap, torch.is_grad_enabled()
    )
    return total


def active_only_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    **head: Unpack[HeadOptions],
) -> Tensor:
    """``full_cross_entropy`` of the rows with more than one candidate.

    The control that separates fewer positions from a smaller softmax.
    """
    active_N = candidates.active()
    return full_cross_entropy(hidden_ND[active_N], weight_VD, candidates.gold_ids[active_N], **head)


def draw_tail(
    num_samples: int,
    vocabulary_size: int,
    *,
    seed: int,
    step: int,
    probabilities: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids [R] and log weights [R] of one step's sampled tail, on the CPU.

    Args:
        num_samples: R.
        vocabulary_size: V.
        seed: the run's seed.
        step: the optimizer step; the same (seed, step) always draws the same.
        probabilities: [V] sampling probabilities, up to a factor. Samples are then drawn with
            replacement and weigh 1 / (R p). A token of probability 0 is never seen, so give one
            only to tokens without outside mass. None: uniform, without replacement, V / R each.

    Raises:
        ValueError: R below 1 or, when uniform, above V; probabilities not [V], negative, not
            finite or all zero.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if probabilities is None and num_samples > vocabulary_size:
        raise ValueError(
            f"num_samples must be at most the vocabulary size {vocabulary_size}, got "
            f"{num_samples}; a uniform tail takes each token at most once"
        )
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
    if probabilities is None:
        ids = torch.randperm(vocabulary_size, generator=generator)[:num_samples].sort().values
        return ids, torch.full((num_samples,), math.log(vocabulary_size / num_samples))
    weights = probabilities.detach().cpu().double()
    is_valid = weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0
    if weights.shape != (vocabulary_size,) or not is_valid:
        raise ValueError(
            f"probabilities must be [{vocabulary_size}], finite, at least 0 and not all 0, got "
            f"shape {tuple(weights.shape)} and sum {float(weights.sum())}"
        )
    ids = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
    ids = ids.sort().values
    return ids, -((weights / weights.sum())[ids] * num_samples).log().float()


def _tail_logsumexp(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    tail_ids: Tensor,
    tail_logweights: Tensor | None,
    **head: Unpack[HeadOptions],
) -> Tensor:
    """[N], ``log sum_{r not in S} w_r exp(z_r)``; -inf where S holds the whole tail."""
    if tail_logweights is None or tail_logweights.shape != tail_ids.shape:
        raise ValueError("tail_ids need tail_logweights of the same length; see draw_tail")
    # A token drawn twice is one token with both weights.
    ids_R, drawn = torch.unique(tail_ids, return_inverse=True)
    weights_R = torch.zeros(ids_R.shape, dtype=torch.float64, device=ids_R.device)
    weights_R.index_add_(0, drawn, tail_logweights.double().exp())

    logits_NR = token_logits(hidden_ND, weight_VD, ids_R, **head)
    token_ids = candidates.token_ids.to(ids_R.dtype)
    place = torch.searchsorted(ids_R, token_ids).clamp_max(len(ids_R) - 1)
    is_drawn = ids_R[place] == token_ids
    is_inside_NR = torch.zeros_like(logits_NR, dtype=torch.bool)
    is_inside_NR[candidates.row_ids[is_drawn], place[is_drawn]] = True
    logits_NR = logits_NR + weights_R.log().to(logits_NR.dtype)
    return logits_NR.masked_fill(is_inside_NR, -math.inf).logsumexp(-1)


class _FullCrossEntropy(torch.autograd.Function):
    """Chunked cross-entropy whose forward pass leaves the gradients of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        gold_N: Tensor,
        logit_scale: float,
        softcap: float | None,
        wants_gradient: bool,
    ) -> Tensor:
        wants_ND, wants_VD, wants_V = (wants_gradient and w for w in ctx.needs_input_grad[:3])
        dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        gradient_ND = torch.empty_like(hidden_ND) if wants_ND else None
        gradient_VD = torch.zeros_like(weight_VD) if wants_VD else None
        gradient_V = torch.zeros_like(bias_V) if bias_V is not None and wants_V else None
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        step = max(1, _CHUNK_ELEMENTS // len(weight_VD))
        for start in range(0, len(hidden_ND), step):
            chunk = slice(start, start + step)
            hidden_nD, gold_n1 = hidden_ND[chunk], gold_N[chunk, None].long()
            logits_nV = F.linear(hidden_nD, weight_VD).to(total.dtype)
            if bias_V is not None:
                logits_nV += bias_V
            logits_nV = shape_logits(logits_nV, logit_scale, softcap)
            logprobs_nV = logits_nV.log_softmax(-1)
            total -= logprobs_nV.gather(1, gold_n1).sum()
            if not (wants_ND or wants_VD or wants_V):
                continue
            gradient_nV = logprobs_nV.exp_()
            gradient_nV.scatter_add_(1, gold_n1, gradient_nV.new_full(gold_n1.shape, -1.0))
            if softcap is not None:
                gradient_nV *= 1 - (logits_nV / softcap).square()
            gradient_nV *= logit_scale
            if gradient_V is not None:
                gradient_V += gradient_nV.sum(0)
            gradient_nV = gradient_nV.to(dtype)
            if gradient_ND is not None:
                torch.mm(gradient_nV, weight_VD, out=gradient_ND[chunk])
            if gradient_VD is not None:
                gradient_VD.addmm_(gradient_nV.T, hidden_nD)
        ctx.save_for_backward(gradient_ND, gradient_VD, gradient_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None, None)
