"""The mask of a packed row, in a form that every attention takes, and attention by its blocks."""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def added_mask(model: Any, is_visible_QT: "Tensor") -> "Tensor":
    """What is added to the scores of attention, [1, 1, Q, T]: every implementation takes it.

    On a CPU, torch's own implementation leaves out pairs that are hidden by it.
    """
    import torch

    from lrmc_ray.method.fast.attention_blocks import divide

    _let_attention_be_divided()
    dtype = model.dtype
    if torch.is_autocast_enabled(is_visible_QT.device.type):
        dtype = torch.get_autocast_dtype(is_visible_QT.device.type)
    mask_QT = torch.zeros(is_visible_QT.shape, dtype=dtype, device=is_visible_QT.device)
    mask_11QT = mask_QT.masked_fill_(~is_visible_QT, torch.finfo(dtype).min)[None, None]
    divide(mask_11QT, is_visible_QT)
    return mask_11QT


@functools.cache
def _let_attention_be_divided() -> None:
    """Once in a process: attention with a mask that has blocks goes block by block."""
    import torch
    from transformers import AttentionInterface

    from lrmc_ray.method.fast.attention_blocks import attend_in_blocks, divided

    whole = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

    def attention(
        module: Any,
        query: "Tensor",
        key: "Tensor",
        value: "Tensor",
        attention_mask: "Tensor | None",
        **options: Any,
    ) -> Any:
        is_plain = options.get("position_bias") is None and options.get("cache") is None
        blocks = None
        if attention_mask is not None and is_plain and not torch.compiler.is_compiling():
            blocks = divided(attention_mask)
        if blocks is None or (query.shape[2], key.shape[2]) != blocks.shape:
            return whole(module, query, key, value, attention_mask, **options)

        def attend(*one: "Tensor") -> "Tensor":
            found: Tensor = whole(module, *one, **options)[0]
            return found

        return attend_in_blocks(attend, query, key, value, blocks), None

    AttentionInterface.register("sdpa", attention)
