"""How evenly the tokens of a batch are spread over the experts of a mixture.

Shape suffixes: X = tokens of the batch, E = experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(logits: Sequence[Tensor], is_token_X: Tensor, *, top_k: int) -> Tensor:
    """The load-balancing loss of the Switch Transformer, as transformers has it.

    E times the sum over experts of the share of tokens that choose the expert, times its mean
    probability, both over all layers; ``top_k`` where the load is even.

    Args:
        logits: of each layer's router, [X, E].
        is_token_X: False for padding, boolean.
        top_k: experts that a token chooses.
    """
    chosen_E = torch.zeros(logits[0].shape[-1], device=logits[0].device)
    probability_E = torch.zeros_like(chosen_E)
    for logits_XE in logits:
        probs_NE = logits_XE[is_token_X].float().softmax(-1)
        chosen_E = chosen_E + expert_counts(probs_NE.topk(top_k, dim=-1).indices, probs_NE.shape[1])
        probability_E = probability_E + probs_NE.sum(0)
    tokens = len(logits) * int(is_token_X.sum())
    loss: Tensor = logits[0].shape[-1] * torch.sum(chosen_E / tokens * (probability_E / tokens))
    return loss


def expert_counts(chosen_NK: Tensor, num_experts: int) -> Tensor:
    """How often each expert is among the chosen ones, float32 [E]."""
    ones = torch.ones(chosen_NK.numel(), device=chosen_NK.device)
    counts_E = torch.zeros(num_experts, device=chosen_NK.device)
    return counts_E.scatter_add_(0, chosen_NK.reshape(-1).long(), ones)


def busiest_load(counts_LE: Tensor) -> float:
    """Load of a layer's busiest expert, in multiples of the mean, averaged over L layers.

    1 is even; E over the experts that a token chooses is all tokens at the same ones.
    """
    counts_LE = counts_LE[counts_LE.sum(1) > 0].double()
    if not len(counts_LE):
        return float("nan")
    return float((counts_LE.max(1).values / counts_LE.mean(1)).mean())
