"""A model that continues from keys and values which several sequences share.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.prefix_batches import BatchLimits, ContextRow, Tokens, prefix_families
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.models import head_of

_log = logging.getLogger(__name__)


def supports(model: Any) -> bool:
    """Whether prefixes of ``model`` can be shared: its cache and its masks do what they promise.

    Compares a few tokens that are run from a shared prefix, after a gap that is masked, with the
    same tokens in one pass.
    """
    try:
        head = head_of(model)
    except DataError:
        return False
    tokens_T = torch.arange(3, 27, device=model.device) % head.vocabulary_size
    try:
        with torch.inference_mode():
            whole_TD = forward(model, tokens_T[None]).last_hidden_state[0]
            first = forward(model, tokens_T[None, :12], use_cache=True)
            cache = first.past_key_values
            cache.batch_select_indices(torch.tensor([0, 0], device=model.device))
            # A row of 8 tokens, and one of 5 with a gap of 3, as padding leaves it.
            ids_BT = torch.stack([tokens_T[12:20], tokens_T[12:20]])
            ids_BT[1, 5:] = 0
            second = forward(model, ids_BT, cache=cache, use_cache=True)
            mask_BT = torch.ones((2, 24), dtype=torch.long, device=model.device)
            mask_BT[1, 17:20] = 0
            positions_BT = torch.arange(4, device=model.device) + torch.tensor(
                [[20], [17]], device=model.device
            )
            third = forward(
                model,
                torch.stack([tokens_T[20:24], tokens_T[17:21]]),
                cache=second.past_key_values,
                mask_BT=mask_BT,
                positions_BT=positions_BT,
            )
    except Exception as failure:
        # Whatever a foreign architecture raises here, it says that it does not fit.
        _log.debug("%s does not support shared prefixes: %r", type(model).__name__, failure)
        return False
    actual_TD = torch.cat([third.last_hidden_state[0], third.last_hidden_state[1]])
    expected_TD = torch.cat([whole_TD[20:24], whole_TD[17:21]])
    tolerance = 1e-3 if actual_TD.dtype == torch.float32 else 5e-2
    error = (actual_TD - expected_TD).norm() / expected_TD.norm()
    return bool(error < tolerance)


def forward(
    model: Any,
    ids_BT: torch.Tensor,
    *,
    cache: Any = None,
    mask_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
    use_cache: bool = False,
) -> Any:
    """The model's body on ``ids_BT``, which follow what ``cache`` holds."""
    return model.base_model(
        input_ids=ids_BT,
        past_key_values=cache,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        use_cache=use_cache or cache is not None,
    )


@dataclass(frozen=True)
class SharedBatch:
    """Rows that are run together, after the prefix that they share."""

    rows: list[ContextRow]
    prefix_length: int
    prefix_cache: Any
    """Keys and values of the prefix, as one sequence; None without a prefix."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, those of the prefix included."""
        return [len(row.tokens) for row in self.rows]


class PrefixModel:
    """A causal LM, run in batches of rows with a shared prefix.

    Args:
        model: one that :func:`supports` accepts.
        head: its output head.
        limits: how much is computed at once.
    """

    def __init__(self, model: Any, head: OutputHead, limits: BatchLimits) -> None:
        self.model = model
        self.limits = limits
        self.device: torch.device = model.device
        self._head = head

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, float32 [N, V]."""
        return head_logits(hidden_ND, self._head)

    def shared_batches(self, rows: Iterable[ContextRow], *, room: int = 0) -> Iterator[SharedBatch]:
        """All ``rows``, in batches; each prefix is run once, before the batches that share it.

        Args:
            rows: in any order.
            room: positions that each will still add to the cache.
        """
        for prefix, family in prefix_families(rows):
            cache = self._run_prefix(prefix)
            for batch in self.limits.batches(family, len(prefix), room=room):
                yield SharedBatch(batch, len(prefix), cache)

    def _run_prefix(self, prefix: Tokens) -> Any:
        if not prefix:
            return None
        ids_BT = torch.tensor([prefix], device=self.device)
        return forward(self.model, ids_BT, use_cache=True).past_key_values

    def run(self, batch: SharedBatch, *, keep: bool) -> tuple[torch.Tensor, Any]:
        """Hidden states of the rows after the prefix, padded on the right, and their cache.

        Args:
            batch: what to run.
            keep: whether the cache is wanted.
        """
        ids_BT = self.pad([row.tokens[batch.prefix_length :] for row in batch.rows])
        cache = None
        if batch.prefix_cache is not None:
            cache = copy.deepcopy(batch.prefix_cache)
            cache.batch_repeat_interleave(len(batch.rows))
        output = forward(self.model, ids_BT, cache=cache, use_cache=keep)
        return output.last_hidden_state, output.past_key_values

    def go_on(
        self, ids_BT: torch.Tensor, cache: Any, mask_BT: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Hidden states of further tokens of the sequences in ``cache``, and the grown cache.

        Args:
            ids_BT: the tokens.
            cache: used up.
            mask_BT: see :meth:`mask`.
            positions_BT: of the tokens in their sequences.
        """
        output = forward(
            self.model, ids_BT, cache=cache, mask_BT=mask_BT, positions_BT=positions_BT
        )
        return output.last_hidden_state, output.past_key_values

    def pad(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids [B, T]; what stands in the padding on the right is never seen."""
        ids_BT = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row)] = torch.tensor(row)
        return ids_BT.to(self.device)

    def mask(self, lengths_B: torch.Tensor, kept: int, new: int) -> torch.Tensor:
        """1 where a cached position holds a token of the row, and for all new ones.

        Args:
            lengths_B: tokens of each row of the cache.
            kept: positions of the cache, padding included.
            new: positions that are added.
        """
        cached_BT = torch.arange(kept, device=self.device) < lengths_B[:, None]
        ones_BT = torch.ones((len(lengths_B), new), dtype=torch.bool, device=self.device)
        return torch.cat([cached_BT, ones_BT], dim=1).long()
