"""A real MLflow server that freezes or dies while training writes its metrics."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import pytest

from lrmc_ray.files.metrics_log import MetricsLog, read_metrics
from lrmc_ray.report import mlflow_mirror as tracking
from lrmc_ray.report.mlflow import StudyTracker
from lrmc_ray.report.mlflow_sync import sync
from tests.support.tiny import make_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60
STEP_SECONDS = 0.1


class Server:
    """`mlflow server` on a port of its own, in a process group of its own."""

    def __init__(self, directory):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._database = f"sqlite:///{directory}/mlflow.db"
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--port", str(self.port)),
                *("--backend-store-uri", self._database, "--workers", "1"),
                *("--artifacts-destination", str(self._directory / "artifacts")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("mlflow server did not start")

    def signal(self, number):
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def close(self):
        for number in (signal.SIGCONT, signal.SIGKILL):
            if self._process.poll() is None:
                self.signal(number)


@pytest.mark.parametrize("fault", ["frozen", "killed and back"])
def test_an_outage_neither_slows_training_nor_loses_or_doubles_a_metric(
    fault, tmp_path, monkeypatch
):
    """From step 20 to 40 the server does not answer. Reads back through MLflow's own client."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.prepare_mlflow()
    from mlflow import MlflowClient

    metrics = tmp_path / "trials" / "0" / "metrics.jsonl"
    trial = {
        "number": 0,
        "role": "search",
        "state": "COMPLETE",
        "cause": None,
        "settings": {"lr": 1e-5},
        "params": {"lr": 3e-5},
        "directory": "trials/0",
        "metrics_file": "trials/0/metrics.jsonl",
        "results": {"eval/domain_gain": 0.1},
    }
    study = {
        **{"schema": 1, "id": f"outage-{fault.split()[0]}", "name": "demo", "created": "now"},
        **{"state": "FINISHED", "forgetting_weight": 1.0, "trials": [trial]},
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    server = Server(tmp_path)
    seconds = []
    try:
        tracker = StudyTracker(
            server.uri,
            study_id=study["id"],
            study_name="demo",
            directory=tmp_path,
            poll_seconds=0.3,
        )
        tracker.child(0, trial["params"])
        tracker.forward(0, metrics)
        with MetricsLog(metrics) as log:
            for step in range(1, STEPS + 1):
                if step == 20:
                    server.signal(signal.SIGSTOP if fault == "frozen" else signal.SIGKILL)
                if step == 40 and fault == "frozen":
                    server.signal(signal.SIGCONT)
                start = time.perf_counter()
                log.log(step, {"train/loss": 1.0 / step, "subset/rho": float(step)})
                seconds.append(time.perf_counter() - start)
                time.sleep(STEP_SECONDS)
        if fault != "frozen":
            server.start()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # of a server that is well but busy
        tracker.finish(0, "FINISHED", trial["results"])
        tracker.close(timeout_seconds=60)
        sync(tmp_path, server.uri)
        assert sync(tmp_path, server.uri).points == 0
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("lrmc_ray")
        runs = client.search_runs(
            [experiment.experiment_id], f"tags.`lrmc.study` = '{study['id']}'"
        )
        assert len(runs) == 2
        (child,) = [run for run in runs if "lrmc.trial" in run.data.tags]
        for key, value in (("train/loss", lambda s: 1.0 / s), ("subset/rho", float)):
            points = client.get_metric_history(child.info.run_id, key)
            assert sorted((p.step, p.value) for p in points) == [
                (step, value(step)) for step in range(1, STEPS + 1)
            ]
    finally:
        server.close()
    # What training itself pays is the line in its file.
    before, during = seconds[:19], seconds[19:39]
    assert statistics.median(during) < 2 * statistics.median(before) + 1e-3
    assert max(during) < STEP_SECONDS


@pytest.mark.ray
def test_a_search_ends_well_though_its_server_falls_silent(tiny_model, tmp_path):
    """From the first step on the server takes connections and answers none, to the end."""
    output, server = tmp_path / "runs", Server(tmp_path)
    words = [sys.executable, "-m", "lrmc_ray", "tune", "--space", "smoke"]
    words += ["--model", str(tiny_model), "--train-data", str(make_data(tmp_path / "train.jsonl"))]
    words += ["--domain-tasks", "capitals", "--general-tasks", "plain_english"]
    words += ["--output", str(output), "--tracking-uri", server.uri]
    try:
        search = subprocess.Popen(
            [*words, "evaluate.limit=4", "search.trials=2"], stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 300
        while not list(output.glob("*/trials/**/metrics.jsonl")) and search.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert search.poll() is None
        server.signal(signal.SIGSTOP)
        _, said = search.communicate(timeout=300)
        assert search.returncode == 0, said[-3000:]
        assert "Traceback" not in said
        assert "mlflow-sync" in said
        (study,) = output.glob("*/study.json")
        trials = json.loads(study.read_text())["trials"]
        assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2
        server.signal(signal.SIGCONT)
        sync(study.parent, server.uri)
        assert losses_by_trial(server.uri) == {
            str(trial["number"]): [
                (line.step, line.metrics["train/loss"])
                for line in read_metrics(study.parent / trial["metrics_file"])
            ]
            for trial in trials
        }
    finally:
        server.close()


def losses_by_trial(uri):
    """Steps and losses of every trial, as MLflow's own client reads them."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lrmc_ray")
    return {
        run.data.tags["lrmc.trial"]: sorted(
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, "train/loss")
        )
        for run in client.search_runs([experiment.experiment_id])
        if "lrmc.trial" in run.data.tags
    }
