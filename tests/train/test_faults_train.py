"""The fault benchmark of training: its parts, and a slow run with a fault of each kind."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import faults_train
from lrmc_ray.errors import DataError
from lrmc_ray.train.checkpoints import list_checkpoints, load_newest, save_checkpoint

ROOT = Path(__file__).parents[2]
KEYS = {
    "faults",
    "recovered",
    "steps_lost",
    "steps_replayed",
    "samples_missing",
    "samples_duplicated",
    "max_abs_parameter_difference",
    "seconds_to_recover_median",
    "seconds_to_recover_max",
}


def test_every_kind_comes_about_equally_often():
    for seed in range(20):
        chosen = faults_train.choose_kinds(faults_train.KINDS, 16, random.Random(seed))
        counts = [chosen.count(kind) for kind in faults_train.KINDS]
        assert sum(counts) == 16
        assert max(counts) - min(counts) <= 1
    assert chosen == faults_train.choose_kinds(faults_train.KINDS, 16, random.Random(19))


def test_every_damage_is_passed_over_and_all_of_them_occur(tmp_path):
    seen = set()
    for seed in range(40):
        directory = tmp_path / str(seed)
        for step in (5, 10):
            save_checkpoint(directory / "checkpoints", step, {"step": step})
        what = faults_train.damage_checkpoint(directory, random.Random(seed))
        assert load_newest(directory / "checkpoints") == {"step": 5}
        seen.add(what.removeprefix("step_00000010"))
    assert seen == {
        " deleted",
        *(
            f"/{name} {how}"
            for name in ("state.pt", "manifest.json")
            for how in ("emptied", "torn", "bit flipped")
        ),
    }


def test_the_only_checkpoint_is_left_alone(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", 5, {"step": 5})
    assert "left alone" in faults_train.damage_checkpoint(tmp_path, random.Random(0))
    assert load_newest(tmp_path / "checkpoints") == {"step": 5}


def test_the_snapshot_is_one_that_ray_cannot_read(tmp_path):
    faults_train.tear_snapshot(tmp_path)
    (snapshot,) = (tmp_path / "ray").glob("run-*/checkpoint_manager_snapshot.json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(snapshot.read_text())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_fault_of_every_kind_leaves_the_same_model():
    """About five minutes."""
    result = subprocess.run(
        [sys.executable, "benchmarks/faults_train.py", "--kills", "7", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    scores = json.loads(result.stdout.splitlines()[-1])
    assert scores.keys() == KEYS
    assert (scores["faults"], scores["recovered"]) == (7, 7)
    for name in ("steps_lost", "samples_missing", "samples_duplicated"):
        assert scores[name] == 0
    assert scores["max_abs_parameter_difference"] == 0.0
    assert scores["steps_replayed"] <= 7 * 5  # at most a checkpoint's interval per fault


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("kinds", "seed"), [("worker,driver,checkpoint", 1), ("raylet,sigterm,preemption", 3)]
)
def test_runs_in_shards_go_on_behind_every_fault(kinds, seed):
    result = subprocess.run(
        [
            *(sys.executable, "benchmarks/faults_train.py", "--parallel", "shard"),
            *("--kills", "3", "--kinds", kinds, "--seed", str(seed)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    scores = json.loads(result.stdout.splitlines()[-1])
    assert (scores["faults"], scores["recovered"]) == (3, 3)
    assert scores["samples_missing"] == scores["samples_duplicated"] == 0
    assert scores["steps_lost"] == 0
    assert scores["steps_replayed"] <= 3 * 2 * 5  # back to the checkpoint before the one in flight


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_with_all_checkpoints_damaged_the_command_ends_with_4(tmp_path):
    from tests.support.tiny import make_data, make_model

    make_model(tmp_path / "model")
    data = make_data(tmp_path / "train.jsonl", num_rows=30)
    command = [
        *(sys.executable, "-m", "lrmc_ray.train", "--model", str(tmp_path / "model")),
        *("--train-data", str(data), "--output", str(tmp_path / "runs")),
        *("--steps", "4000", "--checkpoint-every", "5", "resources.workers=[1,1]"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    found: list[Path] = []
    while len(found) < 2 and process.poll() is None:
        found = [
            path
            for run in (tmp_path / "runs").glob("training/*/checkpoints")
            for path in list_checkpoints(run)
        ]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (checkpoints,) = (tmp_path / "runs").glob("training/*/checkpoints")
    for path in list_checkpoints(checkpoints):
        (path / "state.pt").write_bytes(b"torn")
    with pytest.raises(DataError):
        load_newest(checkpoints)
    ledger = (checkpoints.parent / "ledger.jsonl").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 4, again.stderr
    assert "from the start" in again.stderr
    assert "Traceback" not in again.stderr
    assert (checkpoints.parent / "ledger.jsonl").read_text() == ledger
