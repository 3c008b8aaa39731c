"""The model of a run where it is trained: whole, or this worker's rows of every weight."""

import gc
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.losses import LanguageModel
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import described_head, head_of
from lrmc_ray.models.loading import load_model
from lrmc_ray.models.packing import attention_cost
from lrmc_ray.train.recompute import BrokenOffError, Recomputation
from lrmc_ray.train.sharded_load import NotByRowsError, model_to_fill
from lrmc_ray.train.sharding import Sharding, check_shardable, shard_model
from lrmc_ray.train.trainable import TrainableModel

_log = logging.getLogger(__name__)


def autocast_type(settings: TrainSettings) -> torch.dtype | None:
    """In which type all passes of a run multiply, where it is not that of the weights."""
    return torch.bfloat16 if settings.precision == "bf16" else None


class LoadedModel:
    """A model that is loaded, and tried: how its head is made, and what may be done with it.

    Attributes:
        model: the model, adapters included.
        trainable: what of it is trained.
        recomputation: what its backward pass computes again.
        head: its output head.
        attention_cost: see :func:`lrmc_ray.models.packing.attention_cost`; infinity without
            packing.
        sharding: this worker's rows, where the model is in shards.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model_directory: Path,
        device: torch.device,
        group: WorkerGroup,
    ) -> None:
        """Load it; of one in shards all workers call this together.

        Args:
            settings: of the run.
            model_directory: the base model.
            device: where to compute.
            group: this worker and the others.

        Raises:
            ConfigError: a setting fits nothing in the model.
            DataError: the model cannot be loaded, or its head is not supported.
        """
        self.settings = settings
        self.model_directory = model_directory
        self.group = group
        self.autocast = autocast_type(settings)
        self.sharding: Sharding | None = None
        self._load(device)

    def _load(self, device: torch.device) -> None:
        """Load the model, and leave this worker's rows of it where it is in shards."""
        if self.settings.parallel == "shard":
            try:
                self._load_by_rows(device)
                return
            except (NotByRowsError, BrokenOffError) as reason:
                self.sharding = None
                if self.group.rank == 0:
                    _log.warning("every worker loads the whole model at first: %s", reason)
        # Layers go to the device one by one as they are sharded, if it is to hold none for long.
        home = torch.device("cpu") if self.settings.offload == "cpu" else device
        self._take(load_model(self.model_directory).to(home))
        self.head = head_of(self.model)
        self.attention_cost = attention_cost(self.model) if self.settings.packing else math.inf
        if self.settings.parallel == "shard":
            self.recomputation.try_out()  # later, a worker alone could not prove it
            self._shard(device)

    def _take(self, model: Any) -> None:
        """Train ``model``; some of it is on the meta device perhaps."""
        settings = self.settings
        self.trainable = TrainableModel(model, settings)
        self.model = self.trainable.model
        which = False if settings.compile_layers else settings.gradient_checkpointing
        self.recomputation = Recomputation(self.model, which)

    def _load_by_rows(self, device: torch.device) -> None:
        """Read of every weight what this worker holds.

        Raises:
            NotByRowsError: that cannot be.
            BrokenOffError: a trial of the model left it unusable.
        """
        if self.autocast is not None:
            self._try_in_float32(device)
        model, rows = model_to_fill(self.model_directory)
        check_shardable(model)
        rows.check_tied(self.group)
        try:
            self._take(model)
        except (RuntimeError, ConfigError) as error:
            if not self.settings.lora_rank:
                raise
            raise NotByRowsError(f"adapters must be tried with its values ({error})") from error
        drawn = {n: p.detach() for n, p in self.model.named_parameters() if not p.is_meta}
        rows.make_buffers(device)
        self.head = described_head(self.model)
        sharding = self._shard(device)
        rows.fill(sharding.shards, drawn)
        if self.autocast is None:
            self._try(self.model, sharding)
        with (
            sharding.model.vocabulary.whole(),
            torch.autocast(device.type, self.autocast, self.autocast is not None),
        ):
            self.recomputation.try_out(sharding.model)

    def _try(self, model: Any, sharding: Sharding) -> None:
        """Look whether the head is as described, and whether sequences may be packed."""
        with sharding.model.vocabulary.whole() as head:
            layer = model.get_output_embeddings()
            empty, layer.weight = layer.weight, nn.Parameter(head.weight_VD, requires_grad=False)
            head_of(model)
            layer.weight = empty
            self.attention_cost = math.inf
            if self.settings.packing:
                self.attention_cost = max(self.group.gather(attention_cost(model)))

    def _try_in_float32(self, device: torch.device) -> None:
        """The same by shards of its own: in what is rounded to bf16 a difference would not show.

        Raises:
            NotByRowsError: the weights cannot be read a part at a time.
        """
        model, rows = model_to_fill(self.model_directory)
        check_shardable(model)
        rows.make_buffers(device)
        sharding = shard_model(
            model,
            described_head(model),
            self.group,
            device,
            offload=self.settings.offload == "cpu",
        )
        rows.fill(sharding.shards, {})
        self._try(model, sharding)
        del model, rows, sharding
        gc.collect()  # a model is full of circles

    def _shard(self, device: torch.device) -> Sharding:
        """Leave this worker's rows of the model in place of all."""
        sharding = self.sharding = shard_model(
            self.model,
            self.head,
            self.group,
            device,
            under_autocast=self.autocast is not None,
            offload=self.settings.offload == "cpu",
        )
        self.head = sharding.head
        trained = self.trainable.parameters
        for name in trained:
            trained[name] = sharding.shards[name].own
        return sharding


def frozen_base(
    settings: TrainSettings, model_directory: Path, device: torch.device, group: WorkerGroup
) -> LanguageModel | None:
    """The base model beside the one that is trained, for the loss that compares the two."""
    if settings.loss not in NEED_BASE:
        return None
    if settings.parallel == "shard":
        base, sharding = _base_in_shards(
            model_directory,
            device,
            group,
            under_autocast=autocast_type(settings) is not None,
            offload=settings.offload == "cpu",
        )
        head, shards = sharding.head, sharding.model
    else:
        base = load_model(model_directory).to(device).requires_grad_(False)
        head, shards = head_of(base), None
    return LanguageModel(lambda batch: batch_hidden_states(base, batch), head, shards=shards)


def _base_in_shards(
    model_directory: Path, device: torch.device, group: WorkerGroup, **options: bool
) -> tuple[Any, Sharding]:
    """The frozen base of which this worker has its rows; all workers load it together.

    Args:
        model_directory: the base model.
        device: where to compute.
        group: this worker and the others.
        options: of ``shard_model``.
    """
    try:
        base, rows = model_to_fill(model_directory)
        rows.check_tied(group)
        rows.make_buffers(device)
    except NotByRowsError:  # as the model that is trained, which gave the reason
        base = load_model(model_directory).requires_grad_(False)
        if not options["offload"]:
            base = base.to(device)
        return base, shard_model(base, head_of(base), group, device, **options)
    head = described_head(base)
    sharding = shard_model(base.requires_grad_(False), head, group, device, **options)
    rows.fill(sharding.shards, {})
    return base, sharding
