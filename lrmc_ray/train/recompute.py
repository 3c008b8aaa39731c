"""Which activations of a layer wait in memory for the backward pass, and which are computed again.

The backward pass needs most of what the forward pass has computed, and at some thousand tokens
that is most of the memory. Both ways give up a part of it and end in the same bits:

- ``selective`` keeps what is expensive, the results of matrix products and of attention, and
  computes the rest again: norms, rotary embeddings, activation functions, sums and products of
  single elements. They are hardly any work, and half of what is kept otherwise.
- ``full`` keeps the input of every layer alone, and computes each layer a second time.
- ``auto`` is ``selective`` for micro-batches of ``MANY_TOKENS`` and more, where transformers can do
  it. Below that activations are small beside weights, gradients and the optimizer's state, and to
  compute them again costs more than to keep them.

Random numbers, those of dropout, are drawn again as they were. Both are PyTorch's own
(``torch.utils.checkpoint``); only the choice of operators is ours. A model that is not in training
mode, or computes no gradient, is as it was.

Some models do not stand it: one that adds to the result of a product in place gets it added twice
when the product is kept. So the first batch of a run proves it, see :class:`Recomputation`.
"""

import functools
import logging
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lrmc_ray.errors import ConfigError, first_line
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.method.layout import Layout, pad
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.shards import ShardedModel
from lrmc_ray.models.forward import batch_hidden_states

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.utils.checkpoint import SelectiveCheckpointContext

_log = logging.getLogger(__name__)

Way = Literal["selective", "full"]

_EXPENSIVE = re.compile(r"\w+\.\w*(mm|linear|conv|attention|attn)")
"""Products of matrices, under whatever name a device has for them: ``aten.addmm.default``,
``aten._scaled_dot_product_flash_attention.default``, ``flash_attn._flash_attn_forward.default``."""

MANY_TOKENS = 2048
"""Of a micro-batch, from which ``auto`` computes activations again."""

PROOF_TOKENS = 128
"""Of a sequence, on which the proof is made; it keeps all activations once."""

TRIED_LENGTHS = (24, 17)
"""Tokens of the sequences on which it is tried before there are any."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative difference of gradients that is rounding, for the type of the forward pass. On one
processor they are the same bits; some GPU kernels add up in another order each time."""
COARSE = 5e-2
"""The same for shorter types."""


class BrokenOffError(Exception):
    """A pass over shards ended half-way; none can follow, as some layers are still gathered."""


class Recomputation:
    """The forward pass of a model in training, computing activations again where it should.

    The first batch on which it would do so must prove that gradients are what they are without:
    those of the first and last layer of every kind. ``auto`` falls back from ``selective`` to
    ``full`` and then to nothing, and says so; a way that was asked for by name is an error.
    """

    def __init__(self, model: Any, which: Literal["auto", False, "selective", "full"]) -> None:
        """Prepare ``model``.

        Raises:
            ConfigError: transformers cannot do this with the model; not for ``auto``.
        """
        self.model = model
        self.which = which
        self.way: Way | None = None
        """What is done, once it is proven."""
        self._ways: tuple[Way, ...] = ()
        if which == "auto":
            self._ways = ("selective", "full")
        elif which:
            self._ways = (which,)
        self._switches = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._is_proven = False
        if not (model.supports_gradient_checkpointing and self._switches):
            if which not in ("auto", False):
                raise self._refusal("transformers cannot compute its layers again")
            self._ways = ()

    @property
    def most_kept(self) -> float:
        """Tokens of the largest micro-batch of which all activations are kept; infinity for any."""
        if not self._ways:
            return float("inf")
        return MANY_TOKENS - 1 if self.which == "auto" else 0

    def keep(self) -> None:
        """Keep all activations of passes that follow outside of :meth:`forward`."""
        self._switch(False)

    def forward(self, batch: MicroBatch | Layout) -> Tensor:
        """Final hidden states [B, T, D] of ``batch``.

        Raises:
            ConfigError: the first batch gives other gradients; not for ``auto``.
        """
        is_due = self.which != "auto" or batch.input_ids_BT.numel() >= MANY_TOKENS
        if self._ways and is_due and self.model.training and torch.is_grad_enabled():
            if not self._is_proven:
                self._prove(batch)
            self._switch(self.way is not None)
        else:
            self._switch(False)
        return batch_hidden_states(self.model, batch)

    def try_out(self, shards: ShardedModel | None = None) -> None:
        """Prove it on a few tokens, before any batch is there.

        Args:
            shards: those of the model, whose workers call this together and have the rows of the
                tokens gathered.

        Raises:
            ConfigError: gradients differ; not for ``auto``.
            BrokenOffError: a way raised something over shards.
        """
        embeddings = self.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        sequences = [
            torch.randint(embeddings.shape[0], (length,), generator=generator)
            for length in TRIED_LENGTHS
        ]
        if self._ways:
            self._prove(pad(sequences).to(embeddings.device), shards)

    def _switch(self, on: bool) -> None:
        for module in self._switches:
            module.gradient_checkpointing = on

    def _prove(self, batch: MicroBatch | Layout, shards: ShardedModel | None = None) -> None:
        """Take the first way that changes no gradient."""
        self._is_proven = True
        layout = _beginning(batch)
        parameters = _of_outer_layers(self.model)
        if not parameters:
            self.way = self._ways[0]
            return
        self._switch(False)
        expected = self._gradients(layout, parameters, shards)
        reasons = []
        for way in self._ways:
            try:
                recomputes_layers(self.model, way)
                found = self._gradients(layout, parameters, shards)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                if shards is not None:
                    raise BrokenOffError(f"{way}: {first_line(error)}") from error
                reasons.append(f"{way}: {first_line(error)}")
                continue
            difference = _difference(expected, found)
            if shards is not None:
                difference = max(shards.group.gather(difference))
            is_short = torch.is_autocast_enabled(layout.input_ids_BT.device.type)
            tolerance = COARSE if is_short else TOLERANCE.get(self.model.dtype, COARSE)
            if difference <= tolerance:
                self.way = way
                break
            reasons.append(f"{way}: gradients differ by {difference:.0%}")
        if reasons and self.which != "auto":
            raise self._refusal(reasons[0].partition(": ")[2])
        if reasons:
            _log.warning(
                "%s does not stand train.gradient_checkpointing (%s); %s instead",
                type(self.model).__name__,
                "; ".join(reasons),
                "whole layers are computed again" if self.way else "all activations are kept",
            )

    def _gradients(
        self, layout: Layout, parameters: Sequence[Tensor], shards: ShardedModel | None
    ) -> list[Tensor | None]:
        """Of some function of the hidden states, with the random numbers of the coming pass."""
        devices = [layout.input_ids_BT.device] if layout.input_ids_BT.is_cuda else []
        with torch.random.fork_rng(devices):
            hidden_BTD = batch_hidden_states(self.model, layout)
            weights_BTD = torch.linspace(
                -1, 1, hidden_BTD.numel(), dtype=torch.float32, device=hidden_BTD.device
            ).view_as(hidden_BTD)
            value = (hidden_BTD.float() * weights_BTD.sin()).sum()
            if shards is not None:
                gradients = shards.gradients_of(value, parameters)
            else:
                gradients = list(torch.autograd.grad(value, parameters, allow_unused=True))
        # A weight's short copy that is kept would not be made again, as the next pass expects.
        torch.clear_autocast_cache()
        return gradients

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"train.gradient_checkpointing must be one that {type(self.model).__name__} "
            f"({self.model.config.model_type}) can do, got {self.which!r}: {reason}; leave it at "
            "'auto', which takes what works, or set it to false"
        )


def way_for(
    model: Any, which: Literal["auto", False, "selective", "full"], tokens: int
) -> Way | None:
    """What is tried first in a micro-batch of ``tokens``, before any proof; None keeps all."""
    can = model.supports_gradient_checkpointing
    if not can or not which or (which == "auto" and tokens < MANY_TOKENS):
        return None
    return "selective" if which == "auto" else which


def recomputes_layers(model: Any, way: Way) -> None:
    """Have every layer compute activations again."""
    options: dict[str, Any] = {"use_reentrant": False}
    if way == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    with warnings.catch_warnings():
        # Transformers 5 has a new name for it as well, which its earlier versions lack.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(
    _context: "SelectiveCheckpointContext", operator: "OpOverload", *_: Any, **__: Any
) -> "CheckpointPolicy":
    return (
        CheckpointPolicy.MUST_SAVE if _is_expensive(operator) else CheckpointPolicy.PREFER_RECOMPUTE
    )


@functools.cache
def _is_expensive(operator: "OpOverload") -> bool:
    return _EXPENSIVE.match(str(operator)) is not None


def _beginning(batch: MicroBatch | Layout) -> Layout:
    """The first tokens of the first two rows, in the layout of ``batch``."""
    ids_BT = batch.input_ids_BT[:2, :PROOF_TOKENS].cpu()
    if batch.is_visible_TT is None:
        layout = lay_out(list(ids_BT), float("inf"))
    else:
        # Two sequences with a common beginning, so that a mask is needed.
        (ids_T,) = ids_BT
        layout = lay_out([ids_T, torch.cat([ids_T[: len(ids_T) // 2], ids_T[:1]])], 0.0)
    return layout.to(batch.input_ids_BT.device)


def _of_outer_layers(model: Any) -> list[Tensor]:
    """What is trained in the first and the last layer of every kind.

    Layers are of a kind if they are of one class and have parameters of the same names and shapes.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    kinds: dict[Any, list[list[Tensor]]] = {}
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        named = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
        if named:
            kind = (type(layer), tuple((name, tuple(p.shape)) for name, p in named))
            kinds.setdefault(kind, []).append([p for _, p in named])
    chosen = [p for layers in kinds.values() for layer in (layers[0], layers[-1]) for p in layer]
    if not chosen:  # models that switch it on without such layers
        trained = [p for p in model.parameters() if p.requires_grad]
        chosen = [*trained[:4], *trained[-4:]]
    return list({id(p): p for p in chosen}.values())


def _difference(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float:
    """Largest relative difference of two lists of gradients; infinity where one is missing."""
    norms = [float(e.float().norm()) for e in expected if e is not None]
    least = 1e-4 * max(norms, default=0.0)  # of a gradient that is all rounding
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None:
            return float("inf")
        scale = max(float(one.float().norm()), least)
        error = float((one.float() - other.float()).norm())
        if error:
            largest = max(largest, error / scale if scale else float("inf"))
        if error != error:  # not a number
            return float("inf")
    return largest
