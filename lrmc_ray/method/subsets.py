r"""Stage 0: which tokens each position keeps (candidate sets), and how a set is cut smaller.

Let p be the base model's softmax at a position, tokens sorted by descending p, ties by ascending
id. With the probability threshold tau::

    K_tau = smallest k whose stored mass >= tau
    K     = clip(K_tau, k_min, k_max)
    S     = the first K tokens, and the gold token
    rho   = 1 - p(S), the outside mass

Log-probabilities (nats) are stored as float16 rounded DOWN, and "stored mass" is the sum of
``floor(2^40 exp(stored)) / 2^40``, in integers. Integer sums depend on no order, chunk or device,
so the cut of a record is the record of the cut, exactly::

    cut(select_candidates(logits, gold, tau=high), low)
        == select_candidates(logits, gold, tau=low)     for every low <= high

A search over tau records once, at the top of its interval, and cuts per trial.

Source: Logits Replay + MoClip, arXiv 2510.09152, Stage 0 (dynamic top-K subsets with the gold
label). The rounding, the tie rule and the exactness of the cut are this project's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Shape suffixes (this file):
#   N = positions, V = vocabulary size, n = positions of one chunk, r = a few of these,
#   P = padded tokens per position.

_DTYPES = {
    "offsets": torch.int64,
    "token_ids": torch.int32,
    "logprobs": torch.float16,
    "gold_ids": torch.int32,
}
_MASS_UNIT = 2**40
_LOWEST = torch.finfo(torch.float16).min
_CHUNK_ELEMENTS = 2**21  # of the [n, V] temporaries: 8 MiB in float32
_CACHED_ELEMENTS = 2**18  # of the float64 ones: 2 MiB stay in the cache, a quarter faster
_FIRST_K = 128  # most rows need fewer; only the others are searched to k_max


@dataclass(frozen=True, eq=False)
class CandidateSets:
    """Candidate tokens of N positions in CSR form; a row is one position.

    Attributes:
        offsets: [N + 1] int64; row i holds the entries ``offsets[i]:offsets[i + 1]``.
        token_ids: [nnz] int32, in descending base probability, ties by ascending id; the gold
            token comes last where it is not among the first K.
        logprobs: [nnz] float16, base log-probabilities in nats, rounded down.
        gold_ids: [N] int32; each row contains its gold token once.
    """

    offsets: Tensor
    token_ids: Tensor
    logprobs: Tensor
    gold_ids: Tensor

    @property
    def num_rows(self) -> int:
        """Number of positions N."""
        return self.gold_ids.numel()

    @property
    def sizes(self) -> Tensor:
        """[N] int64, candidates per row: the K of the method, gold included."""
        return self.offsets.diff()

    @property
    def row_ids(self) -> Tensor:
        """[nnz] int64, the row of every entry."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.sizes, output_size=self.token_ids.numel())

    @property
    def is_gold(self) -> Tensor:
        """[nnz] bool, True at each row's gold token."""
        return self.token_ids == self.gold_ids[self.row_ids]

    def active(self) -> Tensor:
        """[N] bool: |S| > 1. The other rows have restricted loss and gradient exactly zero."""
        return self.sizes > 1

    def outside_mass(self) -> Tensor:
        """[N] float64: rho = 1 - stored mass of the row (gold included), at least 0."""
        return (1.0 - self._mass().double() / _MASS_UNIT).clamp_min(0.0)

    def capped(self, tau: float) -> Tensor:
        """[N] bool: the row's stored mass, gold included, is below ``tau``: k_max has ended it."""
        return self._mass() < _mass_goal(tau)

    def rows(self, index: Tensor) -> CandidateSets:
        """The rows at ``index`` (an index or boolean mask tensor), in that order."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        sizes = self.sizes[index]
        offsets = _offsets(sizes)
        shift = self.offsets[index] - offsets[:-1]
        entries = torch.arange(int(offsets[-1]), device=offsets.device)
        entries += shift.repeat_interleave(sizes, output_size=entries.numel())
        return CandidateSets(
            offsets, self.token_ids[entries], self.logprobs[entries], self.gold_ids[index]
        )

    @staticmethod
    def concatenate(parts: Sequence[CandidateSets]) -> CandidateSets:
        """The rows of all ``parts``, one part after the other."""
        return CandidateSets(
            _offsets(torch.cat([part.sizes for part in parts])),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.gold_ids for part in parts]),
        )

    def to(self, device: torch.device | str) -> CandidateSets:
        """The same sets on another device."""
        return CandidateSets(
            self.offsets.to(device),
            self.token_ids.to(device),
            self.logprobs.to(device),
            self.gold_ids.to(device),
        )

    def check(self, vocabulary_size: int) -> None:
        """Raise ``ValueError`` unless these sets may be given to the loss.

        Checked: dtypes and lengths, rising offsets, ids in [0, vocabulary_size), log-probabilities
        finite, at most 0 and descending, no token twice in a row, the gold token in its row.
        """
        for name, dtype in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != 1:
                raise ValueError(
                    f"{name} must be a {dtype} vector, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        nnz = self.token_ids.numel()
        if self.offsets.numel() != self.num_rows + 1 or self.logprobs.numel() != nnz:
            raise ValueError(
                "offsets must be one longer than gold_ids and logprobs as long as token_ids, got "
                f"lengths {self.offsets.numel()}, {self.num_rows}, {self.logprobs.numel()}, {nnz}"
            )
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0 or last != nnz or (self.sizes < 1).any():
            raise ValueError(
                f"offsets must rise from 0 to the number of entries, {nnz}, got {first} to {last} "
                f"with sizes {self.sizes.tolist()[:8]}"
            )
        for name in ("token_ids", "gold_ids"):
            ids = getattr(self, name)
            is_wrong = (ids < 0) | (ids >= vocabulary_size)
            if is_wrong.any():
                raise ValueError(
                    f"{name} must be in [0, {vocabulary_size}), got {int(ids[is_wrong][0])}; is it "
                    "the record of another tokenizer?"
                )
        is_wrong = ~(self.logprobs.isfinite() & (self.logprobs <= 0))
        if is_wrong.any():
            raise ValueError(
                f"logprobs must be finite and at most 0, got {float(self.logprobs[is_wrong][0])}"
            )
        rows = self.row_ids
        is_rising = (rows[1:] == rows[:-1]) & (self.logprobs[1:] > self.logprobs[:-1])
        if is_rising.any():
            entry = int(is_rising.nonzero()[0])
            raise ValueError(
                f"logprobs must descend within a row, got {float(self.logprobs[entry])} before "
                f"{float(self.logprobs[entry + 1])} in row {int(rows[entry])}"
            )
        if torch.unique(rows * vocabulary_size + self.token_ids).numel() != nnz:
            raise ValueError("token_ids must be distinct within a row, got a token twice")
        has_gold = torch.zeros_like(self.gold_ids, dtype=torch.bool)
        has_gold[rows[self.is_gold]] = True
        if not has_gold.all():
            row = int((~has_gold).nonzero()[0])
            raise ValueError(
                f"each row must contain its gold token, row {row} lacks {int(self.gold_ids[row])}"
            )

    def _mass(self) -> Tensor:
        """[N] int64, stored mass of each row in units of 2^-40."""
        total = _prefix_mass(self.logprobs)
        return total[self.offsets[1:]] - total[self.offsets[:-1]]


@torch.no_grad()
def select_candidates(
    logits_NV: Tensor,
    gold_N: Tensor,
    *,
    tau: float,
    k_min: int = 1,
    k_max: int | Tensor = 1024,
) -> CandidateSets:
    """The smallest candidate sets that hold ``tau`` of the base model's probability.

    Args:
        logits_NV: [N, V] logits of the base model, any floating dtype, all finite.
        gold_N: [N] gold token ids, any integer dtype.
        tau: probability threshold in (0, 1].
        k_min: fewest tokens per row before the gold token is added.
        k_max: most tokens per row before the gold token is added; an int, or one int per row
            ([N] tensor) where rows have different caps.

    Returns:
        Candidate sets on the device of ``logits_NV``.

    Raises:
        ValueError: a setting out of range, gold ids outside the vocabulary, or logits that are
            NaN or infinite. -inf is refused too: Stage 1 computes logits from hidden states and
            the head alone and would not know such a mask.
    """
    num_rows, vocabulary_size = logits_NV.shape
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {tau}; it is a fraction, not a percentage")
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
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // vocabulary_size)
    rows_at_once = rows_per_chunk
    if logits_NV.device.type == "cpu":
        rows_at_once = max(1, min(rows_per_chunk, _CACHED_ELEMENTS // vocabulary_size))
    workspace_rV = logits_NV.new_empty(
        (min(rows_at_once, num_rows), vocabulary_size), dtype=torch.float64
    )
    parts = [
        _select_chunk(
            logits_NV[start : start + rows_per_chunk],
            gold_N[start : start + rows_per_chunk],
            tau,
            k_min,
            cap_N[start : start + rows_per_chunk].clamp_max(vocabulary_size),
            workspace_rV,
        )
        for start in range(0, num_rows, rows_per_chunk)
    ]
    return CandidateSets.concatenate(parts)


def cut(candidates: CandidateSets, tau: float, *, k_min: int = 1) -> CandidateSets:
    """The same rows at a smaller ``tau``: exactly what recording at ``tau`` would have stored.

    Exact for ``tau`` and ``k_min`` at most as large as those of the record. A larger ``k_min`` is
    refused where a row is too short for it, but an appended gold token hides one missing token.

    Raises:
        ValueError: ``tau`` outside (0, 1], or a row with fewer than ``k_min`` tokens.
    """
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {tau}; it is a fraction, not a percentage")
    smallest = int(candidates.sizes.min()) if candidates.num_rows else k_min
    if not 1 <= k_min <= smallest:
        raise ValueError(
            f"k_min must be in [1, {smallest}], the smallest recorded row, got {k_min}; "
            "record again with a larger k_min"
        )
    total = _prefix_mass(candidates.logprobs)
    starts = candidates.offsets[:-1][candidates.row_ids]
    rank = torch.arange(starts.numel(), device=starts.device) - starts
    before = total[:-1] - total[starts]
    keep = (rank < k_min) | (before < _mass_goal(tau)) | candidates.is_gold
    return _only(candidates, keep)


def without_added_gold(
    candidates: CandidateSets, tau: float, *, k_min: int, k_max: int
) -> CandidateSets:
    """The sets of a record that had not added the gold token: an ablation.

    A row whose gold token is there only because it is the gold one keeps it alone: without the
    right token in its set the loss of a position means nothing, so it becomes an inactive one.

    Args:
        candidates: what ``cut`` returns, or ``select_candidates``.
        tau: the threshold of that cut.
        k_min: as there.
        k_max: of the record.
    """
    total = _prefix_mass(candidates.logprobs)
    entries = candidates.is_gold.nonzero().squeeze(1)
    starts = candidates.offsets[:-1]
    rank_N = entries - starts
    is_reached_N = total[entries] - total[starts] >= _mass_goal(tau)
    is_added_N = ((rank_N >= k_min) & is_reached_N) | (rank_N >= k_max)
    keep = candidates.is_gold | ~is_added_N[candidates.row_ids]
    return _only(candidates, keep)


def _select_chunk(
    logits_nV: Tensor,
    gold_n: Tensor,
    tau: float,
    k_min: int,
    cap_n: Tensor,
    workspace_rV: Tensor,
) -> CandidateSets:
    # Upcast half precision (exact), leave float64 alone.
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    highest_n = logits_nV.amax(-1)
    if not (highest_n.isfinite() & logits_nV.amin(-1).isfinite()).all():
        raise ValueError(
            "logits must be finite, got NaN or infinity; half precision may have overflowed (use "
            "float32), and a mask of -inf is nothing that Stage 1 could repeat"
        )
    lse_n = _logsumexp(logits_nV, highest_n, workspace_rV)

    # Sort the tokens above a threshold. Unlike torch.topk, whose order among equal values is
    # undefined, a threshold never divides tied tokens, and a stable sort keeps them by id.
    is_top_nV = logits_nV >= _threshold(logits_nV, lse_n, tau, k_min, cap_n)
    flat = _few_nonzero(is_top_nV.flatten())
    row, token = flat // logits_nV.shape[1], flat % logits_nV.shape[1]
    found_n = row.bincount(minlength=len(gold_n))
    rank_P = torch.arange(int(found_n.max()), device=row.device)
    is_filled_nP = rank_P < found_n[:, None]
    logits_nP = logits_nV.new_full(is_filled_nP.shape, -math.inf)
    logits_nP[is_filled_nP] = logits_nV[row, token]
    tokens_nP = token.new_zeros(is_filled_nP.shape)
    tokens_nP[is_filled_nP] = token
    logits_nP, order_nP = torch.sort(logits_nP, dim=-1, descending=True, stable=True)
    tokens_nP = tokens_nP.gather(1, order_nP)
    logprobs_nP = _round_down(logits_nP - lse_n[:, None])
    k_n = _first_reaching(tau, _stored_mass(logprobs_nP)).clamp_min(k_min).minimum(cap_n)

    gold_n1 = gold_n[:, None].long()
    is_kept_nP = rank_P < k_n[:, None]
    lacks_gold_n1 = ~(is_kept_nP & (tokens_nP == gold_n1)).any(-1, keepdim=True)
    gold_logprob_n1 = _round_down(logits_nV.gather(1, gold_n1) - lse_n[:, None])
    is_kept_nP = torch.cat([is_kept_nP, lacks_gold_n1], dim=1)
    return CandidateSets(
        offsets=_offsets(is_kept_nP.sum(-1)),
        token_ids=torch.cat([tokens_nP, gold_n1], dim=1)[is_kept_nP].int(),
        logprobs=torch.cat([logprobs_nP, gold_logprob_n1], dim=1)[is_kept_nP],
        gold_ids=gold_n.int(),
    )


def _logsumexp(logits_nV: Tensor, highest_n: Tensor, workspace_rV: Tensor) -> Tensor:
    """[n] float64; ``workspace_rV`` is float64 and holds a few rows at a time."""
    parts = []
    for start in range(0, len(logits_nV), len(workspace_rV)):
        rows_rV = logits_nV[start : start + len(workspace_rV)]
        highest_r = highest_n[start : start + len(workspace_rV)]
        shifted_rV = workspace_rV[: len(rows_rV)].copy_(rows_rV).sub_(highest_r[:, None])
        parts.append(shifted_rV.exp_().sum(-1).log_().add_(highest_r))
    return torch.cat(parts)


def _threshold(logits_nV: Tensor, lse_n: Tensor, tau: float, k_min: int, cap_n: Tensor) -> Tensor:
    """[n, 1], a logit such that the first K tokens of the row, and few others, reach it.

    Taken among the maxima of blocks of the vocabulary, so topk sees these alone. They are some of
    the row's tokens: where the first j of them hold ``tau``, or j is the cap, so do all tokens
    that are not below the j-th.
    """
    vocabulary_size = logits_nV.shape[1]
    widest = int(cap_n.max())
    block = max(1, min(16, vocabulary_size // (2 * widest)))
    num_blocks = vocabulary_size // block
    blocks = logits_nV[:, : block * num_blocks].view(-1, block, num_blocks)
    maxima_nb = blocks.amax(1)
    threshold_n = torch.empty_like(lse_n, dtype=logits_nV.dtype)
    rest = torch.arange(len(lse_n), device=lse_n.device)
    for k in (min(_FIRST_K, widest), widest):
        top_rk = maxima_nb[rest].topk(k).values
        mass_rk = _stored_mass(_round_down(top_rk - lse_n[rest, None]))
        j_r = _first_reaching(tau, mass_rk).clamp_min(k_min).minimum(cap_n[rest])
        threshold_n[rest] = top_rk.gather(1, j_r.clamp_max(k)[:, None] - 1).squeeze(1)
        rest = rest[j_r > k]
        if not len(rest):
            break
    return threshold_n[:, None]


def _first_reaching(tau: float, mass_nP: Tensor) -> Tensor:
    """[n], how many leading entries it takes to hold ``tau``; P + 1 where all do not."""
    return 1 + (mass_nP.cumsum(-1) < _mass_goal(tau)).sum(-1)


def _few_nonzero(mask: Tensor) -> Tensor:
    """``mask.nonzero()`` of a vector, about five times as fast where little is set.

    Eight booleans are looked at as one integer first.
    """
    if mask.numel() % 8:
        mask = torch.nn.functional.pad(mask, (0, -mask.numel() % 8))
    eights = mask.view(torch.int64).nonzero().squeeze(1)
    which, within = mask.view(-1, 8)[eights].nonzero(as_tuple=True)
    return eights[which] * 8 + within


def _round_down(logprobs: Tensor) -> Tensor:
    """The largest float16 at most ``logprobs`` (and at least the lowest finite one)."""
    logprobs = logprobs.clamp(_LOWEST, 0.0)
    rounded = logprobs.half()
    down = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded > logprobs, down, rounded)


@functools.cache
def _mass_table(device: torch.device) -> Tensor:
    """[65536] int64: floor(2^40 exp(x)) for every float16 bit pattern of an x <= 0."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).tolist()
    masses = [math.floor(math.exp(x) * _MASS_UNIT) if x <= 0 else 0 for x in values]
    return torch.tensor(masses, dtype=torch.int64, device=device)


def _stored_mass(logprobs: Tensor) -> Tensor:
    """floor(2^40 exp(stored)) of each entry, int64."""
    bits = logprobs.view(torch.int16).long() & 0xFFFF
    return _mass_table(logprobs.device)[bits]


def _prefix_mass(logprobs: Tensor) -> Tensor:
    """[nnz + 1] int64, running stored mass over all entries of all rows.

    Integers may wrap around past 2^23 rows; differences stay exact.
    """
    return torch.nn.functional.pad(_stored_mass(logprobs).cumsum(0), (1, 0))


def _mass_goal(tau: float) -> int:
    return math.ceil(tau * _MASS_UNIT)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _only(candidates: CandidateSets, keep: Tensor) -> CandidateSets:
    """The same rows with the entries where ``keep`` is true."""
    kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return CandidateSets(
        kept[candidates.offsets],
        candidates.token_ids[keep],
        candidates.logprobs[keep],
        candidates.gold_ids,
    )
