r"""The restricted loss with a frozen tail: outside the candidates stays what the base model had.

With the logits z at a position, its candidate set S, the gold token g and the base's logits z_0::

    L = log( sum_{i in S} exp(z_i) + sum_{i not in S} exp(z_0i) ) - z_g

With the base's outside mass rho_0 the second sum is rho_0 / (1 - rho_0) sum_{i in S} exp(z_0i): one
number per position. At the base model this is the full loss, and so is its gradient by the logits
of S; that of the others is zero, always. No token is sampled.

The easy way down is to raise all logits of S together: the frozen sum does not follow, and what is
left is the restricted loss. The outside mass that is measured on the way (``subset/rho``) shows it.

This is this project's. The number is not in the record, which has the base's probabilities but not
the scale of its logits. So the base model is held beside and run on every micro-batch. The scale
alone would not do: log-probabilities are stored rounded down, which makes the outside mass larger,
on average over the rounding by 5 % at the median position of the demo's record (SmolLM2-135M, tau
0.99, 10,865 positions) and by more than a tenth at one position in seven.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrmc_ray.method.candidate_sets import CandidateSets, row_gold, row_logsumexp
from lrmc_ray.method.fast.candidate_logits import candidate_logits
from lrmc_ray.method.head import OutputHead

CHUNK_ELEMENTS = 2**24
"""Of the base's [n, V] logits that exist at a time: 64 MiB in float32."""


@torch.no_grad()
def frozen_outside(
    base_logits: Callable[[slice], Tensor], candidates: CandidateSets, vocabulary_size: int
) -> Tensor:
    """[N], ``log sum_{i not in S} exp(z_0i)``; -inf where S is the whole vocabulary.

    Args:
        base_logits: The base model's logits [n, V] at the positions of a slice of the N.
        candidates: N candidate sets, on the same device.
        vocabulary_size: V.
    """
    num_rows = candidates.num_rows
    step = max(1, CHUNK_ELEMENTS // vocabulary_size)
    parts = [torch.zeros(0, device=candidates.offsets.device)]
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        sets = candidates.between(start, stop)
        logits_nV = base_logits(slice(start, stop)).clone()
        logits_nV[sets.row_ids, sets.token_ids.long()] = -math.inf
        parts.append(logits_nV.logsumexp(-1))
    return torch.cat(parts)


def frozen_tail_cross_entropy(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets, outside_N: Tensor
) -> Tensor:
    """Sum of the loss of the module over N positions, in nats.

    Args:
        hidden_ND: [N, D] last hidden states at the positions of ``candidates``.
        head: The output head.
        candidates: N candidate sets, on the same device.
        outside_N: What :func:`frozen_outside` returned for them.

    Returns:
        float32, or float64 if an input is.
    """
    logits_E = candidate_logits(hidden_ND, head, candidates)
    inside_N = row_logsumexp(logits_E, candidates)
    normalizer_N = torch.logaddexp(inside_N, outside_N.to(inside_N.dtype))
    return (normalizer_N - row_gold(logits_E, candidates)).sum()
