"""What one training worker runs, and how many of them there may be."""

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.cluster.resources import fits_here, held_cores, worker_slots
from lrmc_ray.cluster.stacks import listening
from lrmc_ray.config import ResourceSettings, RunSettings, TrainSettings, validate
from lrmc_ray.files.beats import PROGRESS, beating, file_writer
from lrmc_ray.method.names import HOST_AND_GPU
from lrmc_ray.record.stored import record_here
from lrmc_ray.train.run_files import RunFiles

if TYPE_CHECKING:
    import torch

    from lrmc_ray.method.workers import WorkerGroup

_log = logging.getLogger(__name__)


def collective_backend(resources: ResourceSettings, train: TrainSettings) -> str | None:
    """How workers exchange tensors; None leaves it to Ray, which takes NCCL on GPUs, else Gloo.

    NCCL refuses two workers on one GPU; Gloo takes their tensors through the host. Where shards are
    in the host's memory, dot products and norms are summed there, which NCCL cannot.
    """
    if 0 < resources.gpus_per_worker < 1:
        return "gloo"
    return HOST_AND_GPU if resources.gpus_per_worker and train.offload == "cpu" else None


def worker_range(settings: RunSettings) -> tuple[int, int]:
    """Fewest and most workers; the most that both the cluster and the micro-batches allow.

    Raises:
        ResourceError: fewer workers fit than the settings ask for.
    """
    least = settings.resources.workers[0] if settings.resources.workers else 1
    fitting = worker_slots(settings.resources, least=least, what="training worker")
    most = settings.resources.workers[1] if settings.resources.workers else fitting
    return least, max(least, min(most, settings.train.micro_batches))


def _note_reservation(files: RunFiles) -> None:
    """Write down under which name the controller of this run has reserved its workers."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        run_id = get_train_context().train_run_context.run_id
    except (ImportError, AttributeError):  # not a public interface
        return
    files.note_reservation(f"train-{run_id}")


def release_reservation(files: RunFiles) -> None:
    """Give back what a controller that was killed had reserved.

    Ray holds it for three minutes, in which the next run on the same cluster would find no
    resources; with a Ray of its own there is nothing to give back.
    """
    import ray
    from ray.exceptions import RayError

    name = files.reservation()
    if name is None:
        return
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.cancel_request.remote(name), timeout=10)
    except (ValueError, AttributeError, TypeError, RayError) as error:
        _log.debug("nothing was given back: %s", error)
    files.forget_reservation()


def training_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of one worker; returns, from rank 0, what goes into the manifest.

    Args:
        config: what :func:`lrmc_ray.train.driver.make_trainer` gives Ray for its workers.
    """
    import ray.train
    import ray.train.torch

    from lrmc_ray.method.workers import WorkerGroup

    context = ray.train.get_context()
    files: RunFiles = config["files"]()
    is_writer = context.get_world_rank() == 0
    if is_writer:
        files.directory.mkdir(parents=True, exist_ok=True)
        _note_reservation(files)
    with listening(config["work"]):
        return _run(
            config,
            files,
            WorkerGroup(context.get_world_rank(), context.get_world_size()),
            device=ray.train.torch.get_device(),
            is_preempted=_is_preempted if config["may_be_preempted"] else lambda: False,
        )


def trains_here(resources: ResourceSettings) -> bool:
    """Whether this process can train in place of a run's only worker.

    Args:
        resources: of the run, ``workers`` being how many fit.
    """
    is_alone = resources.workers is not None and resources.workers[1] == 1
    return is_alone and resources.storage is None and fits_here(resources)


def train_here(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of a run's only worker, in this process: none has to start and to import it all.

    If this process dies, so does its caller. Ray gives its cores to nobody else meanwhile.

    Args:
        config: as of :func:`training_worker`.
    """
    import torch

    from lrmc_ray.method.fast.allocator import give_back_memory
    from lrmc_ray.method.workers import WorkerGroup

    files: RunFiles = config["files"]()
    files.directory.mkdir(parents=True, exist_ok=True)
    try:
        with held_cores(config["threads"]):
            return _run(
                config,
                files,
                WorkerGroup(),
                device=torch.device("cpu"),
                is_preempted=lambda: False,
            )
    finally:
        gc.collect()  # a model is full of circles
        give_back_memory()


def _run(
    config: dict[str, Any],
    files: RunFiles,
    group: "WorkerGroup",
    *,
    device: "torch.device",
    is_preempted: Callable[[], bool],
) -> dict[str, Any]:
    """Load everything on this node, and train."""
    import torch

    from lrmc_ray.train.loop import TrainingRun

    torch.set_num_threads(config["threads"])
    is_writer = group.rank == 0
    with beating(file_writer(files.directory / PROGRESS)) if is_writer else nullcontext():
        run = TrainingRun(
            validate(TrainSettings, config["train"], "train"),
            record=record_here(files.place, Path(config["record"])),
            model_directory=files.place.here(config["model"]),
            files=files,
            group=group,
            device=device,
            is_preempted=is_preempted,
            rung=config["rung"],
        )
        return run.run()


def _is_preempted() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None
