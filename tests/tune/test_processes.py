"""The processes of runs: told apart from others, and ended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrmc_ray.cluster.stacks import kill_process, process_birth
from lrmc_ray.tune.processes import (
    PROCESSES,
    RunProcess,
    end_leftovers,
    kill_run,
    last_process,
)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_only_the_process_that_was_written_down_is_killed(sleeper):
    born = process_birth(sleeper.pid)
    assert not kill_process(sleeper.pid, born + 1)  # the number went to another process
    assert not kill_process(sleeper.pid, None)
    assert sleeper.poll() is None
    assert kill_process(sleeper.pid, born)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert process_birth(sleeper.pid) is None
    assert not kill_process(sleeper.pid, born)


def test_the_birth_of_a_process_is_its_start_since_boot():
    boot = float(Path("/proc/uptime").read_text().split()[0])
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_birth(child.pid) / os.sysconf("SC_CLK_TCK")
    child.communicate(b"\n")
    assert boot - 0.1 <= started <= float(Path("/proc/uptime").read_text().split()[0])


def test_processes_of_a_killed_sitting_are_ended_first(tmp_path, sleeper):
    directory = tmp_path / "trials" / "0002"
    directory.mkdir(parents=True)
    old = RunProcess(2**22 + 1, 5, "gone", 1.5)
    now = RunProcess(sleeper.pid, process_birth(sleeper.pid), "gone", 2.5)
    lines = [json.dumps(dataclasses.asdict(process)) for process in (old, now)]
    (directory / PROCESSES).write_text("\n".join(lines) + "\n")
    assert last_process(directory) == now
    end_leftovers(tmp_path / "trials")
    assert sleeper.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("content", ["", '{"pid": 1', None])
def test_a_trial_without_a_process_is_not_found(tmp_path, content):
    if content is not None:
        (tmp_path / PROCESSES).write_text(content)
    assert last_process(tmp_path) is None
    assert not kill_run(tmp_path)
