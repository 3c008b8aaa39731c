"""How evenly the tokens of a batch are spread over the experts of a mixture.

Shape suffixes: those of :mod:`lrmc_ray.method`; X = tokens of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(logits: Sequence[Tensor], is_token_X: Tensor, *, top_k: int) -> Tensor:
    """The load-balancing loss of the Switch Transformer, as transformers has it.

    U times the sum over experts of the share of tokens that choose the expert, times its mean
    probability, both over all layers; ``top_k`` where the load is even.

    Args:
        logits: of each layer's router, [X, U].
        is_token_X: False for padding, boolean.
        top_k: experts that a token chooses.
    """
    chosen_U = torch.zeros(logits[0].shape[-1], device=logits[0].device)
    probability_U = torch.zeros_like(chosen_U)
    # The host need not know how many are padding: on a GPU it would wait.
    for logits_XU in logits:
        probs_XU = logits_XU.masked_fill(~is_token_X[:, None], 0.0).float().softmax(-1)
        best_XK = probs_XU.topk(top_k, dim=-1).indices
        chosen_U = chosen_U + expert_counts(best_XK, probs_XU.shape[1], is_token_X)
        probability_U = probability_U + probs_XU.masked_fill(~is_token_X[:, None], 0.0).sum(0)
    tokens = len(logits) * is_token_X.sum()
    loss: Tensor = logits[0].shape[-1] * torch.sum(chosen_U / tokens * (probability_U / tokens))
    return loss


def expert_counts(chosen_XK: Tensor, num_experts: int, is_token_X: Tensor) -> Tensor:
    """How often each expert is among those that tokens have chosen, float32 [U]."""
    ones_XK = is_token_X[:, None].float().expand_as(chosen_XK)
    counts_U = torch.zeros(num_experts, device=chosen_XK.device)
    return counts_U.scatter_add_(0, chosen_XK.reshape(-1).long(), ones_XK.reshape(-1))


def busiest_load(counts_LU: Tensor) -> float:
    """Load of a layer's busiest expert, in multiples of the mean, averaged over L layers.

    1 is even; U over the experts that a token chooses is all tokens at the same ones.
    """
    counts_LU = counts_LU[counts_LU.sum(1) > 0].double()
    if not len(counts_LU):
        return float("nan")
    return float((counts_LU.max(1).values / counts_LU.mean(1)).mean())
