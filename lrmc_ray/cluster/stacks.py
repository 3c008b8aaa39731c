"""Where a process hangs: the stack of every thread, asked for from outside.

:func:`listening` lets a process be asked. The answer is written by C code in a signal handler, so
it comes also from a thread that hangs in C code and holds the interpreter's lock. Which processes
work for a run is written down on their own node, in a directory that only this user can read.
"""

import contextlib
import faulthandler
import functools
import json
import logging
import os
import signal
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
"""What asks a process for its stacks."""

ANSWER_SECONDS = 5.0
"""How long a process may take to answer."""

NODE_SECONDS = 30.0
"""How long a node may take."""


@dataclass(frozen=True)
class Stack:
    """What one process of a run did when it was asked."""

    work: str
    """What it works for: the directory of the run, or one below it."""
    pid: int
    born: int
    """See :func:`process_birth`."""
    node: str
    """Name of its machine."""
    text: str
    """The stack of every thread, the innermost call first."""


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


@contextlib.contextmanager
def listening(work: str | Path) -> Iterator[None]:
    """Let this process be asked for its stacks as long as it works for ``work``.

    One work at a time; where the node has no place to write to, nobody can ask.

    Args:
        work: directory of the run, as the driver calls it.
    """
    directory = _own_directory()
    if directory is None or not _answers_in(directory):
        yield
        return
    pid = os.getpid()
    note = directory / f"{pid}.json"
    said = {"job": _job(), "work": str(work), "born": process_birth(pid)}
    with contextlib.suppress(OSError):  # whoever tidies /tmp may have removed the directory
        note.write_text(json.dumps(said), encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


@functools.cache
def _answers_in(directory: Path) -> bool:
    """Let this process answer, as long as it lives: a late question would end it otherwise."""
    for other in directory.glob("*.txt"):
        if process_birth(int(other.stem)) is None:
            other.unlink(missing_ok=True)
    try:
        file = (directory / f"{os.getpid()}.txt").open("w", encoding="utf-8")
    except OSError as error:
        _log.debug("nobody can ask for the stacks of this process: %s", error)
        return False
    faulthandler.register(SIGNAL, file=file, all_threads=True)
    _open_files.append(file)
    return True


_open_files: list[IO[str]] = []
"""A signal handler writes to these: they are never closed."""


def _own_directory() -> Path | None:
    """A directory of this node that belongs to this user alone; None if another has taken it."""
    path = Path(tempfile.gettempdir()) / f"lrmc-stacks-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        _log.debug("%s cannot be used: %s", path, error)
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return path if is_own and not found.st_mode & 0o077 else None


def _job() -> str:
    """Ray's job that this process is a part of; empty without Ray."""
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else ""


def ray_node() -> str:
    """Ray's id of the node of this process; ``-`` without Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else "-"


def is_gone(node: str, pid: int, born: int) -> bool:
    """Whether a process has ended, or its node is lost.

    Args:
        node: Ray's id of its node.
        pid: its number there.
        born: see :func:`process_birth`.

    Returns:
        False also where the node does not answer.
    """
    import ray

    if node not in {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}:
        return True
    births = _on_nodes([node], process_birth, pid)
    return bool(births) and births[0] != born


def stacks_here(job: str, work: str, own: str = "") -> list[Stack]:
    """What the processes of this node that work for ``work`` do.

    Args:
        job: of Ray, whose processes are meant.
        work: directory of a run; what works for a directory below it is a part of it.
        own: name of this node.
    """
    directory = _own_directory()
    stacks = []
    for note in sorted(directory.glob("*.json")) if directory else ():
        pid = int(note.stem)
        try:
            said = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it has just ended
        if process_birth(pid) != said["born"]:
            note.unlink(missing_ok=True)  # it was killed
            note.with_suffix(".txt").unlink(missing_ok=True)
            continue
        is_part = said["work"] == work or said["work"].startswith(f"{work}/")
        if said["job"] == job and is_part:
            text = _ask(pid, note.with_suffix(".txt"))
            stacks.append(Stack(said["work"], pid, said["born"], own or os.uname().nodename, text))
    return stacks


def _ask(pid: int, answer: Path) -> str:
    """The stacks of a process of this node, or what the kernel says of one that does not answer."""
    try:
        before = size = answer.stat().st_size
        os.kill(pid, SIGNAL)
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (now := answer.stat().st_size) > before and now == size:
                break
            size = now
        with answer.open("rb") as file:
            file.seek(before)
            text = file.read().decode(errors="replace").strip()
    except OSError as error:
        return f"it could not be asked: {error}"
    return text or f"it does not answer; {_kernel_view(pid)}"


def _kernel_view(pid: int) -> str:
    """State and kernel function of every thread of a process."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            where = (task / "wchan").read_text().strip() or "0"
        except OSError:
            continue
        lines.append(f"thread {task.name}: state {state}, in {where}")
    return "\n".join(["its threads:", *lines])


def stacks_of(work: str | Path) -> list[Stack]:
    """What all processes of the cluster do that work for the run in the directory ``work``."""
    job = _job()
    found: list[Stack] = []
    for stacks in _on_all_nodes(stacks_here, job, str(work)):
        found += stacks
    return sorted(found, key=lambda stack: (stack.work, stack.node, stack.pid))


def kill_all(stacks: list[Stack]) -> None:
    """End processes, each on its node, unless they have ended already."""
    _on_all_nodes(_kill_here, [(stack.node, stack.pid, stack.born) for stack in stacks])


def _kill_here(processes: list[tuple[str, int, int]]) -> list[bool]:
    own = os.uname().nodename
    return [kill_process(pid, born) for node, pid, born in processes if node == own]


def _on_all_nodes(work: Any, *arguments: Any) -> list[Any]:
    """What ``work`` returns on every node that answers in time."""
    import ray

    return _on_nodes([node["NodeID"] for node in ray.nodes() if node["Alive"]], work, *arguments)


def _on_nodes(nodes: Sequence[str], work: Any, *arguments: Any) -> list[Any]:
    """What ``work`` returns on those of ``nodes``, Ray's ids, that answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(work)
    references = [
        remote.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(*arguments)
        for node in nodes
    ]
    done, _ = ray.wait(references, num_returns=len(references), timeout=NODE_SECONDS)
    results = []
    for reference in done:
        with contextlib.suppress(ray.exceptions.RayError):
            results.append(ray.get(reference))
    return results


def report(stacks: list[Stack]) -> str:
    """The stacks as a log has them."""
    if not stacks:
        return "no process of it was found"
    return "\n\n".join(
        f"process {stack.pid} on {stack.node}, which works for {stack.work}:\n{stack.text}"
        for stack in stacks
    )


def write_stacks(path: Path, stacks: list[Stack]) -> str:
    """Write the stacks into a file, if that is possible; returns what a reader is sent to.

    Call it when what hangs has been ended: a full disk must not keep it alive.
    """
    try:
        path.write_text(report(stacks) + "\n", encoding="utf-8")
    except OSError as error:
        _log.warning("%s could not be written: %s", path, error)
        return "the log"
    return str(path)
