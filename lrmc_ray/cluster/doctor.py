"""Is everything in place, and what to do where it is not.

    lrmc doctor                                # this machine
    lrmc doctor --cluster cluster.yaml         # a cluster file, before `ray up`
    lrmc doctor --address auto --output DIR    # a running cluster, from its head

Looks at versions, GPUs, threads, memory, disks, ports, the token, the MLflow server; with
``--address`` at every node, and whether it sees the output directory. Changes nothing.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lrmc_ray.cluster.cluster_file import load_cluster, placeholders, problems
from lrmc_ray.cluster.resources import check_trial_slots, cluster_nodes, local_cpus
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser
from lrmc_ray.console import public, setup_logging
from lrmc_ray.errors import LrmcError
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.files.names import default_tracking_uri
from lrmc_ray.files.place import place_of
from lrmc_ray.files.storage import check_storage
from lrmc_ray.tasks.child_process import INSTALL
from lrmc_ray.tasks.pcap_child import load_library

LEAST_FREE_GB = 10.0
LEAST_MEMORY_GB = 6.0
LEAST_OPEN_FILES = 4096
MLFLOW_SECONDS = 3.0
PORTS = {6379: "a Ray head", 8265: "Ray's dashboard", 5000: "the MLflow server"}
Status = Literal["ok", "warning", "failed"]
_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    check: str
    status: Status
    seen: str
    remedy: str = ""


def check_versions() -> Iterator[Finding]:
    """Python, and every package in the versions that the project asks for."""
    from packaging.requirements import Requirement

    yield Finding("python", "ok", platform.python_version())
    for text in importlib.metadata.requires("lrmc-ray") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version != "missing" and wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, "ok", version)
        else:
            yield Finding(
                wanted.name,
                "failed",
                f"{version}, {wanted.specifier} is needed",
                "pip install -e . -c constraints.txt",
            )


def check_gpus() -> Finding:
    """CUDA devices, and whether torch can use the ones that are there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = {torch.cuda.get_device_name(index) for index in range(count)}
        return Finding(
            "gpu",
            "ok",
            f"{count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}; used where "
            "resources.gpus_per_worker is 1, or 0.5 for two workers on each",
        )
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return Finding(
            "gpu",
            "failed",
            f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) "
            "finds no device",
            "install torch for this driver: https://pytorch.org/get-started/locally",
        )
    return Finding("gpu", "ok", "none; everything runs on the CPU (resources.gpus_per_worker = 0)")


def check_libpcap() -> Finding:
    """The library that runs the packet filters of the task ``packet_filter``."""
    if load_library() is None:
        return Finding(
            "libpcap", "warning", "missing; the task packet_filter needs it", INSTALL["libpcap"]
        )
    return Finding("libpcap", "ok", "there; the task packet_filter needs it")


def check_threads() -> Finding:
    """Cores, and settings that would make every worker take all of them."""
    cores = local_cpus()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores:
        return Finding(
            "threads",
            "warning",
            f"{cores} cores, OMP_NUM_THREADS={asked}",
            "unset it: more threads than cores make training several times slower",
        )
    return Finding("threads", "ok", f"{cores} cores, one torch thread per worker by default")


def check_memory() -> Iterator[Finding]:
    """Memory, shared memory for Ray's object store, open files."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if total < LEAST_MEMORY_GB:
        remedy = f"use a machine with {LEAST_MEMORY_GB:g} GB: Ray alone takes 1 to 2"
        yield Finding("memory", "warning", f"{total:.1f} GB", remedy)
    else:
        yield Finding("memory", "ok", f"{total:.1f} GB")
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free / 1e9 if shared.is_dir() else 0.0
    if free < 0.3 * min(total, 10.0):
        yield Finding(
            "shared memory",
            "warning",
            f"{free:.1f} GB in /dev/shm, Ray's object store wants 30 % of the memory",
            "start the container with --shm-size=4g; Ray else uses the slow disk",
        )
    else:
        yield Finding("shared memory", "ok", f"{free:.1f} GB in /dev/shm")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < LEAST_OPEN_FILES:
        yield Finding("open files", "warning", f"limit {files}", "ulimit -n 65536")
    else:
        yield Finding("open files", "ok", f"limit {files}")


def check_disk(output: Path) -> Iterator[Finding]:
    """Whether results, models and temporary files can be written, and room for them."""
    places = {
        "output": output,
        "cache": cache_directory(),
        "temporary files": Path(tempfile.gettempdir()),
    }
    for name, wanted in places.items():
        path = wanted.resolve()
        while not path.exists():
            path = path.parent
        if not os.access(path, os.W_OK | os.X_OK) or not path.is_dir():
            remedy = f"give this user permission to write {path}, or choose another directory"
            yield Finding(name, "failed", f"{wanted} cannot be written", remedy)
            continue
        free = shutil.disk_usage(path).free / 1e9
        status: Status = "ok" if free >= LEAST_FREE_GB else "warning"
        remedy = "" if status == "ok" else f"free space: {LEAST_FREE_GB:g} GB hold a small search"
        yield Finding(name, status, f"{wanted}, {free:.0f} GB free", remedy)


def check_ports() -> Finding:
    """Whether somebody else has the ports that a head uses."""
    taken = []
    for port, user in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken.append(f"{port} ({user})")
    if taken:
        return Finding(
            "ports",
            "warning",
            f"in use: {', '.join(taken)}",
            "fine if these are yours; else stop them before `ray start --head` or `mlflow server`",
        )
    return Finding("ports", "ok", "6379, 8265 and 5000 are free")


def check_token() -> Iterator[Finding]:
    """Ray's token: on, there, and readable by its owner alone."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        yield Finding(
            "authentication",
            "failed",
            f"RAY_AUTH_MODE={mode}: whoever reaches a port of Ray runs code here",
            "unset RAY_AUTH_MODE, or set it to token",
        )
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("authentication", "ok", "token from RAY_AUTH_TOKEN")
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.is_file():
        yield Finding(
            "authentication",
            "ok",
            f"no token at {path} yet; a local command makes one",
            "for a cluster: (umask 077; ray get-auth-token --generate > /dev/null)",
        )
    elif path.stat().st_mode & 0o077:
        permissions = oct(path.stat().st_mode & 0o777)[2:]
        yield Finding(
            "authentication", "failed", f"{path} has mode {permissions}", f"chmod 600 {path}"
        )
    else:
        yield Finding("authentication", "ok", f"token in {path}, readable by you alone")


def check_mlflow(uri: str) -> Finding:
    """Whether MLflow can be written to."""
    shown = public(uri)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).parent
        while not path.exists():
            path = path.parent
        if os.access(path, os.W_OK):
            return Finding("mlflow", "ok", shown)
        return Finding(
            "mlflow", "failed", f"{path} cannot be written", "give another --tracking-uri"
        )
    if not uri.startswith(("http://", "https://")):
        return Finding("mlflow", "ok", f"{shown} (not tried)")
    from urllib.error import URLError
    from urllib.request import urlopen

    # Whoever asks for this page needs no password, and urllib takes one for a port.
    address = re.sub(r"(?<=://)[^/]*@", "", uri).rstrip("/")
    try:
        with urlopen(f"{address}/health", timeout=MLFLOW_SECONDS) as answer:
            return Finding("mlflow", "ok", f"{shown} answers {answer.read(20).decode()}")
    except (URLError, OSError, ValueError) as error:
        return Finding(
            "mlflow",
            "failed",
            f"{shown} does not answer ({error})",
            "start it: mlflow server --host 127.0.0.1; training goes on without, and "
            f"`lrmc mlflow-sync DIR --tracking-uri {shown}` sends it the rest later",
        )


def check_stored(uri: str) -> Finding:
    """Whether an object can be written to the storage, read and removed."""
    try:
        check_storage(uri)
    except LrmcError as error:
        return Finding("storage", "failed", str(error), "docs/storage.md says what it takes")
    return Finding("storage", "ok", f"{uri} can be written, read and cleared from here")


def check_cluster_file(path: Path) -> Iterator[Finding]:
    """Ray's validation of a cluster file, our rules, and what is still to be filled in."""
    config = load_cluster(path)
    name = str(path)
    try:
        from ray.autoscaler._private.util import prepare_config, validate_config

        logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(sys.stderr):
            validate_config(prepare_config(config))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        yield Finding(name, "failed", f"Ray refuses it: {first}", "see cluster.yaml for the form")
    broken = problems(config)
    for problem in broken:
        yield Finding(name, "failed", problem)
    unfilled = placeholders(config)
    for text in unfilled:
        yield Finding(name, "failed", text, "fill it in; the comment beside it says with what")
    if not broken and not unfilled:
        yield Finding(name, "ok", "filled in, and no rule is broken")


def check_cluster(address: str, output: Path, storage: str | None = None) -> Iterator[Finding]:
    """A running cluster: its nodes, the places for trials, what every node must reach.

    That is the storage, or without one the output directory.
    """
    try:
        with ray_session(address, log=output / RAY_LOG, storage=storage):
            nodes = cluster_nodes()
            for node in nodes:
                has = {k: v for k, v in node.resources.items() if not k.startswith("node:")}
                seen = ", ".join(f"{value:g} {key}" for key, value in sorted(has.items()))
                count = f"{node.count} more of: " if node.count > 1 else ""
                yield Finding("node", "ok", count + seen)
            yield place_of(storage).either(
                lambda: Finding("shared output", "ok", f"{output.resolve()} is seen by every node"),
                lambda seen: Finding(
                    "shared storage", "ok", f"{seen.uri} is read and written by every node"
                ),
            )
            try:
                check_trial_slots(storage)
            except LrmcError as error:
                yield Finding("trial slots", "failed", str(error))
    except LrmcError as error:
        yield Finding("cluster", "failed", str(error))


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc doctor``."""
    parser = CommandParser(
        "doctor",
        description="Is everything in place, and what to do where it is not. Exit code 1 if a "
        "check failed; warnings do not count.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where commands will keep everything (default: runs)",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="a cluster file for `ray up`, before it is used",
    )
    parser.add_argument("--address", metavar="A", help="a running cluster: auto, or host:port")
    parser.add_argument(
        "--storage", metavar="URI", help="the object store of nodes that share no directory"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="the MLflow server or database")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")
    arguments = parser.parse_args(argv)
    setup_logging()
    findings = list(examine(arguments))
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.status]}  {finding.check}: {finding.seen}")
            if finding.remedy and finding.status != "ok":
                print(f"{'':9}-> {finding.remedy}")
    failed = sum(finding.status == "failed" for finding in findings)
    if not arguments.json:
        warnings = sum(finding.status == "warning" for finding in findings)
        print(f"\n{len(findings)} checks, {failed} failed, {warnings} warnings.")
    return 1 if failed else 0


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Every check that ``arguments`` ask for."""
    if arguments.cluster is not None:
        yield from check_cluster_file(arguments.cluster)
        yield from check_token()
        return

    single: tuple[Callable[[], Finding], ...] = (
        check_gpus,
        check_threads,
        check_ports,
        check_libpcap,
    )
    yield from check_versions()
    for check in single:
        yield check()
    yield from check_memory()
    yield from check_disk(arguments.output)
    yield from check_token()
    yield check_mlflow(arguments.tracking_uri or default_tracking_uri(arguments.output))
    if arguments.storage is not None:
        yield check_stored(arguments.storage)
    if arguments.address is not None:
        yield from check_cluster(arguments.address, arguments.output, arguments.storage)
