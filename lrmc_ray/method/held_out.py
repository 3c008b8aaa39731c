"""The loss on samples that are not trained on: full-vocabulary NLL of the supervised positions.

The training loss is not comparable with full cross-entropy; this is.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrmc_ray.method.microbatch import Activity, MicroBatch, Sample, collate
from lrmc_ray.method.training_loop import OutputHead, WorkerGroup
from lrmc_ray.method.vocabulary_loss import full_cross_entropy

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""
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
    forward: Callable[[MicroBatch], Tensor],
    head: OutputHead,
    batches: Sequence[MicroBatch],
    group: WorkerGroup,
    *,
    autocast: torch.dtype | None = None,
) -> float:
    """Mean negative log-likelihood per supervised position, in nats.

    The same bits for every number of workers: each batch's sum has a place of its own.
    """
    device = head.weight_VD.device
    sums = torch.zeros(len(batches), dtype=torch.float64, device=device)
    for index in range(group.rank, len(batches), group.world_size):
        batch = batches[index].to(device)
        where = batch.supervised
        if not len(where.row_N):
            continue
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden_BTD = forward(batch)
        sums[index] = full_cross_entropy(
            hidden_BTD[where.row_N, where.column_N],
            head.weight_VD,
            where.candidates.gold_ids,
            **head.options,
        )
    group.sum_(sums)
    return float(sums.sum()) / max(1, sum(batch.num_supervised for batch in batches))
