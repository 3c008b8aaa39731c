r"""Memory that a training worker takes, from the ``config.json`` of a model alone.

    total = weights + gradients + moments + copies + max(activations + loss, step)

- **weights**: of the model in float32 with its buffers, adapters included.
- **gradients**: 4 bytes for each trained weight. ``strict`` keeps the output head's apart from the
  sum, and all of them where there are several workers.
- **moments**: two for each trained weight, of 4 bytes, or 2 with ``train.state_dtype = "bf16"``.
- **copies**: the base model beside it for losses that compare the two, the starting point of L2-SP.
- **activations**: the most that is alive over weights and gradients in the forward and backward
  pass of one micro-batch, whose rows all have the greatest length. Both passes are run, on tensors
  that have a shape and no memory (:mod:`lrmc_ray.train.live_bytes`), with the settings' adapters,
  precision (of ``auto`` the larger) and recomputation. So it holds for whatever the model's code
  does, and needs no formula by type; no value is computed.
- **loss**: hidden states of all positions, their candidates and their logits of the sampled tail,
  see :func:`loss_bytes`. A vocabulary's logits are made in blocks.
- **step**: on a GPU, what MoClip makes beside the largest tensor.

Rows of the vocabulary that a run does not touch count as trained, although they may be left out:
which they are, only the data say. Not counted: what the process and the GPU's driver take by
themselves, and what lies unused between tensors.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.method.baselines.vocabulary_loss import CHUNK_ELEMENTS
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.models import body_of, unweighted_model
from lrmc_ray.train.live_bytes import LiveBytes, counting
from lrmc_ray.train.recompute import recomputes_layers, way_for
from lrmc_ray.train.trainable import TrainableModel

MEAN_CANDIDATES = 150
"""Of a position, where no record tells: that of SQL answers at tau 0.9 (see ``lrmc plan``)."""
CANDIDATE_BYTES = 40
"""A candidate's number, probability and row, and its logit in forward and backward pass."""
TAIL_LOGITS = 5
"""Float32 numbers of a position and sampled token that exist at a time."""
STEP_TENSORS = 5
"""Copies of the largest tensor that MoClip's step makes on a GPU (measured there: 4.7)."""
_OTHER_LOSSES = ("full", "active_only", "dft", "asft", "eaft", "flow", "kl_to_base", "frozen_tail")
"""Those that see all logits."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one worker, by what they are for; the module's docstring has the terms."""

    parameters: int
    """A number, not bytes."""
    trained: int
    """Likewise."""
    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    loss: int
    step: int

    @property
    def total(self) -> int:
        """The most that exists at a time."""
        kept = self.weights + self.gradients + self.moments + self.copies
        return kept + max(self.activations + self.loss, self.step)

    def as_dict(self) -> dict[str, int]:
        """All of it, by name."""
        return {**asdict(self), "total": self.total}


def training_memory(
    directory: Path, train: TrainSettings, *, length: int, workers: int = 1, on_gpu: bool = True
) -> TrainingMemory:
    """The memory of one worker.

    Args:
        directory: has the ``config.json`` of the model; no weights are needed.
        train: settings of the run.
        length: tokens of the longest samples.
        workers: that share the batch.
        on_gpu: whether MoClip's step makes copies.

    Raises:
        DataError: transformers does not know the model, or its passes need the values of tensors.
        ConfigError: a setting fits nothing in the model.
    """
    rows = -(-train.batch_size // train.micro_batches)
    with counting() as live:
        model = unweighted_model(directory)
        trainable = TrainableModel(model, train)
        elements = [p.numel() for p in trainable.parameters.values()]
        parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
        head = model.get_output_embeddings().weight
        gradients, weights = 4 * sum(elements), live.now
        shorter = train.precision != "fp32"
        activations = _passes(live, trainable, train, rows, length, in_bf16=shorter)
        if train.precision == "auto":
            whole = _passes(live, trainable, train, rows, length, in_bf16=False)
            activations = max(activations, whole)
        is_trained = any(p is head for p in trainable.parameters.values())
        vocabulary_size, width = head.shape
    apart = 0
    if train.reduction == "strict":
        apart = gradients if workers > 1 else 4 * vocabulary_size * width * is_trained
    of_state = 2 if train.state_dtype == "bf16" else 4
    return TrainingMemory(
        parameters=parameters,
        trained=sum(elements),
        weights=weights,
        gradients=gradients + apart,
        moments=2 * of_state * sum(elements),
        copies=weights * (train.loss in NEED_BASE) + gradients * bool(train.l2_sp_weight),
        activations=activations,
        loss=loss_bytes(train, rows * length, width, vocabulary_size),
        step=4 * STEP_TENSORS * max(elements) if on_gpu else 0,
    )


def loss_bytes(train: TrainSettings, positions: int, width: int, vocabulary_size: int) -> int:
    """What the loss of one micro-batch takes.

    Args:
        train: settings of the run.
        positions: supervised ones, and with an anchor those of prompts: at most all tokens.
        width: of the hidden states.
        vocabulary_size: tokens.
    """
    hidden = 2 * 4 * positions * width
    if train.loss in _OTHER_LOSSES:
        return hidden + 2 * 4 * min(CHUNK_ELEMENTS, positions * vocabulary_size)
    tail = TAIL_LOGITS * 4 * positions * min(train.tail_samples, vocabulary_size)
    return hidden + tail + CANDIDATE_BYTES * positions * min(MEAN_CANDIDATES, vocabulary_size)


def _passes(
    live: LiveBytes,
    trainable: TrainableModel,
    train: TrainSettings,
    rows: int,
    length: int,
    *,
    in_bf16: bool,
) -> int:
    """The most that is alive in both passes of a micro-batch that finds gradients there."""
    model = trainable.model
    way = way_for(model, train.gradient_checkpointing, rows * length)
    if way is not None:
        recomputes_layers(model, way)
    for parameter in trainable.parameters.values():
        parameter.grad = torch.empty_like(parameter)
    live.begin()
    before = live.now
    ids_BT = torch.ones(rows, length, dtype=torch.long)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            hidden_BTD = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_BTD.backward(torch.ones_like(hidden_BTD))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{model.config.model_type} must be a type whose passes need no values of tensors for "
            f"its memory to be forecast, got {text}; train it for one step and look"
        ) from error
    return live.most - before
