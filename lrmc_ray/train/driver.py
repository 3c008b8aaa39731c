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
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lrmc_ray.cluster.session import (
    release_orphaned_groups,
    watches_preemption,
)
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError, DiskError, LrmcError
from lrmc_ray.files.artifacts import (
    fingerprint,
    is_finished,
    lock_directory,
    write_json,
    write_manifest,
)
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER
from lrmc_ray.files.storage import open_storage
from lrmc_ray.models import publish_model
from lrmc_ray.train.stored import RAY, StoredRun

if TYPE_CHECKING:
    from lrmc_ray.train.early_stopping import Rung

from lrmc_ray.errors import TrainingError
from lrmc_ray.train.failures import cause_text, is_worker_loss, telling_cause
from lrmc_ray.train.workers import (
    collective_backend,
    release_reservation,
    training_worker,
    worker_range,
)

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.train"


MAX_WORKER_FAILURES = 10
"""Losses of workers or nodes in a row, without a new checkpoint, that one command puts up with."""


STOP_SECONDS = 20.0
"""How long a command that is told to stop waits for a last checkpoint."""


def train(
    settings: RunSettings,
    record: Path,
    directory: Path,
    *,
    rung: "Rung | None" = None,
    stored_as: str | None = None,
) -> Path:
    """Train as ``settings.train`` says and leave the model in ``directory / "model"``.

    Needs a running Ray session. A call that was interrupted goes on from the newest checkpoint; a
    finished one returns at once. A run that ends at its ``rung`` leaves no model, and its manifest
    says ``pruned``. With a storage the run is kept there, too, under the name ``stored_as``, by
    default one that says what it was made with; ``directory`` is on this node.

    Raises:
        TrainingError: the workers failed; the message has the cause.
        DataError: ``directory`` holds a run with other settings, or ``record`` belongs to another
            model, tokenizer, chat template or training data.
    """
    from lrmc_ray.models import local_directory
    from lrmc_ray.record.identity import check_fits

    model_directory = local_directory(settings.model)
    check_fits(record, settings, model_directory)
    settings = with_steps(settings, record)
    with lock_directory(directory):
        _claim(directory, run_identity(settings, record))
        if is_finished(directory):
            return directory
        stored = _stored_run(settings, record, directory, stored_as)
        if stored is not None and stored.is_finished():
            stored.fetch_finished()
            return directory
        start = time.monotonic()
        # Of now: a node that is lost in between may come back, and its place is kept for it.
        workers = settings.resources.model_copy(update={"workers": worker_range(settings)})
        with stored.shown() if stored is not None else nullcontext():
            outcome = _fit(
                settings.model_copy(update={"resources": workers}),
                record,
                model_directory,
                directory,
                rung,
                stored,
            )
        if stored is not None:
            stored.fetch()
        manifest = {
            "kind": "training",
            "identity": run_identity(settings, record),
            "seconds": round(time.monotonic() - start, 2),
            "ledger": _audit(settings, record, directory, steps=outcome["steps"]),
            **outcome,
        }
        if stored is not None:
            stored.commit(manifest)
        write_manifest(directory, manifest)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return directory


def _stored_run(
    settings: RunSettings, record: Path, directory: Path, name: str | None
) -> StoredRun | None:
    """The run in the storage; None where all nodes share the disk."""
    storage = open_storage(settings.resources.storage)
    if storage is None:
        return None
    name = name or f"training/{fingerprint(run_identity(settings, record))}"
    return StoredRun(storage, name, directory)


def with_steps(settings: RunSettings, record: Path) -> RunSettings:
    """``settings`` with ``train.epochs``, if it is set, turned into ``train.steps``.

    Raises:
        ConfigError: the warm-up is longer than these epochs.
    """
    from lrmc_ray.train.samples import number_of_steps

    steps = number_of_steps(settings.train, record)
    train = settings.train.model_copy(update={"steps": steps, "epochs": None})
    return settings.model_copy(update={"train": train})


def run_identity(settings: RunSettings, record: Path) -> dict[str, Any]:
    """What makes two training runs the same."""
    return {"record": record.name, **settings.train.model_dump(mode="json")}


def _audit(settings: RunSettings, record: Path, directory: Path, *, steps: int) -> dict[str, Any]:
    """Whether every sample was used as it should, as the ledger has it."""
    from lrmc_ray.record.parts import Records
    from lrmc_ray.train.ledger import audit_ledger
    from lrmc_ray.train.samples import TrainingSamples

    samples = TrainingSamples(Records(record), settings.train)
    audit = audit_ledger(directory / LEDGER, samples.ids_of_step, steps=steps)
    if not audit.is_exact:
        _log.warning(
            "%s does not show every sample used as it should: %s", directory / LEDGER, audit
        )
    return {**dataclasses.asdict(audit), "is_exact": audit.is_exact}


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    """Remember what ``directory`` is for, or refuse it if it is for something else."""
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


def _fit(
    settings: RunSettings,
    record: Path,
    model_directory: Path,
    directory: Path,
    rung: "Rung | None",
    stored: StoredRun | None = None,
) -> dict[str, Any]:
    """Run the workers to the end and return what rank 0 reports."""
    from lrmc_ray.train.checkpoints import list_checkpoints

    scratch = directory / "ray"
    (directory / CHECKPOINT_NOW).unlink(missing_ok=True)
    if stored is not None:
        stored.forget_wishes()
    failures = 0
    reached: object = None
    while True:
        try:
            release_reservation(directory, stored)
            trainer = _trainer(settings, record, model_directory, directory, scratch, rung, stored)
            return _interruptible(trainer.fit, directory, stored)
        except Exception as error:
            cause = telling_cause(error)
            if isinstance(cause, LrmcError):
                raise cause from error
            saved = stored.steps() if stored else list_checkpoints(directory / CHECKPOINTS)
            newest = next(reversed(saved), None)
            failures = failures + 1 if newest == reached else 1
            reached = newest
            if not is_worker_loss(cause) or failures > MAX_WORKER_FAILURES:
                raise TrainingError(
                    f"training in {directory} failed: {cause_text(cause)}"
                ) from error
            _log.warning("a worker was lost (%s); going on from the checkpoint", cause_text(cause))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if stored is not None:
                with suppress(DiskError):
                    stored.storage.delete_all(f"{stored.name}/{RAY}")


def _trainer(
    settings: RunSettings,
    record: Path,
    model_directory: Path,
    directory: Path,
    scratch: Path,
    rung: "Rung | None",
    stored: StoredRun | None,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    release_orphaned_groups()
    resources = settings.resources
    where: dict[str, Any] = {"storage_path": str(scratch.resolve())}
    if stored is not None:
        path = f"{stored.storage.root}/{stored.name}/{RAY}"
        where = {"storage_path": path, "storage_filesystem": stored.storage.filesystem}
    return _trainer_class()(
        training_worker,
        train_loop_config={
            "train": settings.train.model_dump(mode="json"),
            "record": str(record.resolve()),
            "model": str(model_directory),
            "directory": str(directory.resolve()),
            "threads": resources.cpus_per_worker,
            "rung": rung,
            "may_be_preempted": watches_preemption(),
            "stored": None
            if stored is None
            else {
                "uri": stored.storage.uri,
                "run": stored.name,
                "record": record.name,
                "model": publish_model(stored.storage, model_directory),
            },
        },
        torch_config=TorchConfig(backend=collective_backend(resources)),
        scaling_config=ScalingConfig(
            num_workers=worker_range(settings),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.of_worker(),
            label_selector=dict(resources.labels) or None,
            elastic_resize_monitor_interval_s=resources.resize_seconds,
        ),
        # A new name each time: Ray would go on from its own snapshot, we from our checkpoints.
        run_config=RunConfig(
            name=f"run-{time.time_ns()}",
            **where,
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
            asyncio.run(controller.run())
            return controller.get_result()

    return LeanTrainer


def _interruptible(
    fit: Callable[[], Any], directory: Path, stored: StoredRun | None = None
) -> dict[str, Any]:
    """What ``fit`` returns; a signal that ends this process asks for a checkpoint first.

    Ray's own handler of Ctrl-C, which aborts the workers, is set in the main thread alone.
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
            asked = directory / CHECKPOINT_NOW
            if stored is not None:
                stored.ask()
            else:
                asked.touch()
            deadline = time.monotonic() + STOP_SECONDS
            while (
                (stored.is_asked() if stored else asked.exists())
                and not future.done()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
        raise
