"""Sequences as one batch of tokens, and where each token of theirs is in it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Some sequences as one batch of tokens, padded or packed, and where to find each token."""

    input_ids_BT: Tensor
    """Packed: one row."""
    position_ids_BT: Tensor | None
    """Packed: each token's place in its sequence."""
    is_visible_TT: Tensor | None
    """Packed: boolean, whether the token of the row sees that of the column."""
    rows: list[int]
    """Of each sequence."""
    columns: list[Tensor]
    """Of each token of each sequence."""
    num_shared: int
    """Tokens of a prefix that another sequence brings along."""

    @property
    def full_lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(columns_T) for columns_T in self.columns]

    def to(self, device: torch.device) -> "Layout":
        """The same with its batch on another device; the places stay where they are."""
        return dataclasses.replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            position_ids_BT=moved(self.position_ids_BT, device),
            is_visible_TT=moved(self.is_visible_TT, device),
        )


def pad(sequences: Sequence[Tensor]) -> Layout:
    """The plain layout: every sequence has a row of its own, padded on the right."""
    input_ids_BT = torch.zeros(
        len(sequences), max((len(ids_T) for ids_T in sequences), default=0), dtype=torch.int64
    )
    for row, ids_T in enumerate(sequences):
        input_ids_BT[row, : len(ids_T)] = ids_T
    columns = [torch.arange(len(ids_T)) for ids_T in sequences]
    return Layout(input_ids_BT, None, None, list(range(len(sequences))), columns, 0)


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """``tensor`` on another device, if there is one."""
    return None if tensor is None else tensor.to(device)
