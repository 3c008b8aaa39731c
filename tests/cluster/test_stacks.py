"""Where a process hangs, asked for from outside; with real processes that do."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrmc_ray.cluster import stacks
from lrmc_ray.cluster.stacks import kill_all, listening, report, stacks_here

ROOT = Path(__file__).parents[2]
HANGING = """
import ctypes, sys, threading, time
from lrmc_ray.cluster.stacks import listening

def waits_for_ever():
    threading.Event().wait()

def hangs_in_c_code():
    print("hangs", flush=True)
    while True:  # a signal ends a pause
        ctypes.PyDLL(None).pause()  # with the interpreter's lock

with listening(sys.argv[1]):
    threading.Thread(target=waits_for_ever, daemon=True).start()
    time.sleep(0.2)
    hangs_in_c_code()
"""


@pytest.fixture
def own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(stacks.tempfile, "tempdir", None)
    return tmp_path / f"lrmc-stacks-{os.getuid()}"


@pytest.fixture
def hanging(own_directory):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, "/out/trials/0003/training"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "hangs\n"
    yield process
    process.kill()
    process.wait()


def test_every_thread_of_a_process_that_hangs_in_c_code_is_seen(hanging, own_directory):
    for _ in range(2):  # it can be asked again
        (found,) = stacks_here("", "/out/trials/0003", "head")
        assert (found.pid, found.work) == (hanging.pid, "/out/trials/0003/training")
        assert found.text.count("in hangs_in_c_code") == 1
        assert found.text.count("in waits_for_ever") == 1
    assert f"process {hanging.pid} on head" in report([found])
    assert own_directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("job", "work"),
    [("", "/out/trials/0004"), ("", "/out/trials/000"), ("another", "/out/trials/0003")],
)
def test_processes_of_other_runs_and_jobs_are_left_alone(hanging, job, work):
    assert stacks_here(job, work) == []


def test_of_a_stopped_process_the_kernel_tells(hanging, monkeypatch):
    monkeypatch.setattr(stacks, "ANSWER_SECONDS", 0.5)
    hanging.send_signal(signal.SIGSTOP)
    (found,) = stacks_here("", "/out/trials/0003")
    assert found.text.startswith("it does not answer; its threads:\n")
    assert found.text.count("state T") >= 2


def test_a_process_that_was_killed_is_forgotten(hanging, own_directory):
    hanging.kill()
    hanging.wait()
    assert stacks_here("", "/out/trials/0003") == []
    assert list(own_directory.iterdir()) == []


def test_a_late_question_does_not_end_a_process(own_directory):
    with listening("/out/a"):
        (own,) = stacks_here("", "/out/a")
        assert "test_a_late_question" in own.text
    assert stacks_here("", "/out/a") == []
    os.kill(os.getpid(), stacks.SIGNAL)
    stacks._answers_in.cache_clear()


def test_work_goes_on_where_the_directory_is_tidied_away(own_directory):
    stacks._answers_in.cache_clear()
    with listening("/out/a"):
        pass
    shutil.rmtree(own_directory)
    own_directory.touch(mode=0o600)
    with listening("/out/a"):
        assert stacks_here("", "/out/a") == []
    own_directory.unlink()
    own_directory.mkdir(mode=0o700)
    with listening("/out/a"):
        shutil.rmtree(own_directory)
    stacks._answers_in.cache_clear()


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_directory_that_others_could_have_made_is_not_used(own_directory, tmp_path, kind):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    if kind == "link":
        own_directory.symlink_to(other)
    elif kind == "open":
        own_directory.mkdir()
        own_directory.chmod(0o777)
    else:
        own_directory.touch()
    with listening("/out/a"):
        assert stacks_here("", "/out/a") == []
    assert list(other.iterdir()) == []


@pytest.mark.ray
def test_a_scoring_task_that_hangs_is_ended_with_its_stack(tmp_path, caplog):
    """In a Ray of its own: a task gives one sign of life and no more."""
    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.errors import EvaluationError
    from lrmc_ray.evaluate.waiting import Watched, results_of
    from lrmc_ray.files.place import LocalPlace

    tasks = [Watched(str(tmp_path), number, LocalPlace()) for number in range(2)]

    def scores(task: Watched, hangs: bool) -> int:
        def hangs_in_a_task():
            time.sleep(1e6)

        with task.shown():
            if hangs:
                hangs_in_a_task()
        return task.number

    with ray_session(log=tmp_path / "ray.log", num_cpus=2):
        import ray

        remote = ray.remote(max_retries=2)(scores)

        def stop(reference):
            ray.cancel(reference, force=True)

        well = [remote.remote(task, False) for task in tasks]
        assert results_of(well, tasks, 3.0, stop=stop) == [0, 1]
        assert not list(tmp_path.glob(".progress*"))
        ill = [remote.remote(task, task.number == 1) for task in tasks]
        with pytest.raises(EvaluationError, match=r"within 3\.0 s .*/stacks\.txt says where"):
            results_of(ill, tasks, 3.0, stop=stop)
        assert "hangs_in_a_task" in (tmp_path / "stacks.txt").read_text()
        assert "hangs_in_a_task" in caplog.text
        with pytest.raises(ray.exceptions.RayError):
            ray.get(ill[1], timeout=20)
        assert not list(tmp_path.glob(".progress*"))
        # The cores are free again, and scoring can begin anew.
        assert results_of([remote.remote(tasks[0], False)], tasks[:1], 30.0, stop=stop) == [0]
        assert not (tmp_path / "stacks.txt").exists()
        kill_all([])
