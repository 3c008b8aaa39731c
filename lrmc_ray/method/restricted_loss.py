r"""Stage 1: the losses on the candidates. Each is a sum over positions, in nats; callers divide.

With the logits z at a position, its candidate set S, the gold token g, the current model's
softmax p over all V tokens, q over S, and the outside mass rho = 1 - p(S)::

    restricted    L_S = logsumexp_{i in S} z_i - z_g            the paper's
    soft          KL(b || q), b = recorded probabilities renormalized over S

Those over all tokens are in ``vocabulary_loss``, the full loss L among them.

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
tail, the anchor and the soft loss are this project's.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from lrmc_ray.method.candidate_logits import (
    Backend,
    HeadOptions,
    candidate_logits,
    segment_logsumexp,
    token_logits,
)
from lrmc_ray.method.subsets import CandidateSets

# Shape suffixes (this file):
#   N = positions, D = hidden size, V = vocabulary size, R = sampled tail tokens. Entries of
#   candidate sets are flat, [nnz].

Reduction = Literal["sum", "mean", "none"]


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
