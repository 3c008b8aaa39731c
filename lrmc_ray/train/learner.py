"""What one worker trains and by which rules: the weights, their optimizer, the loss."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.files.artifacts import PARTIAL
from lrmc_ray.files.names import ADAPTER
from lrmc_ray.method.baselines.l2_sp import StartingPoint
from lrmc_ray.method.fast.allocator import keep_freed_memory
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.shards import Shard
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.saving import copy_tokenizer, save_model
from lrmc_ray.train.compiled import compile_layers
from lrmc_ray.train.loaded_model import LoadedModel, autocast_type, frozen_base
from lrmc_ray.train.routers import Routers
from lrmc_ray.train.samples import TrainingSamples
from lrmc_ray.train.sharded_export import gathered, write_model
from lrmc_ray.train.sharded_state import ShardedState
from lrmc_ray.train.sharding import Sharding
from lrmc_ray.train.split_forward import SplitModel, can_split, may_share
from lrmc_ray.train.vocabulary import Vocabulary


class Learner:
    """A model with all that a step needs besides samples; the same on every worker."""

    def __init__(
        self,
        settings: TrainSettings,
        model_directory: Path,
        device: torch.device,
        samples: TrainingSamples | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        """Load the base model.

        Args:
            settings: of the run.
            model_directory: the base model.
            device: where to compute.
            samples: of the run, where the rows of the vocabulary that it does not touch may be left
                out of training; None trains all.
            group: this worker and the others, who call this together; needed for shards.

        Raises:
            ConfigError: a setting fits nothing in the model.
            DataError: the model cannot be loaded, or its head is not supported.
        """
        self.settings = settings
        self.model_directory = model_directory
        self.group = group or WorkerGroup()
        self.autocast = autocast_type(settings)
        loaded = LoadedModel(settings, model_directory, device, self.group)
        self.model, self.trainable, self.head = loaded.model, loaded.trainable, loaded.head
        self.recomputation, self.attention_cost = loaded.recomputation, loaded.attention_cost
        self.sharding = loaded.sharding
        keep_freed_memory()
        self.loss = LossSettings(
            loss=settings.loss,
            tail_samples=settings.tail_samples,
            anchor_weight=settings.anchor_weight,
            seed=settings.seed,
            base_kl_weight=settings.base_kl_weight,
        )
        self.vocabulary = Vocabulary(
            self.model,
            self.head,
            {} if self.sharding else self.trainable.parameters,
            settings,
            self.loss.activity,
            None if self.sharding else samples,
        )
        parameters = list(self.trainable.parameters.values())
        self.optimizer = _optimizer(settings, parameters, self._over_shards())
        self.sharded_state = self._sharded_state()
        # Before a checkpoint is loaded: these are the base's weights.
        self.penalty = None
        if settings.l2_sp_weight:
            self.penalty = StartingPoint(parameters, settings.l2_sp_weight)
        self.base = frozen_base(settings, model_directory, device, self.group)
        self.routers = Routers(self.model, settings.router_loss)
        if settings.compile_layers:
            compile_layers(self.model)
        self.split = SplitModel(self.model, self.recomputation.keep)
        self.share_prefix_up_to = self.recomputation.most_kept if self._may_share() else 0.0

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Final hidden states [B, T, D] of the model that is trained."""
        return self.recomputation.forward(batch)

    @property
    def language_model(self) -> LanguageModel:
        """The model that is trained, as measurements take it."""
        shards = self.sharding and self.sharding.model
        return LanguageModel(self.hidden_states, self.head, shards=shards)

    @property
    def trained_model(self) -> LanguageModel:
        """The same as the training loop takes it."""
        rows, shards = self.vocabulary.head_rows, self.sharding and self.sharding.model
        return LanguageModel(self.hidden_states, self.head, self.split, rows, shards)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[OutputHead]:
        """The output head with all of its rows; of one in shards all workers enter together."""
        if self.sharding is None:
            yield self.head
            return
        with self.sharding.model.vocabulary.whole() as head:
            yield head

    def head_now(self) -> OutputHead:
        """The output head, of one in shards with the rows that are gathered at the moment."""
        if self.sharding is None:
            return self.head
        rows_XD = self.sharding.model.vocabulary.output.rows_XD
        return dataclasses.replace(self.head, weight_VD=rows_XD)

    def _over_shards(self) -> Callable[[Tensor], object] | None:
        return None if self.sharding is None else self.group.sum_

    def _sharded_state(self) -> ShardedState | None:
        """Of the optimizer, which is told what it has a part of."""
        if self.sharding is None:
            return None
        shards = self._trained_shards()
        if isinstance(self.optimizer, MoClip):
            self.optimizer.first_elements = [shard.first_element for shard in shards.values()]
        return ShardedState(shards, self.optimizer, self.sharding.model.mesh, self.group)

    def _trained_shards(self) -> dict[str, Shard]:
        assert self.sharding is not None
        return {name: self.sharding.shards[name] for name in self.trainable.parameters}

    def _may_share(self) -> bool:
        if self.sharding is not None:
            return False  # the beginning would have a pass of its own, and layers gather in turn
        may = may_share(
            self.settings,
            on_cpu=self.head.weight_VD.is_cpu,
            is_mixture=self.routers.is_mixture,
        )
        return may and math.isfinite(self.attention_cost) and can_split(self.model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; with shards, what is not in their own files."""
        if self.sharded_state is not None:
            return {"sharded": self.sharded_state.rest()}
        return {
            "model": self.trainable.state(),
            "optimizer": self.optimizer.state_dict(),
            "vocabulary": self.vocabulary.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned; shards are read beside it."""
        vocabulary = state.get("vocabulary", {})
        self.vocabulary.check(vocabulary)
        self.trainable.load(state["model"])
        self.vocabulary.load(vocabulary)
        self.optimizer.load_state_dict(state["optimizer"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a state on the way, to save them."""
        self.trainable.load(dict(weights))
        self.vocabulary.after_update(0.0)

    def save(self, directory: Path) -> None:
        """Save the model, adapters merged into it, with the base's tokenizer; whole or not.

        The adapters lie beside it by themselves: a merged weight that is rounded later, to bf16,
        loses most of a small update.
        """
        unfinished = directory.with_name(directory.name + PARTIAL)
        is_writer = self.sharding is None or self.group.rank == 0
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
        if self.sharding is not None:
            self._write_shards(self.sharding, unfinished)
        else:
            if self.trainable.adapters is not None:
                self.trainable.adapters.save(unfinished / ADAPTER)
            save_model(self.trainable.merged(), self.model_directory, unfinished)
        if is_writer:
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)

    def _write_shards(self, sharding: Sharding, directory: Path) -> None:
        """All workers write the model together; see ``sharded_export``."""
        if self.trainable.adapters is not None:
            whole = {n: gathered(s, self.group) for n, s in self._trained_shards().items()}
            if self.group.rank == 0:
                found = {name: tensor for name, tensor in whole.items() if tensor is not None}
                self.trainable.adapters.save(directory / ADAPTER, found)
        write_model(self.model, sharding.shards, sharding.units, self.group, directory)
        if self.group.rank == 0:
            copy_tokenizer(self.model_directory, directory)


def _optimizer(
    settings: TrainSettings,
    parameters: Sequence[Tensor],
    reduce_sums: Callable[[Tensor], object] | None,
) -> torch.optim.Optimizer:
    return make_optimizer(
        settings.optimizer,
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        reduce_sums=reduce_sums,
        **_optimizer_options(settings),
    )


def _optimizer_options(settings: TrainSettings) -> dict[str, Any]:
    if settings.optimizer == "mofo":
        return {"mofo_share": settings.mofo_share}
    if settings.optimizer == "magma":
        return {"seed": settings.seed}
    if settings.optimizer not in ("moclip", "adam_atan2"):
        return {}
    options: dict[str, Any] = {
        "angle": settings.angle,
        "second_moment": settings.second_moment,
        "atan2_scale": settings.atan2_scale,
        "state_dtype": torch.bfloat16 if settings.state_dtype == "bf16" else None,
    }
    if settings.optimizer == "moclip":
        options |= {"delta_max": settings.delta_max, "clip": settings.clip}
    return options
