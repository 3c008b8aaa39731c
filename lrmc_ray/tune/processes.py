"""The processes of running trials: who they are, and how they are ended."""

import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.names import CHECKPOINT_NOW

_log = logging.getLogger(__name__)

LEFTOVER_SECONDS = 10.0
"""How long a killed process may take to vanish."""


PROCESSES = "processes.jsonl"
"""The processes in which a trial ran, one a line, the last one last: so the search can stop it."""


DIED = "its process died"


def death_cause(directory: Path) -> str:
    """What can be said of a trial whose process died without a word."""
    return DIED + (" while its model was scored" if is_finished(directory / "training") else "")


def this_process() -> dict[str, Any]:
    """What tells this process apart from a later one with the same id."""
    import ray

    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    return {"pid": pid, "born": process_birth(pid), "node": node, "began": time.time()}


def last_process(directory: Path) -> dict[str, Any] | None:
    """The process in which a trial runs, or ran last; None if it never began."""
    try:
        lines = (directory / PROCESSES).read_text(encoding="utf-8").splitlines()
        process: dict[str, Any] = json.loads(lines[-1])
    except (FileNotFoundError, IndexError, ValueError):  # or torn by a crash
        return None
    return process


def process_birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is none of that number."""
    try:
        # The second field, the program's name, may contain anything but ends in the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def kill_process(pid: int, born: int | None) -> bool:
    """End a process of this node at once, unless its number has gone to another one."""
    if born is None or process_birth(pid) != born:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def end_leftovers(trials: Path) -> None:
    """End processes of a killed sitting, which still hold their directories in ``trials``."""
    for directory in sorted(trials.glob("*")):
        process = last_process(directory)
        if process is None or not kill_process(process["pid"], process["born"]):
            continue
        _log.warning("ended process %d of an earlier sitting", process["pid"])
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while process_birth(process["pid"]) == process["born"] and time.monotonic() < deadline:
            time.sleep(0.1)


def finish_steps(trainings: Sequence[Path], seconds: float) -> None:
    """Let running trainings finish their step and save a checkpoint, for at most ``seconds``."""
    asked = [path / CHECKPOINT_NOW for path in trainings if path.is_dir() and not is_finished(path)]
    for path in asked:
        path.touch()
    if asked:
        _log.info("stopping; waiting up to %.0f s for checkpoints", seconds)
    deadline = time.monotonic() + seconds
    while any(path.exists() for path in asked) and time.monotonic() < deadline:
        time.sleep(0.1)
    for path in asked:
        path.unlink(missing_ok=True)
