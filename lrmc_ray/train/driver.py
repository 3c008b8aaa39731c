"""Stage 1: fine-tune on the recorded candidates with MoClip, on any number of workers.

    python -m lrmc_ray.train --output runs train.lr=1e-5

A Ray Train ``TorchTrainer`` runs :func:`lrmc_ray.method.training_loop.train` on its workers. When
workers are lost or join, Ray starts the loop again with another number of them; it goes on from
our own checkpoint, with the same samples in the same order, and in strict mode to the same bits.
"""

import asyncio
import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lrmc_ray.cluster.session import release_orphaned_groups, watches_preemption
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError, DivergedError, LrmcError, TrainingError
from lrmc_ray.files.artifacts import (
    fingerprint,
    is_finished,
    lock_directory,
    write_json,
    write_manifest,
)
from lrmc_ray.files.beats import PROGRESS, beat
from lrmc_ray.files.full_disk import full_disk
from lrmc_ray.files.names import CHECKPOINTS, LEDGER
from lrmc_ray.files.place import place_of
from lrmc_ray.models.directory import local_directory, send_model
from lrmc_ray.record.identity import check_fits
from lrmc_ray.train.divergence import Divergence
from lrmc_ray.train.failures import cause_text, is_worker_loss, telling_cause
from lrmc_ray.train.ledger import audit_ledger
from lrmc_ray.train.precision import with_precision
from lrmc_ray.train.run_files import RunFiles, run_files
from lrmc_ray.train.used import check_used
from lrmc_ray.train.workers import (
    collective_backend,
    release_reservation,
    train_here,
    training_worker,
    trains_here,
    worker_range,
)

if TYPE_CHECKING:
    from lrmc_ray.train.early_stopping import Rung

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.train"


MAX_WORKER_FAILURES = 10
"""Losses of workers or nodes in a row, without a new checkpoint, that one command puts up with."""


STOP_SECONDS = 20.0
"""How long a command that is told to stop waits for a last checkpoint."""


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """What the workers of one run are to do."""

    settings: RunSettings
    """Of the run, ``epochs`` already turned into ``steps``."""
    record: Path
    """The finished record to train on."""
    model_directory: Path
    """The base model."""
    rung: "Rung | None" = None
    """Where a trial is scored on the way, and perhaps ends."""


def train(
    settings: RunSettings,
    record: Path,
    directory: Path,
    *,
    rung: "Rung | None" = None,
    stored_as: str | None = None,
    here: bool = False,
) -> Path:
    """Train and leave the model in ``directory / "model"``; returns ``directory``.

    Needs a running Ray session. A call that was interrupted goes on from the newest checkpoint; a
    finished one returns at once.

    Args:
        settings: ``train`` says how, ``resources`` with how many workers and, with a storage, by
            way of what they exchange files.
        record: the finished record to train on.
        directory: of the run, on this node; one command at a time may use it.
        rung: where a trial is scored on the way. A run that ends there leaves no model, and its
            manifest says ``pruned``. A run that diverged has none either, and says ``diverged``.
        stored_as: name of the run in the storage; by default one that says what it is made with.
        here: train in this process, which has imported half of what it takes, where one worker is
            all there is and Ray can hold its cores for it. If it dies, so does the caller; a worker
            would be replaced. The model is the same.

    Raises:
        TrainingError: the workers failed; the message has the cause.
        DiskError: they found no space.
        DataError: ``directory`` holds a run with other settings, or ``record`` belongs to another
            model, tokenizer, chat template or training data.
        DirectoryInUseError: another command is working in ``directory``.
        ResourceError: fewer workers fit into the cluster than the settings ask for.
    """
    model_directory = local_directory(settings.model)
    check_fits(record, settings, model_directory)
    settings = with_steps(settings, record)
    check_used(record, settings.train)
    settings = with_precision(settings, record)
    identity = run_identity(settings, record)
    with lock_directory(directory):
        claim(directory, identity)
        if is_finished(directory):
            return directory
        place = place_of(settings.resources.storage)
        files = run_files(place, directory, stored_as or f"training/{fingerprint(identity)}")
        if files.is_finished():
            files.fetch_finished()
            return directory
        start = time.monotonic()
        job = TrainingJob(_with_workers(settings), record, model_directory, rung)
        with files.shown():
            # Shards need a process group, which would stay in this process.
            may_be_here = here and settings.train.parallel == "replicate"
            in_place = may_be_here and trains_here(job.settings.resources)
            outcome = (run_here if in_place else run_workers)(job, files)
        files.fetch()
        manifest = {
            "kind": "training",
            "identity": identity,
            "seconds": round(time.monotonic() - start, 2),
            "ledger": _audit(settings, record, directory, steps=outcome["steps"]),
            **outcome,
        }
        files.commit(manifest)
        write_manifest(directory, manifest)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        (directory / PROGRESS).unlink(missing_ok=True)
    return directory


def _with_workers(settings: RunSettings) -> RunSettings:
    """``settings`` with the numbers of workers that fit into the cluster now.

    They are looked up once. A node that is lost later may come back, so its place is kept for it.
    """
    resources = settings.resources.model_copy(update={"workers": worker_range(settings)})
    return settings.model_copy(update={"resources": resources})


def with_steps(settings: RunSettings, record: Path) -> RunSettings:
    """``settings`` with ``train.epochs``, if it is set, turned into ``train.steps``.

    Raises:
        ConfigError: the warm-up is longer than these epochs.
    """
    from lrmc_ray.train.samples import number_of_steps

    steps = number_of_steps(settings.train, record)
    train = settings.train.model_copy(update={"steps": steps, "epochs": None})
    return settings.model_copy(update={"train": train})


def check_converged(manifest: Mapping[str, Any]) -> None:
    """Refuse a run whose loss ended far above where it began.

    Args:
        manifest: of the run.

    Raises:
        DivergedError: it diverged, and has no model.
    """
    if found := manifest.get("diverged"):
        raise DivergedError(Divergence.of(found).message(manifest["identity"]["lr"]))


def run_identity(settings: RunSettings, record: Path) -> dict[str, Any]:
    """What makes two training runs the same."""
    return {"record": record.name, **settings.train.model_dump(mode="json")}


def _audit(settings: RunSettings, record: Path, directory: Path, *, steps: int) -> dict[str, Any]:
    """Whether every sample was used as it should, as the ledger has it."""
    from lrmc_ray.record.reader import Records
    from lrmc_ray.train.samples import TrainingSamples

    samples = TrainingSamples(Records(record), settings.train)
    audit = audit_ledger(directory / LEDGER, samples.ids_of_step, steps=steps)
    if not audit.is_exact:
        _log.warning(
            "%s does not show every sample used as it should: %s", directory / LEDGER, audit
        )
    return {**dataclasses.asdict(audit), "is_exact": audit.is_exact}


def claim(directory: Path, identity: dict[str, Any]) -> None:
    """Remember what ``directory`` is for, or refuse it if it is for something else.

    Raises:
        DataError: it holds a run with another ``identity``, or its own cannot be read.
    """
    path = directory / "identity.json"
    if not path.is_file():
        write_json(path, identity)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}); remove that file if {directory} is the run you mean"
        ) from None
    different = sorted(
        key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key)
    )
    if different:
        key = different[0]
        raise DataError(
            f"{directory} holds a training run with other settings ({key} was {before.get(key)}, "
            f"now {identity.get(key)}); use another --output, or remove it"
        )


def run_workers(job: TrainingJob, files: RunFiles) -> dict[str, Any]:
    """Run the workers to the end, with others in place of those that are lost.

    Args:
        job: what they do.
        files: of the run; a checkpoint there is how far they came.

    Returns:
        What rank 0 reports.

    Raises:
        TrainingError: the loop failed, or too many workers were lost without a new checkpoint.
        DiskError: there is no space to write.
        LrmcError: the loop refused something; the error is its own.
    """
    files.forget_wishes()
    failures = 0
    reached: int | None = None
    while True:
        try:
            release_reservation(files)
            trainer = make_trainer(job, files)
            return interruptible(trainer.fit, files)
        except Exception as error:
            cause = telling_cause(error)
            if isinstance(cause, LrmcError):
                raise cause from error
            newest = next(reversed(files.steps()), None)
            failures = failures + 1 if newest == reached else 1
            reached = newest
            if not is_worker_loss(cause) or failures > MAX_WORKER_FAILURES:
                raise _failure(files, cause) from error
            _log.warning("a worker was lost (%s); going on from the checkpoint", cause_text(cause))
        finally:
            files.clear_ray()


def run_here(job: TrainingJob, files: RunFiles) -> dict[str, Any]:
    """The run in this process, see :func:`lrmc_ray.train.workers.train_here`.

    Args:
        job: what is done.
        files: of the run.

    Returns:
        What goes into the manifest.

    Raises:
        TrainingError: the loop failed.
        DiskError: there is no space to write.
        LrmcError: the loop refused something.
    """
    files.forget_wishes()
    try:
        return train_here(_loop_config(job, files))
    except LrmcError:
        raise
    except Exception as error:
        raise _failure(files, error) from error


def _failure(files: RunFiles, cause: BaseException) -> LrmcError:
    # Torch does not say what kept it from writing.
    if (full := full_disk(files.directory, cause_text(cause))) is not None:
        return full
    return TrainingError(f"training in {files.directory} failed: {cause_text(cause)}")


def _loop_config(job: TrainingJob, files: RunFiles) -> dict[str, Any]:
    """What a worker is told."""
    return {
        "train": job.settings.train.model_dump(mode="json"),
        "record": str(job.record.resolve()),
        "model": send_model(files.place, job.model_directory),
        "files": files.for_workers(),
        "threads": job.settings.resources.cpus_per_worker,
        "rung": job.rung,
        "work": str(files.directory.resolve()),
        "may_be_preempted": watches_preemption(),
    }


def make_trainer(job: TrainingJob, files: RunFiles) -> Any:
    """Ray's trainer for one attempt: its ``fit`` runs :func:`training_worker` on every worker.

    Args:
        job: what the workers do; ``settings.resources.workers`` says how many there may be.
        files: of the run.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    release_orphaned_groups()
    resources = job.settings.resources
    return _trainer_class()(
        training_worker,
        train_loop_config=_loop_config(job, files),
        torch_config=TorchConfig(backend=collective_backend(resources, job.settings.train)),
        scaling_config=ScalingConfig(
            num_workers=worker_range(job.settings),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.of_worker(),
            label_selector=dict(resources.labels) or None,
            elastic_resize_monitor_interval_s=resources.resize_seconds,
        ),
        # A new name each time: Ray would go on from its own snapshot, we from our checkpoints.
        run_config=RunConfig(
            name=f"run-{time.time_ns()}",
            **files.ray_storage(),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _trainer_class() -> Any:
    """Ray's ``TorchTrainer`` without three helper processes, whose imports cost seconds of a run.

    One hands out Ray datasets, of which there are none; one removes the placement group of a
    controller that died, which `release_orphaned_groups` does before every attempt. The third is
    the controller: in an actor, a search's trial for example, which only waits for it anyway, it
    runs in the same process. Then the workers belong to the trial itself, and end with it.
    """
    from ray.train.torch import TorchTrainer

    try:
        from ray.train.v2._internal.callbacks import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import (
            PlacementGroupCleanerCallback,
        )
        from ray.train.v2._internal.execution.controller import TrainController
    except ImportError:  # not a public interface
        return TorchTrainer
    helpers = (DatasetsCallback, PlacementGroupCleanerCallback)

    class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's types are skipped
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, helpers)]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            import ray

            # A driver may shut Ray down while it trains; a controller in it would start Ray again.
            if ray.get_runtime_context().get_actor_id() is None:
                return super()._initialize_and_run_controller(**arguments)
            controller = TrainController(**arguments)
            _beat_with(controller)
            asyncio.run(controller.run())
            return controller.get_result()

    return LeanTrainer


def _beat_with(controller: Any) -> None:
    """Give a sign of life whenever Ray Train tries again to start the workers of a run.

    A run that waits for a node to come back does not hang.
    """
    set_state = controller._set_state

    def changed(state: Any) -> None:
        beat()
        set_state(state)

    controller._set_state = changed


def interruptible(fit: Callable[[], Any], files: RunFiles) -> dict[str, Any]:
    """What ``fit`` returns; a signal that ends this process asks for a checkpoint first.

    Ray's own handler of Ctrl-C, which aborts the workers, is set in the main thread alone. So
    ``fit`` runs in a side thread if this is the main one.

    Args:
        fit: of Ray's trainer; its result has what rank 0 reports as ``return_value``.
        files: of the run, where the wish for a checkpoint is left and seen to be fulfilled.
    """
    if threading.current_thread() is not threading.main_thread():
        return cast(dict[str, Any], fit().return_value)
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(fit().return_value)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return cast(dict[str, Any], future.result())
    except (KeyboardInterrupt, SystemExit):
        if not future.done():
            _log.warning("stopping; waiting up to %.0f s for a checkpoint", STOP_SECONDS)
            files.ask()
            deadline = time.monotonic() + STOP_SECONDS
            while files.is_asked() and not future.done() and time.monotonic() < deadline:
                time.sleep(0.05)
        raise
