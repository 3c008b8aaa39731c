"""What one of W workers does in the tests of loading by rows."""

import ctypes
import multiprocessing
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.head import head_of
from lrmc_ray.models.loading import load_model
from lrmc_ray.train import learner as learner_module
from lrmc_ray.train import loaded_model
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.sharding import Sharding, shard_model

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: every tensor gets a mapping of its own, which is gone when it is."""
CPU = torch.device("cpu")
Held = dict[str, tuple[int, Tensor]]
"""First row and rows of every parameter, by name."""


def settings_of(**changes: Any) -> TrainSettings:
    """Of training in shards."""
    return TrainSettings(parallel="shard", reduction="fast", packing=True, **changes)


def held(sharding: Sharding) -> Held:
    """What this worker has."""
    return {name: (s.first, s.own.detach().clone()) for name, s in sharding.shards.items()}


def both(directory: Path, group: WorkerGroup) -> dict[str, Any]:
    """What a learner holds that read its rows alone, and what is cut out of the whole model."""
    model = load_model(directory)
    cut = shard_model(model, head_of(model), group, CPU)
    kept = loaded_model.load_model
    loaded_model.load_model = None  # type: ignore[assignment]
    try:
        learner = Learner(settings_of(), directory, CPU, group=group)
    finally:
        loaded_model.load_model = kept
    assert learner.sharding is not None
    return {
        "read": held(learner.sharding),
        "cut": held(cut),
        "buffers read": dict(learner.model.named_buffers()),
        "buffers cut": dict(model.named_buffers()),
        "generation": learner.model.generation_config.to_dict(),
        "expected generation": model.generation_config.to_dict(),
        "way": learner.recomputation.way,
        "attention_cost": learner.attention_cost,
    }


def adapted(directory: Path, group: WorkerGroup) -> dict[str, Any]:
    """The same with adapters, drawn on the whole model and on one without values."""
    settings = settings_of(lora_rank=2)
    load = loaded_model.load_model
    loaded_model.load_model = None  # type: ignore[assignment]
    try:
        read = Learner(settings, directory, CPU, group=group)
    finally:
        loaded_model.load_model = load
    kept = loaded_model.model_to_fill
    loaded_model.model_to_fill = _never
    try:
        cut = Learner(settings, directory, CPU, group=group)
    finally:
        loaded_model.model_to_fill = kept
    assert read.sharding is not None
    assert cut.sharding is not None
    return {"read": held(read.sharding), "cut": held(cut.sharding)}


def _never(directory: Path) -> Any:
    raise loaded_model.NotByRowsError(f"{directory} is not to be")


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError


def most_added(action: Any) -> int:
    """How much more anonymous memory there is at most while ``action`` runs."""
    before, most, is_over = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.is_set():
            most = max(most, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    found = action()
    is_over.set()
    thread.join()
    del found
    return most - before


def peak(directory: Path, small: Path, group: WorkerGroup) -> int:
    """Of loading ``directory``; what is imported and compiled is there by ``small``."""
    settings = settings_of(gradient_checkpointing=False)
    learner_module.keep_freed_memory = lambda: False
    for name, value in ((_MMAP_THRESHOLD, 2**16), (_TRIM_THRESHOLD, 0)):
        assert ctypes.CDLL(None).mallopt(name, value)
    Learner(settings, small, CPU, group=group)
    return most_added(lambda: Learner(settings, directory, CPU, group=group))


def worker(rank: int, place: Path, models: dict[str, Path], world_sizes: tuple[int, ...]) -> None:
    """Run everything in every group that ``rank`` belongs to."""
    torch.set_num_threads(1)
    for world_size in world_sizes:
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place}/group-of-{world_size}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
        )
        group = WorkerGroup(rank, world_size)
        found: dict[str, Any] = {
            name: both(directory, group)
            for name, directory in models.items()
            if name not in ("small", "large")
        }
        if world_size == 2:
            found["adapters"] = adapted(models["llama"], group)
            found["peak"] = peak(models["large"], models["small"], group)
        dist.destroy_process_group()
        torch.save(found, place / f"{world_size}-{rank}.pt")


def outcomes(
    place: Path, models: dict[str, Path], world_sizes: tuple[int, ...]
) -> dict[int, list[dict[str, Any]]]:
    """Of every world size, of every rank."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        worker, (place, models, world_sizes), nprocs=max(world_sizes), start_method="forkserver"
    )
    return {
        size: [torch.load(place / f"{size}-{r}.pt", weights_only=False) for r in range(size)]
        for size in world_sizes
    }
