"""What is only measured: held-out loss, outside mass of the current model, MoClip's angles.

- The training loss is not comparable with full cross-entropy; the negative log-likelihood of
  samples that are not trained on, over the whole vocabulary, is.
- The restricted loss never pushes probability back into S, so rho = 1 - p(S) of the model in
  training can grow past the 1 - tau it started below, unseen by the loss: the recorded sets get
  stale. It takes the whole vocabulary to see it; some positions every few steps are enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrmc_ray.method.baselines.vocabulary_loss import full_cross_entropy
from lrmc_ray.method.candidate_sets import CandidateSets, row_logsumexp
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.losses import LanguageModel
from lrmc_ray.method.microbatch import Activity, MicroBatch, Sample, collate
from lrmc_ray.method.workers import WorkerGroup, waves

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass over held-out samples."""
CHUNK_ELEMENTS = 2**22
"""Of the [n, V] logits that the outside mass is taken from: 16 MiB in float32."""
NUM_ANGLE_BINS = 36
"""Bins of the histogram of theta, 5 degrees each."""
_EVERY_SUPERVISED_POSITION = Activity(supervised=1, prompt=math.inf)


def held_out_batches(samples: Sequence[Sample]) -> list[MicroBatch]:
    """``samples`` in batches of similar length, the same whoever computes them."""
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids_T), i))
    groups: list[list[Sample]] = []
    for index in order:
        sample = samples[index]
        # The longest of a group is its last.
        if groups and len(sample.input_ids_T) * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [collate(group, _EVERY_SUPERVISED_POSITION) for group in groups]


@torch.no_grad()
def held_out_nll(
    model: LanguageModel,
    batches: Sequence[MicroBatch],
    group: WorkerGroup,
    *,
    autocast: torch.dtype | None = None,
) -> float:
    """Mean negative log-likelihood per supervised position, in nats.

    The same bits for every number of workers: each batch's sum has a place of its own.

    Args:
        model: The model, without dropout.
        batches: What ``held_out_batches`` makes, the same on every worker.
        group: This worker and the others.
        autocast: Type of the forward pass, None for that of the weights.
    """
    device = model.head.weight_VD.device
    sums_X = torch.zeros(len(batches), dtype=torch.float64, device=device)
    for wave in waves(range(len(batches)), group.world_size):
        if group.rank >= len(wave):
            if model.shards is not None:
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    model.shards.run_idle(model.forward)
            continue
        index = wave[group.rank]
        batch = batches[index].to(device)
        where = batch.supervised
        if not len(where.row_N) and model.shards is None:
            continue
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden_BTD = model.forward(batch)
        sums_X[index] = full_cross_entropy(
            hidden_BTD[where.row_N, where.column_N], model.head, where.candidates.gold_ids
        )
    group.sum_(sums_X)
    return float(sums_X.sum()) / max(1, sum(batch.num_supervised for batch in batches))


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
    head: OutputHead,
    candidates: CandidateSets,
    *,
    num_positions: int,
    seed: int,
) -> OutsideMass:
    """Mean of rho = 1 - p(S) of the current model over sampled positions.

    Args:
        hidden_ND: [N, D] last hidden states of the current model.
        head: Its output head.
        candidates: N candidate sets, on the same device.
        num_positions: How many of the N positions to look at; all of them if there are no more.
        seed: Which ones, drawn without replacement.

    Raises:
        ValueError: No positions.
    """
    if num_positions < 1 or not len(hidden_ND):
        raise ValueError(
            f"num_positions must be at least 1 of at least 1, got {num_positions} of "
            f"{len(hidden_ND)}"
        )
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(hidden_ND), generator=generator)[:num_positions]
    step = max(1, CHUNK_ELEMENTS // head.vocabulary_size)
    rho = []
    for index in torch.split(sample.to(hidden_ND.device), step):
        sets = candidates.rows(index)
        logits_nV = head_logits(hidden_ND[index], head)
        inside_n = row_logsumexp(logits_nV[sets.row_ids, sets.token_ids], sets)
        rho.append(-torch.expm1(inside_n - logits_nV.logsumexp(-1)))
    rho_n = torch.cat(rho).double().clamp(0.0, 1.0)
    spread = float(rho_n.std()) if len(rho_n) > 1 else math.nan
    return OutsideMass(float(rho_n.mean()), spread / math.sqrt(len(rho_n)), len(rho_n))


@dataclass(frozen=True, kw_only=True, slots=True)
class AngleStatistics:
    """Angles between gradient and momentum, before the cap, since the last report.

    A count is one tensor in one step. Tensors without an angle (first step, zero gradient) and
    groups with ``clip="none"`` are left out. Means are NaN where nothing was counted.
    """

    num_angles: int
    mean_deg: float
    clipped_share: float
    """Share of the counted tensors that the cap changed. 0: it never binds; 1: it always does."""
    clipped_element_share: float
    """The same, each tensor weighted by its number of elements."""
    histogram: tuple[int, ...]
    """Counts of the angles in ``NUM_ANGLE_BINS`` bins from 0 to 180 degrees."""


class AngleCounts:
    """Sums of what :class:`AngleStatistics` reports; counting never waits for the device."""

    def __init__(self) -> None:
        self._totals: Tensor | None = None
        self._of_tensors: Tensor | None = None

    def rows(self, number: int, device: torch.device) -> Tensor:
        """[number, NUM_ANGLE_BINS + 5] float64, to which a kernel adds, a row for each tensor.

        These are the histogram, and what ``add`` counts: angles, their sum in degrees, those that
        the cap has changed, and the last two weighted by elements. The same until a report.
        """
        found = self._of_tensors
        if found is None or len(found) != number or found.device != device:
            self._fold()
            found = torch.zeros(number, NUM_ANGLE_BINS + 5, dtype=torch.float64, device=device)
            self._of_tensors = found
        return found

    def _fold(self) -> None:
        if self._of_tensors is not None:
            more = self._of_tensors.sum(0)
            self._totals = more if self._totals is None else self._totals.to(more.device) + more
            self._of_tensors = None

    def add(self, theta_G: Tensor, is_clipped_G: Tensor, numel_G: Tensor) -> None:
        """Count the angles of one step.

        Args:
            theta_G: In radians; those that are not finite are left out.
            is_clipped_G: Whether the cap has changed the gradient.
            numel_G: Number of elements; 0 leaves a tensor out.
        """
        has_angle_G = (numel_G > 0) & theta_G.isfinite()
        theta_deg_G = torch.where(has_angle_G, theta_G.rad2deg(), 0.0)
        is_clipped_G = has_angle_G & is_clipped_G
        bins_G = (theta_deg_G * (NUM_ANGLE_BINS / 180)).long().clamp(max=NUM_ANGLE_BINS - 1)
        counts_5G = torch.stack(
            (has_angle_G, theta_deg_G, is_clipped_G, numel_G * has_angle_G, numel_G * is_clipped_G)
        )
        if self._totals is None:
            self._totals = numel_G.new_zeros(NUM_ANGLE_BINS + 5)
        self._totals.index_add_(0, bins_G, counts_5G[0])
        self._totals[NUM_ANGLE_BINS:] += counts_5G.sum(1)

    def report(self) -> AngleStatistics:
        """What was counted since the last report. Waits for the device."""
        self._fold()
        totals = [0.0] * (NUM_ANGLE_BINS + 5)
        if self._totals is not None:
            totals = self._totals.tolist()
            self._totals = None
        *histogram, num_angles, sum_deg, num_clipped, elements, clipped_elements = totals
        return AngleStatistics(
            num_angles=int(num_angles),
            mean_deg=sum_deg / num_angles if num_angles else math.nan,
            clipped_share=num_clipped / num_angles if num_angles else math.nan,
            clipped_element_share=clipped_elements / elements if elements else math.nan,
            histogram=tuple(map(int, histogram)),
        )
