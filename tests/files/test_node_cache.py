"""What a node keeps of a storage: the oldest goes, what is in use stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrmc_ray.errors import ConfigError
from lrmc_ray.files import node_cache
from lrmc_ray.files.node_cache import lock_of, trim, use
from lrmc_ray.files.place import StoredPlace
from lrmc_ray.files.storage import files_below

ROOT = Path(__file__).parents[2]
USER = """
import sys
from pathlib import Path
from lrmc_ray.files.node_cache import use
use(Path(sys.argv[1]))
print("in use", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Three directories of a million bytes; the first was used the longest ago."""
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    monkeypatch.setattr(node_cache, "_in_use", {})
    monkeypatch.setattr(node_cache, "_looked", {})
    cache = tmp_path / "storage"
    for age, name in enumerate(("newest", "middle", "oldest")):
        directory = cache / "0123456789ab" / "models" / name
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(bytes(1_000_000))
        use(directory)
        os.utime(lock_of(directory), (1e9 - age, 1e9 - age))
    node_cache._in_use.clear()  # closes the files: those processes have ended
    return cache


def left(cache):
    return sorted(path.name for path in cache.glob("*/models/[!.]*"))


def user_of(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in use\n"
    return process


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("0.003", ["middle", "newest", "oldest"]),
        ("0.0029", ["middle", "newest"]),
        ("0.001", ["newest"]),
        ("0", []),
    ],
)
def test_what_was_used_the_longest_ago_goes_first(cache, monkeypatch, limit, expected):
    monkeypatch.setenv("LRMC_CACHE_GB", limit)
    assert len(trim()) == 3 - len(expected)
    assert left(cache) == expected
    assert not list(cache.rglob("*.trimmed"))


def test_what_another_process_uses_stays_until_it_ends_even_by_kill_9(cache, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE_GB", "0")
    process = user_of(cache / "0123456789ab/models/oldest")
    assert [path.name for path in trim()] == ["middle", "newest"]
    assert left(cache) == ["oldest"]
    process.kill()
    process.wait()
    assert trim() == []  # this process has looked just now
    assert [path.name for path in trim(at_once=True)] == ["oldest"]
    assert left(cache) == []


def test_a_use_makes_a_directory_the_newest(cache, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE_GB", "0.001")
    use(cache / "0123456789ab/models/oldest")
    node_cache._in_use.clear()
    trim()
    assert left(cache) == ["oldest"]


def test_without_a_limit_half_of_the_space_is_taken(cache, monkeypatch):
    monkeypatch.delenv("LRMC_CACHE_GB", raising=False)

    def free(amount):
        monkeypatch.setattr(
            node_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": amount})
        )

    free(10_000_000)
    assert trim() == []
    free(1_000_000)  # half of 4 MB may stay
    assert [path.name for path in trim(at_once=True)] == ["oldest"]


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(cache, monkeypatch, limit):
    monkeypatch.setenv("LRMC_CACHE_GB", limit)
    with pytest.raises(ConfigError, match="LRMC_CACHE_GB must be a number of GB"):
        trim()
    assert len(left(cache)) == 3


def test_what_is_fetched_makes_room_and_is_fetched_again(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("LRMC_CACHE_GB", "0.0015")
    place = StoredPlace(f"file://{tmp_path / 'bucket'}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"w" * 1_000_000)
    place.storage.publish("models/mine", files_below(model))
    mine = place.here("models/mine")
    assert left(cache) == ["mine"]
    node_cache._in_use.clear()
    monkeypatch.setenv("LRMC_CACHE_GB", "0")
    trim(at_once=True)
    assert left(cache) == []
    assert (place.here("models/mine") / "weights").read_bytes() == b"w" * 1_000_000
    assert trim(at_once=True) == []
    assert mine.is_dir()
