"""Who waits for others shows life while the storage, by which they show theirs, is out."""

import shutil
import time
from pathlib import Path

from lrmc_ray.evaluate import waiting
from lrmc_ray.evaluate.waiting import Watched
from lrmc_ray.files.beats import PROGRESS, beating
from lrmc_ray.files.place import place_of
from lrmc_ray.files.storage import Storage
from lrmc_ray.train import stored
from lrmc_ray.train.stored import StoredRun


def break_storage(path: Path) -> None:
    """Let every request to a storage in a directory fail."""
    shutil.rmtree(path)
    path.write_text("no directory")


def test_a_storage_that_is_out_ends_no_one_who_waits_for_scoring(tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    task = Watched(str(tmp_path / "work"), 0, place_of(storage.as_uri()))
    signs: list[str] = []
    with task.shown():
        pass
    watch = waiting._Watch(None)
    with beating(signs.append, every=0.0):
        assert not watch.is_hanging(task)  # its first sign
        before = len(signs)
        time.sleep(0.01)
        assert not watch.is_hanging(task)
        assert len(signs) == before  # none has come since, and the storage answers
        break_storage(storage)
        for _ in range(3):
            assert not watch.is_hanging(task)
        assert len(signs) == before + 3
        storage.unlink()
        storage.mkdir()
        assert not watch.is_hanging(task)


def test_a_storage_that_is_out_ends_no_run_that_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PACE_SECONDS", 0.01)
    storage, here = tmp_path / "storage", tmp_path / "here"
    storage.mkdir()
    here.mkdir()
    run = StoredRun(Storage(storage.as_uri(), retry_seconds=()), "trial/training", here)
    run.storage.write(f"trial/training/{PROGRESS}", b"1")
    signs: list[str] = []
    with beating(signs.append, every=0.0):
        with run.shown():
            deadline = time.monotonic() + 20
            while not (here / PROGRESS).is_file() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
        assert (here / PROGRESS).read_bytes() == b"1"
        assert len(signs) == 1  # rank 0 gives no new one, and nobody gives one in its place
        break_storage(storage)
        with run.shown():
            while len(signs) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert len(signs) >= 4
