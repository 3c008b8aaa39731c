r"""Memory that a training worker takes, from the ``config.json`` of a model alone.

    total = weights + gradients + moments + copies + gathered + max(activations + loss, step)

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
- **host**: what is in the host's memory, with shards: the copy that a checkpoint is written from;
  with ``train.offload = "cpu"`` the weights, their gradients, moments and copies too, of which the
  GPU has the model's buffers alone then. It is not in the total.

- **gathered**: with shards, whose first worker has the most rows of every weight. In the backward
  pass of a layer there are its whole weights and gradients, the weights of the next one on their
  way, and the gradients of the one before on theirs. With ``train.precision = "bf16"`` a layer's
  products are there in bf16, but for the gradients on their way; what else the layers have is there
  as long as a pass takes. The vocabulary's weights are there whole, with
  their gradients, in a step whose loss or probe looks at all tokens; of an embedding that is not
  the head's weight as well, the rows of the batch's tokens. A base model's are whole.

With shards weights, gradients and moments are those of the first worker's rows.

Rows of the vocabulary that a run does not touch count as trained, although they may be left out:
which they are, only the data say. Not counted: what the process and the GPU's driver take by
themselves, and what lies unused between tensors.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.method.baselines.vocabulary_loss import CHUNK_ELEMENTS
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.models.loading import unweighted_model
from lrmc_ray.models.parts import body_of, layers_of
from lrmc_ray.train.live_bytes import LiveBytes, counting, without_values
from lrmc_ray.train.recompute import recomputes_layers, way_for
from lrmc_ray.train.sharding import check_shardable, multiplied
from lrmc_ray.train.trainable import TrainableModel

MEAN_CANDIDATES = 150
"""Of a position, where no record tells: that of SQL answers at tau 0.9 (see ``lrmc plan``)."""
CANDIDATE_BYTES = 40
"""A candidate's number, probability and row, and its logit in forward and backward pass."""
TAIL_LOGITS = 5
"""Float32 numbers of a position and sampled token that exist at a time."""
STEP_TENSORS = 5
"""Copies of the largest tensor that MoClip's step makes on a GPU (measured there: 4.7)."""
GATHERED_BYTES = 4 + 4 + 4 + 4
"""Of an element: the weights of a layer and of the next one, the gradients of that layer and of the
one before."""
GATHERED_SHORT_BYTES = 2 + 2 + 2 + 4
"""The same where layers gather in bf16: gradients are added up in float32."""
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
    gathered: int
    activations: int
    loss: int
    step: int
    host: int

    @property
    def total(self) -> int:
        """The most that exists at a time on a worker's device."""
        kept = self.weights + self.gradients + self.moments + self.copies + self.gathered
        return kept + max(self.activations + self.loss, self.step)

    def as_dict(self) -> dict[str, int]:
        """All of it, by name."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Weight:
    """A parameter of the model."""

    rows: int
    width: int
    """Elements of a row."""
    is_trained: bool
    layer: int | None
    """Number of its layer, of those that gather by themselves; None: of no layer."""
    is_vocabulary: bool
    is_embedding_alone: bool
    """Whether it is looked up, and is not the output head's weight as well."""
    is_short: bool
    """Whether it is gathered in bf16."""

    def held(self, workers: int) -> int:
        """Elements that the first of ``workers`` holds of it in shards."""
        return -(-self.rows // workers) * self.width


class MemoryForecast:
    """What one worker takes, for whatever number of workers; the passes are run once."""

    def __init__(
        self, directory: Path, train: TrainSettings, *, length: int, on_gpu: bool = True
    ) -> None:
        """Run both passes of a micro-batch in no memory.

        Args:
            directory: has the ``config.json`` of the model; no weights are needed.
            train: settings of the run.
            length: tokens of the longest samples.
            on_gpu: whether MoClip's step makes copies.

        Raises:
            DataError: transformers does not know the model, or its passes need the values of
                tensors.
            ConfigError: a setting fits nothing in the model, or it cannot be sharded.
        """
        self._train = train
        self._on_gpu = on_gpu
        rows = -(-train.batch_size // train.micro_batches)
        with counting() as live:
            model = unweighted_model(directory)
            trainable = TrainableModel(model, train)
            if train.parallel == "shard":
                check_shardable(model)
            is_short = train.parallel == "shard" and train.precision == "bf16"
            short = multiplied(layers_of(model)) if is_short else []
            self._weights = list(_weights_of(model, short))
            self._all = live.now
            head = model.get_output_embeddings().weight
            self._is_head_trained = any(p is head for p in trainable.parameters.values())
            self._vocabulary_size, self._width = head.shape
            for parameter in short:
                parameter.data = parameter.detach().bfloat16()
            shorter = train.precision != "fp32"
            self._activations = _passes(live, trainable, train, rows, length, in_bf16=shorter)
            if train.precision == "auto":
                whole = _passes(live, trainable, train, rows, length, in_bf16=False)
                self._activations = max(self._activations, whole)
        self._loss = loss_bytes(train, rows * length, self._width, self._vocabulary_size)
        self._looked_up = train.batch_size * length
        self._touched = train.batch_size * length * (1 + MEAN_CANDIDATES) + train.tail_samples

    def of(self, workers: int) -> TrainingMemory:
        """The memory of the first of ``workers`` that share the batch."""
        train = self._train
        parts = workers if train.parallel == "shard" else 1
        trained = [w for w in self._weights if w.is_trained]
        held = [weight.held(parts) for weight in trained]
        parameters = sum(weight.held(1) for weight in self._weights)
        weights = self._all - 4 * parameters + 4 * sum(w.held(parts) for w in self._weights)
        gradients, apart = 4 * sum(held), 0
        if train.reduction == "strict":
            of_head = 4 * self._vocabulary_size * self._width * self._is_head_trained
            apart = gradients if workers > 1 else of_head
        of_state = 2 if train.state_dtype == "bf16" else 4
        moments = 2 * of_state * sum(held)
        copies = weights * (train.loss in NEED_BASE) + gradients * bool(train.l2_sp_weight)
        host = gradients + moments if train.parallel == "shard" else 0  # as many as weights
        is_offloaded = train.offload == "cpu" and self._on_gpu
        if is_offloaded:
            buffers = self._all - 4 * parameters
            host += weights - buffers + gradients + moments + copies
            weights, gradients, moments, copies = buffers, 0, 0, 0
        return TrainingMemory(
            parameters=parameters,
            trained=sum(weight.held(1) for weight in trained),
            weights=weights,
            gradients=gradients + apart,
            moments=moments,
            copies=copies,
            gathered=self._gathered(workers) if train.parallel == "shard" else 0,
            activations=self._activations,
            loss=self._loss,
            step=4 * STEP_TENSORS * max(held) if self._on_gpu and not is_offloaded else 0,
            host=host,
        )

    def _gathered(self, workers: int) -> int:
        """Weights and gradients of others that a worker holds for a while."""
        is_short = any(weight.is_short for weight in self._weights)
        layers: dict[int, int] = {}
        vocabulary = beside = 0
        for weight in self._weights:
            if is_short and not (weight.is_short or weight.is_vocabulary):
                beside += 4 * weight.held(1) * (1 + weight.is_trained)
            elif weight.layer is not None:
                layers[weight.layer] = layers.get(weight.layer, 0) + weight.held(1)
        most = max(layers.values(), default=0)
        for weight in (w for w in self._weights if w.is_vocabulary):
            rows = weight.rows if self._sees_all_tokens() else min(weight.rows, self._touched)
            if weight.is_embedding_alone:
                rows = min(weight.rows, self._looked_up)
            vocabulary += 4 * rows * weight.width * (1 + weight.is_trained)
            if self._train.loss in NEED_BASE:
                vocabulary += 4 * weight.held(1)
        of_layers = (GATHERED_SHORT_BYTES if is_short else GATHERED_BYTES) * most
        return of_layers + 4 * most // workers + beside + vocabulary

    def _sees_all_tokens(self) -> bool:
        return bool(self._train.probe_every) or self._train.loss in _OTHER_LOSSES


def training_memory(
    directory: Path, train: TrainSettings, *, length: int, workers: int = 1, on_gpu: bool = True
) -> TrainingMemory:
    """The memory of one worker, see :class:`MemoryForecast`."""
    return MemoryForecast(directory, train, length=length, on_gpu=on_gpu).of(workers)


def _weights_of(model: Any, short: Iterable[Tensor]) -> Iterator[_Weight]:
    """Every parameter, tied ones once; those of ``short`` are gathered in bf16."""
    are_short = {id(parameter) for parameter in short}
    layer_of = {id(p): n for n, layer in enumerate(layers_of(model)) for p in layer.parameters()}
    embedding, head = (
        id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    for parameter in model.parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        yield _Weight(
            rows=rows,
            width=parameter.numel() // max(rows, 1),
            is_trained=parameter.requires_grad,
            layer=layer_of.get(id(parameter)),
            is_vocabulary=id(parameter) in (embedding, head),
            is_embedding_alone=id(parameter) == embedding != head,
            is_short=id(parameter) in are_short,
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
    refusing = without_values(model, whose="passes need", instead="train it for one step and look")
    with refusing, torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        hidden_BTD = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_BTD.backward(torch.ones_like(hidden_BTD))
    return live.most - before
