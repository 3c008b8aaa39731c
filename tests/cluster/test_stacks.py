"""Where a process hangs, asked for from outside; with real processes that do."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lrmc_ray.cluster import stacks
from lrmc_ray.cluster.stacks import (
    is_gone,
    kill_all,
    listening,
    process_birth,
    ray_node,
    report,
    stacks_here,
)
from lrmc_ray.files.beats import beat

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


def scoring_task():
    """Not importable by its name: Ray's workers get the function itself."""

    def scores(task, does):
        """A scoring task that does what the test wants."""
        folder = Path(task.work)

        def hangs_in_a_task():
            time.sleep(1e6)

        with task.shown():
            if does == "hangs":
                hangs_in_a_task()
            if does == "hangs, and nothing can be written":
                (folder / "stacks.txt").mkdir()
                hangs_in_a_task()
            if does == "goes on":
                while True:
                    beat()
                    time.sleep(0.1)
            if does == "fails":
                while len(list(folder.glob(".progress*"))) < 2:
                    time.sleep(0.1)
                raise ValueError("the scores are wrong")
            if does == "dies once" and not (folder / "died").exists():
                while not (folder / "die").exists():
                    beat()
                    time.sleep(0.1)
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return task.number

    return scores


@pytest.fixture(scope="module")
def remote_scores(tmp_path_factory):
    from lrmc_ray.cluster.session import ray_session

    with ray_session(log=tmp_path_factory.mktemp("ray") / "ray.log", num_cpus=2):
        import ray

        yield ray.remote(max_retries=2)(scoring_task())


def waited_for(remote, directory, *does, hang_seconds=3.0, are_stopped=(), **options):
    """What ``results_of`` makes of such tasks, of which those in these places are stopped, once."""
    import ray

    from lrmc_ray.evaluate.waiting import Watched, results_of
    from lrmc_ray.files.place import LocalPlace

    tasks = [Watched(str(directory), number, LocalPlace()) for number in range(len(does))]
    references = [remote.remote(task, one) for task, one in zip(tasks, does, strict=True)]
    stopped = []

    def stop(one):
        stopped.append(references.index(one))
        ray.cancel(one, force=True)

    try:
        return results_of(references, tasks, hang_seconds, stop=stop, **options)
    finally:
        assert stopped == list(are_stopped)
        assert not list(directory.glob(".progress*"))
        # All have ended when the wait has.
        assert len(ray.wait(references, num_returns=len(does), timeout=0)[0]) == len(does)


@pytest.mark.ray
def test_a_scoring_task_that_hangs_is_ended_with_its_stack(remote_scores, tmp_path, caplog):
    """A task gives one sign of life and no more."""
    from lrmc_ray.errors import EvaluationError

    assert waited_for(remote_scores, tmp_path, "is done", "is done") == [0, 1]
    with pytest.raises(EvaluationError, match=r"within 3\.0 s .*/stacks\.txt says where"):
        waited_for(remote_scores, tmp_path, "is done", "hangs", are_stopped=[1])
    assert "hangs_in_a_task" in (tmp_path / "stacks.txt").read_text()
    assert "hangs_in_a_task" in caplog.text
    # The cores are free again, and scoring can begin anew.
    assert waited_for(remote_scores, tmp_path, "is done", hang_seconds=30.0) == [0]
    assert not (tmp_path / "stacks.txt").exists()
    kill_all([])


@pytest.mark.ray
def test_a_task_that_hangs_is_ended_where_nothing_can_be_written(remote_scores, tmp_path, caplog):
    from lrmc_ray.errors import EvaluationError

    does = "hangs, and nothing can be written"
    with pytest.raises(EvaluationError, match=r"within 3\.0 s and did not; the log says where"):
        waited_for(remote_scores, tmp_path, does, are_stopped=[0])
    assert "hangs_in_a_task" in caplog.text


@pytest.mark.ray
def test_when_one_task_fails_the_others_are_ended(remote_scores, tmp_path):
    import ray

    does = ("fails", "goes on")
    with pytest.raises(ray.exceptions.RayTaskError, match="the scores are wrong"):
        waited_for(remote_scores, tmp_path, *does, hang_seconds=60.0, are_stopped=[1])
    time.sleep(2.0)  # one that lived would have shown itself again
    assert not list(tmp_path.glob(".progress*"))


@pytest.mark.ray
def test_tasks_that_nobody_wants_any_more_are_ended(remote_scores, tmp_path):
    from lrmc_ray.errors import EvaluationError

    def is_wanted():
        return not list(tmp_path.glob(".progress*"))

    with pytest.raises(EvaluationError, match="scoring was given up"):
        waited_for(
            *(remote_scores, tmp_path, "goes on"),
            hang_seconds=60.0,
            are_stopped=[0],
            is_wanted=is_wanted,
        )


@pytest.mark.ray
def test_a_task_whose_process_died_waits_for_its_next_turn_in_peace(remote_scores, tmp_path):
    """Its last sign stays, while another task has the cores for longer than it may be silent."""
    import ray

    @ray.remote(num_cpus=2)
    def takes_the_cores():
        (tmp_path / "taken").touch()
        time.sleep(8.0)
        return len(list(tmp_path.glob(".progress*")))

    def queue_another():
        while not list(tmp_path.glob(".progress*")):
            time.sleep(0.1)
        left.append(takes_the_cores.remote())
        time.sleep(1.0)
        (tmp_path / "die").touch()

    left: list[ray.ObjectRef] = []
    thread = threading.Thread(target=queue_another)
    thread.start()
    remote = remote_scores.options(num_cpus=2)
    assert waited_for(remote, tmp_path, "dies once", hang_seconds=2.0) == [0]
    thread.join()
    assert (tmp_path / "taken").exists()
    assert ray.get(left[0]) == 1  # the old sign was there all the time


@pytest.mark.ray
def test_a_process_is_gone_when_it_or_its_node_is(remote_scores, hanging):
    here, born = ray_node(), process_birth(hanging.pid)
    assert not is_gone(here, hanging.pid, born)
    assert is_gone(here, hanging.pid, born - 1)  # its number has gone to another
    assert is_gone("f" * len(here), hanging.pid, born)
    hanging.kill()
    hanging.wait()
    assert is_gone(here, hanging.pid, born)
