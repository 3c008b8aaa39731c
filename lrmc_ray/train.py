"""Stage 1: fine-tune on the recorded candidates with MoClip, on any number of workers.

    python -m lrmc_ray.train --output runs train.lr=1e-5

A Ray Train ``TorchTrainer`` runs :func:`lrmc_ray.method.training_loop.train` on its workers. When
workers are lost or join, Ray starts the loop again with another number of them; it goes on from
our own checkpoint, with the same samples in the same order, and in strict mode to the same bits.
"""

import argparse
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import (
    PARTIAL,
    fingerprint,
    is_finished,
    lock_directory,
    read_manifest,
    write_json,
    write_manifest,
)
from lrmc_ray.config import RunSettings, TrainSettings, validate
from lrmc_ray.console import progress, run_command, setup_logging
from lrmc_ray.errors import DataError, LrmcError, ResourceError
from lrmc_ray.ray_session import RAY_LOG, ray_session

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
MODEL = "model"
MADE_BY = "python -m lrmc_ray.train"
MAX_WORKER_FAILURES = 10
"""Losses of workers or nodes that one command puts up with."""


class TrainingError(LrmcError):
    """Training failed for good; the message says why."""


def train(settings: RunSettings, record: Path, directory: Path) -> Path:
    """Train as ``settings.train`` says and leave the model in ``directory / "model"``.

    Needs a running Ray session. A call that was interrupted goes on from the newest checkpoint; a
    finished one returns at once.

    Raises:
        TrainingError: the workers failed; the message has the cause.
        DataError: ``directory`` holds a run with other settings, or ``record`` belongs to another
            model, tokenizer, chat template or training data.
    """
    from lrmc_ray.models import local_directory
    from lrmc_ray.record import check_fits

    model_directory = local_directory(settings.model)
    check_fits(record, settings, model_directory)
    identity = {"record": record.name, **settings.train.model_dump(mode="json")}
    with lock_directory(directory):
        _claim(directory, identity)
        if is_finished(directory):
            return directory
        start = time.monotonic()
        outcome = _fit(settings, record, model_directory, directory)
        write_manifest(
            directory,
            {
                "kind": "training",
                "identity": identity,
                "seconds": round(time.monotonic() - start, 2),
                **outcome,
            },
        )
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return directory


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    """Remember what ``directory`` is for, or refuse it if it is for something else."""
    path = directory / "identity.json"
    if not path.is_file():
        write_json(path, identity)
        return
    before = json.loads(path.read_text())
    different = sorted(
        key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key)
    )
    if different:
        key = different[0]
        raise DataError(
            f"{directory} holds a training run with other settings ({key} was {before.get(key)}, "
            f"now {identity.get(key)}); use another --output, or remove it"
        )


def _fit(
    settings: RunSettings, record: Path, model_directory: Path, directory: Path
) -> dict[str, Any]:
    """Run the workers to the end and return what rank 0 reports."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = settings.resources
    least, most = worker_range(settings)
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    scratch = directory / "ray"
    for attempt in range(MAX_WORKER_FAILURES + 1):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "train": settings.train.model_dump(mode="json"),
                "record": str(record.resolve()),
                "model": str(model_directory),
                "directory": str(directory.resolve()),
                "threads": resources.cpus_per_worker,
            },
            scaling_config=ScalingConfig(
                num_workers=(least, most),
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=per_worker,
            ),
            # A new name each time: Ray would go on from its own snapshot, we from our checkpoints.
            run_config=RunConfig(
                name=f"run-{time.time_ns()}",
                storage_path=str(scratch.resolve()),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            outcome: dict[str, Any] = trainer.fit().return_value
            return outcome
        except Exception as error:
            cause = _cause(error)
            if not _is_worker_loss(cause) or attempt == MAX_WORKER_FAILURES:
                raise TrainingError(f"training in {directory} failed: {_text(cause)}") from error
            _log.warning("a worker was lost (%s); going on from the checkpoint", _text(cause))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise AssertionError("unreachable")


def worker_range(settings: RunSettings) -> tuple[int, int]:
    """Fewest and most workers; the most that both the cluster and the micro-batches allow.

    Raises:
        ResourceError: fewer workers fit than the settings ask for.
    """
    import ray

    resources = settings.resources
    total = ray.cluster_resources()
    if resources.gpus_per_worker:
        fitting = int(total.get("GPU", 0) // resources.gpus_per_worker)
    else:
        fitting = int(total.get("CPU", 0) // resources.cpus_per_worker)
    least, most = resources.workers or (1, fitting)
    if fitting < least:
        kind = "GPU" if resources.gpus_per_worker else "CPU"
        raise ResourceError(
            f"{least} workers need {least} times {resources.gpus_per_worker or ''}"
            f"{resources.cpus_per_worker if kind == 'CPU' else ''} {kind}, the cluster has "
            f"{total.get(kind, 0):g}; lower resources.workers"
        )
    return least, max(least, min(most, settings.train.micro_batches))


def _cause(error: BaseException) -> BaseException:
    """The innermost error of what Ray Train wraps several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _cause(_most_telling(failures.values()))
    for attribute in ("cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException) and inner is not error:
            return _cause(inner)
    return error


def _most_telling(errors: Iterable[BaseException]) -> BaseException:
    """An error of the loop itself, if there is one: it breaks the others' collectives."""
    causes = list(errors)
    own = [e for e in causes if not _is_worker_loss(_cause(e)) and "gloo" not in str(e).lower()]
    return (own or causes)[0]


def _is_worker_loss(cause: BaseException) -> bool:
    """Whether a process or a node died, rather than the loop raising an error."""
    from ray.exceptions import RayError

    return isinstance(cause, RayError) or "gloo" in str(cause).lower()


def _text(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    first = lines[0] if lines else ""
    return first if isinstance(cause, FloatingPointError) else f"{type(cause).__name__}: {first}"


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of one worker; returns, from rank 0, what goes into the manifest."""
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    settings = validate(TrainSettings, config["train"], "train")
    run = TrainingRun(
        settings,
        record=Path(config["record"]),
        model_directory=Path(config["model"]),
        directory=Path(config["directory"]),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    return run.run()


class TrainingRun:
    """One worker's share of a run: model, optimizer, checkpoints and what is written down."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        record: Path,
        model_directory: Path,
        directory: Path,
        rank: int,
        world_size: int,
        device: Any,
    ) -> None:
        from lrmc_ray.data.records import Records
        from lrmc_ray.method.optimizers import make_optimizer
        from lrmc_ray.method.training_loop import LossSettings, WorkerGroup
        from lrmc_ray.models import head_of, load_model

        self.settings = settings
        self.directory = directory
        self.model_directory = model_directory
        self.group = WorkerGroup(rank, world_size)
        self.records = Records(record)
        self.model = load_model(model_directory).to(device).train()
        self.head = head_of(self.model)
        self.optimizer = make_optimizer(
            settings.optimizer,
            [p for p in self.model.parameters() if p.requires_grad],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            **_moclip_options(settings),
        )
        self.loss = LossSettings(
            loss=settings.loss,
            tail_samples=settings.tail_samples,
            anchor_weight=settings.anchor_weight,
            seed=settings.seed,
        )
        self.first_step = 0
        self.totals = {"processed_tokens": 0, "original_tokens": 0, "padded_tokens": 0}
        self.totals |= {"bad_steps": 0, "supervised_positions": 0}
        self.seconds_before = 0.0
        self.rho: dict[str, float] = {}

    @property
    def _is_writer(self) -> bool:
        return self.group.rank == 0

    def run(self) -> dict[str, Any]:
        """Train to the end and save the model."""
        import torch

        from lrmc_ray.method.training_loop import learning_rate
        from lrmc_ray.method.training_loop import train as training_steps
        from lrmc_ray.metrics_log import MetricsLog

        settings = self.settings
        self._resume()
        started = time.monotonic()
        last = started
        metrics_log = MetricsLog(self.directory / METRICS) if self._is_writer else None
        ledger = (self.directory / LEDGER).open("a", encoding="utf-8") if self._is_writer else None
        results = training_steps(
            lambda ids: self._hidden(ids),
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
            autocast=torch.bfloat16 if settings.precision == "bf16" else None,
            on_hidden=self._probe,
        )
        result = None
        for result in results:
            now = time.monotonic()
            self._count(result)
            if metrics_log is not None and ledger is not None:
                metrics_log.log(result.step + 1, self._metrics(result, now - last))
                line = {
                    "step": result.step,
                    "sample_ids": result.sample_ids,
                    "world_size": self.group.world_size,
                    "loss": result.loss,
                    "applied": result.is_applied,
                }
                ledger.write(json.dumps(line) + "\n")
                ledger.flush()
            last = now
            done = result.step + 1
            if done < settings.steps and done % settings.checkpoint_every == 0:
                self._save_checkpoint(done, self.seconds_before + now - started)
        seconds = self.seconds_before + time.monotonic() - started
        if self._is_writer:
            self._save_model()
        return {
            "steps": settings.steps,
            "train_seconds": round(seconds, 2),
            "world_size": self.group.world_size,
            "final_loss": result.loss if result else None,
            **self.totals,
        }

    def _hidden(self, input_ids_BT: Any) -> Any:
        from lrmc_ray.models import hidden_states

        return hidden_states(self.model, input_ids_BT)

    def _samples_of_step(self, step: int) -> list[Any]:
        from lrmc_ray.data.order import samples_of_step
        from lrmc_ray.method.microbatch import cut_sample

        settings = self.settings
        indices = samples_of_step(
            len(self.records), step, batch_size=settings.batch_size, seed=settings.seed
        )
        return [
            cut_sample(self.records[index], settings.tau, k_min=settings.k_min) for index in indices
        ]

    def _probe(self, step: int, index: int, hidden_BTD: Any, batch: Any) -> None:
        """Measure the outside mass of the current model on some positions of part 0."""
        every = self.settings.probe_every
        if not every or step % every or index or not len(batch.supervised.row_N):
            return
        from lrmc_ray.method.probe import outside_mass

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
        self.rho = {"subset/rho": measured.mean}
        stale = 1 - self.settings.tau
        if self._is_writer and measured.mean - 2 * measured.stderr > stale + 0.01:
            _log.warning(
                "step %d: the tuned model puts %.3f of its probability outside the candidates, "
                "more than 1 - tau = %.3f: the subsets are getting stale",
                step,
                measured.mean,
                stale,
            )

    def _count(self, result: Any) -> None:
        self.totals["processed_tokens"] += result.num_processed
        self.totals["original_tokens"] += result.num_tokens
        self.totals["padded_tokens"] += result.num_padded
        self.totals["supervised_positions"] += result.num_supervised
        self.totals["bad_steps"] += not result.is_applied

    def _metrics(self, result: Any, seconds: float) -> dict[str, float]:
        metrics = {
            "train/loss": result.loss,
            "train/anchor_kl": result.anchor,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/supervised_tokens_per_second": result.num_supervised / seconds,
            "train/processed_share": result.num_processed / result.num_tokens,
            "train/padding_share": 1 - result.num_processed / max(1, result.num_padded),
            "train/step_seconds": seconds,
            "subset/k_mean": result.mean_candidates,
            "subset/active_share": result.num_active / result.num_supervised,
            "elastic/world_size": float(self.group.world_size),
            **self.rho,
        }
        self.rho = {}
        statistics = getattr(self.optimizer, "angle_statistics", None)
        if statistics is not None:
            angles = statistics()
            metrics["moclip/angle_deg"] = angles.mean_deg
            metrics["moclip/clipped_share"] = angles.clipped_share
        return metrics

    def _save_checkpoint(self, step: int, seconds: float) -> None:
        from lrmc_ray.checkpoints import save_checkpoint

        if not self._is_writer:
            return
        save_checkpoint(
            self.directory / "checkpoints",
            step,
            {
                "step": step,
                "seed": self.settings.seed,
                "batch_size": self.settings.batch_size,
                "micro_batches": self.settings.micro_batches,
                "record": self.records.directory.name,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "totals": dict(self.totals),
                "seconds": seconds,
            },
        )

    def _resume(self) -> None:
        from lrmc_ray.checkpoints import load_newest

        state = load_newest(self.directory / "checkpoints")
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.first_step = state["step"]
        self.totals = state["totals"]
        self.seconds_before = state["seconds"]

    def _save_model(self) -> None:
        from lrmc_ray.models import save_model

        final = self.directory / MODEL
        partial = final.with_name(MODEL + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        save_model(self.model, self.model_directory, partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def _moclip_options(settings: TrainSettings) -> dict[str, Any]:
    if settings.optimizer == "adamw":
        return {}
    options: dict[str, Any] = {
        "angle": settings.angle,
        "second_moment": settings.second_moment,
        "atan2_scale": settings.atan2_scale,
    }
    if settings.optimizer == "moclip":
        options |= {"delta_max": settings.delta_max, "clip": settings.clip}
    return options


@contextmanager
def _shown_progress(directory: Path, steps: int) -> Iterator[None]:
    """A bar that follows the metrics which rank 0 writes."""
    from lrmc_ray.metrics_log import read_metrics

    stop = threading.Event()

    def last_line() -> tuple[int, dict[str, float]]:
        lines = read_metrics(directory / METRICS)
        return (lines[-1].step, lines[-1].metrics) if lines else (0, {})

    done = last_line()[0]
    with progress("Training", total=steps, unit="steps", completed=done) as bar:

        def follow() -> None:
            shown = done
            is_last = False
            while not is_last:
                is_last = stop.wait(0.5)
                step, metrics = last_line()
                if step > shown:
                    note = f"loss {metrics.get('train/loss', float('nan')):.3f}"
                    bar.advance(step - shown, note=note)
                    shown = step

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.train``."""
    from lrmc_ray.cli import add_run_arguments, settings_from

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Stage 1: fine-tune on the recorded candidates with MoClip. Records first "
        "where that has not been done.",
    )
    add_run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    settings = settings_from(arguments)
    from lrmc_ray.record import record, training_files

    training_files(settings)
    with ray_session(arguments.address, log=arguments.output / RAY_LOG, verbose=arguments.verbose):
        recorded = record(settings, arguments.output)
        identity = {"record": recorded.name, **settings.train.model_dump(mode="json")}
        directory = arguments.output / "training" / fingerprint(identity)
        with _shown_progress(directory, settings.train.steps):
            train(settings, recorded, directory)
    manifest = read_manifest(directory, made_by=MADE_BY)
    if arguments.json:
        print(json.dumps({"directory": str(directory), **manifest}))
    else:
        print(
            f"{manifest['steps']} steps in {manifest['train_seconds']:.0f} s, "
            f"{manifest['processed_tokens']} of {manifest['original_tokens']} tokens processed."
        )
        print(f"The model is in {directory / MODEL}.")
        print(f"Next: python -m lrmc_ray.evaluate --tuned {directory / MODEL}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
