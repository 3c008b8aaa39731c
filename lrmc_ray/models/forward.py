"""The forward pass of a batch, padded or packed: from token ids to final hidden states."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lrmc_ray.models.borders import attention_borders
from lrmc_ray.models.masks import added_mask
from lrmc_ray.models.parts import body_of

if TYPE_CHECKING:
    from torch import Tensor

    from lrmc_ray.method.layout import Layout
    from lrmc_ray.method.microbatch import MicroBatch


def hidden_states(model: Any, input_ids_BT: "Tensor") -> "Tensor":
    """Final hidden states [B, T, D], the input of the output head.

    Sequences are padded on the right: in a causal model nothing before the padding sees it, so no
    mask is needed.
    """
    with one_sequence_a_row():
        output = body_of(model)(input_ids=input_ids_BT, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Spare transformers the look at positions for sequences packed in a row: a GPU waits for it.

    Without a mask every row is one sequence here, of which that look finds nothing.
    """
    _let_the_look_be_spared()
    before = _is_one_a_row.set(True)
    try:
        yield
    finally:
        _is_one_a_row.reset(before)


_is_one_a_row: ContextVar[bool] = ContextVar("is_one_a_row", default=False)


@functools.cache
def _let_the_look_be_spared() -> None:
    """Once in a process, and for threads apart; nothing where transformers has no such look."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    look = getattr(masking_utils, name, None)
    if look is not None:
        setattr(masking_utils, name, lambda *x, **y: None if _is_one_a_row.get() else look(*x, **y))


def batch_hidden_states(model: Any, batch: "MicroBatch | Layout") -> "Tensor":
    """Final hidden states [B, T, D] of a batch, padded or packed."""
    if batch.is_visible_TT is None:
        return _padded_hidden_states(model, batch.input_ids_BT, batch.full_lengths)
    output = body_of(model)(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        attention_mask=added_mask(model, batch.is_visible_TT),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _padded_hidden_states(
    model: Any, input_ids_BT: "Tensor", full_lengths: Sequence[int]
) -> "Tensor":
    """Hidden states [B, T, D] of padded rows, those of every row as if it were alone and whole.

    Where rotary frequencies depend on the length, rows of one side of the border run together, as
    wide as they are before trimming: what stands in the padding is never seen.
    """
    import torch
    import torch.nn.functional as F

    borders = attention_borders(model.config)
    sides: dict[int, list[int]] = {}
    for row, length in enumerate(full_lengths):
        sides.setdefault(borders.side(length), []).append(row)
    if not any(sides):
        return hidden_states(model, input_ids_BT)
    width = input_ids_BT.shape[1]
    parts = []
    for rows in sides.values():
        longest = max(full_lengths[row] for row in rows)
        ids_BT = F.pad(input_ids_BT[rows][:, :longest], (0, max(0, longest - width)))
        part_BTD = hidden_states(model, ids_BT)[:, :width]
        parts.append(F.pad(part_BTD, (0, 0, 0, width - part_BTD.shape[1])))
    order = torch.tensor([row for rows in sides.values() for row in rows]).argsort()
    rows_BTD = torch.cat(parts)
    return rows_BTD[order.to(rows_BTD.device)]
