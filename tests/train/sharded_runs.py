"""What one of W workers does in the tests of whole runs with shards: they die, and others go on."""

import contextlib
import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from lrmc_ray.files.names import CHECKPOINTS
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train import loaded_model, sharded_export
from lrmc_ray.train.checkpoints import SHARDS, checkpoint_path
from lrmc_ray.train.loop import TrainingRun
from lrmc_ray.train.run_files import LocalRun
from tests.support.faults import Killed
from tests.support.training import die_behind, settings_of

SETTINGS: dict[str, Any] = {
    "parallel": "shard",
    "reduction": "fast",
    "micro_batches": 4,
    "probe_every": 2,
    "evaluate_every": 2,
}
"""Two checkpoints are kept, and the best one."""
CHANGES: dict[str, dict[str, Any]] = {
    "whole run": {},
    "goes on with more": {},
    "adapters, goes on with fewer": {"lora_rank": 2},
    "goes on behind a damaged one": {"gradient_checkpointing": False},
    "refreshes": {"refresh_every": 2, "evaluate_every": 0, "precision": "bf16"},
    "beside the base": {
        "loss": "kl_to_base",
        "anchor_weight": 0.0,
        "tail_samples": 0,
        "precision": "bf16",
        "gradient_checkpointing": "selective",
    },
    "best": {"export": "best", "lr": 0.1},
}
"""Of the settings, by the names of directories."""


def damage(directory: Path, step: int) -> None:
    """Flip a bit in what some worker has saved."""
    files = checkpoint_path(directory / CHECKPOINTS, step) / SHARDS
    path = next(iter(sorted(files.glob("__*"))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def save_and_die(run: TrainingRun, step: int) -> None:
    """Die behind ``step``, and not before all that is saved is there."""
    save = run.checkpoints.save

    def save_all(*args: Any, **options: Any) -> None:
        save(*args, **options)
        run.checkpoints.wait()

    run.checkpoints.save = save_all  # type: ignore[method-assign]
    die_behind(run, step)


def never(directory: Path, **_: Any) -> Any:
    """No worker loads a whole model."""
    raise AssertionError(directory)


def worker(rank: int, directory: Path, record: Path, model: Path) -> None:
    """The part of worker ``rank`` in all runs."""
    torch.set_num_threads(1)
    loaded_model.load_model = never
    attempts = 0

    def attempt(name: str, world_size: int, dies_behind: int | None = None) -> None:
        """One attempt of the run ``name``."""
        nonlocal attempts
        attempts += 1
        if rank >= world_size:
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/group-{attempts}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
        )
        run = TrainingRun(
            settings_of(**{**SETTINGS, **CHANGES[name]}),
            record=record,
            model_directory=model,
            files=LocalRun(directory / name),
            group=WorkerGroup(rank, world_size),
            device=torch.device("cpu"),
        )
        if dies_behind is not None:
            save_and_die(run, dies_behind)
        with contextlib.suppress(Killed):
            result = run.run()
            assert result["world_size"] == world_size
            assert dies_behind is None
        dist.destroy_process_group()

    attempt("whole run", 2)
    sharded_export.FILE_BYTES = 100_000
    attempt("goes on with more", 2, dies_behind=4)
    attempt("goes on with more", 3)
    attempt("adapters, goes on with fewer", 3, dies_behind=3)
    attempt("adapters, goes on with fewer", 2)
    attempt("goes on behind a damaged one", 2, dies_behind=4)
    if rank == 0:
        damage(directory / "goes on behind a damaged one", 4)
    attempt("goes on behind a damaged one", 2)
    attempt("refreshes", 3)
    attempt("beside the base", 2)
    attempt("best", 3)


def run_all(directory: Path, record: Path, model: Path) -> None:
    """All runs, in processes of their own."""
    for name in CHANGES:
        (directory / name).mkdir()
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        worker, (directory, record, model), nprocs=3, start_method="forkserver"
    )
