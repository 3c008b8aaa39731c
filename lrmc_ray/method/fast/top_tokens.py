"""The likeliest tokens of each row, without sorting a whole vocabulary.

The plain counterpart is a stable sort of every row: ``select_candidates(..., plain=True)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.fast import logits_kernel
from lrmc_ray.method.stored_mass import first_reaching, mass_of, round_down

CACHED_ELEMENTS = 2**16
"""Of the float64 temporaries on a CPU: 512 KiB stay in the cache of one core."""
_FIRST_K = 128  # most rows need fewer tokens; only the others are searched up to the cap
_WIDEST_BLOCK = 16


def cached_logsumexp(logits_nV: Tensor, highest_n: Tensor) -> Tensor:
    """[n] float64, ``logsumexp`` of each row; NaN where a logit is not finite.

    On a CPU float32 goes through ``logits_kernel``. Else it is computed for a part at a time: some
    rows, or of a large vocabulary some columns of one row.

    Args:
        logits_nV: Of each row.
        highest_n: The largest of each row.
    """
    if logits_kernel.can_take(logits_nV):
        return logits_kernel.exp_sums(logits_nV, highest_n).log_().add_(highest_n)
    rows, columns = logits_nV.shape
    if logits_nV.device.type == "cpu":
        columns = max(1, min(columns, CACHED_ELEMENTS))
        rows = max(1, min(rows, CACHED_ELEMENTS // columns))
    workspace = logits_nV.new_empty((rows, columns), dtype=torch.float64)
    sums = []
    for rows_XV, highest_X in zip(
        torch.split(logits_nV, rows), torch.split(highest_n, rows), strict=True
    ):
        sum_X = highest_X.new_zeros(len(highest_X), dtype=torch.float64)
        for part in torch.split(rows_XV, columns, dim=1):
            shifted = workspace[: len(rows_XV), : part.shape[1]].copy_(part)
            sum_X += shifted.sub_(highest_X[:, None]).exp_().sum(-1)
            sum_X.masked_fill_(part.amin(-1).isneginf(), math.nan)
        sums.append(sum_X.log_().add_(highest_X))
    return torch.cat(sums)


class Blocks:
    """The vocabulary in X blocks, and the largest logit of each: most are looked at no further.

    Block x holds the tokens x, x + X, x + 2X, ...; those that are left over stand behind the last.
    """

    def __init__(self, logits_nV: Tensor, widest: int) -> None:
        """Divide so finely that ``widest`` blocks are at most half of them."""
        vocabulary_size = logits_nV.shape[1]
        block = max(1, min(_WIDEST_BLOCK, vocabulary_size // (2 * widest)))
        self.number = vocabulary_size // block
        self._logits_nBX = logits_nV[:, : block * self.number].view(-1, block, self.number)
        self._rest_nY = logits_nV[:, block * self.number :]
        self._vocabulary_size = vocabulary_size
        if logits_kernel.can_take(logits_nV):
            self.maxima_nX = logits_kernel.block_maxima(logits_nV, self.number)
        else:
            self.maxima_nX = self._logits_nBX.amax(1)

    def highest(self) -> Tensor:
        """[n], the largest logit of each row."""
        highest_n = self.maxima_nX.amax(-1)
        if self._rest_nY.shape[1]:
            highest_n = highest_n.maximum(self._rest_nY.amax(-1))
        return highest_n

    def reaching(self, threshold_n: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and token ids of all logits that are not below their row's threshold, in order."""
        flat = _few_nonzero((self.maxima_nX >= threshold_n[:, None]).flatten())
        row_m, block_m = flat // self.number, flat % self.number
        within_mB = self._logits_nBX[row_m, :, block_m] >= threshold_n[row_m, None]
        which, place = within_mB.nonzero(as_tuple=True)
        found = row_m[which] * self._vocabulary_size + place * self.number + block_m[which]
        row, place = (self._rest_nY >= threshold_n[:, None]).nonzero(as_tuple=True)
        first = self._vocabulary_size - self._rest_nY.shape[1]
        found = torch.cat([found, row * self._vocabulary_size + first + place]).sort().values
        return found // self._vocabulary_size, found % self._vocabulary_size


def top_tokens(
    logits_nV: Tensor, blocks: Blocks, lse_n: Tensor, tau: float, k_min: int, cap_n: Tensor
) -> tuple[Tensor, Tensor]:
    """At least the first K tokens of each row, sorted as a stable sort of all would.

    Args:
        logits_nV: Finite logits.
        blocks: Of these logits.
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
    row, token = blocks.reaching(_threshold(blocks.maxima_nX, lse_n, tau, k_min, cap_n))
    found_n = row.bincount(minlength=len(logits_nV))
    is_filled_nK = torch.arange(int(found_n.max()), device=row.device) < found_n[:, None]
    logits_nK = logits_nV.new_full(is_filled_nK.shape, -math.inf)
    logits_nK[is_filled_nK] = logits_nV[row, token]
    tokens_nK = token.new_zeros(is_filled_nK.shape)
    tokens_nK[is_filled_nK] = token
    logits_nK, order_nK = torch.sort(logits_nK, dim=-1, descending=True, stable=True)
    return logits_nK, tokens_nK.gather(1, order_nK)


def _threshold(maxima_nX: Tensor, lse_n: Tensor, tau: float, k_min: int, cap_n: Tensor) -> Tensor:
    """[n], a logit such that the first K tokens of the row, and few others, reach it.

    Taken among the maxima of the blocks, so topk sees these alone. They are some of the row's
    tokens: where the first j of them hold ``tau``, or j is the cap, so do all tokens that are not
    below the j-th.
    """
    widest = int(cap_n.max())
    threshold_n = torch.empty_like(lse_n, dtype=maxima_nX.dtype)
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
    return threshold_n


def _few_nonzero(mask: Tensor) -> Tensor:
    """``mask.nonzero()`` of a vector, about five times as fast where little is set.

    Eight booleans are looked at as one integer first.
    """
    if mask.numel() % 8:
        mask = F.pad(mask, (0, -mask.numel() % 8))
    eights = mask.view(torch.int64).nonzero().squeeze(1)
    which, within = mask.view(-1, 8)[eights].nonzero(as_tuple=True)
    return eights[which] * 8 + within
