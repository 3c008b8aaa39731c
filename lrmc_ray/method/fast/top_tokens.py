"""The likeliest tokens of each row, without sorting a whole vocabulary.

The plain counterpart is a stable sort of every row: ``select_candidates(..., plain=True)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.stored_mass import first_reaching, mass_of, round_down

CACHED_ELEMENTS = 2**18
"""Of the float64 temporaries on a CPU: 2 MiB stay in its cache, which is a quarter faster."""
_FIRST_K = 128  # most rows need fewer tokens; only the others are searched up to the cap


def cached_logsumexp(logits_nV: Tensor, highest_n: Tensor) -> Tensor:
    """[n] float64, ``logsumexp`` of each row, computed for a few rows at a time on a CPU.

    Args:
        logits_nV: Finite logits.
        highest_n: The largest of each row.
    """
    at_once = len(logits_nV)
    if logits_nV.device.type == "cpu":
        at_once = max(1, min(at_once, CACHED_ELEMENTS // logits_nV.shape[1]))
    workspace_XV = logits_nV.new_empty((at_once, logits_nV.shape[1]), dtype=torch.float64)
    parts = []
    for rows_XV, highest_X in zip(
        torch.split(logits_nV, at_once), torch.split(highest_n, at_once), strict=True
    ):
        shifted_XV = workspace_XV[: len(rows_XV)].copy_(rows_XV).sub_(highest_X[:, None])
        parts.append(shifted_XV.exp_().sum(-1).log_().add_(highest_X))
    return torch.cat(parts)


def top_tokens(
    logits_nV: Tensor, lse_n: Tensor, tau: float, k_min: int, cap_n: Tensor
) -> tuple[Tensor, Tensor]:
    """At least the first K tokens of each row, sorted as a stable sort of all would.

    Args:
        logits_nV: Finite logits.
        lse_n: [n] float64, the log-sum-exp of each row.
        tau: The mass that the first K tokens reach, unless the cap ends them.
        k_min: Least K.
        cap_n: [n], largest K of each row, at most V.

    Returns:
        Logits [n, K] and token ids [n, K], in descending order, ties by ascending id; -inf and 0
        in the places behind a row's own tokens.
    """
    # A threshold never divides tied tokens, unlike torch.topk, whose order among equal values is
    # undefined; and a stable sort keeps them by id.
    is_top_nV = logits_nV >= _threshold(logits_nV, lse_n, tau, k_min, cap_n)
    flat = _few_nonzero(is_top_nV.flatten())
    row, token = flat // logits_nV.shape[1], flat % logits_nV.shape[1]
    found_n = row.bincount(minlength=len(logits_nV))
    is_filled_nK = torch.arange(int(found_n.max()), device=row.device) < found_n[:, None]
    logits_nK = logits_nV.new_full(is_filled_nK.shape, -math.inf)
    logits_nK[is_filled_nK] = logits_nV[row, token]
    tokens_nK = token.new_zeros(is_filled_nK.shape)
    tokens_nK[is_filled_nK] = token
    logits_nK, order_nK = torch.sort(logits_nK, dim=-1, descending=True, stable=True)
    return logits_nK, tokens_nK.gather(1, order_nK)


def _threshold(logits_nV: Tensor, lse_n: Tensor, tau: float, k_min: int, cap_n: Tensor) -> Tensor:
    """[n, 1], a logit such that the first K tokens of the row, and few others, reach it.

    Taken among the maxima of X blocks of the vocabulary, so topk sees these alone. They are some of
    the row's tokens: where the first j of them hold ``tau``, or j is the cap, so do all tokens
    that are not below the j-th.
    """
    vocabulary_size = logits_nV.shape[1]
    widest = int(cap_n.max())
    block = max(1, min(16, vocabulary_size // (2 * widest)))
    num_blocks = vocabulary_size // block
    blocks = logits_nV[:, : block * num_blocks].view(-1, block, num_blocks)
    maxima_nX = blocks.amax(1)
    threshold_n = torch.empty_like(lse_n, dtype=logits_nV.dtype)
    # The rows whose threshold is not found yet, n of them at first.
    rest = torch.arange(len(lse_n), device=lse_n.device)
    for k in (min(_FIRST_K, widest), widest):
        top_nK = maxima_nX[rest].topk(k).values
        mass_nK = mass_of(round_down(top_nK - lse_n[rest, None]))
        j_n = first_reaching(tau, mass_nK).clamp_min(k_min).minimum(cap_n[rest])
        threshold_n[rest] = top_nK.gather(1, j_n.clamp_max(k)[:, None] - 1).squeeze(1)
        rest = rest[j_n > k]
        if not len(rest):
            break
    return threshold_n[:, None]


def _few_nonzero(mask: Tensor) -> Tensor:
    """``mask.nonzero()`` of a vector, about five times as fast where little is set.

    Eight booleans are looked at as one integer first.
    """
    if mask.numel() % 8:
        mask = F.pad(mask, (0, -mask.numel() % 8))
    eights = mask.view(torch.int64).nonzero().squeeze(1)
    which, within = mask.view(-1, 8)[eights].nonzero(as_tuple=True)
    return eights[which] * 8 + within
