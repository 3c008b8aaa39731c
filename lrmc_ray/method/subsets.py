r"""Stage 0: which tokens each position keeps (candidate sets), and how a set is cut smaller.

Let p be the base model's softmax at a position, tokens sorted by descending p, ties by ascending
id. With the probability threshold tau::

    K_tau = smallest k whose stored mass >= tau
    K     = clip(K_tau, k_min, k_max)
    S     = the first K tokens, and the gold token
    rho   = 1 - p(S), the outside mass

Log-probabilities (nats) are stored as float16 rounded DOWN, and "stored mass" is a sum of integers
made of them (``stored_mass``), so the cut of a record is the record of the cut, exactly::

    cut(select_candidates(logits, gold, tau=high), low)
        == select_candidates(logits, gold, tau=low)     for every low <= high

A search over tau records once, at the top of its interval, and cuts per trial.

Source: Logits Replay + MoClip, arXiv 2510.09152, Stage 0 (dynamic top-K subsets with the gold
label). The rounding, the tie rule and the exactness of the cut are this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrmc_ray.method.candidate_sets import CandidateSets as CandidateSets
from lrmc_ray.method.candidate_sets import row_offsets
from lrmc_ray.method.fast.top_tokens import Blocks, cached_logsumexp, top_tokens
from lrmc_ray.method.stored_mass import (
    first_reaching,
    mass_goal,
    mass_of,
    round_down,
    running_mass,
)

CHUNK_ELEMENTS = 2**22
"""Logits that are looked at together: 16 MiB in float32."""


@torch.no_grad()
def select_candidates(
    logits_NV: Tensor,
    gold_N: Tensor,
    *,
    tau: float,
    k_min: int = 1,
    k_max: int | Tensor = 1024,
    plain: bool = False,
) -> CandidateSets:
    """The smallest candidate sets that hold ``tau`` of the base model's probability.

    Args:
        logits_NV: [N, V] logits of the base model, any floating dtype, all finite.
        gold_N: [N] gold token ids, any integer dtype.
        tau: Probability threshold in (0, 1].
        k_min: Fewest tokens per row before the gold token is added.
        k_max: Most tokens per row before the gold token is added; an int, or one int per row
            ([N] tensor) where rows have different caps.
        plain: Sort the whole vocabulary, as the definition says. By default only the tokens that
            can be among the first K are sorted: the same sets to the last bit, sooner.

    Returns:
        Candidate sets on the device of ``logits_NV``.

    Raises:
        ValueError: A setting out of range, gold ids outside the vocabulary, or logits that are
            NaN or infinite. -inf is refused too: Stage 1 computes logits from hidden states and
            the head alone and would not know such a mask.
    """
    num_rows, vocabulary_size = logits_NV.shape
    _check_tau(tau)
    cap_N = torch.as_tensor(k_max, device=logits_NV.device).expand(num_rows)
    if num_rows and not 1 <= k_min <= int(cap_N.min()):
        raise ValueError(f"k_min must be in [1, k_max], got k_min {k_min}, k_max {cap_N.min()}")
    if ((gold_N < 0) | (gold_N >= vocabulary_size)).any():
        raise ValueError(
            f"gold_N must be in [0, {vocabulary_size}), got {gold_N.min()} to {gold_N.max()}"
        )
    if not num_rows:
        none = gold_N.int()
        return CandidateSets(none.new_zeros(1, dtype=torch.int64), none, none.half(), none)
    cap_N = cap_N.clamp_max(vocabulary_size)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // vocabulary_size)
    chunks = zip(*(torch.split(x, rows_per_chunk) for x in (logits_NV, gold_N, cap_N)), strict=True)
    return CandidateSets.concatenate(
        [
            _select_chunk(logits_nV, gold_n, tau, k_min, cap_n, plain)
            for logits_nV, gold_n, cap_n in chunks
        ]
    )


def _select_chunk(
    logits_nV: Tensor, gold_n: Tensor, tau: float, k_min: int, cap_n: Tensor, plain: bool
) -> CandidateSets:
    # Half precision is widened, which is exact; float64 stays.
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    if plain:
        lse_n = logits_nV.double().logsumexp(-1)
        lse_n.masked_fill_(~logits_nV.isfinite().all(-1), math.nan)
    else:
        blocks = Blocks(logits_nV, int(cap_n.max()))
        lse_n = cached_logsumexp(logits_nV, blocks.highest())
    if not lse_n.isfinite().all():
        raise ValueError(
            "logits must be finite, got NaN or infinity; half precision may have overflowed (use "
            "float32), and a mask of -inf is nothing that Stage 1 could repeat"
        )
    if plain:
        logits_nK, tokens_nK = torch.sort(logits_nV, dim=-1, descending=True, stable=True)
    else:
        logits_nK, tokens_nK = top_tokens(logits_nV, blocks, lse_n, tau, k_min, cap_n)
    logprobs_nK = round_down(logits_nK - lse_n[:, None])
    k_n = first_reaching(tau, mass_of(logprobs_nK)).clamp_min(k_min).minimum(cap_n)

    # Each row's gold token stands behind its K tokens, and is kept where it is not one of them.
    gold_n1 = gold_n[:, None].long()
    is_kept_nK = torch.arange(logits_nK.shape[1], device=k_n.device) < k_n[:, None]
    lacks_gold_n1 = ~(is_kept_nK & (tokens_nK == gold_n1)).any(-1, keepdim=True)
    gold_logprob_n1 = round_down(logits_nV.gather(1, gold_n1) - lse_n[:, None])
    is_kept_nK = torch.cat([is_kept_nK, lacks_gold_n1], dim=1)
    return CandidateSets(
        offsets=row_offsets(is_kept_nK.sum(-1)),
        token_ids=torch.cat([tokens_nK, gold_n1], dim=1)[is_kept_nK].int(),
        logprobs=torch.cat([logprobs_nK, gold_logprob_n1], dim=1)[is_kept_nK],
        gold_ids=gold_n.int(),
    )


def cut(candidates: CandidateSets, tau: float, *, k_min: int = 1) -> CandidateSets:
    """The same rows at a smaller ``tau``: exactly what recording at ``tau`` would have stored.

    Exact for ``tau`` and ``k_min`` at most as large as those of the record. A larger ``k_min`` is
    refused where a row is too short for it, but an appended gold token hides one missing token.

    Raises:
        ValueError: ``tau`` outside (0, 1], or a row with fewer than ``k_min`` tokens.
    """
    _check_tau(tau)
    smallest = int(candidates.sizes.min()) if candidates.num_rows else k_min
    if not 1 <= k_min <= smallest:
        raise ValueError(
            f"k_min must be in [1, {smallest}], the smallest recorded row, got {k_min}; "
            "record again with a larger k_min"
        )
    total = running_mass(candidates.logprobs)
    starts_E = candidates.offsets[:-1][candidates.row_ids]
    rank_E = torch.arange(starts_E.numel(), device=starts_E.device) - starts_E
    before_E = total[:-1] - total[starts_E]
    return candidates.only((rank_E < k_min) | (before_E < mass_goal(tau)) | candidates.is_gold)


def without_added_gold(
    candidates: CandidateSets, tau: float, *, k_min: int, k_max: int
) -> CandidateSets:
    """The sets of a record that had not added the gold token: an ablation.

    A row whose gold token is there only because it is the gold one keeps it alone: without the
    right token in its set the loss of a position means nothing, so it becomes an inactive one.

    Args:
        candidates: What ``cut`` returns, or ``select_candidates``.
        tau: The threshold of that cut.
        k_min: As there.
        k_max: Of the record.
    """
    total = running_mass(candidates.logprobs)
    gold_entry_N = candidates.is_gold.nonzero().squeeze(1)
    starts_N = candidates.offsets[:-1]
    rank_N = gold_entry_N - starts_N
    is_reached_N = total[gold_entry_N] - total[starts_N] >= mass_goal(tau)
    is_added_N = ((rank_N >= k_min) & is_reached_N) | (rank_N >= k_max)
    return candidates.only(candidates.is_gold | ~is_added_N[candidates.row_ids])


def _check_tau(tau: float) -> None:
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {tau}; it is a fraction, not a percentage")
