"""Candidate sets: which tokens each position keeps, and what the base model said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.fast.loss_plan import LossPlan, TokenOrder
from lrmc_ray.method.stored_mass import MASS_UNIT, mass_goal, running_mass

_DTYPES = {
    "offsets": torch.int64,
    "token_ids": torch.int32,
    "logprobs": torch.float16,
    "gold_ids": torch.int32,
}


@dataclass(frozen=True, eq=False)
class CandidateSets:
    """Candidate tokens of N positions in CSR form; a row is one position, E entries in all.

    Attributes:
        offsets: [N + 1] int64; row i holds the entries ``offsets[i]:offsets[i + 1]``.
        token_ids: [E] int32, in descending base probability, ties by ascending id; the gold
            token comes last where it is not among the first K.
        logprobs: [E] float16, base log-probabilities in nats, rounded down.
        gold_ids: [N] int32; each row contains its gold token once.
        plan: What losses on a GPU want beside, see ``planned``; None until it is made.
    """

    offsets: Tensor
    token_ids: Tensor
    logprobs: Tensor
    gold_ids: Tensor
    plan: LossPlan | None = None

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
        """[E] int64, the row of every entry."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.sizes, output_size=self.token_ids.numel())

    @property
    def is_gold(self) -> Tensor:
        """[E] bool, True at each row's gold token."""
        return self.token_ids == self.gold_ids[self.row_ids]

    def active(self) -> Tensor:
        """[N] bool: |S| > 1. The other rows have restricted loss and gradient exactly zero."""
        return self.sizes > 1

    def outside_mass(self) -> Tensor:
        """[N] float64: rho = 1 - stored mass of the row (gold included), at least 0."""
        return (1.0 - self._mass().double() / MASS_UNIT).clamp_min(0.0)

    def capped(self, tau: float) -> Tensor:
        """[N] bool: the row's stored mass, gold included, is below ``tau``: k_max has ended it."""
        return self._mass() < mass_goal(tau)

    def rows(self, index: Tensor) -> CandidateSets:
        """The rows at ``index`` (an index or boolean mask tensor), in that order."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        sizes = self.sizes[index]
        offsets = row_offsets(sizes)
        shift = self.offsets[index] - offsets[:-1]
        entries = torch.arange(int(offsets[-1]), device=offsets.device)
        entries += shift.repeat_interleave(sizes, output_size=entries.numel())
        return CandidateSets(
            offsets, self.token_ids[entries], self.logprobs[entries], self.gold_ids[index]
        )

    def between(self, start: int, stop: int) -> CandidateSets:
        """The rows from ``start`` to ``stop``; the host waits for a GPU if they are not planned."""
        if self.plan is None:
            first, last = self.offsets[[start, stop]].tolist()
        else:
            first, last = self.plan.bounds[start], self.plan.bounds[stop]
        return CandidateSets(
            self.offsets[start : stop + 1] - first,
            self.token_ids[first:last],
            self.logprobs[first:last],
            self.gold_ids[start:stop],
        )

    @staticmethod
    def concatenate(parts: Sequence[CandidateSets]) -> CandidateSets:
        """The rows of all ``parts``, one part after the other."""
        return CandidateSets(
            row_offsets(torch.cat([part.sizes for part in parts])),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.gold_ids for part in parts]),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CandidateSets:
        """The same sets and their plan on another device; pinned ones need not be waited for."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CandidateSets:
        """The same sets in pinned memory, from which a GPU copies while the host goes on."""
        return self._moved(torch.Tensor.pin_memory)

    def contiguous(self) -> CandidateSets:
        """The same sets, the numbers of each side by side."""
        return self._moved(torch.Tensor.contiguous)

    def planned(self) -> CandidateSets:
        """The same sets with the plan of the kernels; on a GPU the host waits for them."""
        if self.plan is not None:
            return self
        sets = self.to("cpu")
        plan = LossPlan.of(sets.offsets, sets.token_ids, sets.logprobs, sets.outside_mass())
        return dataclasses.replace(sets, plan=plan).to(self.offsets.device)

    def token_order(self) -> TokenOrder:
        """Their entries by token; on a GPU the host waits once for sets without a plan."""
        if self.plan is not None:
            return self.plan.by_token
        return TokenOrder.of(self.offsets, self.token_ids)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> CandidateSets:
        tensors = {name: move(getattr(self, name)) for name in _DTYPES}
        plan = self.plan
        if plan is not None:
            plan = plan.moved(move)
        return CandidateSets(**tensors, plan=plan)

    def check(self, vocabulary_size: int) -> None:
        """Raise ``ValueError`` unless these sets may be given to the loss.

        Checked: dtypes and lengths, rising offsets, ids in [0, vocabulary_size), log-probabilities
        finite, at most 0 and descending, no token twice in a row, the gold token in its row.
        """
        self._check_layout()
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
        if torch.unique(rows * vocabulary_size + self.token_ids).numel() != len(rows):
            raise ValueError("token_ids must be distinct within a row, got a token twice")
        has_gold = torch.zeros_like(self.gold_ids, dtype=torch.bool)
        has_gold[rows[self.is_gold]] = True
        if not has_gold.all():
            row = int((~has_gold).nonzero()[0])
            raise ValueError(
                f"each row must contain its gold token, row {row} lacks {int(self.gold_ids[row])}"
            )

    def _check_layout(self) -> None:
        for name, dtype in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != 1:
                raise ValueError(
                    f"{name} must be a {dtype} vector, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        num_entries = self.token_ids.numel()
        if self.offsets.numel() != self.num_rows + 1 or self.logprobs.numel() != num_entries:
            raise ValueError(
                "offsets must be one longer than gold_ids and logprobs as long as token_ids, got "
                f"lengths {self.offsets.numel()}, {self.num_rows}, {self.logprobs.numel()}, "
                f"{num_entries}"
            )
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0 or last != num_entries or (self.sizes < 1).any():
            raise ValueError(
                f"offsets must rise from 0 to the number of entries, {num_entries}, got {first} to "
                f"{last} with sizes {self.sizes.tolist()[:8]}"
            )

    def _mass(self) -> Tensor:
        """[N] int64, stored mass of each row."""
        total = running_mass(self.logprobs)
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def only(self, keep_E: Tensor) -> CandidateSets:
        """The same rows with the entries where ``keep_E`` is true."""
        kept = F.pad(keep_E.cumsum(0), (1, 0))
        return CandidateSets(
            kept[self.offsets], self.token_ids[keep_E], self.logprobs[keep_E], self.gold_ids
        )


def row_offsets(sizes_N: Tensor) -> Tensor:
    """[N + 1], where the rows of these sizes begin, and where the last one ends."""
    return F.pad(sizes_N.cumsum(0), (1, 0))


def row_logsumexp(values_E: Tensor, candidates: CandidateSets) -> Tensor:
    """[N], the log-sum-exp over each row's entries of ``values_E``."""
    highest_N = torch.segment_reduce(values_E.detach(), "max", offsets=candidates.offsets)
    shifted_E = values_E - highest_N[candidates.row_ids]
    sums_N = torch.segment_reduce(shifted_E.exp(), "sum", offsets=candidates.offsets)
    return sums_N.log() + highest_N


def row_gold(values_E: Tensor, candidates: CandidateSets) -> Tensor:
    """[N], of ``values_E`` that of each row's gold token; the host waits for no GPU."""
    if takes_sums(values_E):
        return _row_gold_by_sums(values_E, candidates)
    return values_E[candidates.is_gold]


def takes_sums(values_E: Tensor) -> bool:
    """Whether a sum over each row is taken in place of one number: a mask has to be counted."""
    return not values_E.is_cpu


def _row_gold_by_sums(values_E: Tensor, candidates: CandidateSets) -> Tensor:
    alone_E = torch.where(candidates.is_gold, values_E, 0.0)
    return torch.segment_reduce(alone_E, "sum", offsets=candidates.offsets)
