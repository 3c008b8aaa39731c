"""The commands on tiny models of several types: record, train, evaluate and a search of two trials.

Samples are longer than the windows, some of them also than the chunks of the state-space model.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.tiny import make_data, make_model_of_type

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
TYPES = ["qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt2", "mamba2"]
SETTINGS = ("train.steps=4", "train.lr=1e-3", "train.batch_size=4", "train.micro_batches=2")
TASKS = ("--domain-tasks", "capitals", "--general-tasks", "plain_english")


def run(stage: str, *arguments: str) -> dict[str, object]:
    """What a command says of itself in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", f"lrmc_ray.{stage}", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_commands(model_type, tmp_path):
    model = make_model_of_type(model_type, tmp_path / "model")
    data = make_data(tmp_path / "train.jsonl", num_rows=24)
    common = ("--model", str(model), "--train-data", str(data), "--output", str(tmp_path / "runs"))
    recorded = run("record", *common)
    assert recorded["samples"] == 24
    trained = run("train", *common, *SETTINGS)
    assert trained["steps"] == 4
    exported = Path(trained["directory"]) / "model"
    before = load_file(model / "model.safetensors")
    after = load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    place = ("--model", str(model), "--output", str(tmp_path / "runs"))
    scored = run("evaluate", *place, "--tuned", str(exported), *TASKS, "evaluate.limit=6")
    assert scored
    study = run("tune", "--space", "smoke", *common, *SETTINGS, *TASKS, "evaluate.limit=6")
    assert study
    (file,) = (tmp_path / "runs").glob("smoke-*/study.json")
    trials = json.loads(file.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
