"""Stage 1: losses on candidate sets, without ever building the [N, V] logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lrmc_ray.method.subsets import CandidateSets

Backend = Literal["auto", "sparse", "gather", "dense"]
Reduction = Literal["sum", "mean", "none"]


def candidate_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    ids = candidates.token_ids.long()
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    z = (hidden_ND[candidates.row_ids].to(dtype) * weight_VD[ids].to(dtype)).sum(-1)
    if bias_V is not None:
        z = z + bias_V[ids].to(dtype)
    return _shape(z, logit_scale, softcap)


def _shape(z: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _segment_logsumexp(values: Tensor, candidates: CandidateSets) -> Tensor:
    rows = candidates.row_ids
    with torch.no_grad():
        top = torch.segment_reduce(values, "max", offsets=candidates.offsets)
    return torch.segment_reduce((values - top[rows]).exp(), "sum", offsets=candidates.offsets).log() + top


def _tail_logsumexp(hidden_ND, weight_VD, candidates, tail_ids, tail_logweights, bias_V, logit_scale, softcap):
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    z = hidden_ND.to(dtype) @ weight_VD[tail_ids].to(dtype).T
    if bias_V is not None:
        z = z + bias_V[tail_ids].to(dtype)
    z = _shape(z, logit_scale, softcap) + tail_logweights.to(dtype)
    inside = torch.zeros(z.shape[0], weight_VD.shape[0], dtype=torch.bool, device=z.device)
    inside[candidates.row_ids, candidates.token_ids.long()] = True
    return z.masked_fill(inside[:, tail_ids], -math.inf).logsumexp(-1)


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
    z = candidate_logits(
        hidden_ND, weight_VD, candidates, bias_V=bias_V, logit_scale=logit_scale, softcap=softcap
    )
    lse = _segment_logsumexp(z, candidates)
    if tail_ids is not None:
        lse = torch.logaddexp(
            lse,
            _tail_logsumexp(
                hidden_ND, weight_VD, candidates, tail_ids, tail_logweights, bias_V, logit_scale, softcap
            ),
        )
    loss = lse - z[candidates.is_gold]
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def soft_cross_entropy(hidden_ND, weight_VD, candidates, *, bias_V=None, logit_scale=1.0, softcap=None, backend="auto"):
    """Sum over rows of KL(recorded, renormalized over S || model over S)."""
    return anchor_kl(
        hidden_ND, weight_VD, candidates, bias_V=bias_V, logit_scale=logit_scale, softcap=softcap, backend=backend
    )


def anchor_kl(
    hidden_ND, weight_VD, candidates, *, bias_V=None, tail_ids=None, tail_logweights=None,
    logit_scale=1.0, softcap=None, backend="auto",
):
    """Sum over rows of KL(p_base || q_model) in nats."""
    z = candidate_logits(
        hidden_ND, weight_VD, candidates, bias_V=bias_V, logit_scale=logit_scale, softcap=softcap
    )
    logp = candidates.logprobs.to(z.dtype)
    rows = candidates.row_ids
    lse = _segment_logsumexp(z, candidates)
    if tail_ids is None:
        logp = logp - _segment_logsumexp(logp, candidates)[rows]
        return (logp.exp() * (logp - z + lse[rows])).sum()
    tail = _tail_logsumexp(
        hidden_ND, weight_VD, candidates, tail_ids, tail_logweights, bias_V, logit_scale, softcap
    )
    lse = torch.logaddexp(lse, tail)
    out = candidates.outside_mass().to(z.dtype)
    return (logp.exp() * (logp - z + lse[rows])).sum() + (torch.xlogy(out, out) - out * (tail - lse)).sum()


def full_cross_entropy(
    hidden_ND, weight_VD, gold_N, *, bias_V=None, logit_scale=1.0, softcap=None,
):
    """Sum of full-vocabulary cross-entropy, nats."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    z = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        z = z + bias_V
    return torch.nn.functional.cross_entropy(_shape(z, logit_scale, softcap), gold_N.long(), reduction="sum")


def active_only_cross_entropy(hidden_ND, weight_VD, candidates, *, bias_V=None, logit_scale=1.0, softcap=None):
    """Full cross-entropy summed over the rows with more than one candidate."""
    active = candidates.active()
    return full_cross_entropy(
        hidden_ND[active], weight_VD, candidates.gold_ids[active], bias_V=bias_V, logit_scale=logit_scale, softcap=softcap
    )


def draw_tail(num_samples: int, vocabulary_size: int, *, seed: int, step: int, probabilities: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sampled token ids [R] and their log weights."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
    if probabilities is None:
        ids = torch.randperm(vocabulary_size, generator=generator)[:num_samples].sort().values
        return ids, torch.full((num_samples,), math.log(vocabulary_size / num_samples))
    ids = torch.multinomial(probabilities, num_samples, replacement=True, generator=generator).sort().values
    return ids, -(probabilities / probabilities.sum())[ids].log() - math.log(num_samples)
