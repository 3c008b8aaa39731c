"""Inputs of the losses by kernels, and what they are compared with: dense float64."""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lrmc_ray.method.candidate_sets import CandidateSets, row_offsets
from lrmc_ray.method.fast import fused_loss
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.stored_mass import round_down
from tests.support.method_inputs import inside, leaves, rng

Loss = Callable[..., Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 40
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
LIMITS = {FLOAT: 2e-6, HALF: 5e-4, BRAIN: 4e-3}
"""Of gradients, relative to their norm: those of half precision are rounded once or twice."""
TAILS = {
    "no tail": None,
    "tail": draw_tail(9, V, seed=0, step=0),
    "all tokens": draw_tail(V, V, seed=0, step=0),
    "drawn twice": draw_tail(30, V, seed=0, step=1, probabilities=torch.arange(V) + 1.0),
}


def sets_of(sizes: list[int], vocabulary_size: int = V, seed: int = 0) -> CandidateSets:
    """Candidate sets of these sizes; gold anywhere, up to 80 % of the probability inside."""
    generator = rng(seed)
    tokens, logprobs, gold = [], [], []
    for size in sizes:
        row = torch.randperm(vocabulary_size, generator=generator)[:size]
        chances = torch.rand(size, generator=generator, dtype=torch.float64)
        chances = 0.8 * chances / chances.sum()
        tokens.append(row.int())
        logprobs.append(round_down(chances.log().sort(descending=True).values))
        place = int(torch.randint(max(size, 1), (), generator=generator))
        gold.append(int(row[place]) if size else 0)
    return CandidateSets(
        row_offsets(torch.tensor(sizes)),
        torch.cat(tokens),
        torch.cat(logprobs).half(),
        torch.tensor(gold, dtype=torch.int32),
    )


def inputs(n: int, d: int = 20, v: int = V, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = rng(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) / math.sqrt(d) * 3
    return hidden, weight, torch.randn(v, generator=generator)


def true_loss(hidden, head, sets, tail, *, is_anchor) -> Tensor:
    """[N] by all logits, as ``restricted_loss`` defines both."""
    logits_NV = hidden @ head.weight_VD.T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = logits_NV * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    is_inside_NV = inside(sets, logits_NV.shape[1])
    inside_N = logits_NV.masked_fill(~is_inside_NV, -math.inf).logsumexp(1)
    normalizer_N, has_tail_N = inside_N, torch.zeros(len(hidden), dtype=torch.bool)
    tail_N = torch.full_like(inside_N, -math.inf)
    if tail is not None:
        drawn_NR = logits_NV[:, tail.ids_R] + tail.logweights_R.double()
        drawn_NR = drawn_NR.masked_fill(is_inside_NV[:, tail.ids_R], -math.inf)
        has_tail_N = (drawn_NR > -math.inf).any(1)
        tail_N = drawn_NR.masked_fill(~has_tail_N[:, None], 0.0).logsumexp(1)
        normalizer_N = torch.where(has_tail_N, torch.logaddexp(inside_N, tail_N), inside_N)
    if not is_anchor:
        return normalizer_N - logits_NV[range(len(hidden)), sets.gold_ids.long()]
    base_NV = torch.zeros_like(logits_NV)
    base_NV[sets.row_ids, sets.token_ids.long()] = sets.logprobs.double().exp()
    outside_N = sets.outside_mass() * has_tail_N
    base_NV = torch.where(has_tail_N[:, None], base_NV, base_NV / base_NV.sum(1, keepdim=True))
    logprobs_NV = logits_NV - normalizer_N[:, None]
    kl_N = torch.xlogy(base_NV, base_NV).sum(1) - (base_NV * logprobs_NV).sum(1)
    tail_logprob_N = torch.where(has_tail_N, tail_N - normalizer_N, 0.0)
    return kl_N + torch.xlogy(outside_N, outside_N) - outside_N * tail_logprob_N


def kernel_loss(
    hidden, head, sets, tail=None, *, is_anchor=False, way: Loss = fused_loss.fused_loss
) -> Tensor:
    """[N] by the kernels, on the CPU."""
    shared = None
    if tail is not None:
        on_device = tail.to(DEVICE)
        shared = fused_loss.share_tail(on_device.ids_R, on_device.logweights_R, len(head.weight_VD))
    return way(hidden, head, sets.to(DEVICE), tail=shared, is_anchor=is_anchor).cpu()


def error(value: Tensor, truth: Tensor) -> float:
    difference = (value.detach().double().cpu() - truth.detach()).norm()
    return float(difference / truth.detach().norm().clamp_min(1e-30))


def check(
    types,
    sets,
    tail=None,
    *,
    is_anchor=False,
    d=20,
    v=V,
    has_bias=False,
    way: Loss = fused_loss.fused_loss,
    limits: Mapping[torch.dtype, float] = LIMITS,
    **options,
):
    """Loss and gradients of these inputs, each position with a factor of its own."""
    our_loss = functools.partial(kernel_loss, way=way)
    tensors = [x.to(t) for x, t in zip(inputs(sets.num_rows, d, v), types, strict=True)]
    factors_N = torch.rand(sets.num_rows, generator=rng(5)) + 0.5
    ours = leaves(*(x.to(DEVICE) for x in tensors))
    trues = leaves(*(x.double() for x in tensors))
    losses = []
    for (hidden, weight, bias), loss_of in ((ours, our_loss), (trues, true_loss)):
        head = OutputHead(weight, bias if has_bias else None, **options)
        loss_N = loss_of(hidden, head, sets, tail, is_anchor=is_anchor)
        (loss_N * factors_N).sum().backward()
        losses.append(loss_N)
    assert losses[0].dtype == FLOAT
    assert error(*losses) < 1e-6
    for our, true in list(zip(ours, trues, strict=True))[: 2 + has_bias]:
        assert our.grad.dtype == our.dtype
        assert error(our.grad, true.grad) < limits[our.dtype]
    assert has_bias or ours[2].grad is None


RAGGED = [3, 1, 17, V, 8, 2]
HEADS = [
    {},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"has_bias": True, "logit_scale": 1.7, "softcap": 5.0},
]
