r"""Losses over the whole vocabulary: plain fine-tuning, and baselines made of it. Sums, in nats.

With the logits z at a position, the gold token g, the model's softmax p over all V tokens and the
base model's b::

    full          -log p_g                            ordinary fine-tuning
    active_only   -log p_g where |S| > 1, else 0      fewer positions, the softmax not smaller
    dft           -p_g log p_g, the factor p_g taken as a constant
    eaft          -h log p_g, h the entropy of the likeliest tokens, taken as a constant
    flow          -w log p_g, w the weight of the sample
    kl_to_base    -log p_g + kl_weight KL(b || p)
    asft          dft + kl_weight KL(b || p), b from the record

The logits exist for one chunk of positions at a time, and their gradient is made with them, in the
forward pass, so nothing is computed twice. What a loss adds is a *rule*: the loss and dL/dz of a
chunk, from its log-probabilities::

    full          dL/dz = p - onehot(g)
    dft           dL/dz = p_g (p - onehot(g)); the same with h or w in place of p_g
    kl_to_base    dL/dz = p - onehot(g) + kl_weight (p - b)

Sources: ``dft`` is Dynamic Fine-Tuning, arXiv 2508.05629; ``kl_to_base`` is Learning without
Forgetting (arXiv 1606.09282) at temperature 1, with the base's outputs on the new task's own
positions; ``active_only`` is this project's control.

``eaft`` is Entropy-Adaptive Fine-Tuning, arXiv 2601.02151: h = H / ln K, with the entropy H of the
current model over its K = 20 likeliest tokens, their probabilities renormalized. (The authors' code
divides by 3, which is ln 20 up to 0.2 %.)

``flow`` is arXiv 2502.02797, by sequences: w = exp(-l / T) with the base's mean loss l of the
sample and the median T of these, see ``train/samples.py``. As in the authors' code the divisor is
the number of positions, not the sum of the weights.

``asft`` is Anchored Supervised Fine-Tuning, arXiv 2509.23753. There the KL is over the vocabulary,
with the base model run beside. Here it is over the recorded candidates, and all other tokens are
one more outcome, so it is a lower bound of theirs, and exact where S is the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmc_ray.method.candidate_sets import CandidateSets, row_logsumexp
from lrmc_ray.method.head import OutputHead, head_logits

CHUNK_ELEMENTS = 2**24
"""Of the [n, V] logits that exist at a time: 64 MiB in float32."""

Rule = Callable[[Tensor, slice], tuple[Tensor, Callable[[], Tensor]]]
"""From log-probabilities [n, V] and the chunk's place among the N: the summed loss, and what makes
dL/dz [n, V]. That is called after the loss, once or never, and may overwrite the former."""

EAFT_TOKENS = 20
"""K of ``eaft``."""


def full_cross_entropy(hidden_ND: Tensor, head: OutputHead, gold_N: Tensor) -> Tensor:
    """Sum of the gold tokens' cross-entropy over the whole vocabulary.

    Args:
        hidden_ND: [N, D] last hidden states.
        head: The output head; its weight's gradient is an ordinary dense one.
        gold_N: [N] gold token ids, any integer dtype.

    Returns:
        float32, or float64 if an input is.
    """

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        gold_n1 = gold_N[chunk, None].long()
        return (
            -logprobs_nV.gather(1, gold_n1).sum(),
            lambda: _less_onehot_(logprobs_nV.exp_(), gold_n1),
        )

    return _vocabulary_loss(hidden_ND, head, rule)


def active_only_cross_entropy(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets
) -> Tensor:
    """``full_cross_entropy`` of the rows with more than one candidate.

    The control that separates fewer positions from a smaller softmax.
    """
    return weighted_cross_entropy(hidden_ND, head, candidates.gold_ids, candidates.active())


def dft_cross_entropy(hidden_ND: Tensor, head: OutputHead, gold_N: Tensor) -> Tensor:
    """``full_cross_entropy``, each position weighted by the probability that its gold token has.

    The weight is a constant to the gradient: what the model finds unlikely is hardly learned.
    """

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        gold_n1 = gold_N[chunk, None].long()
        return _weighted(logprobs_nV, gold_n1, logprobs_nV.gather(1, gold_n1).exp())

    return _vocabulary_loss(hidden_ND, head, rule)


def eaft_cross_entropy(hidden_ND: Tensor, head: OutputHead, gold_N: Tensor) -> Tensor:
    """``full_cross_entropy``, each position weighted by how open the model takes it to be.

    The weight, a constant to the gradient, is the entropy of the model's 20 likeliest tokens, as a
    share of the largest there can be. Where the model is sure of something, right or wrong, hardly
    anything is learned.
    """
    num_tokens = min(EAFT_TOKENS, head.vocabulary_size)

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        top_nK = logprobs_nV.topk(num_tokens).values.log_softmax(-1)
        entropy_n1 = -(top_nK.exp() * top_nK).sum(-1, keepdim=True)
        return _weighted(logprobs_nV, gold_N[chunk, None].long(), entropy_n1 / math.log(num_tokens))

    return _vocabulary_loss(hidden_ND, head, rule)


def weighted_cross_entropy(
    hidden_ND: Tensor, head: OutputHead, gold_N: Tensor, weight_N: Tensor
) -> Tensor:
    """``full_cross_entropy``, each position times its constant weight [N]."""

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        weight_n1 = weight_N[chunk, None].to(logprobs_nV.dtype)
        return _weighted(logprobs_nV, gold_N[chunk, None].long(), weight_n1)

    return _vocabulary_loss(hidden_ND, head, rule)


def asft_cross_entropy(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets, *, kl_weight: float
) -> Tensor:
    """``dft_cross_entropy`` + ``kl_weight`` times the sum of KL(base || model) as recorded.

    Args:
        hidden_ND: As there.
        head: As there.
        candidates: N candidate sets, on the same device.
        kl_weight: Weight of the KL.
    """

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        sets = candidates.between(chunk.start, chunk.start + len(logprobs_nV))
        gold_n1 = sets.gold_ids[:, None].long()
        weight_n1 = logprobs_nV.gather(1, gold_n1).exp()
        loss = -(weight_n1 * logprobs_nV.gather(1, gold_n1)).sum()
        kl, kl_gradient = _recorded_kl(logprobs_nV, sets)

        def gradient() -> Tensor:
            gradient_nV = kl_gradient().mul_(kl_weight)
            gradient_nV += weight_n1 * logprobs_nV.exp_()
            return gradient_nV.scatter_add_(1, gold_n1, -weight_n1)

        return loss + kl_weight * kl, gradient

    return _vocabulary_loss(hidden_ND, head, rule)


def kl_regularized_cross_entropy(
    hidden_ND: Tensor,
    head: OutputHead,
    gold_N: Tensor,
    base_logits: Callable[[slice], Tensor],
    *,
    kl_weight: float,
) -> Tensor:
    """``full_cross_entropy`` + ``kl_weight`` times the sum of KL(base || model).

    Args:
        hidden_ND: As there.
        head: As there.
        gold_N: As there.
        base_logits: The base model's logits [n, V] at the positions of a slice of the N.
        kl_weight: Weight of the KL.
    """

    def rule(logprobs_nV: Tensor, chunk: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        gold_n1 = gold_N[chunk, None].long()
        base_nV = base_logits(chunk).to(logprobs_nV.dtype).log_softmax(-1)
        weighted_nV = kl_weight * base_nV.exp()
        kl = (weighted_nV * (base_nV - logprobs_nV)).sum()

        def gradient() -> Tensor:
            gradient_nV = logprobs_nV.exp_().mul_(1 + kl_weight).sub_(weighted_nV)
            return _less_onehot_(gradient_nV, gold_n1)

        return kl - logprobs_nV.gather(1, gold_n1).sum(), gradient

    return _vocabulary_loss(hidden_ND, head, rule)


def _weighted(
    logprobs_nV: Tensor, gold_n1: Tensor, weight_n1: Tensor
) -> tuple[Tensor, Callable[[], Tensor]]:
    """What a rule returns: cross-entropies times constant weights."""
    return (
        -(weight_n1 * logprobs_nV.gather(1, gold_n1)).sum(),
        lambda: _less_onehot_(logprobs_nV.exp_(), gold_n1).mul_(weight_n1),
    )


def _recorded_kl(logprobs_nV: Tensor, sets: CandidateSets) -> tuple[Tensor, Callable[[], Tensor]]:
    """Summed KL(base || model), all tokens outside S being one outcome, and its gradient [n, V].

    With the base's b, o its outside mass and P the model's: dKL/dz is p - b in S, p - o p / P
    outside. A row whose S is the whole vocabulary has no such outcome: b is renormalized there.
    """
    rows_E, tokens_E = sets.row_ids, sets.token_ids.long()
    model_E = logprobs_nV[rows_E, tokens_E]
    outside_n = logprobs_nV.index_put((rows_E, tokens_E), logprobs_nV.new_tensor(-math.inf))
    outside_n = outside_n.logsumexp(-1)
    has_outside_n = outside_n > -math.inf
    outside_n = torch.where(has_outside_n, outside_n, 0.0)
    base_E = sets.logprobs.to(logprobs_nV.dtype)
    base_E = base_E - torch.where(has_outside_n, 0.0, row_logsumexp(base_E, sets))[rows_E]
    base_outside_n = sets.outside_mass().to(logprobs_nV.dtype) * has_outside_n
    inside_kl = (base_E.exp() * (base_E - model_E)).sum()
    outside_kl_n = torch.xlogy(base_outside_n, base_outside_n) - base_outside_n * outside_n

    def gradient() -> Tensor:
        gradient_nV = logprobs_nV.exp()
        # As a difference of logarithms: both probabilities may be too small for the type.
        gradient_nV -= base_outside_n[:, None] * (logprobs_nV - outside_n[:, None]).exp()
        gradient_nV[rows_E, tokens_E] = model_E.exp() - base_E.exp()
        return gradient_nV

    return inside_kl + outside_kl_n.sum(), gradient


def _less_onehot_(gradient_nV: Tensor, gold_n1: Tensor) -> Tensor:
    return gradient_nV.scatter_add_(1, gold_n1, gradient_nV.new_full(gold_n1.shape, -1.0))


def _vocabulary_loss(hidden_ND: Tensor, head: OutputHead, rule: Rule) -> Tensor:
    total: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, head.bias_V, head, rule, torch.is_grad_enabled()
    )
    return total


class _VocabularyLoss(torch.autograd.Function):
    """A chunked loss whose forward pass leaves the gradients of the sum.

    The weight and the bias stand beside the head that holds them, because autograd follows the
    tensors among the arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        rule: Rule,
        wants_gradient: bool,
    ) -> Tensor:
        wants_ND, wants_VD, wants_V = (wants_gradient and w for w in ctx.needs_input_grad[:3])
        dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        head = dataclasses.replace(head, weight_VD=weight_VD)
        gradient_ND = torch.empty_like(hidden_ND) if wants_ND else None
        gradient_VD = torch.zeros_like(weight_VD) if wants_VD else None
        gradient_V = torch.zeros_like(bias_V) if bias_V is not None and wants_V else None
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        step = max(1, CHUNK_ELEMENTS // head.vocabulary_size)
        for start in range(0, len(hidden_ND), step):
            chunk = slice(start, start + step)
            hidden_nD = hidden_ND[chunk]
            logits_nV = head_logits(hidden_nD, head)
            loss, make_gradient = rule(logits_nV.log_softmax(-1), chunk)
            total += loss
            if not (wants_ND or wants_VD or wants_V):
                continue
            gradient_nV = make_gradient()
            if head.softcap is not None:
                gradient_nV *= 1 - (logits_nV / head.softcap).square()
            gradient_nV *= head.logit_scale
            if gradient_V is not None:
                gradient_V += gradient_nV.sum(0)
            gradient_nV = gradient_nV.to(dtype)
            if gradient_ND is not None:
                torch.mm(gradient_nV, weight_VD, out=gradient_ND[chunk])
            if gradient_VD is not None:
                gradient_VD.addmm_(gradient_nV.T, hidden_nD)
        ctx.save_for_backward(gradient_ND, gradient_VD, gradient_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None)
