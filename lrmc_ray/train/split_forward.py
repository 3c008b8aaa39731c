"""The forward pass of a Hugging Face model in two parts: a beginning, and what follows it.

What the second part sees of the first are the keys and values of every layer, as the model's own
cache holds them. A cache of plain layers is taken for windows of attention as well: packed
sequences are never longer than the shortest window. :func:`can_split` tries it out.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.method.fast.packing import pack
from lrmc_ray.method.layout import Layout
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.masks import added_mask
from lrmc_ray.models.parts import body_of

_log = logging.getLogger(__name__)

_TRIED_TOKENS = 24


class SplitModel:
    """A causal LM, run in two parts."""

    def __init__(self, model: Any, before: Callable[[], None] = lambda: None) -> None:
        """Wrap ``model``; ``before`` is called before each part."""
        self._model = model
        self._before = before

    def beginning(self, input_ids_1X: Tensor) -> list[Tensor]:
        """The last hidden states [1, X, D] of the first tokens; then each layer's keys, values."""
        from transformers import DynamicCache

        self._before()
        cache: Any = DynamicCache()
        output = body_of(self._model)(input_ids=input_ids_1X, past_key_values=cache, use_cache=True)
        states = [output.last_hidden_state]
        for layer in cache.layers:
            states += [layer.keys, layer.values]
        return states

    def rest(self, batch: MicroBatch | Layout, states: Sequence[Tensor]) -> Tensor:
        """The last hidden states of the packed ``batch`` behind its beginning, [1, T - X, D]."""
        from transformers import DynamicCache

        assert batch.is_visible_TT is not None
        assert batch.position_ids_BT is not None
        self._before()
        cache = DynamicCache()
        for layer, start in enumerate(range(1, len(states), 2)):
            cache.update(states[start], states[start + 1], layer)
        length = states[0].shape[1]
        output = body_of(self._model)(
            input_ids=batch.input_ids_BT[:, length:],
            position_ids=batch.position_ids_BT[:, length:],
            attention_mask=added_mask(self._model, batch.is_visible_TT[length:]),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def may_share(settings: TrainSettings, *, on_cpu: bool, is_mixture: bool) -> bool:
    """Whether a beginning that all samples of a step share may have a pass of its own.

    On a GPU one more pass costs more calls than it spares work. What the base and routers say, they
    say of a whole micro-batch, and half precision would round the sum of its gradients. Lengths of
    both parts would not repeat, as compiled layers want them to. The model
    must be one that can be packed, and pass :func:`can_split`.
    """
    return (
        settings.micro_batches > 1
        and on_cpu
        and settings.precision != "bf16"
        and not settings.compile_layers
        and settings.loss not in NEED_BASE
        and not is_mixture
    )


def can_split(model: Any) -> bool:
    """Whether both parts together give the hidden states of one pass over a packed row.

    For models that can be packed, see :func:`lrmc_ray.models.packing.attention_cost`.
    """
    config = model.config.get_text_config()
    length = int(min(longest_packed(config), _TRIED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (length + 4,), generator=generator)
    common = length - 4
    layout = pack([ids_T[:length], torch.cat([ids_T[:common], ids_T[length:]])]).to(model.device)
    was_training = model.training
    model.eval()
    split = SplitModel(model)
    try:
        with torch.no_grad():
            whole_1TD = batch_hidden_states(model, layout)
            states = split.beginning(layout.input_ids_BT[:, :common])
            parts_1TD = torch.cat([states[0], split.rest(layout, states)], dim=1)
    except Exception as failure:
        # Whatever a foreign architecture raises here, it says that it does not fit.
        _log.debug("%s does not divide its pass: %r", type(model).__name__, failure)
        return False
    finally:
        model.train(was_training)
    scale = float(whole_1TD.abs().max())
    return torch.allclose(whole_1TD, parts_1TD, atol=1e-3 * scale, rtol=1e-3)
