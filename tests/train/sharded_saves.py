"""What one of 2 workers does in the tests of checkpoints that are written beside the training."""

import contextlib
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train.checkpoints import list_checkpoints, step_of
from lrmc_ray.train.loop import TrainingRun
from lrmc_ray.train.run_files import LocalRun
from tests.support.faults import Killed
from tests.support.training import settings_of

WORKERS = 2
LARGEST_FILE = 150_000
"""Bytes; less than a worker's shards, more than anything else that worker 1 writes."""


class Watched:
    """A run of which it is known what a worker held, and which checkpoints there were, and when."""

    def __init__(self, run: TrainingRun, directory: Path, name: str) -> None:
        self.run, self.directory, self.name = run, directory, name
        self.done = 0
        """Steps whose samples were asked for."""
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        """Copies of weights and moments, by the number of steps behind which they were saved."""
        self.found: list[tuple[int, list[int]]] = []
        """Behind every save: its step, and those of the checkpoints that were there."""
        self.staged: list[tuple[int, int]] = []
        """Behind every save: bytes of the staged copies, and where the first one is."""
        self.writing: Callable[[], None] = lambda: time.sleep(0.3)
        """What happens first in the thread that writes."""
        self.before_step: Callable[[int], None] = lambda step: None
        assert run.learner.sharded_state is not None
        self.state = run.learner.sharded_state
        self._save, self._write = run.checkpoints.save, self.state.write
        self._samples = run.fresh.samples_of_step
        run.checkpoints.save = self.save  # type: ignore[method-assign]
        self.state.write = self.write  # type: ignore[method-assign]
        run.fresh.samples_of_step = self.samples  # type: ignore[method-assign]

    def samples(self, step: int) -> Any:
        self.before_step(step)
        self.done = step
        return self._samples(step)

    def save(self, step: int, *args: Any, **options: Any) -> None:
        learner = self.run.learner
        self.held[step] = {}
        for name, parameter in learner.trainable.parameters.items():
            self.held[step][f"model/{name}"] = parameter.detach().clone()
            for key, value in learner.optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    self.held[step][f"{key}/{name}"] = value.clone()
        self._save(step, *args, **options)
        there = [step_of(path) for path in list_checkpoints(self.run.directory / CHECKPOINTS)]
        self.found.append((step, there))
        copies = [copy.to_local() for copy in self.state._staged.values()]
        self.staged.append((sum(copy.nbytes for copy in copies), copies[0].data_ptr()))

    def write(self, partial: Path) -> dict[str, str]:
        self.writing()
        return self._write(partial)

    def go(self) -> None:
        """Run to the end, or to the error that is kept."""
        error: BaseException | None = None
        try:
            self.run.run()
        except (Killed, OSError, RuntimeError) as found:
            error = found
        limit_files(resource.RLIM_INFINITY)
        seen = {name: getattr(self, name) for name in ("held", "found", "staged", "done")}
        told = None if error is None else (type(error).__name__, getattr(error, "errno", None))
        rank = self.run.group.rank
        torch.save({**seen, "error": told}, self.directory / f"{self.name}-{rank}.pt")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def worker(rank: int, directory: Path, record: Path, model: Path) -> None:
    """The part of worker ``rank`` in all runs."""
    torch.set_num_threads(1)
    attempts = 0

    @contextlib.contextmanager
    def attempt(name: str, told: str = "", **changes: Any) -> Any:
        nonlocal attempts
        attempts += 1
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/group-{attempts}",
            rank=rank,
            world_size=WORKERS,
            timeout=timedelta(minutes=10),
        )
        settings = settings_of(parallel="shard", reduction="fast", micro_batches=4, **changes)
        run = TrainingRun(
            settings,
            record=record,
            model_directory=model,
            files=LocalRun(directory / name),
            group=WorkerGroup(rank, WORKERS),
            device=torch.device("cpu"),
        )
        watched = Watched(run, directory, told or name)
        yield watched
        watched.go()
        dist.barrier()
        dist.destroy_process_group()

    # Of the second save nothing is written before the weights have changed.
    with attempt("beside") as watched:
        fifth = threading.Event()
        watched.writing = lambda: fifth.wait(60) if watched.done >= 3 else None
        watched.before_step = lambda step: fifth.set() if step == 5 else None

    with attempt("asked for", checkpoint_every=100) as watched:
        wish = directory / "asked for" / CHECKPOINT_NOW
        watched.before_step = lambda step: wish.touch() if step in (1, 3) else None

    with attempt("dies", told="dies first") as watched:
        never = threading.Event()
        watched.writing = lambda: never.wait(60) if watched.done >= 3 else None

        def die(step: int) -> None:
            if step == 5:
                raise Killed

        watched.before_step = die
    never.set()  # what was given up goes on, and must not count
    with attempt("dies"):
        pass

    with attempt("disk is full", told="disk is full first") as watched:

        def fill(step: int) -> None:
            if rank == 1 and step == 3:
                limit_files(LARGEST_FILE)
            time.sleep(0.5)  # the error is known before the last step

        watched.before_step = fill
    with attempt("disk is full"):
        pass

    together(rank, directory)


def together(rank: int, directory: Path) -> None:
    """What workers hear of each other's errors."""
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/group", rank=rank, world_size=WORKERS
    )
    channel = dist.new_group(backend="gloo")
    group = WorkerGroup(rank, WORKERS, channel)
    heard: list[Any] = [group.together(lambda: rank * 10)]
    for error in (OSError(28, "No space left on device"), KeyError("x")):

        def fail(error: Exception = error) -> None:
            if rank == 1:
                raise error

        try:
            group.together(fail)
        except Exception as found:
            heard.append((type(found).__name__, str(found)))
    torch.save(heard, directory / f"together-{rank}.pt")
    dist.destroy_process_group()


def run_all(directory: Path, record: Path, model: Path) -> None:
    """All runs, in processes of their own."""
    for name in ("beside", "asked for", "dies", "disk is full"):
        (directory / name).mkdir()
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        worker, (directory, record, model), nprocs=WORKERS, start_method="forkserver"
    )
