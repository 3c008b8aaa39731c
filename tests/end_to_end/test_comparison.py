"""A comparison by the command line, through Ray, on a small model."""

import json
import os
import subprocess

import pytest

from lrmc_ray.files.artifacts import read_manifest
from tests.support.documents import ROOT
from tests.support.small_comparison import compare_command

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_comparison_runs_to_its_end_with_one_run_that_fails(tmp_path, tiny_model):
    budget = ["compare.learning_rates=[1e-5]", "compare.seeds=[0]", "train.steps=1"]
    budget += ["compare.blend_weights=[0.5]", "compare.depth_blend_weights=[0.5]"]
    command = compare_command(tmp_path, tiny_model, "--json", *budget)
    faults = {"LRMC_TESTING": "1", "LRMC_TRIAL_FAULTS": "lrmc-lr1e-05-seed0:raise"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **faults}
    )
    assert done.returncode == 10, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    sft, lrmc = told["methods"]
    assert sft["seeds"] == [0]
    assert sft["trade"]["domain_gain"]["over_seeds"] is None
    items = sft["trade"]["domain_gain"]["over_items"]
    assert items["low"] <= sft["trade"]["domain_gain"]["value"] <= items["high"]
    assert sft["cost"]["cpu_seconds"] > 0
    assert sft["cost"]["peak_memory_bytes"] > 1e8
    assert sft["kl_general"]["value"] >= 0
    assert lrmc["trade"] is None
    assert lrmc["problems"] == ["lr 1e-05, seed 0, dev: failed: ValueError: a fault was asked for"]
    places = [(row["place"]["form"], row["place"]["weight"]) for row in told["curves"]]
    assert places == [("even", 0.5), ("depth", 0.5), ("even", 1.0)]
    assert [row["beyond"] is None for row in told["curves"]] == [True, False, True]
    assert told["curves"][2]["trade"] == sft["trade"]
    (directory,) = (tmp_path / "runs").glob("compare-smoke-*")
    scored = [read_manifest(path.parent, made_by="evaluate") for path in
              directory.glob("runs/sft-*/scores/*/manifest.json")]  # fmt: skip
    assert len({manifest["identity"]["model"] for manifest in scored}) == 3
    assert list(directory.glob("runs/*/blend.partial")) == []
    names = {path.name for path in directory.iterdir()}
    assert {"compare.html", "compare.md", "compare.csv", "compare.png", "compare.json"} <= names
    assert list(directory.glob("runs/*/training/model")) == []
    for training in directory.glob("runs/sft-*/training"):
        assert read_manifest(training, made_by="train")["steps"] == 1
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 10
    assert "nothing was done again" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == told
