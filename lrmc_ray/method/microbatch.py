"""Micro-batches: token ids in rows, and the positions at which a loss is taken.

A position is *active* if its loss can be other than zero. With the restricted loss a position
whose candidate set holds the gold token alone has loss 0 and gradient 0 (method, point 3). Since
the model is causal, a sequence can then be cut behind its last active position, and a sequence
without one can be left out of the forward pass; the gradient stays exactly the same (point 4).
The divisors do not change: they count every supervised and every prompt position.

A batch is *padded*, each sequence in a row of its own, or *packed* into one row, where what they
have in common at their beginnings is computed once: see ``fast.packing``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.method.layout import Layout
from lrmc_ray.method.subsets import CandidateSets, cut

NO_CANDIDATES = CandidateSets(
    offsets=torch.zeros(1, dtype=torch.int64),
    token_ids=torch.zeros(0, dtype=torch.int32),
    logprobs=torch.zeros(0, dtype=torch.float16),
    gold_ids=torch.zeros(0, dtype=torch.int32),
)


@dataclass(frozen=True)
class Sample:
    """One recorded sequence."""

    sample_id: str
    input_ids_T: Tensor
    """Token ids, int64."""
    positions_P: Tensor
    """Ascending positions whose next token is predicted, int64."""
    is_supervised_P: Tensor
    """True at positions to be learned, False at prompt positions (the anchor's)."""
    candidates: CandidateSets
    """P rows."""
    domain: str = ""
    """What the data call it, for ``train.domain_weights`` and counts; empty where there is one."""
    weight: float = 1.0
    """What its positions count for, with the loss ``flow``."""


@dataclass(frozen=True)
class LossPositions:
    """Where hidden states are read in the batch, and what is compared there."""

    row_N: Tensor
    column_N: Tensor
    candidates: CandidateSets
    weight_N: Tensor
    """Of the sample that a position is in, float64."""

    def to(self, device: torch.device) -> "LossPositions":
        """The same on another device; the host does not wait where it is in pinned memory."""
        is_cuda = device.type == "cuda"
        return LossPositions(
            self.row_N.to(device, non_blocking=is_cuda),
            self.column_N.to(device, non_blocking=is_cuda),
            self.candidates.to(device, non_blocking=is_cuda),
            self.weight_N.to(device, non_blocking=is_cuda),
        )

    def planned(self) -> "LossPositions":
        """The same with the plan of the kernels of a GPU."""
        return dataclasses.replace(self, candidates=self.candidates.planned())

    def pin_memory(self) -> "LossPositions":
        """The same in pinned memory."""
        return LossPositions(
            self.row_N.pin_memory(),
            self.column_N.pin_memory(),
            self.candidates.pin_memory(),
            self.weight_N.pin_memory(),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Sequences, padded on the right or packed, with loss positions and the divisors' counts.

    Padded sequences need no attention mask: in a causal model nothing before the padding sees it.
    """

    input_ids_BT: Tensor
    """Packed: one row."""
    position_ids_BT: Tensor | None
    """Packed: each token's place in its sequence."""
    is_visible_TT: Tensor | None
    """Packed: boolean, whether the token of the row sees that of the column."""
    is_token_BT: Tensor
    """False where there is padding, boolean."""
    supervised: LossPositions
    anchored: LossPositions
    num_supervised: int
    """Supervised positions, inactive ones included."""
    num_prompt: int
    """Recorded prompt positions, inactive ones included."""
    num_tokens: int
    """Tokens of the sequences before trimming."""
    num_processed: int
    """Tokens of the sequences after trimming."""
    num_shared: int
    """Of these, tokens of a prefix that another sequence brings along."""
    full_lengths: list[int]
    """Tokens of each sequence before trimming, which some models' positions depend on."""
    num_prefix: int = 0
    """Tokens at the beginning of the packed row that are computed once for all micro-batches of
    the step, see ``shared_prefix``."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; the host does not wait where it is in pinned memory."""
        is_cuda = device.type == "cuda"
        return dataclasses.replace(
            self._mapped(lambda tensor: tensor.to(device, non_blocking=is_cuda)),
            supervised=self.supervised.to(device),
            anchored=self.anchored.to(device),
        )

    def planned(self) -> "MicroBatch":
        """The same with the plans of the kernels of a GPU, in pinned memory where there is one."""
        supervised, anchored = self.supervised.planned(), self.anchored.planned()
        if not torch.cuda.is_available():
            return dataclasses.replace(self, supervised=supervised, anchored=anchored)
        return dataclasses.replace(
            self._mapped(Tensor.pin_memory),
            supervised=supervised.pin_memory(),
            anchored=anchored.pin_memory(),
        )

    def filled_up(self, multiple: int) -> "MicroBatch":
        """The same with padding behind its rows, up to a multiple of so many tokens."""
        length = self.input_ids_BT.shape[1]
        more = -length % multiple
        position_ids_BT, is_visible_TT = self.position_ids_BT, self.is_visible_TT
        if is_visible_TT is not None:
            is_visible_TT = F.pad(is_visible_TT, (0, more, 0, more))
            is_visible_TT[length:, length:].fill_diagonal_(True)  # itself alone
        return dataclasses.replace(
            self,
            input_ids_BT=F.pad(self.input_ids_BT, (0, more)),
            position_ids_BT=None if position_ids_BT is None else F.pad(position_ids_BT, (0, more)),
            is_visible_TT=is_visible_TT,
            is_token_BT=F.pad(self.is_token_BT, (0, more)),
        )

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """With what ``move`` makes of every tensor but those of the positions."""
        position_ids_BT, is_visible_TT = self.position_ids_BT, self.is_visible_TT
        return dataclasses.replace(
            self,
            input_ids_BT=move(self.input_ids_BT),
            position_ids_BT=None if position_ids_BT is None else move(position_ids_BT),
            is_visible_TT=None if is_visible_TT is None else move(is_visible_TT),
            is_token_BT=move(self.is_token_BT),
        )


@dataclass(frozen=True)
class Activity:
    """How many candidates a position must have for its loss to be other than zero."""

    supervised: int
    """Of a supervised position: 2, or 1 where the loss sees tokens outside the candidates."""
    prompt: float
    """The same of a prompt position; infinity without an anchor."""

    def of(self, sample: Sample) -> Tensor:
        """Active positions of ``sample``, boolean [P]."""
        needed_P = torch.where(sample.is_supervised_P, float(self.supervised), self.prompt)
        return sample.candidates.sizes >= needed_P


def active_length(sample: Sample, activity: Activity) -> int:
    """Tokens of ``sample`` up to its last active position; 0 if it has none."""
    active_P = sample.positions_P[activity.of(sample)]
    return int(active_P[-1]) + 1 if len(active_P) else 0


def collate(
    samples: Sequence[Sample],
    activity: Activity,
    *,
    trim: bool = True,
    attention_cost: float = math.inf,
    pack_up_to: float = math.inf,
) -> MicroBatch:
    """Put ``samples`` into one micro-batch.

    Args:
        samples: the sequences.
        activity: which positions count as active.
        trim: cut behind the last active position and leave out sequences without one; the
            gradient is the same without it, only slower.
        attention_cost: what it costs a token to see one more, in units of what else it costs. The
            cheaper layout is taken; infinity, the default, always pads.
        pack_up_to: tokens, before trimming, of the longest sequence that may be packed.
    """
    lengths = [
        active_length(sample, activity) if trim else len(sample.input_ids_T) for sample in samples
    ]
    kept = [(s, n) for s, n in zip(samples, lengths, strict=True) if n > 0]
    sequences = [sample.input_ids_T[:length] for sample, length in kept]
    full_lengths = [len(sample.input_ids_T) for sample, _ in kept]
    if max(full_lengths, default=0) > pack_up_to:
        attention_cost = math.inf
    layout = lay_out(sequences, attention_cost)
    is_token_BT = torch.zeros_like(layout.input_ids_BT, dtype=torch.bool)
    for row, columns_T in zip(layout.rows, layout.columns, strict=True):
        is_token_BT[row, columns_T] = True
    active = [activity.of(sample) for sample, _ in kept]
    return MicroBatch(
        input_ids_BT=layout.input_ids_BT,
        position_ids_BT=layout.position_ids_BT,
        is_visible_TT=layout.is_visible_TT,
        is_token_BT=is_token_BT,
        supervised=_loss_positions(
            [(s, a & s.is_supervised_P) for (s, _), a in zip(kept, active, strict=True)], layout
        ),
        anchored=_loss_positions(
            [(s, a & ~s.is_supervised_P) for (s, _), a in zip(kept, active, strict=True)], layout
        ),
        num_supervised=sum(int(s.is_supervised_P.sum()) for s in samples),
        num_prompt=sum(int((~s.is_supervised_P).sum()) for s in samples),
        num_tokens=sum(len(s.input_ids_T) for s in samples),
        num_processed=sum(lengths),
        num_shared=layout.num_shared,
        full_lengths=full_lengths,
    )


def _loss_positions(chosen: Sequence[tuple[Sample, Tensor]], layout: Layout) -> LossPositions:
    none = torch.zeros(0, dtype=torch.int64)
    rows, columns, candidates, weights = [none], [none], [NO_CANDIDATES], [none.double()]
    for (sample, chosen_P), row, columns_T in zip(chosen, layout.rows, layout.columns, strict=True):
        index = chosen_P.nonzero()[:, 0]
        rows.append(torch.full_like(index, row))
        columns.append(columns_T[sample.positions_P[index]])
        candidates.append(sample.candidates.rows(index))
        weights.append(torch.full(index.shape, sample.weight, dtype=torch.float64))
    return LossPositions(
        torch.cat(rows),
        torch.cat(columns),
        CandidateSets.concatenate(candidates),
        torch.cat(weights),
    )


def deal(samples: Sequence[Sample], num_micro_batches: int, activity: Activity) -> list[list[int]]:
    """Indices of ``samples`` for each of the fixed micro-batches of a global batch.

    Neighbours in length go together, so little is padding. The result depends on the samples
    alone: not on who computes which micro-batch.
    """
    order = sorted(range(len(samples)), key=lambda i: (active_length(samples[i], activity), i))
    size, extra = divmod(len(order), num_micro_batches)
    parts, start = [], 0
    for part in range(num_micro_batches):
        stop = start + size + (part < extra)
        parts.append(order[start:stop])
        start = stop
    return parts


def divide(
    samples: Sequence[Sample],
    num_micro_batches: int,
    activity: Activity,
    *,
    trim: bool = True,
    attention_cost: float = math.inf,
    pack_up_to: float = math.inf,
) -> list[MicroBatch]:
    """The fixed micro-batches of a global batch; see ``deal`` and ``collate``."""
    return [
        collate(
            [samples[i] for i in part],
            activity,
            trim=trim,
            attention_cost=attention_cost,
            pack_up_to=pack_up_to,
        )
        for part in deal(samples, num_micro_batches, activity)
    ]


def cut_sample(sample: Sample, tau: float, *, k_min: int) -> Sample:
    """``sample`` with the candidates of its supervised positions cut at ``tau``.

    Prompt positions keep what was recorded: the anchor wants as much of the base model as there is.
    """
    supervised = sample.is_supervised_P.nonzero()[:, 0]
    prompt = (~sample.is_supervised_P).nonzero()[:, 0]
    candidates = CandidateSets.concatenate(
        [
            cut(sample.candidates.rows(supervised), tau, k_min=k_min),
            sample.candidates.rows(prompt),
        ]
    )
    in_order = torch.cat([supervised, prompt]).argsort()
    return dataclasses.replace(sample, candidates=candidates.rows(in_order))
