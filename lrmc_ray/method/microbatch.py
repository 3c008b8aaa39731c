"""Micro-batches: token ids in rows, and the positions at which a loss is taken.

A position is *active* if its loss can be other than zero. With the restricted loss a position
whose candidate set holds the gold token alone has loss 0 and gradient 0 (method, point 3). Since
the model is causal, a sequence can then be cut behind its last active position, and a sequence
without one can be left out of the forward pass; the gradient stays exactly the same (point 4).
The divisors do not change: they count every supervised and every prompt position.

For the same reason the hidden states of a prefix that sequences share are the same in all of them,
so it is enough to compute them once. *Packed*, the sequences are one row: a tree of tokens, in
which each sees its ancestors alone. There is no padding, and a prompt that all samples begin with
is there once. The loss and its gradient are the same up to rounding. *Padded*, each sequence has a
row of its own; long sequences without a common prefix are cheaper that way, since attention within
one row costs the square of its length.

Shape suffixes: B = sequences, T = tokens (padded), P = recorded positions of one sequence,
N = positions of a micro-batch at which a loss is taken.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrmc_ray.method.subsets import CandidateSets, cut

_NO_CANDIDATES = CandidateSets(
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


@dataclass(frozen=True)
class LossPositions:
    """Where hidden states are read in the batch, and what is compared there."""

    row_N: Tensor
    column_N: Tensor
    candidates: CandidateSets

    def to(self, device: torch.device) -> "LossPositions":
        """The same on another device."""
        return LossPositions(
            self.row_N.to(device), self.column_N.to(device), self.candidates.to(device)
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

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return dataclasses.replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            position_ids_BT=_to(self.position_ids_BT, device),
            is_visible_TT=_to(self.is_visible_TT, device),
            supervised=self.supervised.to(device),
            anchored=self.anchored.to(device),
        )


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


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
) -> MicroBatch:
    """Put ``samples`` into one micro-batch.

    Args:
        samples: the sequences.
        activity: which positions count as active.
        trim: cut behind the last active position and leave out sequences without one; the
            gradient is the same without it, only slower.
        attention_cost: what it costs a token to see one more, in units of what else it costs. The
            cheaper layout is taken; infinity, the default, always pads.
    """
    lengths = [
        active_length(sample, activity) if trim else len(sample.input_ids_T) for sample in samples
    ]
    kept = [(s, n) for s, n in zip(samples, lengths, strict=True) if n > 0]
    sequences = [sample.input_ids_T[:length] for sample, length in kept]
    layout = lay_out(sequences, attention_cost)
    active = [activity.of(sample) for sample, _ in kept]
    return MicroBatch(
        input_ids_BT=layout.input_ids_BT,
        position_ids_BT=layout.position_ids_BT,
        is_visible_TT=layout.is_visible_TT,
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
    )


@dataclass(frozen=True)
class Layout:
    """Some sequences as one batch of tokens, padded or packed, and where to find each token."""

    input_ids_BT: Tensor
    """Packed: one row."""
    position_ids_BT: Tensor | None
    """Packed: each token's place in its sequence."""
    is_visible_TT: Tensor | None
    """Packed: boolean, whether the token of the row sees that of the column."""
    rows: list[int]
    """Of each sequence."""
    columns: list[Tensor]
    """Of each token of each sequence."""
    num_shared: int
    """Tokens of a prefix that another sequence brings along."""

    def to(self, device: torch.device) -> "Layout":
        """The same with its batch on another device; the places stay where they are."""
        return dataclasses.replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            position_ids_BT=_to(self.position_ids_BT, device),
            is_visible_TT=_to(self.is_visible_TT, device),
        )


def lay_out(sequences: Sequence[Tensor], attention_cost: float) -> Layout:
    """The cheaper of the two layouts.

    Args:
        sequences: token ids of each, int64 [T].
        attention_cost: see :func:`collate`.
    """
    padded = _pad(sequences)
    if not math.isfinite(attention_cost):
        return padded
    packed = _pack(sequences)
    cheaper = _cost(packed, attention_cost) < _cost(padded, attention_cost)
    return packed if cheaper else padded


def _cost(layout: Layout, attention_cost: float) -> float:
    rows, length = layout.input_ids_BT.shape
    return rows * length * (1 + attention_cost * length)


def _pad(sequences: Sequence[Tensor]) -> Layout:
    input_ids_BT = torch.zeros(
        len(sequences), max((len(ids_T) for ids_T in sequences), default=0), dtype=torch.int64
    )
    for row, ids_T in enumerate(sequences):
        input_ids_BT[row, : len(ids_T)] = ids_T
    columns = [torch.arange(len(ids_T)) for ids_T in sequences]
    return Layout(input_ids_BT, None, None, list(range(len(sequences))), columns, 0)


def _pack(sequences: Sequence[Tensor]) -> Layout:
    """A tree: in lexicographic order, a sequence shares most with the one before it."""
    ids = [ids_T.tolist() for ids_T in sequences]
    columns: list[list[int]] = [[] for _ in ids]
    tokens: list[int] = []
    depths: list[int] = []
    before: list[int] = []
    path: list[int] = []
    for index in sorted(range(len(ids)), key=lambda i: (ids[i], i)):
        common = 0
        for ours, theirs in zip(ids[index], before, strict=False):
            if ours != theirs:
                break
            common += 1
        new = ids[index][common:]
        path = path[:common] + list(range(len(tokens), len(tokens) + len(new)))
        depths += range(common, len(ids[index]))
        tokens += new
        before, columns[index] = ids[index], path
    is_visible_TT = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    places = [torch.tensor(path) for path in columns]
    for path_T in places:
        is_visible_TT[path_T[:, None], path_T[None, :]] |= path_T[:, None] >= path_T[None, :]
    return Layout(
        torch.tensor([tokens], dtype=torch.int64),
        torch.tensor([depths], dtype=torch.int64),
        is_visible_TT,
        [0] * len(ids),
        places,
        sum(map(len, ids)) - len(tokens),
    )


def _loss_positions(chosen: Sequence[tuple[Sample, Tensor]], layout: Layout) -> LossPositions:
    rows, columns, candidates = [], [], [_NO_CANDIDATES]
    for (sample, chosen_P), row, columns_T in zip(chosen, layout.rows, layout.columns, strict=True):
        index = chosen_P.nonzero()[:, 0]
        rows.append(torch.full_like(index, row))
        columns.append(columns_T[sample.positions_P[index]])
        candidates.append(sample.candidates.rows(index))
    none = torch.zeros(0, dtype=torch.int64)
    return LossPositions(
        torch.cat([none, *rows]),
        torch.cat([none, *columns]),
        CandidateSets.concatenate(candidates),
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
