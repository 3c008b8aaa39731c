"""A run that diverges says so and leaves no model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DivergedError
from lrmc_ray.files.names import MODEL
from lrmc_ray.train.divergence import Divergence, LossWatch
from lrmc_ray.train.driver import check_converged
from tests.support.tiny import make_data
from tests.support.training import run_alone


def watched(losses):
    watch = LossWatch(len(losses))
    for loss in losses:
        watch.add(loss)
    return watch.divergence()


@pytest.mark.parametrize(
    ("losses", "last", "count"),
    [
        ([2.0, 1.5, 1.0], None, None),
        ([2.0, 9.0, 4.69], None, None),  # 2 x 2 + ln 2 = 4.693
        ([2.0, 9.0, 4.70], 4.70, 1),
        ([0.01, 0.5, 0.71], None, None),  # 2 x 0.01 + ln 2 = 0.713
        ([0.01, 0.5, 0.72], 0.72, 1),
        ([1.0] * 18 + [2.0, 4.0], 3.0, 2),  # the mean of the last tenth
        ([1.0] * 19 + [4.0], None, None),
        ([1.0] * 990 + [3.0] * 10, 3.0, 10),  # of ten steps at most
        ([1.0] * 991 + [3.0] * 9, 2.8, 10),
        ([math.nan, 1.0, math.nan], math.inf, 1),
        ([1.0] * 18 + [math.nan, 5.0], 5.0, 2),
    ],
)
def test_the_last_tenth_against_the_first_step(losses, last, count):
    found = watched(losses)
    if last is None:
        assert found is None
        return
    assert found.last_loss == pytest.approx(last)
    assert found.last_steps == count
    assert Divergence.of(json.loads(json.dumps(found.as_dict()))) == found


def test_a_run_that_goes_on_remembers_its_losses():
    whole, begun = LossWatch(20), LossWatch(20)
    losses = [1.0, *range(2, 20), 30.0]
    for loss in losses[:19]:
        begun.add(loss)
    resumed = LossWatch(20)
    resumed.load(json.loads(json.dumps(begun.state())))
    resumed.add(losses[19])
    for loss in losses:
        whole.add(loss)
    assert resumed.divergence() == whole.divergence() == Divergence(1.0, 24.5, 2)


@pytest.mark.parametrize(("lr", "diverges"), [(0.9, True), (1e-3, False)])
def test_a_diverged_run_leaves_no_model_and_says_why(lr, diverges, recorded, tiny_model, tmp_path):
    train = TrainSettings.model_validate(
        {"steps": 4, "batch_size": 4, "lr": lr, "loss": "full", "optimizer": "adamw",
         "anchor_weight": 0.0, "warmup_steps": 0, "max_grad_norm": None}
    )  # fmt: skip
    told = run_alone(train, record=recorded, model=tiny_model, directory=tmp_path).run()
    assert (tmp_path / MODEL).exists() is not diverges
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    first, last = lines[0]["loss"], lines[-1]["loss"]
    assert (last > 2 * first + math.log(2)) is diverges
    manifest = {**told, "identity": {"lr": lr}}
    if not diverges:
        assert told["diverged"] is None
        check_converged(manifest)
        return
    assert told["diverged"] == {"first_loss": first, "last_loss": last, "last_steps": 1}
    with pytest.raises(DivergedError, match=r"the run diverged.*Lower train\.lr \(it was 0\.9\)"):
        check_converged(manifest)
    assert DivergedError.exit_code == 8


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_commands_say_so_and_end_with_a_code_of_its_own(tiny_model, tmp_path):
    """Plain fine-tuning with a learning rate that is far too large, alone and in a search."""
    data = make_data(tmp_path / "train.jsonl", num_rows=24)
    of_both = (
        *("--model", str(tiny_model), "--train-data", str(data)),
        *("--output", str(tmp_path / "runs"), "train.lr=0.9", "train.steps=6"),
        *("train.loss=full", "train.optimizer=adamw", "train.anchor_weight=0", "--json"),
        *("train.warmup_steps=0", "train.batch_size=4"),
    )
    for _ in range(2):  # a finished one says it again
        done = run("train", *of_both)
        assert done.returncode == 8, done.stderr[-2000:]
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "the run diverged, and its model is not kept. Lower train.lr (it was 0.9)" in error
        assert json.loads(done.stdout)["diverged"]["last_steps"] == 1
    assert not list(tmp_path.rglob(MODEL))
    search = ("--domain-tasks", "capitals", "--general-tasks", "plain_english", "evaluate.limit=4")
    done = run("tune", *of_both, *search, "--space", "smoke", "search.trials=2")
    assert done.returncode == 10, done.stderr[-2000:]
    (path,) = (tmp_path / "runs").glob("*/study.json")
    defaults, yardstick = json.loads(path.read_text())["trials"]
    assert (defaults["state"], defaults["scores"]) == ("FAIL", None)
    assert "the run diverged" in defaults["cause"]
    assert yardstick["state"] == "COMPLETE"
    argv = ("export", str(path.parent), "--trial", "0", "--to", str(tmp_path / "mine"))
    assert run(*argv).returncode == 2
    assert not (tmp_path / "mine").exists()


def run(*argv):
    return subprocess.run(
        [sys.executable, "-m", "lrmc_ray", *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
