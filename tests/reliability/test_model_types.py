"""The commands on tiny models of several types: record, train, evaluate and a search of two trials.

Samples are longer than the windows, some of them also than the chunks of the state-space model. All
commands share one Ray session, which they use as they find it.
"""

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.console import run_command
from lrmc_ray.evaluate import command as evaluate
from lrmc_ray.record import command as record
from lrmc_ray.train import command as train
from lrmc_ray.tune import command as tune
from tests.support.tiny import make_data, make_model_of_type

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

TYPES = ["qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt2", "mamba2"]
SETTINGS = ("train.steps=2", "train.lr=1e-3", "train.batch_size=4", "train.micro_batches=2")
TASKS = (
    *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
    *("evaluate.limit=4", "evaluate.drift_samples=2"),
)


@pytest.fixture(scope="module", autouse=True)
def _session(tmp_path_factory):
    with ray_session(log=tmp_path_factory.mktemp("ray") / "ray.log", num_cpus=2):
        yield


@pytest.fixture
def run(capsys):
    """What a command says of itself in its last line."""

    def run_one(command, *arguments):
        start = time.monotonic()
        code = run_command(command.main, ["--json", *map(str, arguments)])
        said = capsys.readouterr()
        with capsys.disabled():
            print(f"{command.__name__} took {time.monotonic() - start:.0f} s", flush=True)
        assert code == 0, said.err[-3000:]
        assert "Traceback" not in said.err
        return json.loads(said.out.splitlines()[-1])

    return run_one


@pytest.mark.parametrize("model_type", TYPES)
def test_the_commands(model_type, run, tmp_path):
    model = make_model_of_type(model_type, tmp_path / "model")
    data = make_data(tmp_path / "train.jsonl", num_rows=12)
    place = ("--model", model, "--output", tmp_path / "runs")
    # The largest tau that the search may ask for: it records nothing again.
    common = (*place, "--train-data", data, "record.tau=0.999")
    assert run(record, *common)["samples"] == 12
    trained = run(train, *common, *SETTINGS)
    assert trained["steps"] == 2
    exported = Path(trained["directory"]) / "model"
    before = load_file(model / "model.safetensors")
    after = load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    assert run(evaluate, *place, "--tuned", exported, *TASKS)
    assert run(tune, "--space", "smoke", *common, *SETTINGS, *TASKS)
    (file,) = (tmp_path / "runs").glob("*/study.json")
    trials = json.loads(file.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
