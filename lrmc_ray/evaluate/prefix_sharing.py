"""How far sequences may share keys and values: by the configuration, and proven on the model.

Rows of unequal length leave gaps of padding in a cache, and a layer with a window counts them as
tokens. So beyond :attr:`Borders.whole` rows continue only where there is no gap: after equal
lengths, or padded on the left. Beyond :attr:`Borders.rope_border` nothing is shared at all.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from lrmc_ray.models.borders import attention_borders, text_config
from lrmc_ray.models.causal import differs
from lrmc_ray.models.parts import body_of

_log = logging.getLogger(__name__)

MOST_PROVEN = 1024
"""Tokens of the widest window beyond which sharing is tried out; beyond wider ones none is done."""

_TRIED = 24
"""Tokens of a trial within all borders."""

_FEWEST = 16
"""Tokens without which there is nothing to try."""

_BEYOND = 24
"""Tokens behind the last border in a trial."""


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
    return body_of(model)(
        input_ids=ids_BT,
        past_key_values=cache,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        use_cache=use_cache or cache is not None,
    )


class Sharing:
    """What a model's cache may be used for.

    Args:
        model: a causal LM.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.borders = attention_borders(model.config)

    @functools.cached_property
    def is_possible(self) -> bool:
        """Whether short sequences continue from a shared prefix, after a gap that is masked.

        Without it the cache and the masks of the model do not do what they promise.
        """
        whole = self.borders.whole
        length = min(_TRIED, self.borders.rope_border or _TRIED)
        if length < _FEWEST:
            return False
        if whole is not None and whole < length:
            return self._holds(_equal_lengths, length)  # a gap is never harmless
        return self._holds(_a_gap, length)

    def allows_gap(self, slots: int) -> bool:
        """Whether padding within a cache of so many places is harmless."""
        return self.borders.whole is None or slots <= self.borders.whole

    def allows(self, length: int) -> bool:
        """Whether a sequence of so many tokens may continue from a cache without a gap."""
        if not self.is_possible or self.crosses_rope(length):
            return False
        return self.allows_gap(length) or self._goes_beyond

    def crosses_rope(self, length: int) -> bool:
        """Whether a sequence of so many tokens has other rotary frequencies than a short one."""
        border = self.borders.rope_border
        return border is not None and length > border

    @functools.cached_property
    def _goes_beyond(self) -> bool:
        """Whether sharing is right beyond all windows; tried out when first asked for."""
        borders = self.borders
        last = max((*borders.windows, *borders.chunks, *borders.selections))
        length = last + _BEYOND
        if last > MOST_PROVEN or borders.compressions or self.crosses_rope(length):
            return False
        positions = getattr(text_config(self._model.config), "max_position_embeddings", None)
        if positions is not None and length > positions:
            return False
        return self._holds(_equal_lengths, length) and self._holds(_left_padding, length)

    def _holds(self, trial: Callable[[Any, torch.Tensor], tuple[Any, Any]], length: int) -> bool:
        """Whether both ways of ``trial`` give the same hidden states of ``length`` tokens."""
        model = self._model
        vocabulary_size = model.get_output_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids_T = torch.randint(3, max(4, vocabulary_size), (length,), generator=generator)
        ids_T = (ids_T % vocabulary_size).to(model.device)
        try:
            with torch.inference_mode():
                expected_ND, actual_ND = trial(model, ids_T)
        except Exception as failure:
            # Whatever a foreign architecture raises here, it says that it does not fit.
            _log.debug("%s does not share prefixes: %r", type(model).__name__, failure)
            return False
        error_ND = (actual_ND - expected_ND).float()
        if actual_ND.dtype.itemsize >= 4:
            return bool((error_ND.norm(dim=-1) < 1e-3 * expected_ND.norm(dim=-1)).all())
        # In a shorter format rounding sends a token to another expert now and then.
        return bool(error_ND.norm() < 5e-2 * expected_ND.float().norm())


def generates_in_batches(model: Any) -> bool:
    """Whether transformers generates from a prompt that is padded on the left as from it alone.

    Some models count the padding as tokens, since their positions come from no mask.
    """
    ids_T = torch.arange(4, 16, device=model.device) % model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.stack([ids_T, torch.cat([torch.zeros_like(ids_T[:5]), ids_T[:-5]])])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :5] = 0

    def logits(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        written = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(written.logits)[:, -1].float()

    with torch.inference_mode():
        together_NV = logits(ids_BT, mask_BT)
        alone_NV = logits(ids_BT[1:, 5:], mask_BT[1:, 5:])
    return differs(model, alone_NV, together_NV) is None


def _alone(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    states_TD: torch.Tensor = forward(model, ids_T[None]).last_hidden_state[0]
    return states_TD


def _a_gap(model: Any, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of all tokens, and a shorter one with a gap of 3 where its padding was."""
    end = len(ids_T)
    start, middle = end // 2, end - 4
    cache = forward(model, ids_T[None, :start], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([0, 0], device=model.device))
    ids_BT = torch.stack([ids_T[start:middle], ids_T[start:middle]])
    ids_BT[1, -3:] = 0
    cache = forward(model, ids_BT, cache=cache).past_key_values
    mask_BT = torch.ones((2, end), dtype=torch.long, device=model.device)
    mask_BT[1, middle - 3 : middle] = 0
    starts_BT = torch.tensor([[middle], [middle - 3]], device=model.device)
    last = forward(
        model,
        torch.stack([ids_T[middle:], ids_T[middle - 3 : end - 3]]),
        cache=cache,
        mask_BT=mask_BT,
        positions_BT=starts_BT + torch.arange(4, device=model.device),
    )
    whole_TD = _alone(model, ids_T)
    expected_ND = torch.cat([whole_TD[middle:], whole_TD[middle - 3 : end - 3]])
    return expected_ND, last.last_hidden_state.flatten(0, 1)


def _equal_lengths(model: Any, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows from one prefix, and from each of them one more step; the second row differs."""
    end = len(ids_T)
    start, middle = end - 8, end - 3
    rows_BT = torch.stack([ids_T, ids_T])
    rows_BT[1, start:] = rows_BT[1, start:].flip(0)
    cache = forward(model, ids_T[None, :start], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    first = forward(model, rows_BT[:, start:middle], cache=cache)
    positions_BT = torch.arange(middle, end, device=model.device).expand(2, -1)
    mask_BT = torch.ones((2, end), dtype=torch.long, device=model.device)
    second = forward(
        model,
        rows_BT[:, middle:],
        cache=first.past_key_values,
        mask_BT=mask_BT,
        positions_BT=positions_BT,
    )
    actual_BTD = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    expected_BTD = torch.stack([_alone(model, row_T)[start:] for row_T in rows_BT])
    return expected_BTD.flatten(0, 1), actual_BTD.flatten(0, 1)


def _left_padding(model: Any, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of all tokens, and one that lacks the first 5, in one batch, and then one more step."""
    end, missing = len(ids_T), 5
    ids_BT = torch.stack([ids_T, ids_T])
    ids_BT[1, :missing] = 0
    mask_BT = torch.ones((2, end), dtype=torch.long, device=model.device)
    mask_BT[1, :missing] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    first = forward(
        model,
        ids_BT[:, :-2],
        mask_BT=mask_BT[:, :-2],
        positions_BT=positions_BT[:, :-2],
        use_cache=True,
    )
    second = forward(
        model,
        ids_BT[:, -2:],
        cache=first.past_key_values,
        mask_BT=mask_BT,
        positions_BT=positions_BT[:, -2:],
    )
    actual_BTD = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    actual_ND = torch.cat([actual_BTD[0, -9:], actual_BTD[1, -9:]])
    expected_ND = torch.cat([_alone(model, ids_T)[-9:], _alone(model, ids_T[missing:])[-9:]])
    return expected_ND, actual_ND
