"""One worker's share of Stage 1: the loop, its checkpoints, and what is written down.

Knows of the other workers (``WorkerGroup``) but not of Ray. Rank 0 writes: checkpoints,
``metrics.jsonl``, ``ledger.jsonl`` and the model. All workers hold the same state at every step, so
what rank 0 saves is everybody's.
"""

import contextlib
import dataclasses
import fcntl
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError, DataError, DirectoryInUseError
from lrmc_ray.files.artifacts import PARTIAL
from lrmc_ray.files.metrics_log import MetricsLog
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER, METRICS, MODEL
from lrmc_ray.method.held_out import held_out_batches, held_out_nll
from lrmc_ray.method.l2_sp import StartingPoint
from lrmc_ray.method.microbatch import MicroBatch, Sample, collate, deal
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.probe import outside_mass
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.method.training_loop import (
    FrozenBase,
    LossSettings,
    StepResult,
    WorkerGroup,
    learning_rate,
    waves,
)
from lrmc_ray.method.training_loop import train as training_steps
from lrmc_ray.models import (
    attention_cost,
    batch_hidden_states,
    head_of,
    load_model,
    logits,
    save_model,
)
from lrmc_ray.record.parts import Records
from lrmc_ray.train.checkpoints import discard_after, load_checkpoint, load_newest, save_checkpoint
from lrmc_ray.train.early_stopping import EarlyStopping, Rung
from lrmc_ray.train.ledger import Ledger, read_ledger
from lrmc_ray.train.measures import SystemMetrics, Usage
from lrmc_ray.train.samples import TrainingSamples, with_supervised_candidates
from lrmc_ray.train.stored import StoredRun
from lrmc_ray.train.trainable import TrainableModel

_log = logging.getLogger(__name__)

WRITER_SECONDS = 120.0
"""How long rank 0 waits for one of an earlier attempt to end."""


NOTICE_SHARE = 0.1
"""Share of the time that may go into checkpoints while a node is about to be taken away."""


_LOGIT_ELEMENTS = 2**22  # of the [n, V] logits of one chunk


class TrainingRun:
    """Model, optimizer and position of one worker."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        record: Path,
        model_directory: Path,
        directory: Path,
        group: WorkerGroup,
        device: torch.device,
        is_preempted: Callable[[], bool] = lambda: False,
        rung: Rung | None = None,
        stored: StoredRun | None = None,
    ) -> None:
        """Load everything.

        Args:
            settings: of the run, ``epochs`` already turned into ``steps``.
            record: the finished record.
            model_directory: the base model.
            directory: where the run keeps its files.
            group: this worker and the others.
            device: where to compute.
            is_preempted: whether a node is about to be taken away; all workers ask after every
                step and get the same answer.
            rung: where it is scored on the way, and perhaps ends.
            stored: where the workers exchange files if they do not share ``directory``.
        """
        self.settings = settings
        self.directory = directory
        self.stored = stored
        self.model_directory = model_directory
        self.group = group
        self.device = device
        self.records = Records(record)
        self.samples = TrainingSamples(self.records, settings)
        self.trainable = TrainableModel(load_model(model_directory).to(device), settings)
        self.model = self.trainable.model
        self.head = head_of(self.model)
        self.optimizer = make_optimizer(
            settings.optimizer,
            list(self.trainable.parameters.values()),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            **_optimizer_options(settings),
        )
        # Before a checkpoint is loaded: these are the base's weights.
        self.penalty = None
        if settings.l2_sp_weight:
            self.penalty = StartingPoint(
                list(self.trainable.parameters.values()), settings.l2_sp_weight
            )
        self.base = None
        if settings.loss == "kl_to_base":
            base = load_model(model_directory).to(device).requires_grad_(False)
            self.base = FrozenBase(lambda batch: batch_hidden_states(base, batch), head_of(base))
        self.loss = LossSettings(
            loss=settings.loss,
            tail_samples=settings.tail_samples,
            anchor_weight=settings.anchor_weight,
            seed=settings.seed,
            base_kl_weight=settings.base_kl_weight,
        )
        self.autocast = torch.bfloat16 if settings.precision == "bf16" else None
        self.attention_cost = attention_cost(self.model) if settings.packing else math.inf
        self.held_out = held_out_batches([self.samples[i] for i in self.samples.held_out])
        self.first_step = 0
        self.bad_steps = 0
        self.totals = {
            "processed_tokens": 0,
            "original_tokens": 0,
            "padded_tokens": 0,
            "shared_tokens": 0,
        }
        self.totals |= {"bad_steps": 0, "supervised_positions": 0}
        self.seconds_before = 0.0
        self.cpu_seconds_before = 0.0
        self.peak_bytes_before = 0
        self._usage = Usage(device)
        self.best: dict[str, float] = {}
        self.early_stopping = (
            EarlyStopping(
                rung,
                directory=directory,
                model_directory=model_directory,
                group=group,
                stored=stored,
            )
            if rung is not None
            else None
        )
        self.is_pruned = False
        self._is_preempted = is_preempted
        self._outside = (0.0, 0.0, 0)
        self._fresh: dict[int, list[CandidateSets]] = {}
        self._saved_at = -math.inf
        self._save_seconds = 0.0

    @property
    def _is_writer(self) -> bool:
        return self.group.rank == 0

    def run(self) -> dict[str, Any]:
        """Train to the end and save the model; returns what goes into the manifest.

        A run that is stopped early has no model.
        """
        with self._alone():
            self._resume()
            started = time.monotonic()
            self._usage = Usage(self.device)
            result = self._train(started)
            seconds = self.seconds_before + time.monotonic() - started
            used = self.group.gather((self._usage.cpu_seconds, self._usage.peak_bytes))
            if self._is_writer and not self.is_pruned:
                self._save_model()
        if self.stored is not None:
            (self.stored.end if self._is_writer else self.stored.leave)()
        return {
            "steps": result.step + 1 if result else self.settings.steps,
            "pruned": self.is_pruned,
            "train_seconds": round(seconds, 2),
            "cpu_seconds": round(self.cpu_seconds_before + sum(cpu for cpu, _ in used), 2),
            "peak_memory_bytes": max(self.peak_bytes_before, *(peak for _, peak in used)),
            "world_size": self.group.world_size,
            "final_loss": result.loss if result else None,
            **{f"best_{name}": value for name, value in self.best.items()},
            **self.totals,
        }

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run's files: a worker whose driver was killed may live on for a while."""
        if not self._is_writer:
            yield
            return
        with (self.directory / ".writer").open("a") as file:
            deadline = time.monotonic() + WRITER_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DirectoryInUseError(
                            f"a worker of an earlier attempt still writes to {self.directory}; "
                            "stop it"
                        ) from None
                    time.sleep(0.2)
            yield

    def _train(self, started: float) -> StepResult | None:
        settings = self.settings
        with contextlib.ExitStack() as files:
            metrics_log = ledger = None
            system = SystemMetrics(self.device)
            if self._is_writer:
                metrics_log = files.enter_context(MetricsLog(self.directory / METRICS))
                ledger = files.enter_context(Ledger(self.directory / LEDGER))
                if self.stored is not None:
                    files.enter_context(self.stored.followed())
            result = None
            last = time.monotonic()
            for result in self._steps():
                self._check_compiled()
                seconds = time.monotonic() - last
                done = result.step + 1
                self._count(result)
                metrics = self._metrics(result, seconds)
                is_best = self._evaluate(done, metrics)
                self.is_pruned = self._is_hopeless(done, metrics)
                is_preempted = self._is_preempted()
                if metrics_log is not None and ledger is not None:
                    metrics_log.log(done, metrics | system.sample())
                    ledger.write(
                        step=result.step,
                        sample_ids=result.sample_ids,
                        world_size=self.group.world_size,
                        loss=result.loss,
                        applied=result.is_applied,
                    )
                    is_last = done == settings.steps or self.is_pruned
                    if not is_last and (is_best or self._is_due(done, is_preempted)):
                        ledger.sync()
                        self._save_checkpoint(
                            done, self.seconds_before + time.monotonic() - started
                        )
                if self.is_pruned:
                    break
                last = time.monotonic()
        return result

    def _check_compiled(self) -> None:
        """Refuse to go on uncompiled: other workers, or this one later, would round otherwise."""
        optimizer = self.optimizer
        if self.settings.compile_optimizer and isinstance(optimizer, MoClip):
            if optimizer.compiled:
                return
            raise ConfigError(
                "train.compile_optimizer = true needs a C++ compiler on every node, and there is "
                "none that works on this one; install one (apt install g++), or set it to false"
            )

    def _steps(self) -> Iterator[StepResult]:
        settings = self.settings
        return training_steps(
            self._hidden,
            self.head,
            self.optimizer,
            self._samples_of_step,
            self.loss,
            self.group,
            first_step=self.first_step,
            steps=settings.steps,
            num_micro_batches=settings.micro_batches,
            lr_of_step=lambda step: learning_rate(
                step,
                peak=settings.lr,
                warmup_steps=settings.warmup_steps,
                steps=settings.steps,
                schedule=settings.schedule,
            ),
            reduction=settings.reduction,
            max_grad_norm=settings.max_grad_norm,
            max_bad_steps=settings.max_bad_steps,
            autocast=self.autocast,
            attention_cost=self.attention_cost,
            probe=self._probe,
            bad_steps=self.bad_steps,
            base=self.base,
            penalize=self.penalty.add_gradient if self.penalty else None,
        )

    def _hidden(self, batch: MicroBatch) -> Tensor:
        return batch_hidden_states(self.model, batch)

    # Samples

    def _samples_of_step(self, step: int) -> list[Sample]:
        every = self.settings.refresh_every
        samples = [self.samples[index] for index in self.samples.indices_of_step(step)]
        if not every or step < every:
            return samples
        if step not in self._fresh:
            self._refresh(step)
        return [
            with_supervised_candidates(sample, fresh)
            for sample, fresh in zip(samples, self._fresh.pop(step), strict=True)
        ]

    @torch.no_grad()
    def _refresh(self, first: int) -> None:
        """Record the supervised positions of the coming steps again, with the current model.

        Prompt positions keep the base model's: those are what the anchor holds on to.
        """
        last = min(first + self.settings.refresh_every, self.settings.steps)
        self.model.eval()
        jobs = []
        for step in range(first, last):
            samples = [self.samples[index] for index in self.samples.indices_of_step(step)]
            # The parts are those of the step: rows padded together give the same bits each time.
            parts = deal(samples, self.settings.micro_batches, self.loss.activity)
            jobs += [(step, part, [samples[i] for i in part]) for part in parts]
        own: dict[tuple[int, int], CandidateSets] = {}
        for wave in waves(range(len(jobs)), self.group.world_size):
            if self.group.rank < len(wave):
                step, part, samples = jobs[wave[self.group.rank]]
                for place, candidates in zip(part, self._record_again(samples), strict=True):
                    own[step, place] = candidates
        self.model.train()
        together: dict[tuple[int, int], CandidateSets] = {}
        for theirs in self.group.gather(own):
            together |= theirs
        for step in range(first, last):
            self._fresh[step] = [together[step, place] for place in range(self.settings.batch_size)]

    def _record_again(self, samples: list[Sample]) -> list[CandidateSets]:
        batch = collate(samples, self.loss.activity, trim=False).to(self.device)
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            hidden_BTD = self._hidden(batch)
        fresh = []
        for row, sample in enumerate(samples):
            positions = sample.positions_P[sample.is_supervised_P].to(self.device)
            chunks = torch.split(positions, max(1, _LOGIT_ELEMENTS // len(self.head.weight_VD)))
            fresh.append(
                CandidateSets.concatenate(
                    [
                        select_candidates(
                            logits(hidden_BTD[row, chunk].to(self.head.weight_VD.dtype), self.head),
                            batch.input_ids_BT[row, chunk + 1],
                            tau=self.settings.tau,
                            k_min=self.settings.k_min,
                            k_max=self.records.manifest["identity"]["k_max"],
                        ).to("cpu")
                        for chunk in chunks
                    ]
                )
            )
        return fresh

    # Measurements

    def _probe(self, step: int, hidden_BTD: Tensor, batch: MicroBatch) -> None:
        """Measure the outside mass of the current model on the worker that has the positions."""
        every = self.settings.probe_every
        if not every or step % every:
            return
        where = batch.supervised
        measured = outside_mass(
            hidden_BTD[where.row_N, where.column_N],
            self.head.weight_VD,
            where.candidates,
            bias_V=self.head.bias_V,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            num_positions=self.settings.probe_positions,
            seed=step,
        )
        self._outside = measured

    def _shared_outside(self, step: int) -> dict[str, float]:
        """What ``_probe`` measured at ``step``, on whichever worker."""
        every = self.settings.probe_every
        if not every or step % every:
            return {}
        shared = torch.tensor(self._outside, dtype=torch.float64, device=self.device)
        self._outside = (0.0, 0.0, 0)
        self.group.sum_(shared)
        mean, stderr, num_positions = shared.tolist()
        if not num_positions:
            return {}
        stale = 1 - self.settings.tau
        if self._is_writer and mean - 2 * stderr > stale + 0.01:
            _log.warning(
                "step %d: the tuned model puts %.3f of its probability outside the candidates, "
                "more than 1 - tau = %.3f: the subsets are getting stale; train.refresh_every "
                "records them again",
                step,
                mean,
                stale,
            )
        return {"subset/rho": mean}

    def _evaluate(self, done: int, metrics: dict[str, float]) -> bool:
        """Score the held-out samples where it is time; whether this is the best model so far."""
        every = self.settings.evaluate_every
        if not every or (done % every and done < self.settings.steps):
            return False
        self.model.eval()
        nll = held_out_nll(
            self._hidden, self.head, self.held_out, self.group, autocast=self.autocast
        )
        self.model.train()
        metrics["train/held_out_nll"] = nll
        if not math.isfinite(nll) or nll >= self.best.get("held_out_nll", math.inf):
            return False
        self.best = {"held_out_nll": nll, "step": done}
        return True

    def _is_hopeless(self, done: int, metrics: dict[str, float]) -> bool:
        """Score the model on the way where it is time; whether the run ends here."""
        if self.early_stopping is None or done != self.early_stopping.rung.step:
            return False
        decision = self.early_stopping.decide(self.model)
        self.model.train()
        metrics |= decision.metrics
        return decision.stop

    def _count(self, result: StepResult) -> None:
        self.bad_steps = result.bad_steps
        self.totals["processed_tokens"] += result.num_processed
        self.totals["original_tokens"] += result.num_tokens
        self.totals["shared_tokens"] += result.num_shared
        self.totals["padded_tokens"] += result.num_padded
        self.totals["supervised_positions"] += result.num_supervised
        self.totals["bad_steps"] += not result.is_applied

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, float]:
        metrics = {
            "train/loss": result.loss,
            "train/anchor_kl": result.anchor,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/epoch": (result.step + 1) * self.settings.batch_size / self.samples.epoch_length,
            "train/supervised_tokens_per_second": result.num_supervised / seconds,
            "train/tokens_per_second": result.num_tokens / seconds,
            "train/processed_share": result.num_processed / result.num_tokens,
            "train/shared_share": result.num_shared / max(1, result.num_processed),
            "train/padding_share": 1
            - (result.num_processed - result.num_shared) / max(1, result.num_padded),
            "train/step_seconds": seconds,
            "subset/k_mean": result.mean_candidates,
            "subset/active_share": result.num_active / result.num_supervised,
            "elastic/world_size": float(self.group.world_size),
            **self._shared_outside(result.step),
        }
        statistics = getattr(self.optimizer, "angle_statistics", None)
        if statistics is not None:
            angles = statistics()
            metrics["moclip/angle_deg"] = angles.mean_deg
            metrics["moclip/clipped_share"] = angles.clipped_share
        return metrics

    # Checkpoints

    def _is_due(self, done: int, is_preempted: bool) -> bool:
        """Whether rank 0 saves a checkpoint behind step ``done``."""
        if done % self.settings.checkpoint_every == 0 or self._asked.exists():
            return True
        pause = self._save_seconds / NOTICE_SHARE
        return is_preempted and time.monotonic() - self._saved_at > pause

    @property
    def _asked(self) -> Path:
        return self.directory / CHECKPOINT_NOW

    def _claims(self) -> dict[str, Any]:
        """What a checkpoint must agree with; nothing of the number of workers."""
        return {
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "micro_batches": self.settings.micro_batches,
            "record": self.records.directory.name,
        }

    def _save_checkpoint(self, step: int, seconds: float) -> None:
        start = time.monotonic()
        also = [int(self.best["step"])] if self.best else []
        save_checkpoint(
            self.directory / CHECKPOINTS,
            step,
            {
                "step": step,
                "claims": self._claims(),
                "model": self.trainable.state(),
                "optimizer": self.optimizer.state_dict(),
                "totals": dict(self.totals),
                "bad_steps": self.bad_steps,
                "best": dict(self.best),
                "fresh": {
                    step: [dataclasses.asdict(sets) for sets in fresh]
                    for step, fresh in self._fresh.items()
                },
                "seconds": seconds,
                # Those of rank 0; the others do as much.
                "cpu_seconds": self.cpu_seconds_before
                + self.group.world_size * self._usage.cpu_seconds,
                "peak_memory_bytes": max(self.peak_bytes_before, self._usage.peak_bytes),
            },
            keep=self.settings.keep_checkpoints,
            also=also,
        )
        if self.stored is not None:
            self.stored.push(step, keep=self.settings.keep_checkpoints, also=also)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - start
        self._asked.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Go on from the newest good checkpoint; rank 0 says which one that is."""
        directory = self.directory / CHECKPOINTS
        state = None
        if self._is_writer:
            if self.stored is not None:
                self.stored.begin()
            state = load_newest(directory)
            if state is None:
                self._refuse_lost_checkpoints()
            discard = (
                self.stored.discard_after if self.stored else partial(discard_after, directory)
            )
            discard(state["step"] if state else 0)
        chosen = torch.tensor([state["step"] if state else 0], device=self.device)
        self.group.broadcast_(chosen, source=0)
        if not self._is_writer and int(chosen):
            if self.stored is not None:
                self.stored.pull(int(chosen))
            state = load_checkpoint(directory, int(chosen))
        if state is None:
            return
        if state["claims"] != self._claims():
            raise DataError(
                f"the checkpoint behind step {state['step']} in {directory} is that of another "
                f"run ({state['claims']}, this one {self._claims()}); remove {self.directory}"
            )
        self.trainable.load(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.first_step = state["step"]
        self.totals = state["totals"]
        self.bad_steps = state["bad_steps"]
        self.best = state["best"]
        self._fresh = {
            step: [CandidateSets(**sets) for sets in fresh]
            for step, fresh in state["fresh"].items()
        }
        self.seconds_before = state["seconds"]
        self.cpu_seconds_before = state["cpu_seconds"]
        self.peak_bytes_before = state["peak_memory_bytes"]

    def _refuse_lost_checkpoints(self) -> None:
        """Never start again from step 0 where the ledger shows that there were checkpoints."""
        lines = read_ledger(self.directory / LEDGER)
        last = max((line.step for line in lines), default=-1)
        # The line of a step is written before its checkpoint, that of the next one after it.
        if last >= self.settings.checkpoint_every:
            raise DataError(
                f"{self.directory / LEDGER} shows {last + 1} steps, but there is no checkpoint in "
                f"{self.directory / CHECKPOINTS}; restore them from a backup, or remove "
                f"{self.directory} to train from the start"
            )

    def _save_model(self) -> None:
        best = int(self.best.get("step", 0))
        if self.settings.export == "best" and 0 < best < self.settings.steps:
            if self.stored is not None:
                self.stored.pull(best)
            self.trainable.load(load_checkpoint(self.directory / CHECKPOINTS, best)["model"])
        final = self.directory / MODEL
        unfinished = final.with_name(MODEL + PARTIAL)
        shutil.rmtree(unfinished, ignore_errors=True)
        save_model(self.trainable.merged(), self.model_directory, unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)


def _optimizer_options(settings: TrainSettings) -> dict[str, Any]:
    if settings.optimizer == "mofo":
        return {"mofo_share": settings.mofo_share}
    if settings.optimizer not in ("moclip", "adam_atan2"):
        return {}
    options: dict[str, Any] = {
        "angle": settings.angle,
        "second_moment": settings.second_moment,
        "atan2_scale": settings.atan2_scale,
        "compiled": settings.compile_optimizer,
    }
    if settings.optimizer == "moclip":
        options |= {"delta_max": settings.delta_max, "clip": settings.clip}
    return options
