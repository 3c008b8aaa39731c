"""What the documents tell people to type does what they say, here on a small model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrmc_ray.evaluate.items import Scores
from lrmc_ray.report.study import load_study
from tests.support.documents import ROOT, block


def run(name: str, tiny_model: Path, directory: Path) -> dict[str, Any]:
    """The study of the search that the block ``name`` starts, with the report beside it."""
    commands = block(name)
    assert commands.count("./lrmc tune") == 1
    commands = commands.replace("./lrmc tune", f"{sys.executable} -m lrmc_ray tune --json")
    (directory / "my_model").symlink_to(tiny_model)
    (directory / "examples").symlink_to(ROOT / "examples")
    shorter = "search.trials=2 train.steps=4 evaluate.limit=8"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{commands.rstrip()} --model my_model {shorter}"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])
    study = next((directory / "my_runs").glob("*/study.json"))
    assert study.with_name("report.html").stat().st_size > 10_000
    assert (study.parent / "best_model" / "model.safetensors").is_file()
    return json.loads(study.read_text())


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "samples", "tasks"),
    [
        ("own-data", 72, {"invented", "wordnet"}),
        pytest.param(
            *("own-data-in-full", 3, {"my_task", "wordnet", "plain_english"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_examples_of_own_data_run_as_they_stand(tiny_model, tmp_path, name, samples, tasks):
    study = run(name, tiny_model, tmp_path)
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE", "COMPLETE"]
    assert [trial["role"] for trial in study["trials"]] == ["defaults", "yardstick"]
    assert study["record"]["samples"] == samples
    names = [name.split("/") for name in study["trials"][0]["results"]]
    if name == "own-data":
        check_parts(tmp_path, study)
    assert {parts[2] for parts in names if len(parts) == 4} == tasks


def check_parts(directory: Path, study: dict[str, Any]) -> None:
    """No item that the best trial is judged on at the end was asked while it was chosen."""
    (found,) = (directory / "my_runs").glob("*/study.json")
    searched, final = (
        set(Scores.load(found.parent / path).objective("invented").item_ids)
        for path in (study["base_scores"], study["final"]["base"])
    )
    assert len(searched) == 8  # the limit
    assert len(final) == 9
    assert searched.isdisjoint(final)
    assert load_study(found.parent).verdict.fresh_tasks == ("invented",)


def test_the_example_in_the_readme_is_short():
    assert len(block("own-data").splitlines()) == 2
