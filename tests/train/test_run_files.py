"""The files of a run whose nodes share a directory, and of one that goes by way of a storage."""

import pickle

import pytest

from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.files.names import CHECKPOINTS, RUNG
from lrmc_ray.files.place import LocalPlace, place_of
from lrmc_ray.train.checkpoints import save_checkpoint
from lrmc_ray.train.run_files import LocalRun, run_files
from lrmc_ray.train.stored import StoredRun


@pytest.fixture(params=["directory", "storage"])
def files(request, tmp_path, monkeypatch):
    """A run as its driver sees it."""
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    uri = None if request.param == "directory" else (tmp_path / "bucket").as_uri()
    return run_files(place_of(uri), tmp_path / "run", "training/abc")


def on_a_worker(files):
    """The same run as rank 0 sees it, which got nothing but what Ray sends."""
    return pickle.loads(pickle.dumps(files.for_workers()))()


def test_the_place_chooses(files, tmp_path):
    assert isinstance(files, LocalRun if files.place == LocalPlace() else StoredRun)
    worker = on_a_worker(files)
    assert type(worker) is type(files)
    assert worker.place == files.place
    assert (worker.directory == files.directory) == isinstance(files, LocalRun)
    assert worker.directory.is_absolute()
    assert worker.directory.is_dir()


def test_a_wish_crosses_from_the_driver_to_rank_0_and_is_taken_back(files):
    worker = on_a_worker(files)
    assert not worker.is_asked()
    files.ask()
    assert worker.is_asked()
    files.forget_wishes()
    assert not worker.is_asked()


def test_a_reservation_crosses_from_rank_0_to_the_next_command(files):
    assert files.reservation() is None
    on_a_worker(files).note_reservation("train-12")
    assert files.reservation() == "train-12"
    files.forget_reservation()
    assert files.reservation() is None


def test_the_driver_sees_how_far_rank_0_came(files):
    worker = on_a_worker(files)
    worker.begin()
    for step in (2, 4, 6):
        save_checkpoint(worker.directory / CHECKPOINTS, step, {"step": step}, keep=2, also=[2])
        worker.push(step, keep=2, also=[2])
    assert files.steps() == [2, 4, 6]
    save_checkpoint(worker.directory / CHECKPOINTS, 8, {"step": 8}, keep=2)
    worker.push(8, keep=2, also=[])
    assert files.steps() == [6, 8]
    worker.discard_after(6)
    assert files.steps() == [6]


def test_only_another_machine_can_have_finished_it(files, tmp_path):
    assert not files.is_finished()
    files.commit({"kind": "training", "x": 1})
    write_manifest(files.directory, {"kind": "training", "x": 1})
    there = tmp_path / "there"
    there.mkdir()
    other = run_files(files.place, there, "training/abc")
    assert other.is_finished() == isinstance(files, StoredRun)
    if other.is_finished():
        other.fetch_finished()
        names = {path.name for path in files.directory.iterdir()}
        assert {path.name for path in other.directory.iterdir()} == names == {"manifest.json"}


def test_what_ray_writes_is_the_runs_own_and_goes(files, tmp_path):
    storage = files.ray_storage()
    assert str(storage["storage_path"]).endswith("/ray")
    if isinstance(files, LocalRun):
        written = files.directory / "ray"
    else:
        written = tmp_path / "bucket" / "training" / "abc" / "ray"
    assert str(written) == storage["storage_path"]
    (written / "run-1").mkdir(parents=True)
    (written / "run-1" / "state.json").write_text("{}")
    files.clear_ray()
    assert not written.exists()
    files.clear_ray()  # nothing to do


def test_clearing_leaves_what_is_on_this_node_and_the_decision(files):
    (files.directory / RUNG).write_text("{}")
    files.push_decision()
    files.clear()
    assert (files.directory / RUNG).is_file()
    if isinstance(files, StoredRun):
        assert files.storage.children("training/abc").keys() == {RUNG}
