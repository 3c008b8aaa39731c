"""Where nodes find each other's files: both places answer the same questions."""

import pickle

import pytest

from lrmc_ray.errors import DiskError, IncompleteArtifactError
from lrmc_ray.files.place import LocalPlace, StoredPlace, place_of
from lrmc_ray.files.storage import Storage


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["directory", "storage"])
def place(request, tmp_path):
    return place_of(None if request.param == "directory" else (tmp_path / "bucket").as_uri())


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "part").write_bytes(b"weights")
    return directory


def seen(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "committed.json"
    }


def test_the_setting_chooses():
    assert place_of(None) == LocalPlace()
    assert place_of("s3://bucket/p") == StoredPlace("s3://bucket/p")
    assert (place_of(None).uri, place_of("s3://bucket/p").uri) == (None, "s3://bucket/p")


def test_what_one_node_sends_another_finds(place, model):
    sent = place.send(model, lambda: "models/abc")
    other = pickle.loads(pickle.dumps(place))
    assert seen(other.here(sent)) == {"config.json": b"{}", "sub/part": b"weights"}
    with other.borrowed(sent) as directory:
        assert seen(directory) == seen(model)


def test_a_place_takes_along_nothing_of_its_node(tmp_path, model, monkeypatch):
    place = place_of((tmp_path / "bucket").as_uri())
    place.send(model, lambda: "models/abc")
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "other"))
    there = pickle.loads(pickle.dumps(place)).here("models/abc")
    assert there.is_relative_to(tmp_path / "other")


def test_what_is_borrowed_does_not_stay_and_what_is_lent_is_taken_back(place, model, tmp_path):
    with place.lend(model, name="runs/1/model") as sent:
        with place.borrowed(sent) as directory:
            assert seen(directory) == seen(model)
        assert directory.exists() == (directory == model)
    assert seen(model)
    assert not [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]


def test_what_was_sent_is_not_copied_again_to_be_lent(tmp_path, model):
    place = place_of((tmp_path / "bucket").as_uri())
    place.send(model, lambda: "runs/1/model")
    with place.lend(model, name="runs/1/model") as sent:
        assert sent == "runs/1/model"
    assert place.here("runs/1/model")


def test_files_are_read_by_the_names_that_all_nodes_use(place, tmp_path):
    directory = tmp_path / "study"
    name = place.home(directory, lambda: "studies/one")
    assert place.children(f"{name}/trials") == []
    assert place.read(f"{name}/trials/2/rung.json") is None
    for number in (2, 1):
        if isinstance(place, StoredPlace):
            place.storage.write(f"{name}/trials/{number}/rung.json", b"%d" % number)
        else:
            path = directory / "trials" / str(number) / "rung.json"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"%d" % number)
    assert place.children(f"{name}/trials") == ["1", "2"]
    assert place.read(f"{name}/trials/2/rung.json") == b"2"
    assert place.where(f"{name}/trials").endswith("/trials")


def test_clearing_leaves_what_is_only_here(place, tmp_path, model):
    name = place.send(model, lambda: "runs/1")
    place.clear(name)
    assert seen(model) == {"config.json": b"{}", "sub/part": b"weights"}
    if isinstance(place, StoredPlace):
        with pytest.raises(IncompleteArtifactError):
            place.here(name)


def test_each_place_takes_its_own_of_a_pair(place):
    taken = place.either(lambda: "local", lambda storage: storage)
    if isinstance(place, StoredPlace):
        assert isinstance(taken, Storage)
    else:
        assert taken == "local"


def test_a_report_is_kept_and_one_that_cannot_be_only_warns(place, tmp_path, caplog, monkeypatch):
    report = tmp_path / "report.html"
    report.write_text("<p>")
    place.publish_report("abc", {"report.html": report})
    copy = tmp_path / "bucket" / "reports" / "abc" / "report.html"
    assert copy.is_file() == isinstance(place, StoredPlace)

    def full(*args):
        raise DiskError("full")

    monkeypatch.setattr(Storage, "publish", full)
    place.publish_report("abc", {"report.html": report})
    assert ("not in the storage: full" in caplog.text) == isinstance(place, StoredPlace)
