"""The outside mass of the current model: how stale the recorded candidate sets have become.

The restricted loss never pushes probability back into S, so rho = 1 - p(S) of the model in
training can grow past the 1 - tau it started below, unseen by the loss. It takes the full
vocabulary to see it; a sample of positions every few steps is enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrmc_ray.method.candidate_logits import segment_logsumexp, shape_logits
from lrmc_ray.method.subsets import CandidateSets

_CHUNK_ELEMENTS = 2**22  # of the [n, V] logits: 16 MiB in float32


class OutsideMass(NamedTuple):
    """Mean outside mass over a sample of positions, with its standard error."""

    mean: float
    stderr: float
    """Sample standard deviation / sqrt(positions), the finite population not counted; NaN for one
    position."""
    num_positions: int


@torch.no_grad()
def outside_mass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    num_positions: int,
    seed: int,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> OutsideMass:
    """Mean of rho = 1 - p(S) of the current model over sampled positions.

    Args:
        hidden_ND: [N, D] last hidden states of the current model.
        weight_VD: [V, D] weight of the output head.
        candidates: N candidate sets, on the same device.
        num_positions: how many of the N positions to look at; all of them if there are no more.
        seed: which ones, drawn without replacement.
        bias_V: see ``HeadOptions`` in ``candidate_logits``.
        logit_scale: as there.
        softcap: as there.

    Raises:
        ValueError: no positions.
    """
    if num_positions < 1 or not len(hidden_ND):
        raise ValueError(
            f"num_positions must be at least 1 of at least 1, got {num_positions} of "
            f"{len(hidden_ND)}"
        )
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(hidden_ND), generator=generator)[:num_positions]
    step = max(1, _CHUNK_ELEMENTS // len(weight_VD))
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    rho = []
    for index in torch.split(sample.to(hidden_ND.device), step):
        sets = candidates.rows(index)
        logits_nV = (hidden_ND[index].to(weight_VD.dtype) @ weight_VD.T).to(dtype)
        if bias_V is not None:
            logits_nV += bias_V
        logits_nV = shape_logits(logits_nV, logit_scale, softcap)
        inside_n = segment_logsumexp(logits_nV[sets.row_ids, sets.token_ids], sets)
        rho.append(-torch.expm1(inside_n - logits_nV.logsumexp(-1)))
    rho_n = torch.cat(rho).double().clamp(0.0, 1.0)
    spread = float(rho_n.std()) if len(rho_n) > 1 else math.nan
    return OutsideMass(float(rho_n.mean()), spread / math.sqrt(len(rho_n)), len(rho_n))
