"""One worker's share of Stage 1: the order of a run, from loading the model to saving it.

:class:`TrainingRun` knows of the other workers (``WorkerGroup``) but not of Ray. All workers hold
the same state at every step, or shards of it. Rank 0 writes: ``metrics.jsonl``, ``ledger.jsonl``,
checkpoints and the model; with shards all write their part of a checkpoint. What a step is made
of, and what happens beside the steps, is elsewhere in this room:

    learner         the model that is trained, its optimizer and loss
    refresh         recording candidates again with the current model
    measures        metrics, the probe's outside mass, the held-out loss, costs
    resume          when a checkpoint is saved, and what a run goes on from
    early_stopping  the score on the way of a search's trial
    run_files       where the other nodes see these files
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.files.beats import beat_with
from lrmc_ray.files.names import MODEL
from lrmc_ray.method.optimizers import learning_rate
from lrmc_ray.method.step_result import StepResult
from lrmc_ray.method.training_loop import StepOptions
from lrmc_ray.method.training_loop import train as training_steps
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.loading import dropped_parts
from lrmc_ray.record.reader import Records
from lrmc_ray.train.compiled import LENGTHS
from lrmc_ray.train.divergence import LossWatch
from lrmc_ray.train.early_stopping import EarlyStopping, Rung
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.measures import Costs, Counts, HeldOut, Probe, StepLog, step_metrics
from lrmc_ray.train.refresh import FreshCandidates
from lrmc_ray.train.resume import Checkpoints, only_writer
from lrmc_ray.train.run_files import RunFiles
from lrmc_ray.train.samples import TrainingSamples

_log = logging.getLogger(__name__)


class TrainingRun:
    """The run of one worker, from loading the base model to saving the tuned one."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        record: Path,
        model_directory: Path,
        files: RunFiles,
        group: WorkerGroup,
        device: torch.device,
        is_preempted: Callable[[], bool] = lambda: False,
        rung: Rung | None = None,
    ) -> None:
        """Load everything.

        Args:
            settings: of the run, ``epochs`` already turned into ``steps``.
            record: the finished record.
            model_directory: the base model.
            files: where the run keeps its files.
            group: this worker and the others.
            device: where to compute.
            is_preempted: whether a node is about to be taken away; all workers ask after every
                step and get the same answer.
            rung: where it is scored on the way, and perhaps ends.
        """
        self.settings = settings
        self.files = files
        self.directory = files.directory
        self.group = group
        self._is_preempted = is_preempted
        records = Records(record)
        self.samples = TrainingSamples(records, settings)
        self.learner = Learner(settings, model_directory, device, self.samples, group)
        beat_with(self.learner.model)
        k_max = records.manifest["identity"]["k_max"]
        self.fresh = FreshCandidates(settings, self.samples, self.learner, k_max=k_max, group=group)
        held_out = [self.samples.in_full(index) for index in self.samples.held_out]
        self.held_out = HeldOut(settings, held_out, self.learner, group=group)
        self.probe = Probe(settings, self.learner.head_now, group=group, device=device)
        self.checkpoints = Checkpoints(
            settings, files, record=records.directory.name, group=group, device=device
        )
        self.early_stopping = None
        if rung is not None:
            self.early_stopping = EarlyStopping(
                rung, files=files, model_directory=model_directory, group=group
            )
        self.counts = Counts()
        if group.rank == 0 and (adapters := self.learner.trainable.adapters) is not None:
            _log.info("%.0f %% of the model's weights have an adapter", 100 * adapters.share)
        if group.rank == 0 and (dropped := dropped_parts(self.learner.model, model_directory)):
            _log.warning("%s", dropped)
        self.losses = LossWatch(settings.steps)
        self.costs = Costs(device)
        self.first_step = 0
        self.bad_steps = 0
        self.is_pruned = False

    def run(self) -> dict[str, Any]:
        """Train to the end and save the model; returns what goes into the manifest.

        A run that is stopped early has no model, and neither has one that diverged.
        """
        is_writer = self.group.rank == 0
        with only_writer(self.directory) if is_writer else contextlib.nullcontext():
            self._resume()
            self.costs.start()
            with self.checkpoints.completed():
                result = self._train()
            costs = self.costs.total(self.group)
            divergence = None if self.is_pruned else self.losses.divergence()
            writes = is_writer or self.learner.sharding is not None
            if writes and not self.is_pruned and divergence is None:
                self._save_model()
        (self.files.end if is_writer else self.files.leave)()
        return {
            "steps": result.step + 1 if result else self.settings.steps,
            "pruned": self.is_pruned,
            "diverged": divergence.as_dict() if divergence else None,
            **costs,
            "world_size": self.group.world_size,
            "final_loss": result.loss if result else None,
            **{f"best_{name}": value for name, value in self.held_out.best.items()},
            **self.counts.totals,
        }

    # The steps

    def _train(self) -> StepResult | None:
        """Take the steps that are left; returns the last one, None if none was."""
        result = None
        with self._written() as log:
            last = time.monotonic()
            for result in self.steps():
                done = result.step + 1
                metrics = self._measure(result, time.monotonic() - last)
                self.is_pruned = self._is_hopeless(done, metrics)
                is_preempted = self._is_preempted()
                if log is not None:
                    log.write(result, metrics)
                if self._is_to_be_saved(done, is_preempted):
                    if log is not None:
                        log.sync()
                    self._save_checkpoint(done)
                if self.is_pruned:
                    break
                last = time.monotonic()
        return result

    @contextlib.contextmanager
    def _written(self) -> Iterator[StepLog | None]:
        """What rank 0 writes the steps into, where the driver follows it; None on other ranks."""
        if self.group.rank != 0:
            yield None
            return
        with (
            StepLog.opened(
                self.directory,
                world_size=self.group.world_size,
                device=self.learner.head.weight_VD.device,
            ) as log,
            self.files.followed(),
        ):
            yield log

    def steps(self) -> Iterator[StepResult]:
        """Take the steps that are left, one after the other; nothing is measured or saved."""
        settings, learner = self.settings, self.learner
        is_on_gpu = learner.head.weight_VD.is_cuda
        return training_steps(
            learner.trained_model,
            learner.optimizer,
            self.fresh.samples_of_step,
            learner.loss,
            StepOptions(
                num_micro_batches=settings.micro_batches,
                reduction=settings.reduction,
                autocast=learner.autocast,
                attention_cost=learner.attention_cost,
                pack_up_to=longest_packed(learner.model.config),
                share_prefix_up_to=learner.share_prefix_up_to,
                lengths=LENGTHS if settings.compile_layers else 1,
                plans_losses=is_on_gpu and learner.loss.reads_candidates,
                prepares_ahead=is_on_gpu and not settings.refresh_every,
                max_grad_norm=settings.max_grad_norm,
                max_bad_steps=settings.max_bad_steps,
                base=learner.base,
                probe=self.probe.measure,
                probes_at=self.probe.is_due,
                balance_loss=learner.routers.loss,
                penalize=learner.penalty.add_gradient if learner.penalty else None,
                after_update=learner.vocabulary.after_update,
            ),
            self.group,
            steps=range(self.first_step, settings.steps),
            lr_of_step=lambda step: learning_rate(
                step,
                peak=settings.lr,
                warmup_steps=settings.warmup_steps,
                steps=settings.steps,
                schedule=settings.schedule,
            ),
            bad_steps=self.bad_steps,
        )

    def _measure(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Count the step, which took ``seconds``; returns its metrics."""
        done = result.step + 1
        self.bad_steps = result.bad_steps
        self.counts.add(result)
        self.losses.add(result.loss)
        metrics = step_metrics(
            result,
            seconds=seconds,
            epoch=done * self.settings.batch_size / self.samples.epoch_length,
            world_size=self.group.world_size,
            outside=self.probe.shared(result.step),
            optimizer=self.learner.optimizer,
        )
        metrics |= self.learner.routers.report(self.group)
        return metrics | self.held_out.score(done)

    def _is_hopeless(self, done: int, metrics: dict[str, float]) -> bool:
        """Score the model on the way where it is time; whether the run ends here.

        What was scored is added to ``metrics``.
        """
        if self.early_stopping is None or done != self.early_stopping.rung.step:
            return False
        decision = self.early_stopping.decide(self.learner.model)
        self.learner.model.train()
        metrics |= decision.metrics
        return decision.stop

    # Checkpoints and the model

    def _is_to_be_saved(self, done: int, is_preempted: bool) -> bool:
        """Whether this worker saves a checkpoint behind step ``done``; rank 0 says when it is time.

        It saves alone, or with shards all of them together.
        """
        is_time = False
        if self.group.rank == 0 and done < self.settings.steps and not self.is_pruned:
            is_best = self.held_out.best_step == done
            is_time = is_best or self.checkpoints.is_due(done, is_preempted)
        return is_time if self.learner.sharding is None else self.checkpoints.agree(is_time)

    def _save_checkpoint(self, done: int) -> None:
        state = {
            **self.learner.state(),
            "totals": dict(self.counts.totals),
            "bad_steps": self.bad_steps,
            "losses": self.losses.state(),
            "best": dict(self.held_out.best),
            "fresh": self.fresh.state(),
            **self.costs.state(self.group.world_size),
        }
        self.checkpoints.save(
            done, state, best=self.held_out.best_step, shards=self.learner.sharded_state
        )

    def _resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        state = self.checkpoints.newest()
        if state is None:
            return
        self.first_step = state["step"]
        if self.learner.sharded_state is None:
            self.learner.load(state)
        else:
            path = self.checkpoints.path(state["step"])
            self.learner.sharded_state.read(path, state["sharded"])
        self.counts.totals = state["totals"]
        self.bad_steps = state["bad_steps"]
        self.losses.load(state["losses"])
        self.held_out.best = state["best"]
        self.fresh.load(state["fresh"])
        self.costs.load(state)

    def _save_model(self) -> None:
        best = self.held_out.best_step
        if self.settings.export == "best" and best is not None and best < self.settings.steps:
            if self.learner.sharded_state is None:
                self.learner.load_weights(self.checkpoints.weights(best))
            else:
                self.checkpoints.check(best)
                self.learner.sharded_state.read_weights(self.checkpoints.path(best))
        self.learner.save(self.directory / MODEL)
