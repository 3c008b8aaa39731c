"""The output head: how hidden states become logits, here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class OutputHead:
    """``softcap tanh(logit_scale (hidden weight' + bias) / softcap)``, as models have it.

    Attributes:
        weight_VD: Maybe the embedding's own weight.
        bias_V: None for none.
        logit_scale: Factor on the logits (Cohere; Granite divides by its ``logits_scaling``).
        softcap: Bound on the logits (Gemma), None for none.
        whole_size: Tokens of the vocabulary of which ``weight_VD`` holds some rows; None for all.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    whole_size: int | None = None

    @property
    def vocabulary_size(self) -> int:
        """V, the tokenizer's tokens and padding behind them."""
        return self.weight_VD.shape[0] if self.whole_size is None else self.whole_size

    def shape_logits(self, logits: Tensor) -> Tensor:
        """Scale and bound the products of any hidden states and tokens, bias included."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def shape_logits_(self, logits: Tensor) -> Tensor:
        """The same numbers in the place of ``logits``, which no gradient may need any more."""
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)


def head_logits(hidden_ND: Tensor, head: OutputHead, *, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [N, V] over the whole vocabulary: for a few positions at a time.

    Args:
        hidden_ND: Last hidden states.
        head: The output head.
        dtype: Of the product; by default the wider one of hidden states and weight.

    Returns:
        float32, or float64 if that is the product's.
    """
    dtype = dtype or torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype)
    logits_NV = F.linear(hidden_ND.to(dtype), head.weight_VD.to(dtype))
    logits_NV = logits_NV.to(torch.promote_types(dtype, torch.float32))
    if head.bias_V is not None:
        logits_NV += head.bias_V
    if logits_NV.requires_grad:
        return head.shape_logits(logits_NV)
    return head.shape_logits_(logits_NV)  # a copy of [N, V] is what bounds how many fit
