"""How long a run may take or be silent, and what becomes of those that must stop."""

import contextlib
import math
import time
from pathlib import Path

import pytest

from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.files.beats import PROGRESS, OwnTime
from lrmc_ray.files.names import CHECKPOINT_NOW, METRICS, STACKS
from lrmc_ray.files.study import trial_directory
from lrmc_ray.tune import processes
from lrmc_ray.tune.limits import RunWatch, time_limit
from lrmc_ray.tune.processes import PROCESSES
from lrmc_ray.tune.result import FAILURE, failure_cause


def cost(train, evaluate):
    return {"train_seconds": train, "evaluate_seconds": evaluate}


@pytest.mark.parametrize(
    ("chosen", "costs", "expected"),
    [
        (None, [], float("inf")),
        (None, [{}, {}], float("inf")),
        (None, [cost(3.0, 1.0), {}], 600.0),
        (None, [cost(3.0, 1.0), cost(100.0, 20.0)], 1200.0),
        (7.5, [cost(100.0, 20.0)], 7.5),
    ],
)
def test_the_time_limit_is_ten_times_the_longest_run_and_never_short(chosen, costs, expected):
    assert time_limit(chosen, costs) == expected


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Runs:
    """Runs whose processes are told to have begun, in a watch with its own time."""

    def __init__(self, tmp_path, **options):
        self.directory, self.clock = tmp_path, Clock()
        self.killed: list[Path] = []
        self.watch = RunWatch(
            self.kill,
            setting="search.trial_timeout_seconds",
            stacks=lambda directory: [],
            time=OwnTime(self.clock),
            **options,
        )

    def kill(self, directory):
        self.killed.append(directory)
        return True

    def begin(self, number):
        directory = trial_directory(self.directory, number)
        (directory / "training").mkdir(parents=True, exist_ok=True)
        self.watch.begin(directory)
        return directory

    def start(self, directory):
        with (directory / PROCESSES).open("a") as file:
            file.write("{}\n")

    def step(self, directory):
        with (directory / "training" / METRICS).open("a") as file:
            file.write("{}\n")

    def wait(self, seconds, limit=math.inf, is_waiting=lambda _: False):
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            self.watch.look(limit, is_waiting)


def test_an_overdue_trial_gets_its_cause_once(tmp_path):
    runs = Runs(tmp_path)
    waiting, late, early = (runs.begin(number) for number in (0, 2, 3))
    runs.start(late)
    runs.wait(3)
    runs.start(early)
    runs.wait(4, limit=5.0)
    runs.wait(1, limit=5.0)
    assert runs.killed == [late]
    assert failure_cause(late) == (
        "it has not ended after 6.0 s, more than 5.0 s; raise search.trial_timeout_seconds if it "
        "is only slow"
    )
    assert (late / STACKS).read_text() == "no process of it was found\n"
    assert len(list(tmp_path.glob(f"trials/*/{FAILURE}"))) == 1
    assert runs.watch.directories == [waiting, early]


def test_the_time_for_which_a_trial_waits_for_the_base_is_not_its_own(tmp_path):
    runs = Runs(tmp_path, hang_seconds=100.0)
    waiting, other = (runs.begin(number) for number in (0, 1))
    for directory in (waiting, other):
        runs.start(directory)
    runs.wait(4, limit=5.0)
    runs.wait(90, limit=5.0, is_waiting=lambda directory: directory == waiting)
    assert runs.killed == [other]
    runs.wait(5, limit=5.0)
    assert runs.killed == [other]
    runs.wait(1, limit=5.0)
    assert runs.killed == [other, waiting]
    assert "has not ended after 6.0 s" in failure_cause(waiting)
    silent = runs.begin(2)
    runs.start(silent)  # and who waits without a sign of life hangs
    runs.wait(102, is_waiting=lambda _: True)
    assert runs.killed == [other, waiting, silent]


def test_a_run_that_goes_on_has_stepped_when_its_metrics_have_grown(tmp_path):
    runs = Runs(tmp_path)
    fresh = runs.begin(0)
    assert not runs.watch.has_stepped(fresh)
    runs.step(fresh)
    assert runs.watch.has_stepped(fresh)
    runs.watch.end(fresh)
    runs.begin(0)  # with the steps of before
    assert not runs.watch.has_stepped(fresh)
    runs.step(fresh)
    assert runs.watch.has_stepped(fresh)


@pytest.mark.parametrize("name", [STACKS, FAILURE])
def test_what_cannot_be_written_does_not_keep_a_run_alive(tmp_path, name):
    """In place of a full disk: a directory has the name of the file."""
    runs = Runs(tmp_path)
    late = runs.begin(0)
    runs.start(late)
    (late / name).mkdir()
    is_told = pytest.raises(IsADirectoryError) if name == FAILURE else contextlib.nullcontext()
    with is_told:
        runs.wait(7, limit=5.0)
    assert runs.killed == [late]
    assert runs.watch.directories == []


def test_a_start_in_an_earlier_sitting_does_not_count(tmp_path):
    directory = trial_directory(tmp_path, 0)
    directory.mkdir(parents=True)
    (directory / PROCESSES).write_text("{}\n")
    runs = Runs(tmp_path)
    runs.begin(0)
    runs.wait(20, limit=5.0)
    assert runs.killed == []
    runs.start(directory)
    runs.wait(7, limit=5.0)
    assert runs.killed == [directory]


@pytest.mark.parametrize(
    ("options", "first", "later"),
    [
        ({}, 1800, 600),
        ({"step_seconds": 100.0}, 1800, 1000),
        ({"step_seconds": 300.0}, 3000, 3000),
        ({"hang_seconds": 50.0}, 50, 50),
    ],
)
def test_how_long_the_first_run_may_be_silent(tmp_path, options, first, later):
    """Without any run that has ended: a run that never begins its work, and one that stops."""
    runs = Runs(tmp_path, **options)
    stuck, stops = runs.begin(0), runs.begin(1)
    runs.start(stuck)
    runs.wait(1)
    runs.wait(first)
    assert runs.killed == []
    runs.wait(1)
    assert runs.killed == [stuck]
    assert "and hangs; stacks.txt in its directory says where" in failure_cause(stuck)
    runs.start(stops)
    runs.wait(10)
    runs.step(stops)
    runs.wait(1)
    runs.wait(later)
    assert runs.killed == [stuck]
    runs.wait(1)
    assert runs.killed == [stuck, stops]


def test_every_sign_of_progress_counts_and_the_longest_pause_teaches(tmp_path):
    runs = Runs(tmp_path)
    directory = runs.begin(0)
    runs.start(directory)
    runs.wait(1)
    for sign in (
        lambda: runs.step(directory),
        lambda: (directory / PROGRESS).write_text("1 1"),
        lambda: (directory / "training" / PROGRESS).write_text("1 1"),
        lambda: write_manifest(directory / "training", {}),
        lambda: (directory / PROGRESS).unlink(),
        lambda: runs.start(directory),
    ):
        runs.wait(590)
        sign()
    assert runs.killed == []
    runs.wait(5900)  # ten pauses of 590 seconds
    assert runs.killed == []
    runs.wait(12)
    assert runs.killed == [directory]


def test_time_in_which_the_command_was_stopped_does_not_count(tmp_path):
    runs = Runs(tmp_path, hang_seconds=100.0)
    directory = runs.begin(0)
    runs.start(directory)
    runs.wait(1)
    for _ in range(9):
        runs.clock.now += 7200.0  # Ctrl-Z, or a machine that slept
        runs.watch.look(1000.0)
    assert runs.killed == []
    runs.wait(12, limit=1000.0)
    assert runs.killed == [directory]


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_set_changes_no_limit(tmp_path, monkeypatch, days):
    real = time.time
    watch = RunWatch(lambda _: True, setting="x", hang_seconds=60.0, stacks=lambda _: [])
    directory = trial_directory(tmp_path, 0)
    directory.mkdir(parents=True)
    watch.begin(directory)
    (directory / PROCESSES).write_text("{}\n")
    watch.look(60.0)
    monkeypatch.setattr(time, "time", lambda: real() + days * 86_400.0)
    watch.look(60.0)
    watch.look(60.0)
    assert watch.directories == [directory]


def test_an_interrupted_search_asks_its_trials_for_a_checkpoint_and_waits(tmp_path, monkeypatch):
    watch = RunWatch(lambda _: True, setting="x")
    for number in (2, 3, 4, 5):
        watch.begin(trial_directory(tmp_path, number))
    training = {n: trial_directory(tmp_path, n) / "training" for n in (2, 3, 4, 5)}
    for path in training.values():
        path.mkdir(parents=True)
    for number in (2, 3, 4):  # the last one waits for its cores
        (training[number] / METRICS).touch()
    write_manifest(training[4], {})  # it trains no more
    answered = []

    def answer(seconds):  # trial 2 saves a checkpoint, trial 3 never does
        answered.append((training[3] / CHECKPOINT_NOW).exists())
        assert not any((training[number] / CHECKPOINT_NOW).exists() for number in (4, 5))
        (training[2] / CHECKPOINT_NOW).unlink(missing_ok=True)

    monkeypatch.setattr(processes.time, "sleep", answer)
    watch.finish_steps(0.2)
    assert answered
    assert all(answered)
    assert not any((path / CHECKPOINT_NOW).exists() for path in training.values())
