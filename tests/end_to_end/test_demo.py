"""The demo as a newcomer runs it: the real model, the real database, by the command line."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lrmc_ray.config import find_space, load_settings

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]

OVERRIDES = ["search.trials=2", "train.checkpoint_every=5"]
STEPS = load_settings(find_space("demo")).train.steps


def command(output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lrmc_ray.tune",
        "--output",
        str(output),
        *OVERRIDES,
        *more,
    ]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A search that was killed in the middle of its training, and the same command again."""
    output = tmp_path_factory.mktemp("runs")
    log = (output / "first.log").open("wb")
    first = subprocess.Popen(
        command(output), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 1500
    pattern = "*/trials/*/training/checkpoints/step_*/manifest.json"
    while not any(output.glob(pattern)) and time.monotonic() < deadline:
        assert first.poll() is None, (output / "first.log").read_text()
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)  # driver, Ray and workers at once
    first.wait()
    steps_before = {
        path.parent.parent.name: path.read_text().count("\n")
        for path in output.glob("*/trials/*/training/ledger.jsonl")
    }
    second = subprocess.run(
        command(output, "--json"), capture_output=True, text=True, check=False, timeout=2400
    )
    assert second.returncode == 0, second.stderr[-3000:]
    directory = next(output.glob("demo-*/study.json")).parent
    return directory, json.loads(second.stdout.splitlines()[-1]), second.stderr, steps_before


def test_the_killed_search_went_on_from_its_checkpoints(search):
    directory, _, _, steps_before = search
    assert steps_before
    for ledger in directory.glob("trials/*/training/ledger.jsonl"):
        steps = [json.loads(line)["step"] for line in ledger.read_text().splitlines()]
        assert sorted(set(steps)) == list(range(STEPS))
        # Redone steps are those since the last checkpoint: fewer than the whole run.
        assert len(steps) - STEPS <= 5


def test_the_model_learns_the_domain(search):
    """Execution accuracy on the test questions rises from near 0, beyond what luck could do."""
    from lrmc_ray.evaluate.items import Scores

    directory, _, _, _ = search
    final = json.loads((directory / "study.json").read_text())["final"]
    before = Scores.load(directory / final["base"]).metric("nl2sql", "accuracy").value
    after = Scores.load(directory / final["best"]).metric("nl2sql", "accuracy").value
    assert before.value < 0.1
    assert after.value >= 0.2
    assert after.low > before.high


def test_the_exported_model_is_the_one_that_was_trained(search):
    """It opens with transformers alone and generates what its own scores say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _, _, _ = search
    study = json.loads((directory / "study.json").read_text())
    exported = directory / "best_model"
    trained = directory / study["trials"][study["best"]]["directory"] / "training" / "model"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("Which country has the most people?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(exported)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(trained)(ids).logits
    assert torch.equal(ours, theirs)
    assert "nl2sql" in (exported / "README.md").read_text()
    assert not (exported / "pytorch_model.bin").exists()


def test_the_printed_command_repeats_the_scores_of_the_search(search):
    """``lrmc evaluate --tuned DIR`` alone: base, tasks, items and output are known."""
    from lrmc_ray.evaluate.items import Scores

    directory, _, _, _ = search
    shown = subprocess.run(
        command(directory.parent), capture_output=True, text=True, check=True, timeout=120
    ).stdout
    (line,) = [line.strip() for line in shown.splitlines() if "lrmc evaluate --tuned" in line]
    done = subprocess.run(
        [*shlex.split(line), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    final = json.loads((directory / "study.json").read_text())["final"]
    for path, name in zip(told["scores"], ("base", "best"), strict=True):
        assert Path(path).parent == directory.parent / "scores"
        repeated, known = Scores.load(Path(path)), Scores.load(directory / final[name])
        assert repeated.metrics.keys() == known.metrics.keys()
        for key, items in known.metrics.items():
            # The search had asked fewer questions of the general tasks.
            values = items.values.tolist()
            again = repeated.metrics[key].values.tolist()[: len(values)]
            assert again == pytest.approx(values, rel=1e-4), key  # other batches, other rounding
            assert key[0] != "nl2sql" or len(repeated.metrics[key].values) == len(values)


def test_mlflow_has_one_parent_and_a_child_per_trial(search):
    from mlflow import MlflowClient

    directory, _, _, _ = search
    client = MlflowClient(f"sqlite:///{directory.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lrmc_ray")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert len(children) == 2
    for run in children:
        assert run.info.status == "FINISHED"
        assert {
            "search items/domain gain",
            "search items/forgetting",
            "train/loss",
        } <= run.data.metrics.keys()
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1))


def test_the_same_command_again_says_so_and_does_nothing(search):
    directory, _, _, _ = search
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    start = time.monotonic()
    again = subprocess.run(
        command(directory.parent), capture_output=True, text=True, check=False, timeout=120
    )
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert time.monotonic() - start < 60
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    assert {p for p in after if p.name != ".lock" and after[p] != before.get(p)} == set()


def test_mlflows_page_shows_forgetting_against_gain(search, tmp_path):
    """The link that the search prints, in a real browser."""
    from tests.end_to_end.mlflow_page import CHROMIUM, page_html, screenshot

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page was not looked at")
    directory, _, _, _ = search
    path = json.loads((directory / "study.json").read_text())["trade_off_path"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"sqlite:///{directory.parent / 'mlflow.db'}"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            uri,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        base_url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{base_url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        page = page_html(f"{base_url}/{path}")
        screenshot(f"{base_url}/{path}", tmp_path / "page.png")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    for text in ("search items/domain gain", "search items/forgetting", "yardstick"):
        assert text in page
    assert (tmp_path / "page.png").stat().st_size > 50_000
