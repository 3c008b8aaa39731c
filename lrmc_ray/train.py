"""Stage 1: fine-tune on the recorded candidates with MoClip, on any number of workers.

    python -m lrmc_ray.train --output runs train.lr=1e-5

A Ray Train ``TorchTrainer`` runs :func:`lrmc_ray.method.training_loop.train` on its workers. When
workers are lost or join, Ray starts the loop again with another number of them; it goes on from
our own checkpoint, with the same samples in the same order, and in strict mode to the same bits.
"""

import argparse
import asyncio
import dataclasses
import json
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lrmc_ray.artifacts import (
    fingerprint,
    is_finished,
    lock_directory,
    read_manifest,
    write_json,
    write_manifest,
)
from lrmc_ray.config import ResourceSettings, RunSettings, TrainSettings, validate
from lrmc_ray.console import progress, run_command, setup_logging
from lrmc_ray.errors import DataError, DiskError, LrmcError
from lrmc_ray.ray_session import (
    RAY_LOG,
    ray_session,
    release_orphaned_groups,
    watches_preemption,
    worker_slots,
)
from lrmc_ray.run_files import CHECKPOINT_NOW, CHECKPOINTS, LEDGER, METRICS, MODEL
from lrmc_ray.storage import Storage, check_storage, open_storage, publish_model
from lrmc_ray.stored_record import StoredRecord
from lrmc_ray.stored_run import RAY, RESERVATION, StoredRun

if TYPE_CHECKING:
    from lrmc_ray.early_stopping import Rung

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.train"
MAX_WORKER_FAILURES = 10
"""Losses of workers or nodes in a row, without a new checkpoint, that one command puts up with."""
STOP_SECONDS = 20.0
"""How long a command that is told to stop waits for a last checkpoint."""


class TrainingError(LrmcError):
    """Training failed for good; the message says why."""


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
    from lrmc_ray.record import check_fits

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
    from lrmc_ray.training_samples import number_of_steps

    steps = number_of_steps(settings.train, record)
    train = settings.train.model_copy(update={"steps": steps, "epochs": None})
    return settings.model_copy(update={"train": train})


def run_identity(settings: RunSettings, record: Path) -> dict[str, Any]:
    """What makes two training runs the same."""
    return {"record": record.name, **settings.train.model_dump(mode="json")}


def _audit(settings: RunSettings, record: Path, directory: Path, *, steps: int) -> dict[str, Any]:
    """Whether every sample was used as it should, as the ledger has it."""
    from lrmc_ray.data.records import Records
    from lrmc_ray.ledger import audit_ledger
    from lrmc_ray.training_samples import TrainingSamples

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
    from lrmc_ray.checkpoints import list_checkpoints

    scratch = directory / "ray"
    (directory / CHECKPOINT_NOW).unlink(missing_ok=True)
    if stored is not None:
        stored.forget_wishes()
    failures = 0
    reached: object = None
    while True:
        try:
            _release_reservation(directory, stored)
            trainer = _trainer(settings, record, model_directory, directory, scratch, rung, stored)
            return _interruptible(trainer.fit, directory, stored)
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, LrmcError):
                raise cause from error
            saved = stored.steps() if stored else list_checkpoints(directory / CHECKPOINTS)
            newest = next(reversed(saved), None)
            failures = failures + 1 if newest == reached else 1
            reached = newest
            if not _is_worker_loss(cause) or failures > MAX_WORKER_FAILURES:
                raise TrainingError(f"training in {directory} failed: {_text(cause)}") from error
            _log.warning("a worker was lost (%s); going on from the checkpoint", _text(cause))
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
        _worker,
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


def collective_backend(resources: ResourceSettings) -> str | None:
    """How workers exchange tensors; None leaves it to Ray, which takes NCCL on GPUs, else Gloo.

    NCCL refuses two workers on one GPU; Gloo takes their tensors through the host.
    """
    return "gloo" if 0 < resources.gpus_per_worker < 1 else None


def worker_range(settings: RunSettings) -> tuple[int, int]:
    """Fewest and most workers; the most that both the cluster and the micro-batches allow.

    Raises:
        ResourceError: fewer workers fit than the settings ask for.
    """
    least = settings.resources.workers[0] if settings.resources.workers else 1
    fitting = worker_slots(settings.resources, least=least, what="training worker")
    most = settings.resources.workers[1] if settings.resources.workers else fitting
    return least, max(least, min(most, settings.train.micro_batches))


_INNER = ("_base_exc", "controller_failure", "health_check_failure", "cause", "__cause__")
"""Where errors of Ray keep what they wrap."""


def _cause(error: BaseException) -> BaseException:
    """The innermost error of what Ray Train wraps several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _cause(_most_telling(failures.values()))
    for attribute in _INNER:
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
    modules = {kind.__module__.partition(".")[0] for kind in type(cause).__mro__}
    is_collective = any(kind.__module__ == "torch.distributed" for kind in type(cause).__mro__)
    return "ray" in modules or is_collective or "gloo" in str(cause).lower()


def _text(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    first = lines[0] if lines else ""
    return first if isinstance(cause, FloatingPointError) else f"{type(cause).__name__}: {first}"


def _note_reservation(directory: Path, stored: StoredRun | None) -> None:
    """Write down under which name the controller of this run has reserved its workers."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        run_id = get_train_context().train_run_context.run_id
    except (ImportError, AttributeError):  # not a public interface
        return
    if stored is None:
        (directory / RESERVATION).write_text(f"train-{run_id}", encoding="utf-8")
    else:
        stored.storage.write(f"{stored.name}/{RESERVATION}", f"train-{run_id}".encode())


def _release_reservation(directory: Path, stored: StoredRun | None = None) -> None:
    """Give back what a controller that was killed had reserved.

    Ray holds it for three minutes, in which the next run on the same cluster would find no
    resources; with a Ray of its own there is nothing to give back.
    """
    import ray
    from ray.exceptions import RayError

    path = directory / RESERVATION
    noted = stored.storage.read(f"{stored.name}/{RESERVATION}") if stored else None
    if noted is not None:
        path.write_bytes(noted)
    if not path.is_file():
        return
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.cancel_request.remote(path.read_text(encoding="utf-8")), timeout=10)
    except (ValueError, AttributeError, TypeError, RayError) as error:
        _log.debug("nothing was given back: %s", error)
    path.unlink(missing_ok=True)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of one worker; returns, from rank 0, what goes into the manifest."""
    import ray.train
    import ray.train.torch
    import torch

    from lrmc_ray.method.training_loop import WorkerGroup
    from lrmc_ray.training_run import TrainingRun

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    record, model = Path(config["record"]), Path(config["model"])
    directory, stored = Path(config["directory"]), None
    if (names := config["stored"]) is not None:
        storage = Storage(names["uri"])
        record = StoredRecord(storage, names["record"]).view_here()
        model = storage.fetch(names["model"], storage.cache / names["model"])
        directory = storage.cache / names["run"]
        directory.mkdir(parents=True, exist_ok=True)
        stored = StoredRun(storage, names["run"], directory)
    if context.get_world_rank() == 0:
        _note_reservation(directory, stored)
    run = TrainingRun(
        validate(TrainSettings, config["train"], "train"),
        record=record,
        model_directory=model,
        directory=directory,
        group=WorkerGroup(context.get_world_rank(), context.get_world_size()),
        device=ray.train.torch.get_device(),
        is_preempted=_is_preempted if config["may_be_preempted"] else lambda: False,
        rung=config["rung"],
        stored=stored,
    )
    return run.run()


def _is_preempted() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None


@contextmanager
def _shown_progress(directory: Path, steps: int) -> Iterator[None]:
    """A bar that follows the metrics which rank 0 writes."""
    from lrmc_ray.metrics_log import read_new_lines

    stop = threading.Event()
    path = directory / METRICS
    lines, offset = read_new_lines(path, 0)
    shown = lines[-1].step if lines else 0
    with progress("Training", total=steps, unit="steps", completed=shown) as bar:

        def follow() -> None:
            nonlocal offset, shown
            seen: dict[str, float] = {}
            is_last = False
            while not is_last:
                is_last = stop.wait(0.5)
                lines, offset = read_new_lines(path, offset)
                for line in lines:
                    seen |= line.metrics
                    if line.step > shown:
                        bar.advance(line.step - shown, note=progress_note(seen))
                        shown = line.step

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


_NOTES = (
    ("loss", "train/loss", "{:.3f}"),
    ("held-out NLL", "train/held_out_nll", "{:.3f}"),
    ("tokens/s", "train/tokens_per_second", "{:.0f}"),
    ("K", "subset/k_mean", "{:.0f}"),
    ("active", "subset/active_share", "{:.0%}"),
    ("rho", "subset/rho", "{:.4f}"),
    ("angle", "moclip/angle_deg", "{:.0f}"),
    ("clipped", "moclip/clipped_share", "{:.0%}"),
    ("workers", "elastic/world_size", "{:.0f}"),
)


def progress_note(metrics: Mapping[str, float]) -> str:
    """The metrics that say at a glance how training goes, in one line."""
    return ", ".join(
        f"{name} {form.format(metrics[key])}"
        for name, key, form in _NOTES
        if math.isfinite(metrics.get(key, math.nan))
    )


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of ``train``: ``--lora-rank 8`` is ``train.lora_rank=8``."""
    group = parser.add_argument_group("settings of train, each the same as train.NAME=VALUE")
    for name, field in TrainSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        description = " ".join((field.description or "").split()).replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(
                flag,
                dest=f"train.{name}",
                action="store_const",
                const="true",
                help=description,
            )
        else:
            group.add_argument(flag, dest=f"train.{name}", metavar="VALUE", help=description)


def flag_overrides(arguments: argparse.Namespace) -> list[str]:
    """The settings that were given as flags, as overrides."""
    return [
        f"{name}={value}"
        for name, value in vars(arguments).items()
        if name.startswith("train.") and value is not None
    ]


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.train``."""
    from lrmc_ray.cli import add_run_arguments, settings_from

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Stage 1: fine-tune on the recorded candidates with MoClip. Records first "
        "where that has not been done.",
    )
    add_run_arguments(parser)
    add_setting_flags(parser)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    arguments.overrides += flag_overrides(arguments)
    settings = settings_from(arguments)
    from lrmc_ray.record import prepare, record

    storage = settings.resources.storage
    if storage is not None:
        check_storage(storage)
    prepare(settings, arguments.output)  # bad rows are found before Ray starts
    with ray_session(
        arguments.address,
        log=arguments.output / RAY_LOG,
        verbose=arguments.verbose,
        storage=storage,
    ):
        recorded = record(settings, arguments.output)
        settings = with_steps(settings, recorded)
        identity = run_identity(settings, recorded)
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
