"""What one training worker runs, and how many of them there may be."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.cluster.resources import worker_slots
from lrmc_ray.cluster.stacks import listening
from lrmc_ray.config import ResourceSettings, RunSettings, TrainSettings, validate
from lrmc_ray.files.beats import PROGRESS, beating, file_writer
from lrmc_ray.record.stored import record_here
from lrmc_ray.train.run_files import RunFiles

if TYPE_CHECKING:
    from lrmc_ray.method.workers import WorkerGroup

_log = logging.getLogger(__name__)


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
    import torch

    from lrmc_ray.method.workers import WorkerGroup

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    files: RunFiles = config["files"]()
    is_writer = context.get_world_rank() == 0
    if is_writer:
        _note_reservation(files)
        files.directory.mkdir(parents=True, exist_ok=True)
    sign = beating(file_writer(files.directory / PROGRESS)) if is_writer else nullcontext()
    with listening(config["work"]), sign:
        return _run(config, files, WorkerGroup(context.get_world_rank(), context.get_world_size()))


def _run(config: dict[str, Any], files: RunFiles, group: "WorkerGroup") -> dict[str, Any]:
    """Load everything on this node, and train."""
    import ray.train.torch

    from lrmc_ray.train.loop import TrainingRun

    run = TrainingRun(
        validate(TrainSettings, config["train"], "train"),
        record=record_here(files.place, Path(config["record"])),
        model_directory=files.place.here(config["model"]),
        files=files,
        group=group,
        device=ray.train.torch.get_device(),
        is_preempted=_is_preempted if config["may_be_preempted"] else lambda: False,
        rung=config["rung"],
    )
    return run.run()


def _is_preempted() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None
