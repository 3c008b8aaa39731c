"""MLflow is read back through its own client, metrics files through plain JSON."""

import contextlib
import http.server
import json
import logging
import math
import re
import shutil
import socket
import socketserver
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.ask.mlflow_model import Answering, write_mlmodel
from lrmc_ray.errors import DataError, IncompleteArtifactError, ResourceError
from lrmc_ray.files.metrics_log import MetricsLog, StepMetrics, read_metrics, read_new_lines
from lrmc_ray.files.names import default_tracking_uri
from lrmc_ray.files.study import TrainingFile
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.report import mlflow_mirror as tracking
from lrmc_ray.report.mlflow import StudyTracker
from lrmc_ray.report.mlflow_mirror import metric_name, mlflow_status
from lrmc_ray.report.mlflow_shown import shown_results
from lrmc_ray.report.mlflow_sync import sync
from lrmc_ray.report.study import load_study
from lrmc_ray.report.words import headline
from tests.support.synthetic_study import add_final, edit, make_study

MOST_CALL_SECONDS = 0.05
"""What a call on the driver may take, whatever MLflow does."""


# --- the metrics file ---------------------------------------------------------------------------


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_a_line_is_strict_json_with_step_time_and_metrics(tmp_path):
    before = time.time()
    with MetricsLog(tmp_path / "trial" / "metrics.jsonl") as log:
        log.log(3, {"train/loss": 0.25, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 7})
    content = (tmp_path / "trial" / "metrics.jsonl").read_text()
    assert content.count("\n") == 1
    assert content.endswith("\n")
    line = json.loads(content, parse_constant=refuse_constant)
    assert before <= line.pop("time") <= time.time()
    assert line == {
        "step": 3,
        "metrics": {"train/loss": 0.25, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 7.0},
    }


def test_metrics_read_back_as_floats(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log(1, {"x": 0.1, "nan": math.nan, "inf": math.inf, "minus": -math.inf})
    [line] = read_metrics(tmp_path / "m.jsonl")
    assert line.step == 1
    assert math.isnan(line.metrics.pop("nan"))
    assert line.metrics == {"x": 0.1, "inf": math.inf, "minus": -math.inf}


def test_the_last_line_of_a_redone_step_counts(tmp_path):
    path = tmp_path / "m.jsonl"
    for steps, factor in (((1, 2, 3), 1.0), ((2, 3, 4), 10.0)):
        with MetricsLog(path) as log:
            for step in steps:
                log.log(step, {"x": factor * step})
    assert [(m.step, m.metrics["x"]) for m in read_metrics(path)] == [
        (1, 1.0),
        (2, 20.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert len(path.read_text().splitlines()) == 6


def test_no_file_reads_as_no_steps(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


@given(cut=st.integers(0, 200))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_a_torn_end_is_ignored_by_the_reader_and_cut_by_the_writer(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    lines = [f'{{"step": {s}, "time": {s}.5, "metrics": {{"x": {s}}}}}\n' for s in (1, 2, 3, 4)]
    content = "".join(lines)[:cut]
    path.write_text(content)
    whole = content.count("\n")
    expected = [StepMetrics(s, s + 0.5, {"x": float(s)}) for s in range(1, whole + 1)]
    assert read_metrics(path) == expected

    with MetricsLog(path) as log:
        log.log(9, {"x": 9.0})
    assert path.read_text().splitlines(keepends=True)[:-1] == lines[:whole]
    assert [m.step for m in read_metrics(path)] == [*range(1, whole + 1), 9]


def test_reading_on_takes_whole_new_lines_only(tmp_path):
    path = tmp_path / "m.jsonl"
    line = '{"step": 1, "time": 0.5, "metrics": {"x": 1}}\n'
    path.write_text(line + line[:20])
    first, offset = read_new_lines(path, 0)
    assert (len(first), offset) == (1, len(line))
    path.write_text(line + line.replace("1,", "2,", 1))
    second, offset = read_new_lines(path, offset)
    assert ([m.step for m in second], offset) == ([2], 2 * len(line))
    path.write_text(line)  # started over
    assert [m.step for m in read_new_lines(path, offset)[0]] == [1]


@pytest.mark.parametrize(
    "bad", ["not json", "[]", '{"step": 2}', '{"step": 2, "time": 0, "metrics": {"x": null}}']
)
def test_a_corrupt_line_inside_is_an_error_that_says_where(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    good = '{"step": 1, "time": 0.5, "metrics": {"x": 1}}\n'
    path.write_text(f"{good}{bad}\n{good}")
    with pytest.raises(DataError, match=rf"m\.jsonl .* byte {len(good)} does not"):
        read_metrics(path)


WRITER = """
import sys
from pathlib import Path
from lrmc_ray.files.metrics_log import MetricsLog
with MetricsLog(Path(sys.argv[1])) as log:
    for step in range(1, 10**7):
        log.log(step, {"train/loss": 1 / step, "subset/rho": step / 2})
"""


def test_kill_leaves_a_gapless_beginning(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        while not path.exists() or path.stat().st_size < 20_000:
            time.sleep(0.005)
    finally:
        writer.kill()
        writer.wait()
    lines = read_metrics(path)
    assert [m.step for m in lines] == list(range(1, len(lines) + 1))
    assert all(m.metrics == {"train/loss": 1 / m.step, "subset/rho": m.step / 2} for m in lines)
    assert len(lines) > 100


FULL_DISK = """
import resource, sys
from pathlib import Path
from lrmc_ray.files.metrics_log import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with MetricsLog(Path(sys.argv[1])) as log:
    try:
        for step in range(100):
            log.log(step, {"train/loss": 0.5})
    except OSError as error:
        print(step, error.filename)
"""


def test_a_full_disk_leaves_whole_lines_and_names_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    failed_step, name = result.stdout.split()
    assert name == str(path)
    assert path.read_bytes().endswith(b"\n")
    assert [m.step for m in read_metrics(path)] == list(range(int(failed_step)))
    assert int(failed_step) > 5


# --- MLflow -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One database for the module: MLflow takes five seconds to set one up."""
    output = tmp_path_factory.mktemp("out put ü")
    return default_tracking_uri(output)


@pytest.fixture(scope="module")
def client(uri):
    tracking.prepare_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def default_artifacts(uri: str) -> Path:
    """Where artifacts lie beside the database."""
    return Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"


def runs_of(client, study_id):
    """Parent and children by trial number."""
    experiment = client.get_experiment_by_name("lrmc_ray")
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.`lrmc.study` = '{study_id}'", max_results=1000
    )
    parents = [run for run in runs if "lrmc.trial" not in run.data.tags]
    children = {int(r.data.tags["lrmc.trial"]): r for r in runs if "lrmc.trial" in r.data.tags}
    assert len(parents) == 1
    assert len(children) == len(runs) - 1, "a trial has two runs"
    return parents[0], children


def history(client, run, key):
    """All points of a metric as (step, value)."""
    points = client.get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def write_steps(path, steps, value=float):
    with MetricsLog(path) as log:
        for step in steps:
            log.log(step, {"train/loss": value(step), "subset/rho": 2.0 * step})


def write_study(directory, study_id, *, trials=2, steps=3, **fields):
    """A finished study on disk; trial n has loss n + step at each step."""
    described = []
    for number in range(trials):
        path = directory / "trials" / str(number) / "metrics.jsonl"
        write_steps(path, range(1, steps + 1), lambda step, n=number: float(n + step))
        described.append(
            {
                "number": number,
                "role": "search",
                "state": "COMPLETE",
                "cause": None,
                "settings": {"lr": 1e-5, "betas": [0.9, 0.99], "clip": None},
                "params": {"lr": 3e-5, "tau": 0.95},
                "directory": f"trials/{number}",
                "metrics_file": f"trials/{number}/metrics.jsonl",
                "results": {"eval/domain_gain": 0.1 * number, "note": "text", "ok": True},
            }
        )
    study = {
        **{"schema": 1, "id": study_id, "name": "demo", "created": "now", "state": "FINISHED"},
        **{"forgetting_weight": 1.0, "trials": described},
        **fields,
    }
    (directory / "study.json").write_text(json.dumps(study))
    return study


def test_a_study_as_it_runs(client, uri, tmp_path):
    space = tmp_path / "space.toml"
    space.write_text("[search]\ntrials = 2\n")
    with StudyTracker(
        uri,
        study_id="live",
        study_name="demo",
        directory=tmp_path,
        params={"trials": 2},
        datasets=[TrainingFile(name="nl2sql", digest="ab" * 32, source="/data/nl2sql.jsonl")],
        poll_seconds=0.05,
    ) as tracker:
        tracker.log_artifact(space, "config")
        tracker.child(0, {"tau": 0.95, "lr": 3e-5}, role="default", tags={"gpu": "none"})
        tracker.forward(0, tmp_path / "0.jsonl")
        write_steps(tmp_path / "0.jsonl", (1, 2))
        tracker.child(1, {"tau": 0.9})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and tracker.trade_off_path is None:
            time.sleep(0.05)
        write_steps(tmp_path / "0.jsonl", (3,))
        tracker.finish(0, "FINISHED", {"eval/domain_gain": 0.25, "eval/forgetting": -0.5})
        tracker.finish(1, "FAILED", cause="loss was not finite")

    parent, children = runs_of(client, "live")
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "demo"
    assert parent.data.params == {"trials": "2"}
    [artifact] = client.list_artifacts(parent.info.run_id, "config")
    copied = client.download_artifacts(parent.info.run_id, artifact.path, str(tmp_path))
    assert Path(copied).read_text() == space.read_text()
    for run in (parent, *children.values()):
        [dataset] = [item.dataset for item in run.inputs.dataset_inputs]
        assert (dataset.name, dataset.digest) == ("nl2sql", ("ab" * 32)[:36])
        assert json.loads(dataset.source) == {"uri": "/data/nl2sql.jsonl"}

    good, bad = children[0], children[1]
    assert good.info.status == "FINISHED"
    assert good.info.run_name == "trial 0 default"
    assert good.data.params == {"tau": "0.95", "lr": "3e-05"}
    assert good.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert good.data.tags["lrmc.role"] == "default"
    assert good.data.tags["gpu"] == "none"
    assert "lrmc.cause" not in good.data.tags
    assert history(client, good, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert history(client, good, "subset/rho") == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert history(client, good, "search items/domain gain") == [(0, 25.0)]
    assert good.data.metrics["search items/forgetting"] == -50.0
    assert (bad.info.status, bad.data.tags["lrmc.cause"]) == ("FAILED", "loss was not finite")
    assert bad.data.metrics == {}
    on_disk = read_metrics(tmp_path / "0.jsonl")
    points = client.get_metric_history(good.info.run_id, "train/loss")
    assert [p.timestamp for p in points] == [round(1000 * line.time) for line in on_disk]


def test_a_resumed_study_doubles_nothing(client, uri, tmp_path):
    def tracker():
        return StudyTracker(
            uri, study_id="resumed", study_name="demo", directory=tmp_path, poll_seconds=0.05
        )

    path = tmp_path / "m.jsonl"
    write_steps(path, (1, 2, 3))
    with contextlib.suppress(KeyboardInterrupt), tracker() as first:
        first.child(0, {"tau": 0.95})
        first.forward(0, path)
        raise KeyboardInterrupt
    parent, children = runs_of(client, "resumed")
    assert (parent.info.status, children[0].info.status) == ("KILLED", "RUNNING")
    assert parent.data.tags["lrmc.cause"] == "KeyboardInterrupt"

    # It had been saved at step 1, so steps 2 and 3 are redone, with other values.
    write_steps(path, (2, 3, 4), value=lambda step: 100.0 * step)
    with tracker() as second:
        second.child(0, {"tau": 0.5, "lr": 1e-5})
        second.forward(0, path)
        second.finish(0, "FINISHED")
    again, children = runs_of(client, "resumed")
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == "FINISHED"
    assert "lrmc.cause" not in again.data.tags
    assert history(client, children[0], "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 400.0)]
    # A param cannot be changed: the first value stays, and nothing crashes.
    assert children[0].data.params == {"tau": "0.95", "lr": "1e-05"}
    assert [m.metrics["train/loss"] for m in read_metrics(path)] == [1.0, 200.0, 300.0, 400.0]


def test_neighbouring_trials_differ_in_colour_and_a_chosen_colour_stays(client, uri, tmp_path):
    def run():
        with StudyTracker(
            uri, study_id="colours", study_name="demo", directory=tmp_path, poll_seconds=0.05
        ) as tracker:
            for number in range(9):
                tracker.child(number, {"tau": 0.9}, role="yardstick" if number == 1 else "search")
                tracker.finish(number, "FINISHED")
        _, children = runs_of(client, "colours")
        return [children[number].data.tags["mlflow.runColor"] for number in range(9)], children

    colours, children = run()
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert colours.count(colours[1]) == 1
    assert len(set(colours[:8])) == 8
    client.set_tag(children[3].info.run_id, "mlflow.runColor", "#123456")
    again, _ = run()
    assert again == [*colours[:3], "#123456", *colours[4:]]


def test_a_trial_of_an_earlier_process_may_end_in_this_one(client, uri, tmp_path):
    def tracker():
        return StudyTracker(
            uri, study_id="handed-on", study_name="demo", directory=tmp_path, poll_seconds=0.05
        )

    with tracker() as first:
        first.child(0, {"tau": 0.95}, role="yardstick")
    with tracker() as second:
        second.finish(0, "FAILED", cause="its machine was lost")
    _, children = runs_of(client, "handed-on")
    assert (children[0].info.status, children[0].data.params) == ("FAILED", {"tau": "0.95"})
    assert children[0].data.tags["lrmc.cause"] == "its machine was lost"
    assert children[0].data.tags["lrmc.role"] == "yardstick"


def test_sync_brings_a_study_from_its_directory_alone_and_once(client, uri, tmp_path):
    write_study(tmp_path, "from-disk")
    first = sync(tmp_path, uri)
    assert (first.runs, first.points) == (3, 2 * (3 * 2 + 1))
    second = sync(tmp_path, uri)
    assert (second.runs, second.points) == (0, 0)
    parent, children = runs_of(client, "from-disk")
    assert parent.info.status == "FINISHED"
    assert sorted(children) == [0, 1]
    assert history(client, children[1], "train/loss") == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert history(client, children[1], "search items/domain gain") == [(0, 10.0)]
    assert sorted(children[1].data.metrics) == [
        "search items/domain gain",
        "subset/rho",
        "train/loss",
    ]
    # A trial's own params lie over the settings.
    assert children[1].data.params == {
        "lr": "3e-05",
        "tau": "0.95",
        "betas": "[0.9, 0.99]",
        "clip": "None",
    }


def test_an_error_of_the_database_is_one_line(tmp_path, capsys):
    """In place of a full disk: a table is gone."""
    write_study(tmp_path, "from-disk")
    database = tmp_path / "own.db"
    sync(tmp_path, f"sqlite:///{database}")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE metrics")
        connection.commit()
    capsys.readouterr()
    with pytest.raises(ResourceError, match=r"MLflow at .* must answer, but .*no such table"):
        sync(tmp_path, f"sqlite:///{database}")
    assert "Traceback" not in "".join(capsys.readouterr())


def test_what_a_pass_missed_is_added_by_the_next(client, uri, tmp_path):
    study = write_study(tmp_path, "grows")
    study["trials"][1] |= {"state": "RUNNING", "results": {}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    sync(tmp_path, uri)
    write_steps(tmp_path / "trials/1/metrics.jsonl", (4, 5))
    study["trials"][1] |= {"state": "PRUNED", "cause": "no better than the median"}
    (tmp_path / "study.json").write_text(json.dumps(study))
    added = sync(tmp_path, uri)
    assert (added.runs, added.points) == (0, 4)
    _, children = runs_of(client, "grows")
    assert children[1].info.status == "KILLED"
    assert children[1].data.tags["lrmc.cause"] == "no better than the median"
    assert children[1].data.tags["lrmc.stopped_early"] == "true"
    assert "lrmc.stopped_early" not in children[0].data.tags
    assert [step for step, _ in history(client, children[1], "train/loss")] == [1, 2, 3, 4, 5]


def test_of_redone_steps_that_were_never_sent_the_last_is_sent(client, uri, tmp_path):
    write_study(tmp_path, "redone", trials=1)
    write_steps(tmp_path / "trials/0/metrics.jsonl", (2, 3, 4), lambda step: 100.0 * step)
    assert sync(tmp_path, uri).points == 2 * 4 + 1
    _, children = runs_of(client, "redone")
    points = history(client, children[0], "train/loss")
    assert points == [(1, 1.0), (2, 200.0), (3, 300.0), (4, 400.0)]


def test_more_than_mlflow_takes_at_once(client, uri, tmp_path):
    study = write_study(tmp_path, "large", trials=1, steps=1100)
    study["trials"][0]["settings"] = {f"s{i}": i for i in range(250)} | {"long": "x" * 9000}
    study["trials"][0]["cause"] = "y" * 9000
    (tmp_path / "study.json").write_text(json.dumps(study))
    assert sync(tmp_path, uri).points == 2201
    _, children = runs_of(client, "large")
    assert len(history(client, children[0], "train/loss")) == 1100
    assert len(children[0].data.params) == 250 + 1 + 2
    assert children[0].data.params["long"] == "x" * 6000
    assert children[0].data.tags["lrmc.cause"] == "y" * 8000


def test_non_finite_values_reach_mlflow(client, uri, tmp_path):
    write_study(tmp_path, "broken-run", trials=1, steps=1)
    with MetricsLog(tmp_path / "trials/0/metrics.jsonl") as log:
        log.log(2, {"train/loss": math.nan, "subset/rho": math.inf})
    sync(tmp_path, uri)
    _, children = runs_of(client, "broken-run")
    points = client.get_metric_history(children[0].info.run_id, "train/loss")
    assert math.isnan(points[1].value)
    # The database has no infinity; MLflow stores the largest double.
    assert history(client, children[0], "subset/rho") == [(1, 2.0), (2, sys.float_info.max)]


def test_an_answer_that_was_lost_doubles_nothing(client, uri, tmp_path, monkeypatch):
    """The server does what it is asked, but the client sees a failure, once for each call."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    failed = set()

    def lossy(name):
        real = getattr(MlflowClient, name)

        def call(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            kind = (name, "metrics" in kwargs)
            if kind not in failed:
                failed.add(kind)
                raise MlflowException("no answer")
            return result

        return call

    for name in ("create_run", "log_batch", "log_inputs", "set_terminated", "log_artifact"):
        monkeypatch.setattr(MlflowClient, name, lossy(name))
    write_study(
        tmp_path,
        "lossy",
        datasets=[{"name": "d", "digest": "1", "source": "/d"}],
        artifacts=[{"path": "study.json"}],
    )
    attempts = 0
    while True:
        attempts += 1
        try:
            sync(tmp_path, uri)
            break
        except ResourceError:
            assert attempts < 20
    assert attempts == 1 + len(failed) == 7
    parent, children = runs_of(client, "lossy")
    assert history(client, children[0], "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(children[0].inputs.dataset_inputs) == 1
    assert [a.path for a in client.list_artifacts(parent.info.run_id)] == ["study.json"]


def test_a_corrupt_metrics_file_does_not_hold_up_the_others(client, uri, tmp_path):
    write_study(tmp_path, "partly")
    (tmp_path / "trials/0/metrics.jsonl").write_text("oops\n")
    with pytest.raises(DataError, match=r"trials/0/metrics\.jsonl .* byte 0"):
        sync(tmp_path, uri)
    _, children = runs_of(client, "partly")
    assert len(history(client, children[1], "train/loss")) == 3


def test_a_study_that_cannot_be_read(tmp_path, uri):
    with pytest.raises(IncompleteArtifactError, match=r"has no study\.json"):
        sync(tmp_path, uri)
    study = write_study(tmp_path, "a", trials=1)
    without_name = {key: value for key, value in study.items() if key != "name"}
    odd = {**study["trials"][0], "state": "odd"}
    for text, reason in (
        ("{", r"study\.json: the file: Invalid JSON"),
        ("[]", r"study\.json: the file: Input should be an object"),
        (json.dumps(without_name), r"study\.json: name: Field required"),
        (json.dumps({**study, "trials": [odd]}), r"study\.json: trials\.0\.state: .*'COMPLETE'"),
    ):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            sync(tmp_path, uri)
    write_study(tmp_path, "a' or 1")
    with pytest.raises(DataError, match="a study's id is made of"):
        sync(tmp_path, uri)


def test_a_state_that_mlflow_has_no_name_for_is_refused():
    assert mlflow_status("pruned") == "KILLED"
    with pytest.raises(DataError, match=r"a state is one of .* got 'odd'"):
        mlflow_status("odd")


@given(name=st.text(max_size=300))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_mlflow_accepts_every_metric_name_we_give_it(name):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_name(name))


def test_a_good_metric_name_stays():
    for name in ("eval/domain/nl2sql/accuracy", "train/supervised_tokens_per_second", "a-b. c:d"):
        assert metric_name(name) == name
    assert metric_name("eval/general/wordnet/acc,none") == "eval/general/wordnet/acc_none"


def test_the_trade_off_is_saved_as_a_view_of_the_runs_page(client, uri, tmp_path):
    write_study(tmp_path, "viewed")
    path = sync(tmp_path, uri).trade_off_path
    experiment = client.get_experiment_by_name("lrmc_ray")
    assert path == (
        f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART&viewStateShareKey=lrmc-viewed"
    )
    view = json.loads(experiment.tags["mlflow.sharedViewState.lrmc-viewed"])
    # These types are what the page checks before it offers a view.
    assert isinstance(view["name"], str)
    assert isinstance(view["createdAt"], int)
    state = json.loads(view["state"])
    assert state["searchFilter"] == "tags.`lrmc.study` = 'viewed'"
    [scatter] = [c for c in state["compareRunCharts"] if c["type"] == "SCATTER"]
    assert scatter["xaxis"] == {"key": "search items/forgetting", "type": "METRIC"}
    assert scatter["yaxis"] == {"key": "search items/domain gain", "type": "METRIC"}
    assert state["runListHidden"] is True
    assert [section["columns"] for section in state["compareRunSections"]] == [2]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections


# --- MLflow does not answer ---------------------------------------------------------------------


class FailingHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def unhelpful_server(kind):
    """The address of a server that is ``dead``, ``frozen`` or ``failing``."""
    if kind == "failing":
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), FailingHandler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "frozen":
            listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["dead", "frozen", "failing"])
def test_an_unhelpful_server_costs_no_time_and_sync_catches_up(
    kind, client, uri, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    study = write_study(tmp_path, f"missed-{kind}")
    call_seconds = []

    def timed(call, *args, **kwargs):
        start = time.perf_counter()
        result = call(*args, **kwargs)
        call_seconds.append(time.perf_counter() - start)
        return result

    with unhelpful_server(kind) as address, caplog.at_level(logging.INFO, "lrmc_ray"):
        tracker = timed(
            StudyTracker,
            address,
            study_id=study["id"],
            study_name="demo",
            directory=tmp_path,
            catch_up="lrmc mlflow-sync --output here",
            poll_seconds=0.2,
        )
        for trial in study["trials"]:
            number = trial["number"]
            timed(tracker.child, number, trial["params"])
            timed(tracker.forward, number, tmp_path / trial["metrics_file"])
            timed(tracker.finish, number, "FINISHED", trial["results"])
        timed(tracker.log_artifact, tmp_path / "study.json")
        time.sleep(2.5)  # several attempts
        start = time.perf_counter()
        assert tracker.close(timeout_seconds=5) is False
        assert time.perf_counter() - start < 6
    # The median, for a busy machine may stop us for longer at any time.
    assert statistics.median(call_seconds) < MOST_CALL_SECONDS
    assert max(call_seconds) < 0.5
    assert tracker.trade_off_path is None
    messages = [r.getMessage() for r in caplog.records if r.name == "lrmc_ray.report.mlflow"]
    assert all("`lrmc mlflow-sync --output here`" in message for message in messages)
    # One for the cause, however often it was tried, and one at the end.
    assert len(messages) == 2

    assert sync(tmp_path, uri).runs == 3
    assert sync(tmp_path, uri).points == 0
    _, children = runs_of(client, study["id"])
    assert history(client, children[1], "train/loss") == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert history(client, children[0], "search items/domain gain") == [(0, 0.0)]


def test_a_server_that_comes_up_late_gets_everything(client, uri, tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    write_steps(tmp_path / "m.jsonl", (1, 2))
    up = threading.Event()
    real = MlflowClient.get_experiment_by_name

    def sometimes(self, name):
        if not up.is_set():
            raise ConnectionError("still down")
        return real(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", sometimes)
    with caplog.at_level(logging.INFO, "lrmc_ray"):
        tracker = StudyTracker(
            uri, study_id="late", study_name="demo", directory=tmp_path, poll_seconds=0.05
        )
        tracker.child(0, {"tau": 0.9})
        tracker.forward(0, tmp_path / "m.jsonl")
        time.sleep(0.5)
        up.set()
        tracker.finish(0, "FINISHED")
        assert tracker.close() is True
    parent, children = runs_of(client, "late")
    assert parent.info.status == "FINISHED"
    assert history(client, children[0], "train/loss") == [(1, 1.0), (2, 2.0)]
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        f"MLflow at {uri} misses data",
        f"MLflow at {uri} is up to date again",
    ]


def test_a_server_that_dies_at_the_end_is_no_success(client, uri, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    tracker = StudyTracker(
        uri, study_id="cut-off", study_name="demo", directory=tmp_path, poll_seconds=0.05
    )
    while tracker.trade_off_path is None:
        time.sleep(0.05)

    def fail(*args, **kwargs):
        raise ConnectionError("gone")

    monkeypatch.setattr(MlflowClient, "set_terminated", fail)
    assert tracker.close() is False
    assert runs_of(client, "cut-off")[0].info.status == "RUNNING"


def test_sync_to_a_dead_server_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_study(tmp_path, "nowhere")
    with unhelpful_server("dead") as address, pytest.raises(ResourceError, match=address):
        sync(tmp_path, address)


PROGRAM = """
import sys, time
from pathlib import Path
from lrmc_ray.report.mlflow import StudyTracker
with StudyTracker(sys.argv[1], study_id="s", study_name="s", directory=Path(sys.argv[2])) as t:
    t.child(0, {"tau": 0.9})
    while not Path(sys.argv[2], "connected").exists():
        time.sleep(0.05)
    start = time.monotonic()
    complete = t.close("FINISHED", timeout_seconds=1)
print(complete, time.monotonic() - start < 2, time.time())
"""


def test_a_program_ends_while_the_server_is_frozen(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def accept():
            connection, _ = listening.accept()
            (tmp_path / "connected").touch()
            connections.append(connection)

        connections: list[socket.socket] = []
        threading.Thread(target=accept, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, address, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        ended = time.time()
        connections[0].close()
    complete, in_time, at = result.stdout.split()
    assert (complete, in_time) == ("False", "True")
    assert ended - float(at) < 5


def test_a_failed_study_says_why(client, uri, tmp_path):
    with (
        pytest.raises(ValueError, match="no data"),
        StudyTracker(uri, study_id="failed", study_name="demo", directory=tmp_path),
    ):
        raise ValueError("no data")
    parent, _ = runs_of(client, "failed")
    assert parent.info.status == "FAILED"
    assert parent.data.tags["lrmc.cause"] == "ValueError: no data"


@pytest.mark.parametrize("module", ["lrmc_ray.report.mlflow", "lrmc_ray.files.metrics_log"])
def test_importing_is_light(module):
    heavy = "{'mlflow', 'torch', 'ray', 'rich', 'numpy', 'pandas'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_training_never_calls_mlflow():
    """Its workers write a file: nothing that MLflow does can reach them."""
    code = (
        "import sys, lrmc_ray.train.loop, lrmc_ray.train\n"
        "assert not {'mlflow', 'lrmc_ray.report.mlflow'} & set(sys.modules), 'mlflow is there'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("uri", "behind"),
    [
        (None, ""),
        ("http://127.0.0.1:5000", " --tracking-uri http://127.0.0.1:5000"),
        ("https://ann:hunter2@ml.example", " --tracking-uri 'https://***@ml.example'"),
    ],
)
def test_catching_up_is_with_the_mlflow_that_the_search_had(uri, behind, tmp_path):
    command = tracking.catch_up_command(tmp_path / "a study", uri or default_tracking_uri(tmp_path))
    assert command.endswith(f"lrmc mlflow-sync '{tmp_path / 'a study'}'{behind}")


def test_the_best_model_is_registered_once_and_comes_back_whole(client, uri, tmp_path):
    from lrmc_ray.report.mlflow import register_model

    write_study(tmp_path, "registered", best=1, experiment="another")
    model = tmp_path / "best_model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    with pytest.raises(IncompleteArtifactError, match=r"lrmc mlflow-sync .* first"):
        register_model(tmp_path, model, "my-model", uri)
    sync(tmp_path, uri)
    assert client.get_experiment_by_name("another") is not None
    assert register_model(tmp_path, model, "my-model", uri) == "1"
    assert register_model(tmp_path, model, "my-model", uri) == "1"
    (version,) = client.search_model_versions("name = 'my-model'")
    assert version.tags["lrmc.trial"] == "1"
    source = client.get_model_version_download_uri("my-model", "1")
    copy = Path(urllib.request.url2pathname(source.removeprefix("file://")))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_scores_are_shown_in_points_of_100_and_others_as_they_are():
    results = {
        "eval/domain_gain": 0.25,
        "eval/combined_low": -0.5,
        "eval/general/wordnet/accuracy": 0.75,
        "eval/general/plain_english/cross_entropy": 3.5,
        "eval/kl_base_domain": 0.2,
        "note": "text",
    }
    assert shown_results(results) == {
        "search items/domain gain": 25.0,
        "search items/combined low": -50.0,
        "search items/general/wordnet/accuracy": 75.0,
        "eval/general/plain_english/cross_entropy": 3.5,
        "eval/kl_base_domain": 0.2,
        "note": "text",
    }


def test_the_studys_run_says_what_was_found_and_where_the_best_model_is(client, uri, tmp_path):
    directory = tmp_path / "demo-0123"
    directory.mkdir()
    add_final(make_study(directory))
    edit(directory, state="FINISHED", trials={9: {"state": "FAIL"}})
    (directory / "best_model").mkdir()
    (directory / "best_model" / "model.safetensors").write_bytes(b"0" * 1000)
    study = load_study(directory)
    for _ in range(2):  # nothing is there twice
        sync(directory, uri)
    parent, _ = runs_of(client, study.file.id)
    note = parent.data.tags["mlflow.note.content"]
    assert headline(study)[0].text in note
    assert f"get-artifact?path=gain_vs_forgetting.png&run_uuid={parent.info.run_id}" in note
    verdict = study.verdict.comparison
    gain = parent.data.metrics["test items/best: domain gain"]
    assert gain == pytest.approx(100 * verdict.domain_gain.value)
    lost = parent.data.metrics["search items/best: forgetting"]
    assert lost == pytest.approx(100 * verdict.forgetting.value)
    combined = parent.data.metrics["search and test items/best: combined"]
    assert combined == pytest.approx(100 * verdict.combined.value)
    assert "test items/plain fine-tuning: domain gain" in parent.data.metrics
    (named,) = parent.outputs.model_outputs
    (model,) = client.search_logged_models([parent.info.experiment_id], max_results=10)
    assert model.model_id == named.model_id
    assert model.tags["lrmc.directory"] == str(directory / "best_model")
    assert model.source_run_id == parent.info.run_id
    assert model.status.value == "READY"
    copies = list(default_artifacts(uri).rglob("model.safetensors"))
    assert not [path for path in copies if parent.info.run_id in str(path)]


def test_mlflow_loads_a_models_directory_as_it_is(tiny_model, tmp_path):
    import mlflow.pyfunc

    directory = Path(shutil.copytree(tiny_model, tmp_path / "best_model"))
    write_mlmodel(directory)
    loaded = mlflow.pyfunc.load_model(str(directory))
    questions = ["What is one?", "What is two, then?"]
    answers = loaded.predict(pd.DataFrame({"prompt": questions}), params=None)
    assert answers == Answering(tiny_model).predict(questions)
    short = loaded.predict(pd.DataFrame({"prompt": questions}), params={"max_new_tokens": 3})
    assert short == Answering(tiny_model).predict(questions, {"max_new_tokens": 3})
    assert all(len(one) < len(whole) for one, whole in zip(short, answers, strict=True))
    tokenizer, model = load_tokenizer(tiny_model), load_model(tiny_model)
    text = f"<|im_start|>user\n{questions[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=128, do_sample=False)[0, ids.shape[1] :]
    assert answers[0] == tokenizer.decode(expected, skip_special_tokens=True)
