"""The processes of running trials and of a comparison's runs: who they are, how they end."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lrmc_ray.cluster.stacks import kill_process, process_birth
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.names import CHECKPOINT_NOW, METRICS

_log = logging.getLogger(__name__)

LEFTOVER_SECONDS = 10.0
"""How long a killed process may take to vanish."""

PROCESSES = "processes.jsonl"
"""The processes in which a run ran, one a line, the last one last: so that it can be stopped."""

DIED = "its process died"


@dataclass(frozen=True)
class RunProcess:
    """The process of a run, told apart from a later one with the same number."""

    pid: int
    born: int | None
    """See :func:`process_birth`."""
    node: str
    """Ray's id of its node."""
    began: float
    """When the run began in it, in seconds since 1970; for people to read."""


def death_cause(directory: Path) -> str:
    """What can be said of a run whose process died without a word."""
    return DIED + (" while its model was scored" if is_finished(directory / "training") else "")


def write_process(directory: Path) -> None:
    """Note in a run's directory that it goes on in this process."""
    import ray

    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    process = RunProcess(pid, process_birth(pid), node, time.time())
    with (directory / PROCESSES).open("a", encoding="utf-8") as log:
        log.write(json.dumps(asdict(process)) + "\n")


def count_starts(directory: Path) -> int:
    """How often a run has begun."""
    try:
        return (directory / PROCESSES).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def last_process(directory: Path) -> RunProcess | None:
    """The process in which a run runs, or ran last; None if it never began."""
    try:
        lines = (directory / PROCESSES).read_text(encoding="utf-8").splitlines()
        return RunProcess(**json.loads(lines[-1]))
    except (FileNotFoundError, IndexError, ValueError, TypeError):  # or torn by a crash
        return None


def kill_run(directory: Path) -> bool:
    """End the process of a run, wherever it runs; whether it was there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    process = last_process(directory)
    if process is None:
        return False
    kill = ray.remote(kill_process).options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(process.node, soft=False),
    )
    try:
        return bool(ray.get(kill.remote(process.pid, process.born), timeout=60))
    except (ray.exceptions.RayError, TimeoutError):
        return False  # its node is gone, and the run with it


def end_leftovers(runs: Path) -> None:
    """End processes of a killed sitting, which still hold their directories in ``runs``."""
    for directory in sorted(runs.glob("*")):
        process = last_process(directory)
        if process is None or not kill_process(process.pid, process.born):
            continue
        _log.warning("ended process %d of an earlier sitting", process.pid)
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while process_birth(process.pid) == process.born and time.monotonic() < deadline:
            time.sleep(0.1)


def finish_steps(trainings: Sequence[Path], seconds: float) -> None:
    """Let running trainings finish their step and save a checkpoint, for at most ``seconds``.

    One that still waits for its cores, or loads its model, has nothing to save.
    """
    asked = [
        path / CHECKPOINT_NOW
        for path in trainings
        if (path / METRICS).is_file() and not is_finished(path)
    ]
    for path in asked:
        path.touch()
    if asked:
        _log.info("stopping; waiting up to %.0f s for checkpoints", seconds)
    deadline = time.monotonic() + seconds
    while any(path.exists() for path in asked) and time.monotonic() < deadline:
        time.sleep(0.1)
    for path in asked:
        path.unlink(missing_ok=True)
