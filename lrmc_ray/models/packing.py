"""Whether a model's sequences may be packed into one row, and what attention costs it there."""

import inspect
import sys
from typing import TYPE_CHECKING, Any

from lrmc_ray.models.borders import attention_borders, longest_packed
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.parts import body_of

if TYPE_CHECKING:
    from torch import Tensor


_TRIED_TOKENS = 64

_FEWEST_TOKENS = 4
"""Of a sequence with which packing is tried, and below which it is never worth it."""

_ROUNDED = 0.1
"""What bf16 moves hidden states by at most, as a share of their length; another neighbour moves
them by more."""


def attention_cost(model: Any) -> float:
    """What it costs a token to see one more, in units of its matrix products with the weights.

    Infinity where sequences cannot be packed: the model does not take a mask and positions of our
    own. Those longer than :func:`lrmc_ray.models.borders.longest_packed` cannot be packed either.
    """
    import torch

    from lrmc_ray.method.fast.packing import pack
    from lrmc_ray.method.layout import pad

    if not may_be_packed(model):
        return float("inf")
    config = model.config.get_text_config()
    length = int(min(longest_packed(config), _TRIED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (2 * length,), generator=generator)
    # Two sequences with a common beginning, of unequal lengths.
    common = length // 2
    other_T = torch.cat([ids_T[:common], ids_T[length : 2 * length - common - 1]])
    sequences = [ids_T[:length], other_T]
    was_training = model.training
    model.eval()
    found = []
    try:
        for layout in (pad(sequences), pack(sequences)):
            with torch.no_grad():
                hidden_BTD = batch_hidden_states(model, layout.to(model.device)).float()
            found.append(
                torch.cat(
                    [
                        hidden_BTD[row, columns_T]
                        for row, columns_T in zip(layout.rows, layout.columns, strict=True)
                    ]
                )
            )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return float("inf")  # it does not take such arguments
    finally:
        model.train(was_training)
    if not _are_alike(*found, is_rounded=model.dtype.itemsize < 4):
        return float("inf")
    return price_of_attention(model)


def _are_alike(padded_ND: "Tensor", packed_ND: "Tensor", *, is_rounded: bool) -> bool:
    """Whether hidden states differ by no more than rounding does, at every position.

    Args:
        padded_ND: of each sequence alone.
        packed_ND: of both in one row.
        is_rounded: whether the model computes in a shorter format than float32. Then the lengths of
            differences are compared, not single numbers.
    """
    import torch

    if is_rounded:
        difference_N = (padded_ND - packed_ND).norm(dim=-1)
        return bool((difference_N <= _ROUNDED * padded_ND.norm(dim=-1)).all())
    scale = float(padded_ND.abs().max())
    return torch.allclose(padded_ND, packed_ND, atol=1e-3 * scale, rtol=1e-3)


def price_of_attention(model: Any) -> float:
    """The number that :func:`attention_cost` gives where sequences can be packed."""
    config = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return float(2 * config.num_hidden_layers * config.hidden_size / weights)


_WITH_STATE = ("conv", "linear_attention")
"""Layers of models that transformers does not call stateful as a whole, whose state is no cache of
keys and values."""

_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)
"""Functions of transformers that make windows and chunks, and pass on a mask that is given."""


def may_be_packed(model: Any) -> bool:
    """Whether sequences may be packed, by the model's structure; :func:`attention_cost` tries it.

    It needs no weights. State-space models and others with a state that goes from token to token
    cannot be packed: a token would take it over from its neighbour in the row. Nor can those that
    count positions by themselves, as BLOOM and MPT do: no part of them is told any.
    """
    config = model.config.get_text_config()
    length = min(longest_packed(config), _TRIED_TOKENS)
    layers = getattr(config, "layer_types", None) or ()
    has_state = model._is_stateful or any(kind in _WITH_STATE for kind in layers)
    if length < _FEWEST_TOKENS or has_state or _has_windows_of_its_own(model):
        return False
    forwards = (type(module).forward for module in body_of(model).modules())
    return any("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def _has_windows_of_its_own(model: Any) -> bool:
    """Whether the model's code cuts windows by places in the row, whatever mask it is given."""
    borders = attention_borders(model.config)
    kinds = type(body_of(model)).__mro__  # the first is torch's own where the model is in shards
    code = sys.modules[next(k.__module__ for k in kinds if not k.__module__.startswith("torch."))]
    return bool(borders.windows or borders.chunks) and not any(hasattr(code, n) for n in _MASKS)
