"""Random inputs of the method's tests, and what several of them compare with."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.subsets import select_candidates
from tests.support import reference

FIELDS = ("offsets", "token_ids", "logprobs", "gold_ids")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(
    seed: int, num_rows: int, vocabulary_size: int, *, tied: bool = False
) -> tuple[Tensor, Tensor]:
    """Peaked and flat rows; with ``tied``, few distinct values, so that every cut meets ties."""
    generator = rng(seed)
    scale = torch.rand(num_rows, 1, generator=generator) * 4
    logits_NV = scale * torch.randn(num_rows, vocabulary_size, generator=generator)
    if tied:
        logits_NV = logits_NV.round()
    return logits_NV, torch.randint(vocabulary_size, (num_rows,), generator=generator)


def logits_problem(
    seed: int = 0, n: int = 6, v: int = 30, tau: float = 0.8
) -> tuple[Tensor, Tensor, CandidateSets]:
    """A model's logits, given as hidden states of an identity weight, and another model's sets."""
    generator = rng(seed)
    logits_NV = 1.5 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    recorded_NV = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    gold_N = torch.randint(v, (n,), generator=generator)
    sets = select_candidates(recorded_NV, gold_N, tau=tau)
    return logits_NV, torch.eye(v, dtype=torch.float64), sets


def head_problem(
    seed: int = 0, n: int = 7, d: int = 5, v: int = 40, tau: float = 0.8
) -> tuple[Tensor, Tensor, Tensor, CandidateSets]:
    """Hidden states, head weight and bias in float64, and sets recorded by another model."""
    generator = rng(seed)
    hidden_ND = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(v, d, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(v, generator=generator, dtype=torch.float64)
    recorded_NV = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    gold_N = torch.randint(v, (n,), generator=generator)
    return hidden_ND, weight_VD, bias_V, select_candidates(recorded_NV, gold_N, tau=tau)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def gradient_of(
    loss: Callable[..., Tensor], logits_NV: Tensor, *args: Any, **options: Any
) -> Tensor:
    (logits_NV,) = leaves(logits_NV)
    loss(logits_NV, *args, **options).backward()
    assert logits_NV.grad is not None
    return logits_NV.grad


def reference_rows(sets: CandidateSets) -> list[reference.Row]:
    return [
        reference.Row(sets.token_ids[a:b].numpy(), sets.logprobs[a:b].numpy(), int(gold))
        for (a, b), gold in zip(
            itertools.pairwise(sets.offsets.tolist()), sets.gold_ids, strict=True
        )
    ]


def inside(sets: CandidateSets, vocabulary_size: int) -> Tensor:
    is_inside_NV = torch.zeros(sets.num_rows, vocabulary_size, dtype=torch.bool)
    is_inside_NV[sets.row_ids, sets.token_ids] = True
    return is_inside_NV


def masked_cross_entropy(logits_NV: Tensor, sets: CandidateSets) -> Tensor:
    """[N], all logits, those outside S at -inf, and torch's own cross-entropy."""
    masked_NV = logits_NV.masked_fill(~inside(sets, logits_NV.shape[1]), -math.inf)
    return F.cross_entropy(masked_NV, sets.gold_ids.long(), reduction="none")


def gold_alone(sets: CandidateSets) -> CandidateSets:
    logprobs = torch.full(sets.gold_ids.shape, -0.1, dtype=torch.float16)
    return CandidateSets(torch.arange(sets.num_rows + 1), sets.gold_ids, logprobs, sets.gold_ids)


def assert_same_sets(actual: CandidateSets, expected: CandidateSets) -> None:
    for field in FIELDS:
        a, e = getattr(actual, field), getattr(expected, field)
        assert a.dtype == e.dtype
        assert torch.equal(a, e), field
