"""Training on nodes without a shared disk: checkpoints, resumption and the result in a storage.

Each "node" is a directory that the other one does not see, the loop runs in this process; the last
test has Ray's workers and the commands.
"""

import json
import random
import shutil
import threading
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError, DirectoryInUseError
from lrmc_ray.files import storage as storage_module
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER, METRICS, MODEL
from lrmc_ray.files.storage import COMMITTED, Storage
from lrmc_ray.record.names import VIEW
from lrmc_ray.record.reader import Records
from lrmc_ray.train import stored as stored_run
from lrmc_ray.train.checkpoints import list_checkpoints
from lrmc_ray.train.ledger import audit_ledger, read_ledger
from lrmc_ray.train.samples import TrainingSamples
from lrmc_ray.train.stored import StoredRun
from tests.support.faults import Killed, kill_at
from tests.support.s3 import s3_server
from tests.support.tiny import make_data
from tests.support.training import die_behind, run_alone

torch.set_num_threads(1)
STEPS = 7
NAME = "training/abc"


@pytest.fixture(scope="module")
def server():
    with s3_server() as made:
        yield made


def settings_of(**changes):
    values = {
        **{"steps": STEPS, "batch_size": 4, "micro_batches": 2, "checkpoint_every": 2},
        **{"lr": 1e-3, "tau": 0.9, "anchor_weight": 0.5, "probe_every": 0},
    }
    return TrainSettings(**(values | changes))


class Cluster:
    """Nodes that share a storage and nothing else."""

    def __init__(self, uri, directory, model, recorded):
        self.uri, self.directory, self.model, self.recorded = uri, directory, model, recorded

    def run_on(self, node, **changes):
        """A run that is about to start on ``node``."""
        directory = self.directory / node / "run"
        directory.mkdir(parents=True, exist_ok=True)
        return run_alone(
            settings_of(**changes),
            record=self.recorded,
            model=self.model,
            files=StoredRun(Storage(self.uri, retry_seconds=()), NAME, directory),
        )

    def driver(self, name="driver"):
        (self.directory / name).mkdir(exist_ok=True)
        return StoredRun(Storage(self.uri, retry_seconds=()), NAME, self.directory / name)


@pytest.fixture
def cluster(server, tmp_path, tiny_model, recorded):
    return Cluster(server.uri(f"{tmp_path.name}/p"), tmp_path, tiny_model, recorded)


@pytest.fixture(scope="module")
def alone(tiny_model, recorded, tmp_path_factory):
    """What a run that keeps everything in one directory comes to."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run = run_alone(settings_of(), record=recorded, model=tiny_model, directory=directory)
    run.run()
    return directory


def assert_same_model(one, other):
    ours, theirs = (load_file(path / MODEL / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_as_alone(cluster, alone):
    """The model to the last bit, every step with its samples, in the driver's directory."""
    driver = cluster.driver()
    driver.fetch()
    assert_same_model(driver.directory, alone)
    samples = TrainingSamples(Records(cluster.recorded), settings_of())
    audit = audit_ledger(driver.directory / LEDGER, samples.ids_of_step, steps=STEPS)
    assert audit.is_exact, audit
    losses = [line.metrics["train/loss"] for line in read_metrics(driver.directory / METRICS)]
    expected = [line.metrics["train/loss"] for line in read_metrics(alone / METRICS)]
    assert losses == expected
    assert {path.name for path in (driver.directory / MODEL).iterdir()} == {
        path.name for path in (alone / MODEL).iterdir()
    }


def test_the_model_is_that_of_a_local_run_and_no_node_keeps_anything(cluster, alone):
    cluster.run_on("one").run()
    assert not (cluster.directory / "one" / "run").exists()
    assert_as_alone(cluster, alone)
    driver = cluster.driver()
    assert driver.steps() == [4, 6]
    assert not driver.is_finished()
    driver.commit({"kind": "training", "x": 1})
    assert driver.steps() == []
    assert driver.storage.children(NAME).keys() >= {"manifest.json", MODEL, LEDGER, METRICS}
    assert not driver.storage.children(NAME).keys() & {CHECKPOINTS, "writer"}
    other = cluster.driver("other")
    assert other.is_finished()
    other.fetch_finished()
    assert read_manifest(other.directory, made_by="")["x"] == 1
    assert_same_model(other.directory, alone)


@pytest.mark.parametrize(
    ("node", "step"),
    [
        *(("two", 0), ("one", 1), ("two", 4)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("one", 0), ("two", 1))),
        pytest.param("one", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_there_or_elsewhere(cluster, alone, node, step):
    run = cluster.run_on("one")
    die_behind(run, step)
    with pytest.raises(Killed):
        run.run()
    saved = (step + 1) // 2 * 2
    assert cluster.driver().steps() == [s for s in (2, 4) if s <= saved]
    again = cluster.run_on(node)
    again.run()
    assert again.first_step == saved
    assert_as_alone(cluster, alone)


def test_a_kill_between_files_and_marker_falls_back_to_the_checkpoint_before(
    cluster, alone, monkeypatch, server
):
    with monkeypatch.context() as patch:
        kill_at(patch, storage_module, "storage.files_put", 2)
        with pytest.raises(Killed):
            cluster.run_on("one").run()
    objects = server.objects(f"{cluster.directory.name}/p/{NAME}/{CHECKPOINTS}")
    assert "step_00000004/state.pt" in objects
    assert f"step_00000004/{COMMITTED}" not in objects
    assert cluster.driver().steps() == [2]
    again = cluster.run_on("two")
    again.run()
    assert again.first_step == 2
    assert_as_alone(cluster, alone)


def test_a_kill_between_files_and_the_first_marker_starts_again(cluster, alone, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, storage_module, "storage.files_put", 1)
        with pytest.raises(Killed):
            cluster.run_on("one").run()
    again = cluster.run_on("two")
    again.run()
    assert again.first_step == 0
    assert_as_alone(cluster, alone)


def damage(server, name, how):
    content = server.client().get_object(Bucket="lrmc-test", Key=name)["Body"].read()
    damaged = bytearray(content)
    if how == "flip":
        damaged[random.Random(0).randrange(len(damaged))] ^= 1
    server.delete(name)
    if how != "remove":
        server.put(name, bytes(damaged[: len(damaged) // 2] if how == "cut" else damaged))


IN_DEFAULT = [("state.pt", "flip"), ("manifest.json", "remove"), (COMMITTED, "cut")]
DAMAGES = [
    pytest.param(name, how, marks=[] if (name, how) in IN_DEFAULT else pytest.mark.slow)
    for name in ("state.pt", "manifest.json", COMMITTED)
    for how in ("flip", "cut", "remove")
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(cluster, server, alone, name, how, caplog):
    run = cluster.run_on("one")
    die_behind(run, 4)
    with pytest.raises(Killed):
        run.run()
    place = f"{cluster.directory.name}/p/{NAME}/{CHECKPOINTS}"
    damage(server, f"{place}/step_00000004/{name}", how)
    again = cluster.run_on("two")
    again.run()
    assert again.first_step == 2
    is_torn = name == COMMITTED and how == "remove"
    assert ("using the checkpoint before" in caplog.text) != is_torn
    assert_as_alone(cluster, alone)


def test_when_all_are_damaged_training_does_not_start_again(cluster, server):
    run = cluster.run_on("one")
    die_behind(run, 4)
    with pytest.raises(Killed):
        run.run()
    place = f"{cluster.directory.name}/p/{NAME}/{CHECKPOINTS}"
    for step in (2, 4):
        damage(server, f"{place}/step_{step:08d}/state.pt", "flip")
    for _ in range(2):  # nor the second time, when they are gone
        with pytest.raises(DataError, match="checkpoint") as caught:
            cluster.run_on("two").run()
        assert caught.value.exit_code == 4


def test_an_attempt_that_was_cut_off_ends_when_another_has_taken_over(cluster, alone):
    """The first one lives on, and comes to its next checkpoint when the second one has finished."""
    first = cluster.run_on("one")
    samples_of_step = first.fresh.samples_of_step
    others: list[Any] = []

    def taken_over(step):
        if step == 5 and not others:
            others.append(cluster.run_on("two"))
            others[0].run()
        return samples_of_step(step)

    first.fresh.samples_of_step = taken_over
    with pytest.raises(DirectoryInUseError, match="a later one has taken over"):
        first.run()
    assert others[0].first_step == 4
    assert_as_alone(cluster, alone)


def test_the_best_weights_may_have_been_saved_on_another_node(cluster, tiny_model, recorded):
    """The best checkpoint is older than the newest ones that are kept, and not on this node."""
    best = {"evaluate_every": 2, "holdout_share": 0.2, "export": "best", "keep_checkpoints": 1}
    run = cluster.run_on("one", **best)
    nll = iter([1.0, 2.0, 3.0, 4.0])

    def worse_and_worse(held_out):
        def score(done):
            if done % 2 == 0 or done == STEPS:
                value = next(nll)
                if value < held_out.best.get("held_out_nll", 9.0):
                    held_out.best = {"held_out_nll": value, "step": done}
            return {}

        return score

    run.held_out.score = worse_and_worse(run.held_out)
    die_behind(run, 4)
    with pytest.raises(Killed):
        run.run()
    assert cluster.driver().steps() == [2, 4]
    state = Storage(cluster.uri).fetch(
        f"{NAME}/{CHECKPOINTS}/step_00000002", cluster.directory / "two_steps"
    )
    again = cluster.run_on("two", **best)
    again.held_out.score = worse_and_worse(again.held_out)
    again.run()
    driver = cluster.driver()
    driver.fetch()
    saved = torch.load(state / "state.pt", weights_only=True)["model"]
    exported = load_file(driver.directory / MODEL / "model.safetensors")
    assert saved
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


def test_a_wish_of_the_driver_reaches_rank_0_and_metrics_reach_the_driver(cluster, monkeypatch):
    monkeypatch.setattr(stored_run, "PACE_SECONDS", 0.05)
    driver = cluster.driver()
    run = cluster.run_on("one", steps=200, checkpoint_every=1000)
    original = run.fresh.samples_of_step
    stop = threading.Event()

    def slow(step):
        if stop.is_set():
            raise Killed
        time.sleep(0.02)
        return original(step)

    run.fresh.samples_of_step = slow
    errors = []

    def work():
        try:
            run.run()
        except Killed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with driver.shown():
        thread.start()
        deadline = time.monotonic() + 60
        while not read_metrics(driver.directory / METRICS) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_metrics(driver.directory / METRICS)
        driver.ask()
        while driver.is_asked() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not driver.is_asked()
        steps = driver.steps()
        stop.set()
        thread.join()
    assert len(errors) == 1
    assert len(steps) >= 1
    assert 0 < steps[0] < 200
    assert not (run.directory / CHECKPOINT_NOW).exists()
    # The ledger in the storage has every step behind which the checkpoint stands.
    driver.fetch()
    assert {line.step for line in read_ledger(driver.directory / LEDGER)} >= set(range(steps[0]))
    driver.ask()
    driver.forget_wishes()
    assert not driver.is_asked()


def test_what_another_node_fetched_is_cleared_unless_rank_0_works_there(cluster):
    run = cluster.run_on("one")
    die_behind(run, 3)
    with pytest.raises(Killed):
        run.run()
    other = cluster.driver("other")
    other.pull(4)
    assert [path.name for path in list_checkpoints(other.directory / CHECKPOINTS)] == [
        "step_00000004"
    ]
    (other.directory / ".writer").touch()
    other.leave()
    assert other.directory.exists()
    (other.directory / ".writer").unlink()
    other.leave()
    assert not other.directory.exists()


# The commands, with Ray


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_record_and_train_by_way_of_the_storage(server, tiny_model, tmp_path, monkeypatch, capsys):
    """The command on two workers, and one process that trains on the same record alone."""
    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.config import validate
    from lrmc_ray.console import run_command
    from lrmc_ray.train import command as train

    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    data = make_data(tmp_path / "train.jsonl", num_rows=16)
    argv = [
        *("--model", str(tiny_model), "--train-data", str(data), "--json", "train.steps=4"),
        *("--storage", server.uri(f"{tmp_path.name}/p"), "--output", str(tmp_path / "runs")),
        *("train.batch_size=4", "train.micro_batches=2", "train.checkpoint_every=2"),
        *("resources.workers=[2, 2]", "train.lr=1e-3", "train.probe_every=0"),
    ]
    with ray_session(log=tmp_path / "ray.log", num_cpus=2):
        code = run_command(train.main, argv)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    manifest = json.loads(shown.out)
    assert manifest["ledger"]["is_exact"]
    assert manifest["world_size"] == 2
    (directory,) = (tmp_path / "runs" / "training").iterdir()
    (record,) = (tmp_path / "runs" / "records").iterdir()
    # A copy of the record on a disk, as without a storage.
    copy = tmp_path / "copy" / record.name
    shutil.copytree(record, copy)
    for number in range(len(Records(record).parts)):
        shutil.copy(Records(record).part_path(number), copy)
    (copy / VIEW).unlink()
    alone = tmp_path / "alone"
    identity = {k: v for k, v in manifest["identity"].items() if k != "record"}
    settings = validate(TrainSettings, identity, "test")
    run_alone(settings, record=copy, model=tiny_model, directory=alone).run()
    assert_same_model(directory, alone)
    names = server.objects(f"{tmp_path.name}/p/training/{directory.name}")
    assert {name.partition("/")[0] for name in names} == {
        *("manifest.json", MODEL, LEDGER, METRICS)
    }
    assert json.loads(names["manifest.json"]) == read_manifest(directory, made_by="")
