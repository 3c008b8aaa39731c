"""How long a run may take, and what becomes of those that must stop."""

import json
import time
from typing import Any

import pytest

from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.files.names import CHECKPOINT_NOW
from lrmc_ray.files.study import trial_directory
from lrmc_ray.tune import processes
from lrmc_ray.tune.limits import RunningTrials, time_limit
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


def test_an_overdue_trial_gets_its_cause_once(tmp_path):
    killed: list[Any] = []

    def kill(path):
        killed.append(path)
        return True

    running = RunningTrials(tmp_path, kill=kill)
    now = time.time()
    running.handed_out = {0: now - 60.0, 2: now - 60.0, 3: now - 60.0, 4: now - 60.0}
    # Trial 0 has not begun yet, and 4 only in an earlier sitting.
    for number, seconds in ((2, 6.0), (3, 4.0), (4, 99.0)):
        process = {"pid": 1, "born": 0, "node": "x", "began": now - seconds}
        directory = trial_directory(tmp_path, number)
        directory.mkdir(parents=True)
        (directory / PROCESSES).write_text(json.dumps(process))
    running.stop_overdue(5.0)
    running.stop_overdue(5.0)
    directory = trial_directory(tmp_path, 2)
    assert killed == [directory]
    assert failure_cause(directory) == (
        "it has not ended after 6.0 s, more than 5.0 s; raise search.trial_timeout_seconds if it "
        "is only slow"
    )
    assert len(list(tmp_path.glob(f"trials/*/{FAILURE}"))) == 1


def test_an_interrupted_search_asks_its_trials_for_a_checkpoint_and_waits(tmp_path, monkeypatch):
    running = RunningTrials(tmp_path)
    for number in (2, 3, 4):
        running.begin(number)
    training = {n: trial_directory(tmp_path, n) / "training" for n in (2, 3, 4)}
    for path in training.values():
        path.mkdir(parents=True)
    write_manifest(training[4], {})  # it trains no more
    answered = []

    def answer(seconds):  # trial 2 saves a checkpoint, trial 3 never does
        answered.append((training[3] / CHECKPOINT_NOW).exists())
        assert not (training[4] / CHECKPOINT_NOW).exists()
        (training[2] / CHECKPOINT_NOW).unlink(missing_ok=True)

    monkeypatch.setattr(processes.time, "sleep", answer)
    running.finish_steps(0.2)
    assert answered
    assert all(answered)
    assert not any((path / CHECKPOINT_NOW).exists() for path in training.values())
