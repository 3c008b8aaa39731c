"""Scoring, searching and comparing on nodes without a shared disk.

Models, base scores and the decisions of other trials cross through an S3-compatible server. In
`tests/cluster` the nodes really share nothing; here what is asked for is where it must be.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.items import ITEMS_FILE, Scores
from lrmc_ray.evaluate.processes import ScoredModel, score_part
from lrmc_ray.evaluate.waiting import Watched
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.names import LEDGER, MODEL, RUNG
from lrmc_ray.files.place import LocalPlace, StoredPlace
from lrmc_ray.files.storage import COMMITTED, Storage, files_below
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.train.early_stopping import read_decision, values_of_others
from lrmc_ray.train.ledger import read_ledger
from lrmc_ray.train.stored import StoredRun
from tests.support.rung import RULE, write_decision
from tests.support.s3 import BUCKET, s3_server
from tests.support.tiny import make_data, make_model
from tests.support.training import run_alone, settings_of

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
NAME = "studies/one/trials/0007/training"
REPORTED = ("study.json", "settings.json", "report.html", "gain_vs_forgetting.png")


@pytest.fixture(scope="module")
def server():
    with s3_server() as made:
        yield made


@pytest.fixture
def storage(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    return Storage(server.uri(f"{tmp_path.name}/p"), retry_seconds=())


def objects(server, storage):
    return server.objects(storage.root.partition("/")[2])


# A trial's decision


def decision_of(storage, directory, number, value):
    write_decision(directory, number, value)
    place = f"studies/one/trials/{number:04d}/training/{RUNG}"
    storage.put(directory / f"{number:04d}" / "training" / RUNG, place)


def in_storage(number=7):
    return dataclasses.replace(
        RULE, number=number, trials="studies/one/trials", base_scores="studies/one/base_scores"
    )


def test_trials_compare_with_those_in_the_storage(storage, tmp_path):
    assert values_of_others(in_storage(), StoredPlace(storage.uri)) == {}
    for number, value in {1: 0.25, 3: -0.5, 7: 9.0}.items():
        decision_of(storage, tmp_path, number, value)
    storage.write("studies/one/trials/0004/training/metrics.jsonl", b"{}")
    storage.write("studies/other/trials/0005/training/rung.json", b"{}")
    assert values_of_others(in_storage(), StoredPlace(storage.uri)) == {1: 0.25, 3: -0.5}
    storage.write("studies/one/trials/0003/training/rung.json", b"{")
    with pytest.raises(DataError, match=r"trials/0003/training/rung\.json is damaged"):
        values_of_others(in_storage(), StoredPlace(storage.uri))


@pytest.mark.parametrize("others", [{1: 9.0, 2: 9.0}, {1: -9.0, 2: -9.0}], ids=["worse", "better"])
def test_a_decision_reaches_the_storage_and_the_next_node(
    others,
    storage,
    tmp_path,
    tiny_model,
    recorded,
    base_scores,
):
    """The trial ends, or goes on, on another node without being scored again."""
    for number, value in others.items():
        decision_of(storage, tmp_path / "trials", number, value)
    storage.publish("studies/one/base_scores", {ITEMS_FILE: base_scores / ITEMS_FILE})

    def run_on(node):
        directory = tmp_path / node / "run"
        directory.mkdir(parents=True)
        return run_alone(
            settings_of(),
            record=recorded,
            model=tiny_model,
            files=StoredRun(storage, NAME, directory),
            rung=dataclasses.replace(in_storage(), least=2),
        )

    first, stops = run_on("one"), others[1] > 0
    decide = first.early_stopping.decide

    def decide_and_die(model):
        decide(model)
        raise KeyboardInterrupt

    first.early_stopping.decide = decide_and_die
    with pytest.raises(KeyboardInterrupt):
        first.run()
    known = read_decision(first.directory)
    assert (known.others, known.stop) == ({str(n): v for n, v in others.items()}, stops)
    second = run_on("two")
    second.early_stopping.own_rows = lambda model: pytest.fail("scored again")
    outcome = second.run()
    assert outcome["pruned"] is stops
    driver = StoredRun(storage, NAME, tmp_path / "driver")
    driver.directory.mkdir()
    driver.fetch()
    assert read_decision(driver.directory) == known
    assert (driver.directory / MODEL).is_dir() is not stops
    driver.commit({"kind": "training"})
    driver.clear()
    assert storage.children(NAME).keys() == {RUNG}


def test_a_wish_in_the_drivers_directory_crosses_and_is_taken_back(storage, tmp_path, monkeypatch):
    from lrmc_ray.files.names import CHECKPOINT_NOW
    from lrmc_ray.train import stored as stored_run

    monkeypatch.setattr(stored_run, "PACE_SECONDS", 0.02)
    driver = StoredRun(storage, NAME, tmp_path)
    wish = tmp_path / CHECKPOINT_NOW

    def until(reached):
        deadline = time.monotonic() + 20
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert reached()

    with driver.shown():
        for _ in range(2):
            assert not driver.is_asked()
            wish.touch()
            until(driver.is_asked)
            assert wish.exists()
            driver.storage.delete(f"{NAME}/{CHECKPOINT_NOW}")  # the checkpoint is saved
            until(lambda: not wish.exists())
    assert not driver.is_asked()


def test_a_study_leaves_one_empty_name_however_many_runs_it_had(server, storage, tmp_path):
    """Arrow keeps the name of a directory whose last object is removed, as an object of its own."""
    for number in range(2):
        name = f"studies/one/trials/{number:04d}/training"
        run = StoredRun(storage, name, tmp_path / f"{number}")
        run.directory.mkdir()
        run.begin()
        for part in (f"{RUNG}", "checkpoints/step_00000010/state.pt", "ray/a/b", "metrics.jsonl"):
            storage.write(f"{name}/{part}", b"{}")
        run.ask()
        run.note_reservation("x")
        run.forget_wishes()
        run.commit({"kind": "training"})
        run.clear()
    StoredPlace(storage.uri).clear("studies/one")
    prefix = storage.root.partition("/")[2]
    found = server.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    assert [entry["Key"] for entry in found] == [f"{prefix}/studies/"]


# Scoring


def scoring_of(storage, directory, stored_as=None, *, is_base=False):
    return ScoredModel(directory, StoredPlace(storage.uri), is_base, stored_as)


def test_without_a_storage_the_model_is_where_it_is(tiny_model):
    for is_base in (True, False):
        with ScoredModel(tiny_model, LocalPlace(), is_base).sent() as sent:
            assert sent == str(tiny_model)


def test_a_base_stays_in_the_storage_and_a_tuned_model_does_not(server, storage, tiny_model):
    with scoring_of(storage, tiny_model, is_base=True).sent() as sent:
        assert storage.committed(sent).keys() == files_below(tiny_model).keys()
    kept = objects(server, storage).keys()
    assert kept
    assert {name.partition("/")[0] for name in kept} == {"models"}
    with scoring_of(storage, tiny_model).sent() as sent:
        assert storage.committed(sent).keys() == files_below(tiny_model).keys()
    assert objects(server, storage).keys() == kept
    with (
        pytest.raises(KeyboardInterrupt),
        scoring_of(storage, tiny_model).sent(),
    ):
        raise KeyboardInterrupt
    assert objects(server, storage).keys() == kept
    # One that a run has left there is used, and left.
    storage.publish(f"{NAME}/model", files_below(tiny_model))
    with scoring_of(storage, tiny_model, f"{NAME}/model").sent() as sent:
        assert sent == f"{NAME}/model"
    assert storage.committed(f"{NAME}/model") is not None
    storage.delete_all(f"{NAME}/model")
    with scoring_of(storage, tiny_model, f"{NAME}/model").sent() as sent:
        assert sent.startswith("scoring/")


def test_a_copy_that_cannot_be_removed_hides_no_error(server, storage, tiny_model, caplog):
    seen: list[str] = []

    def fails(refused):
        with scoring_of(storage, tiny_model).sent() as sent:
            seen.append(sent)
            refused.enter_context(server.asking_for_credentials())
            raise KeyboardInterrupt

    with contextlib.ExitStack() as refused, pytest.raises(KeyboardInterrupt):
        fails(refused)
    (sent,) = seen
    assert f"{sent} is left in the storage: " in caplog.text
    assert storage.committed(sent) is not None


@pytest.mark.parametrize("kind", ["base", "tuned"])
def test_a_node_scores_what_it_fetched(storage, tiny_model, monkeypatch, kind):
    def score(directory, request):
        return (model_fingerprint(directory), request)

    monkeypatch.setattr("lrmc_ray.evaluate.processes.score", score)
    storage.publish("x/model", files_below(tiny_model))
    expected: Any = (model_fingerprint(tiny_model), "request")
    place = StoredPlace(storage.uri)
    watched = Watched("/out/scores/x.partial", 3, place)
    assert watched.sign() is None
    part = score_part("x/model", "request", 1, place, kind == "base", watched)
    assert part == expected
    assert watched.sign().split()[1] == str(os.getpid()).encode()
    watched.forget()
    assert watched.sign() is None
    left = [path.name for path in storage.cache.rglob("*.safetensors")]
    assert left == (["model.safetensors"] if kind == "base" else [])
    assert not list(storage.cache.glob("scoring-*"))


def test_scoring_by_way_of_a_storage_leaves_nothing_there(storage, tiny_model):
    place = StoredPlace(storage.uri)
    tasks = [Watched("/out/scores/x.partial", number, place) for number in range(2)]
    with scoring_of(storage, tiny_model).sent() as sent:
        assert sent.startswith("scoring/")
        for task in tasks:
            with task.shown():
                assert task.sign() is not None
        assert len(storage.children("scoring")) == 3
        for task in tasks:
            task.forget()
    assert storage.children("scoring") == {}


def test_signs_of_other_scores_and_of_other_machines_are_others(storage):
    place = StoredPlace(storage.uri)
    tasks = [
        Watched("/out/a/b", 0, place),
        Watched("/out/a_b", 0, place),
        Watched("/out/a/b", 1, place),
        Watched("/out/a/b", 0, place, driver="another"),
    ]
    for task in tasks:
        assert all(other.sign() is None for other in tasks)
        with task.shown():
            pass
        assert [other for other in tasks if other.sign() is not None] == [task]
        task.forget()


def test_a_task_file_that_a_node_lacks_is_refused(tmp_path, monkeypatch):
    from lrmc_ray.cluster import checks
    from lrmc_ray.evaluate.task_files import own_files

    data = tmp_path / "items.jsonl"
    data.write_text("{}\n")
    task = tmp_path / "mine.yaml"
    task.write_text(f"task: mine\ndataset_kwargs:\n  data_files: {data}\n")
    files = own_files(["capitals", str(task)])
    assert set(files.values()) == {task, data}

    def nodes_without(finds, path, sha256):
        assert finds(path, sha256)
        assert not finds(path, "0" * 64)
        assert not finds(f"{path}.other", sha256)
        return ["10.0.0.2"] if path == str(data) else []

    monkeypatch.setattr(checks, "_nodes_without", nodes_without)
    checks.check_files_shared({"task": task})
    with pytest.raises(IncompleteArtifactError, match=r"items\.jsonl must be on every node"):
        checks.check_files_shared(files)


# The commands, with Ray


def command_of(tmp_path, tiny_model, stage, *more):
    data = tmp_path / "train.jsonl"
    if not data.exists():
        make_data(data, num_rows=24)
    return [
        *(sys.executable, "-m", "lrmc_ray", stage, "--model", str(tiny_model)),
        *(() if stage == "evaluate" else ("--train-data", str(data))),
        *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        *("--json", "evaluate.limit=6"),
        *("evaluate.drift_samples=2", *more),
    ]


def run_to_its_end(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_and_an_evaluation_by_way_of_the_storage(
    server, storage, tiny_model, tmp_path
):
    """kill -9 to the command, its trial and its workers, once a checkpoint is in the storage."""
    runs = tmp_path / "runs"
    stored = ("--storage", storage.uri, "--output", str(runs))
    command = [
        *command_of(tmp_path, tiny_model, "tune", "--space", "smoke", *stored),
        *("search.trials=4", "search.early_stopping=median", "search.early_stopping_trials=2"),
        *("search.early_stopping_items=4", "resources.max_concurrent=1", "train.lr=1e-2"),
        *("train.steps=24", "train.checkpoint_every=4", "train.probe_every=0"),
    ]
    checkpoint = re.compile("studies/.*/trials/0000/training/checkpoints/step_.*/committed.json")
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(command, stderr=log, start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    below = storage.root.partition("/")[2]
    while not any(map(checkpoint.fullmatch, server.names(below))):
        assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    run_to_its_end(command)
    left = objects(server, storage)
    (study,) = (json.loads(path.read_text()) for path in runs.glob("*/study.json"))
    assert {name.partition("/")[0] for name in left} == {"records", "models", "reports"}
    reported = {name: left[f"reports/{study['id']}/{name}"] for name in REPORTED}
    assert reported == {name: (runs / study["id"] / name).read_bytes() for name in REPORTED}
    assert study["state"] == "FINISHED"
    assert study["stored_as"].startswith(f"studies/{study['id']}-")
    assert len(study["sessions"]) == 2
    rungs = [trial["rung"] for trial in study["trials"]]
    for number, rung in enumerate(rungs):
        assert rung["others"] == {str(n): rungs[n]["value"] for n in range(number)}
    states = {trial["number"]: trial["state"] for trial in study["trials"]}
    expected = {n: "PRUNED" if rungs[n]["stop"] else "COMPLETE" for n in range(4)}
    assert states == expected
    killed, best = (
        runs / study["id"] / study["trials"][n]["directory"] / "training"
        for n in (0, study["best"])
    )
    for directory in (killed, best):
        assert read_manifest(directory, made_by="")["ledger"]["is_exact"]
    entries = read_ledger(killed / LEDGER)
    assert {entry.attempt for entry in entries} == {1, 2}
    assert min(entry.step for entry in entries if entry.attempt == 2) > 1
    assert (runs / study["id"] / "best_model" / "model.safetensors").read_bytes() == (
        best / MODEL / "model.safetensors"
    ).read_bytes()
    assert not (best / MODEL / COMMITTED).exists()
    # What a task on a node scored is what this process makes of the same files.
    other = make_model(tmp_path / "other", seed=1)
    scored = run_to_its_end(
        command_of(
            *(tmp_path, tiny_model, "evaluate", "--tuned", str(other), "--actors", "1", *stored)
        )
    )
    assert objects(server, storage).keys() == left.keys()
    assert_scored_as_here(Path(scored["scores"][1]), other)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_comparison_and_a_suggestion_are_the_same_by_way_of_the_storage(tiny_model, tmp_path):
    compared, suggested = [], []
    for name, more in (("here", []), ("stored", ["--storage", (tmp_path / "o").as_uri()])):
        output = tmp_path / name
        run_to_its_end(
            [
                *command_of(tmp_path, tiny_model, "compare", "--space", "compare_smoke", *more),
                *("--output", str(output), "--methods", "lrmc", "compare.learning_rates=[1e-3]"),
                *("compare.seeds=[0]", "compare.reference=lrmc"),
            ]
        )
        (found,) = output.glob("compare-smoke-*/compare.json")
        runs = json.loads(found.read_text())["runs"]
        assert [run["state"] for run in runs] == ["COMPLETE", "COMPLETE"]
        compared.append([(run["method"], run["split"], run["results"]) for run in runs])
        suggestion = run_to_its_end(
            [
                *command_of(tmp_path, tiny_model, "suggest", "--space", "smoke", *more),
                *("--output", str(output), "train.steps=6"),
            ]
        )
        suggested.append(suggestion)
    assert compared[0] == compared[1]
    assert suggested[0] == suggested[1]
    left = {p.relative_to(tmp_path / "o").parts[0] for p in (tmp_path / "o").rglob("*.*")}
    assert left == {"records", "models", "reports"}


def assert_scored_as_here(scores, model):
    from lrmc_ray.evaluate.harness import score
    from lrmc_ray.evaluate.request import ScoreRequest

    request = ScoreRequest(
        tasks=(("capitals", "domain"), ("plain_english", "general")),
        **{"batch_tokens": 8192, "precision": "fp32", "limit": 6, "split": "test"},
        drift_samples={"domain": 0, "general": 0},
    )
    here = Scores.from_rows(score(model, request).rows)
    theirs = Scores.load(scores)
    assert here.metrics.keys() == theirs.metrics.keys()
    for key, items in here.metrics.items():
        assert items.values.tolist() == theirs.metrics[key].values.tolist()


def test_a_run_of_a_comparison_has_a_name_of_its_own(storage, tmp_path):
    from lrmc_ray.compare.description import Description
    from lrmc_ray.compare.jobs import Job
    from lrmc_ray.compare.run import Comparing
    from lrmc_ray.config.compare import CompareSpace

    values = load_settings(None, []).model_dump()
    values["resources"]["storage"] = storage.uri
    space = CompareSpace.model_validate(
        {
            **values,
            "parameters": {},
            "methods": {"sft": {"title": "sft", "train": {"loss": "full"}}},
        }
    )
    made = []
    for name in ("one", "two"):
        comparing = Comparing(Description(space, ["sft"], tmp_path / name, {}))
        comparing.description.open()
        made.append(comparing.home(Job("sft", 1e-5, 0, "dev")))
        assert made[-1] == comparing.home(Job("sft", 1e-5, 0, "test"))
        again = Comparing(Description(space, ["sft"], tmp_path / name, {}))
        again.description.open()
        assert again.home(Job("sft", 1e-5, 0, "dev")) == made[-1]
        storage.write(f"{made[-1]}/training/metrics.jsonl", b"")
    assert made[0] != made[1]
    assert all(name.startswith(f"comparisons/{again.description.id}-") for name in made)
    again.leave_storage()
    assert storage.exists(f"{made[0]}/training/metrics.jsonl")
    assert not storage.exists(f"{made[1]}/training/metrics.jsonl")
