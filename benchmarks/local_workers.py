"""Gloo workers of one machine with the same random Llama: for sharded_step and sharded_saving."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.memory_forecast import Point as Model
from benchmarks.memory_forecast import config_of, save_random

Worker = Callable[[int, argparse.Namespace, Path], None]
"""What a worker does: its rank, the arguments, and the directory with ``model``."""


def join(rank: int, args: argparse.Namespace, directory: Path) -> None:
    """Become one of the workers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/group", rank=rank, world_size=args.workers
    )


def leave(rank: int, directory: Path, found: Any) -> None:
    """End the work; rank 0 says what it has found."""
    if rank == 0:
        (directory / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def found_by(worker: Worker, args: argparse.Namespace) -> Any:
    """What rank 0 of ``args.workers`` workers has found."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        options = {"tie_word_embeddings": True, "num_hidden_layers": args.layers}
        save_random(config_of(Model("llama", args.length, options)), directory / "model")
        start_processes(  # type: ignore[no-untyped-call]
            worker, (args, directory), nprocs=args.workers, start_method="forkserver"
        )
        return json.loads((directory / "found.json").read_text())
