"""Faults on purpose, for tests: ``LRMC_TESTING=1 LRMC_TRIAL_FAULTS=2:raise,3:hang,4:none``."""

import ctypes
import errno
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

from lrmc_ray.cluster.resources import held_cores
from lrmc_ray.files.artifacts import write_json, write_manifest
from lrmc_ray.files.names import RUNG
from lrmc_ray.train.early_stopping import Decision
from lrmc_ray.tune.result import RunResult


def asked_fault(name: str) -> str | None:
    """The fault that the environment asks for in the trial ``name``; None without."""
    if os.environ.get("LRMC_TESTING") != "1":
        return None
    faults = os.environ.get("LRMC_TRIAL_FAULTS", "").split(",")
    return dict(fault.split(":") for fault in faults if fault).get(name)


def fail_on_purpose(fault: str, directory: Path) -> RunResult:
    """Fail in the way that was asked for; ``none`` and ``prune`` end well at once, without work."""
    if fault == "raise":
        raise ValueError("a fault was asked for")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.startswith("scoring_"):
        (directory / "training").mkdir(exist_ok=True)
        write_manifest(directory / "training", {})
        with held_cores(1):
            return fail_on_purpose(fault.removeprefix("scoring_"), directory)
    if fault == "memory":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
        bytearray(2**31)
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "hang":
        time.sleep(1e9)
    if fault == "hang_in_c":
        while True:  # a signal ends a pause
            ctypes.PyDLL(None).pause()  # with the interpreter's lock, so that no thread goes on
    names = ("eval/domain_gain", "eval/forgetting", "eval/combined")
    if fault == "none":
        cost = {"train_seconds": 1.0, "evaluate_seconds": 1.0}
        return RunResult(dict.fromkeys(names, 0.0), "scores", {}, cost)
    if fault == "prune":
        number = int(directory.name)
        decision = Decision(number, 3, -1.0, -0.5, 0.5, -1.0, {"0": 0.0}, 0.0, True, 1.0)
        (directory / "training").mkdir()
        write_json(directory / "training" / RUNG, asdict(decision))
        cost = {"train_seconds": 1.0, "evaluate_seconds": 0.0}
        return RunResult({}, None, {"steps": 6}, cost)
    assert fault == "nan", f"unknown fault {fault}"
    return RunResult(dict.fromkeys(names, math.nan), None, {}, {})
