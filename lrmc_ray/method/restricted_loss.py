r"""Stage 1: the losses on the candidates. Each is a sum over positions, in nats; callers divide.

With the logits z at a position, its candidate set S, the gold token g, the current model's
softmax p over all V tokens, q over S, and the outside mass rho = 1 - p(S)::

    restricted    L_S = logsumexp_{i in S} z_i - z_g            the paper's
    soft          KL(b || q), b = recorded probabilities renormalized over S

Those over all tokens, the full loss L among them, are in ``baselines.vocabulary_loss``.

What follows for the restricted loss:

1. dL_S/dz = q - onehot(g), zero outside S. Its bias against the full loss, q - p, has L1 norm
   exactly 2 rho.
2. L - L_S = -log(1 - rho): nothing pushes mass back into S once it has left; see ``measure``.
3. |S| = 1 gives loss 0 and gradient 0, exactly.

**Sampled tail.** R tokens r, shared by all positions, with weights w_r (inverse sampling
probabilities) estimate the outside part of the normalizer; those inside S do not count::

    logaddexp(logsumexp_{i in S} z_i, log sum_{r not in S} w_r exp(z_r)) - z_g

The estimate of the normalizer is unbiased. With R = V, each token once at weight 1, this is the
full loss. The cost is (K + R) / V of the full loss's.

**Anchor.** On prompt positions, KL(base || model) holds the model to what the base model said.
Without a tail it is the soft loss. With a tail, all tokens outside S are one more outcome: the
base gives it 1 - stored mass, the model the tail's share of the estimated normalizer.

Source: the restricted loss is that of Logits Replay + MoClip, arXiv 2510.09152, Stage 1; the
tail, the anchor and the soft loss are this project's.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lrmc_ray.method.candidate_sets import CandidateSets, row_gold, row_logsumexp
from lrmc_ray.method.fast.backend_choice import kernel_backend, logits_backend
from lrmc_ray.method.fast.candidate_logits import candidate_logits, loss_size, token_logits
from lrmc_ray.method.fast.chunk_table import to_device
from lrmc_ray.method.fast.dense_loss import dense_loss
from lrmc_ray.method.fast.fused_loss import fused_loss, refusal, share_tail
from lrmc_ray.method.fast.loss_launch import SharedTail
from lrmc_ray.method.fast.triton_support import is_wanted
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.names import (
    Backend,
    KernelBackend,
    LogitsBackend,
    LossReduction,
    check_choice,
)


class Tail(NamedTuple):
    """One step's sampled tail; a token may be there more than once."""

    ids_R: Tensor
    """Token ids."""
    logweights_R: Tensor
    """Logarithms of their weights."""

    def to(self, device: torch.device) -> Tail:
        """The same on another device; the host does not wait for a GPU."""
        return Tail(to_device(self.ids_R, device), to_device(self.logweights_R, device))


def restricted_cross_entropy(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    *,
    tail: Tail | None = None,
    reduction: LossReduction = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of the gold token over its candidate set, in nats.

    Args:
        hidden_ND: [N, D] last hidden states at the positions of ``candidates``.
        head: The output head; where its weight's gradient goes, see ``fast.candidate_logits``.
        candidates: N candidate sets, on the same device.
        tail: What ``draw_tail`` gives; None for the paper's loss.
        reduction: ``"sum"``, ``"mean"`` (over all N rows), or ``"none"`` for [N].
        backend: ``"kernel"`` (``fast.fused_loss``) and ``"dense_kernel"`` (``fast.dense_loss``) are
            on a GPU with Triton, up to float32. The others are those of ``fast.candidate_logits``.
            ``"auto"``: see ``fast.backend_choice``.

    Returns:
        float32, or float64 if an input is.

    Raises:
        ValueError: An unknown reduction or backend, or sizes that do not agree.
    """
    check_choice("reduction", reduction, LossReduction)
    way = _way(hidden_ND, head, candidates, tail, backend)
    if way == "kernel" or way == "dense_kernel":
        loss_N = _by_kernels(hidden_ND, head, candidates, tail, way, is_anchor=False)
    else:
        logits_E = candidate_logits(hidden_ND, head, candidates, backend=way)
        normalizer_N = row_logsumexp(logits_E, candidates)
        if tail is not None:
            tail_N = _tail_logsumexp(hidden_ND, head, candidates, tail)
            normalizer_N = torch.logaddexp(normalizer_N, tail_N)
        loss_N = normalizer_N - row_gold(logits_E, candidates)
    if reduction == "none":
        return loss_N
    return loss_N.mean() if reduction == "mean" else loss_N.sum()


def soft_cross_entropy(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets, *, backend: Backend = "auto"
) -> Tensor:
    """Sum of KL(recorded || model), both renormalized over S; arguments as above."""
    return anchor_kl(hidden_ND, head, candidates, backend=backend)


def anchor_kl(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    *,
    tail: Tail | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum of KL(base || model) on the recorded candidates, in nats; arguments as above.

    A row whose candidates include every sampled token has no estimate of its outside mass: it
    counts as without a tail.
    """
    way = _way(hidden_ND, head, candidates, tail, backend)
    if way == "kernel" or way == "dense_kernel":
        return _by_kernels(hidden_ND, head, candidates, tail, way, is_anchor=True).sum()
    logits_E = candidate_logits(hidden_ND, head, candidates, backend=way)
    inside_N = row_logsumexp(logits_E, candidates)
    rows_E = candidates.row_ids
    base_E = candidates.logprobs.to(logits_E.dtype)
    base_inside_N = row_logsumexp(base_E, candidates)
    if tail is None:
        base_E = base_E - base_inside_N[rows_E]
        return (base_E.exp() * (base_E - logits_E + inside_N[rows_E])).sum()

    tail_N = _tail_logsumexp(hidden_ND, head, candidates, tail)
    has_tail_N = tail_N > -math.inf
    # Without a sampled token outside S there is no such outcome: the base is renormalized over S.
    base_outside_N = candidates.outside_mass().to(logits_E.dtype) * has_tail_N
    base_E = base_E - torch.where(has_tail_N, 0.0, base_inside_N)[rows_E]
    normalizer_N = torch.logaddexp(inside_N, tail_N)
    inside_kl = (base_E.exp() * (base_E - logits_E + normalizer_N[rows_E])).sum()
    outside_logprob_N = torch.where(has_tail_N, tail_N, 0.0) - normalizer_N
    outside_kl_N = torch.xlogy(base_outside_N, base_outside_N) - base_outside_N * outside_logprob_N
    return inside_kl + outside_kl_N.sum()


def draw_tail(
    num_samples: int,
    vocabulary_size: int,
    *,
    seed: int,
    step: int,
    probabilities: Tensor | None = None,
) -> Tail:
    """The sampled tail of one step, on the CPU.

    Args:
        num_samples: R.
        vocabulary_size: V.
        seed: The run's seed.
        step: The optimizer step; the same (seed, step) always draws the same.
        probabilities: [V] sampling probabilities, up to a factor. Samples are then drawn with
            replacement and weigh 1 / (R p). A token of probability 0 is never seen, so give one
            only to tokens without outside mass. None: uniform, without replacement, V / R each.

    Raises:
        ValueError: R below 1 or, when uniform, above V; probabilities not [V], negative, not
            finite or all zero.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if probabilities is None and num_samples > vocabulary_size:
        raise ValueError(
            f"num_samples must be at most the vocabulary size {vocabulary_size}, got "
            f"{num_samples}; a uniform tail takes each token at most once"
        )
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
    if probabilities is None:
        ids_R = torch.randperm(vocabulary_size, generator=generator)[:num_samples].sort().values
        logweight = math.log(vocabulary_size / num_samples)
        return Tail(ids_R, torch.full((num_samples,), logweight))
    weights_V = probabilities.detach().cpu().double()
    is_valid = weights_V.isfinite().all() and (weights_V >= 0).all() and weights_V.sum() > 0
    if weights_V.shape != (vocabulary_size,) or not is_valid:
        raise ValueError(
            f"probabilities must be [{vocabulary_size}], finite, at least 0 and not all 0, got "
            f"shape {tuple(weights_V.shape)} and sum {float(weights_V.sum())}"
        )
    ids_R = torch.multinomial(weights_V, num_samples, replacement=True, generator=generator)
    ids_R = ids_R.sort().values
    return Tail(ids_R, -((weights_V / weights_V.sum())[ids_R] * num_samples).log().float())


def _way(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    tail: Tail | None,
    backend: Backend,
) -> KernelBackend | LogitsBackend:
    """The backend, chosen by size where it is ``"auto"``."""
    check_choice("backend", backend, Backend)
    if len(hidden_ND) != candidates.num_rows:
        raise ValueError(
            "hidden_ND must have one row per candidate set, got "
            f"{len(hidden_ND)} rows and {candidates.num_rows} sets"
        )
    if tail is not None and tail.ids_R.shape != tail.logweights_R.shape:
        raise ValueError(
            "a tail must have one weight per token, got "
            f"{len(tail.logweights_R)} weights of {len(tail.ids_R)} tokens; see draw_tail"
        )
    if backend != "auto":
        return backend
    size = loss_size(hidden_ND, head, candidates, 0 if tail is None else len(tail.ids_R))
    # Only on a GPU: Triton's interpreter runs the kernels elsewhere as well, but slowly.
    if hidden_ND.is_cuda and is_wanted() and refusal(hidden_ND, head, gathers=False) is None:
        return kernel_backend(size, gathers=refusal(hidden_ND, head) is None)
    return logits_backend(hidden_ND.device.type, size)


def _by_kernels(
    hidden_ND: Tensor,
    head: OutputHead,
    candidates: CandidateSets,
    tail: Tail | None,
    way: KernelBackend,
    *,
    is_anchor: bool,
) -> Tensor:
    """[N], with the tail as the kernels want it."""
    shared = None if tail is None else _shared(tail, len(head.weight_VD))
    loss = fused_loss if way == "kernel" else dense_loss
    return loss(hidden_ND, head, candidates, tail=shared, is_anchor=is_anchor)


_SHARED: MutableMapping[Tensor, tuple[Tensor, object, SharedTail]] = WeakTensorKeyDictionary()
"""Of tails whose tokens are there: losses and micro-batches of a step have one tail."""


def _shared(tail: Tail, num_rows: int) -> SharedTail:
    ids_R, logweights_R = tail
    key = num_rows, ids_R._version, logweights_R._version
    found = _SHARED.get(ids_R)
    if found is None or found[0] is not logweights_R or found[1] != key:
        found = logweights_R, key, share_tail(ids_R, logweights_R, num_rows)
        _SHARED[ids_R] = found
    return found[2]


def _tail_logsumexp(
    hidden_ND: Tensor, head: OutputHead, candidates: CandidateSets, tail: Tail
) -> Tensor:
    """[N], ``log sum_{r not in S} w_r exp(z_r)``; -inf where S holds the whole tail."""
    shared = _shared(tail, len(head.weight_VD))
    number, logweights_R = len(shared.ids_R), shared.wide_logweights_R
    logits_NR = token_logits(hidden_ND, head, shared.ids_R)
    logits_NR = logits_NR + logweights_R.to(logits_NR.dtype)
    # Candidates that are not drawn go to one column more, so that nothing has to be counted.
    place_E = shared.places_V[candidates.token_ids]
    is_left_out_NR = logits_NR.new_zeros((len(hidden_ND), number + 1), dtype=torch.bool)
    is_left_out_NR[candidates.row_ids, torch.where(place_E < 0, number, place_E)] = True
    # A token drawn twice is one token with both weights, which stand at its first place.
    is_left_out_NR = is_left_out_NR[:, :number] | logweights_R.isneginf()
    return logits_NR.masked_fill(is_left_out_NR, -math.inf).logsumexp(-1)
