"""A trial whose process dies in the middle of its training goes on from its checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.files.names import CHECKPOINTS, MODEL
from lrmc_ray.train.run_files import LocalRun
from lrmc_ray.tune.losses import MAX_LOSSES, LostProcesses
from lrmc_ray.tune.processes import PROCESSES
from tests.support.tiny import make_data

ROOT = Path(__file__).parents[2]


def checkpoint(run, step):
    (run / "training" / CHECKPOINTS / f"step_{step:08d}").mkdir(parents=True)


def test_only_the_middle_of_a_training_goes_on(tmp_path):
    lost = LostProcesses()
    run = tmp_path / "0000"
    assert not lost.goes_on(run)  # it has not begun to train
    checkpoint(run, 3)
    assert lost.goes_on(run)
    write_manifest(run / "training", {"kind": "training"})
    assert not lost.goes_on(run)  # it was being scored


def test_where_workers_train_the_end_of_the_trial_is_final(tmp_path):
    checkpoint(tmp_path / "0000", 3)
    LocalRun(tmp_path / "0000" / "training").note_reservation("group")
    assert not LostProcesses().goes_on(tmp_path / "0000")


def test_losses_are_counted_anew_with_every_checkpoint_and_for_every_run(tmp_path):
    first, other = tmp_path / "0000", tmp_path / "0001"
    (first / "training").mkdir(parents=True)
    (other / "training").mkdir(parents=True)
    lost = LostProcesses()
    assert [lost.goes_on(first) for _ in range(MAX_LOSSES)] == [True] * MAX_LOSSES
    checkpoint(first, 2)
    assert [lost.goes_on(first) for _ in range(MAX_LOSSES)] == [True] * MAX_LOSSES
    assert not lost.goes_on(first)
    assert lost.goes_on(other)
    checkpoint(first, 4)
    assert lost.goes_on(first)


def test_it_is_said_where_it_goes_on(tmp_path, caplog):
    (tmp_path / "0007" / "training").mkdir(parents=True)
    lost = LostProcesses()
    lost.goes_on(tmp_path / "0007")
    checkpoint(tmp_path / "0007", 12)
    lost.goes_on(tmp_path / "0007")
    assert [record.getMessage() for record in caplog.records] == [
        "the process of trial 7 died in training; it goes on from its beginning",
        "the process of trial 7 died in training; it goes on from its checkpoint of step 12",
    ]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_that_is_killed_in_training_ends_with_the_same_weights(tmp_path, tiny_model):
    data = make_data(tmp_path / "train.jsonl")

    def search(name, *, kill):
        command = [
            *(sys.executable, "-m", "lrmc_ray.tune", "--space", "smoke", "--model", tiny_model),
            *("--train-data", str(data), "--output", str(tmp_path / name), "--general-tasks"),
            *("plain_english", "--domain-tasks", "capitals", "search.trials=2"),
            *("evaluate.limit=4", "train.steps=200", "train.checkpoint_every=5"),
            *("search.keep_models=all", "resources.max_concurrent=1"),
        ]
        with (tmp_path / f"{name}.log").open("wb") as log:
            running = subprocess.Popen(list(map(str, command)), stderr=log, stdout=log, cwd=ROOT)
        reached = f"{name}/*/trials/0000/training/{CHECKPOINTS}/step_0*"
        while kill and running.poll() is None:
            if found := next(tmp_path.glob(reached), None):
                processes = found.parents[2] / PROCESSES
                os.kill(json.loads(processes.read_text().splitlines()[-1])["pid"], signal.SIGKILL)
                break
            time.sleep(0.05)
        assert running.wait(600) == 0, (tmp_path / f"{name}.log").read_text()
        (study,) = tmp_path.glob(f"{name}/*/study.json")
        trials = json.loads(study.read_text())["trials"]
        assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
        first = study.parent / "trials" / "0000"
        starts = len((first / PROCESSES).read_text().splitlines())
        return starts, (first / "training" / MODEL / "model.safetensors").read_bytes()

    starts, killed = search("killed", kill=True)
    assert starts == 2
    assert search("whole", kill=False) == (1, killed)
