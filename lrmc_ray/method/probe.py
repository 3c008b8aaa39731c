"""Outside-mass probe."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrmc_ray.method.restricted_loss import _segment_logsumexp, _shape, candidate_logits
from lrmc_ray.method.subsets import CandidateSets


class OutsideMass(NamedTuple):
    """Mean outside mass of a sample of positions."""

    mean: float
    standard_error: float
    num_positions: int


@torch.no_grad()
def outside_mass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    candidates: CandidateSets,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    share: float = 1.0,
    seed: int = 0,
) -> OutsideMass:
    """Mean rho = 1 - q(S) of the current model on a sampled share of positions."""
    num = max(1, round(share * candidates.num_rows))
    index = torch.randperm(candidates.num_rows, generator=torch.Generator().manual_seed(seed))[:num]
    index = index.to(hidden_ND.device)
    sets, hidden = candidates.rows(index), hidden_ND[index]
    z = candidate_logits(hidden, weight_VD, sets, bias_V=bias_V, logit_scale=logit_scale, softcap=softcap)
    dtype = z.dtype
    full = hidden.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        full = full + bias_V
    rho = -torch.expm1(_segment_logsumexp(z, sets) - _shape(full, logit_scale, softcap).logsumexp(-1))
    rho = rho.clamp_min(0).double()
    return OutsideMass(float(rho.mean()), float(rho.std() / num**0.5) if num > 1 else float("nan"), num)
