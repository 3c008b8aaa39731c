"""Nodes without a shared disk: records in an object store, against a real S3-compatible server.

No Ray here: what an actor does runs in this process.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lrmc_ray.cluster.checks import reads_storage
from lrmc_ray.compare import command as compare
from lrmc_ray.compare import run as compare_run
from lrmc_ray.config import check_storage_uri, load_settings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError, DataError, DiskError, IncompleteArtifactError
from lrmc_ray.evaluate import command as evaluate
from lrmc_ray.files import artifacts, storage
from lrmc_ray.files.artifacts import file_digest, is_finished, read_manifest
from lrmc_ray.files.storage import COMMITTED, Storage, check_storage
from lrmc_ray.record import actors
from lrmc_ray.record import command as record_command
from lrmc_ray.record import commit as commit_module
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record import stored as stored_record
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.record.names import EXAMPLES, INDEX, VIEW
from lrmc_ray.record.prepare import prepare
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from lrmc_ray.record.stored import StoredRecord
from lrmc_ray.train import command as train
from lrmc_ray.train.samples import sample_names
from lrmc_ray.tune import command as tune
from lrmc_ray.tune import run as tune_run
from lrmc_ray.tune import suggest
from tests.support.faults import Killed, kill_at
from tests.support.s3 import BUCKET, KEY, SECRET, s3_server
from tests.support.tiny import make_data

torch.set_num_threads(1)
SECONDS = 30.0


@pytest.fixture(scope="module")
def server():
    with s3_server() as made:
        yield made


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch):
    """A node with an empty cache, and an actor that works in this process."""
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_run, "run_actors", actors_here)
    monkeypatch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 300)
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    return tmp_path / "cache"


@pytest.fixture(params=["s3", "file"])
def uri(request, server, tmp_path):
    if request.param == "file":
        return (tmp_path / "shared").as_uri()
    return server.uri(f"{tmp_path.name}/prefix")


def actors_here(prepared, shards, tokenizer_size):
    recorder = Recorder(**recorder_options(prepared, tokenizer_size))
    for shard in shards:
        yield recorder.record(shard)


# Objects and directories


def test_objects_come_back_as_they_were_written(uri, tmp_path):
    room = Storage(uri)
    content = bytes(range(256)) * 5000
    (tmp_path / "one").write_bytes(content)
    room.put(tmp_path / "one", "a/b/one")
    room.write("a/two", b"2")
    assert room.read("a/b/one") == content
    assert (room.read("a/none"), room.read("none/none")) == (None, None)
    assert (room.size("a/two"), room.exists("a/b"), room.exists("a/three")) == (1, False, False)
    assert room.children("a") == {"b": None, "two": 1}
    assert room.children("nowhere") == {}
    room.write("a/two", b"twenty")
    assert room.read("a/two") == b"twenty"
    digest = file_digest(tmp_path / "one")
    room.get("a/b/one", tmp_path / "deep" / "copy", digest)
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    room.delete("a/two")
    room.delete("a/two")
    assert room.children("a") == {"b": None}
    room.delete_all("a")
    assert room.read("a/b/one") is None
    check_storage(uri)


def test_what_is_not_what_was_written_does_not_arrive(uri, tmp_path):
    room = Storage(uri)
    room.write("a", b"one")
    with pytest.raises(DataError, match="SHA-256 differs"):
        room.get("a", tmp_path / "a", "0" * 64)
    with pytest.raises(DataError, match="is missing"):
        room.get("b", tmp_path / "b")
    assert list(tmp_path.glob("a")) + list(tmp_path.glob(".a*")) + list(tmp_path.glob(".b*")) == []


@pytest.fixture
def folder(tmp_path):
    for name, text in (("x", "1"), ("sub/y", "22"), (".hidden", "3")):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "folder"


def test_a_directory_is_there_when_its_marker_is(uri, folder, tmp_path, monkeypatch):
    room = Storage(uri)
    files = storage.files_below(folder)
    assert set(files) == {"x", "sub/y"}
    with monkeypatch.context() as patch:
        kill_at(patch, storage, "storage.files_put")
        with pytest.raises(Killed):
            room.publish("d", files)
    assert room.read("d/sub/y") == b"22"
    assert room.committed("d") is None
    with pytest.raises(IncompleteArtifactError, match=f"has no {COMMITTED}"):
        room.fetch("d", tmp_path / "here")
    room.publish("d", files)
    here = room.fetch("d", tmp_path / "here")
    assert {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()} == {
        *("x", "sub/y", COMMITTED)
    }
    # What is there is neither written nor fetched again.
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", lambda *_: pytest.fail("written again"))
        patch.setattr(Storage, "get", lambda *_: pytest.fail("fetched again"))
        room.publish("d", files)
        room.fetch("d", tmp_path / "here")
    (here / "x").unlink()
    assert (room.fetch("d", here) / "x").read_text() == "1"


def test_other_content_is_whole_as_well_or_not_there(uri, folder, tmp_path, monkeypatch):
    room = Storage(uri)
    room.publish("d", storage.files_below(folder))
    room.fetch("d", tmp_path / "here")
    (folder / "x").write_text("other")
    with monkeypatch.context() as patch:
        kill_at(patch, storage, "storage.files_put")
        with pytest.raises(Killed):
            room.publish("d", storage.files_below(folder))
    assert room.committed("d") is None  # never the old marker with new files
    room.publish("d", storage.files_below(folder))
    assert (room.fetch("d", tmp_path / "here") / "x").read_text() == "other"


def test_a_damaged_file_of_a_directory_is_not_fetched(server, folder, tmp_path):
    room = Storage(server.uri(f"{tmp_path.name}/p"))
    room.publish("d", storage.files_below(folder))
    server.put(f"{tmp_path.name}/p/d/sub/y", b"23")
    with pytest.raises(DataError, match="d/sub/y is not what was written"):
        room.fetch("d", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    server.put(f"{tmp_path.name}/p/d/{COMMITTED}", b"{")
    with pytest.raises(DataError, match="not readable JSON"):
        room.fetch("d", tmp_path / "here")


def test_what_fails_is_tried_again(server, tmp_path, monkeypatch, caplog):
    room = Storage(server.uri(tmp_path.name), retry_seconds=(0.0, 0.0))
    calls = []

    class Flaky:
        def open_output_stream(self, path):
            calls.append(path)
            if len(calls) < 3:
                raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
            return filesystem.open_output_stream(path)

    filesystem = room.filesystem
    monkeypatch.setattr(room, "filesystem", Flaky())
    room.write("a", b"1")
    assert len(calls) == 3
    assert caplog.text.count("trying again") == 2
    monkeypatch.setattr(room, "filesystem", filesystem)
    assert room.read("a") == b"1"


# Addresses, credentials, servers


@pytest.mark.parametrize(
    "bad",
    [
        "s3://KEY:SECRETX@bucket/x",
        "s3://KEY:SECRETX/with/slash@bucket/x",
        "s3://KEY@bucket/x",
        "s3://bucket/x?secret_key=SECRETX",
        "ftp://bucket/x",
        "s3://",
        "s3:///x",
        "file://",
        "file:///",
        "file://host/x",
        "/mnt/x",
        "s3://[",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret(bad, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"storage must be s3://BUCKET/PREFIX"):
        check_storage_uri(bad)
    assert (
        run_command(record_command.main, ["--storage", bad, "--output", str(tmp_path / "o")]) == 2
    )
    error = capsys.readouterr().err
    assert "SECRETX" not in error
    assert "KEY" not in error.replace("AWS_ACCESS_KEY_ID", "")
    assert not (tmp_path / "o").exists()


def test_a_parameter_that_pyarrow_does_not_know_is_a_setting_that_is_wrong():
    with pytest.raises(ConfigError, match="'colour'"):
        check_storage("s3://bucket/x?colour=red")


@pytest.fixture(scope="module")
def silent():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def nobody():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        *(("bucket", record_command), ("credentials", record_command)),
        *(("nobody", record_command), ("silent", record_command)),
        *(("bucket", command) for command in (train, tune, evaluate, suggest, compare)),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_storage_that_does_not_work_ends_a_command_soon_with_one_error(
    server, silent, nobody, kind, command, tiny_model, tmp_path, capsys, monkeypatch
):
    where = {tune: tune_run, compare: compare_run}.get(command, command)
    monkeypatch.setattr(where, "ray_session", lambda *a, **o: pytest.fail("Ray was started"))
    data = make_data(tmp_path / "train.jsonl", num_rows=3)
    uri, said = {
        "bucket": (server.uri("x", bucket="no-such-bucket"), "NO_SUCH_BUCKET"),
        "credentials": (server.uri("x"), "INVALID_ACCESS_KEY_ID"),
        "nobody": (server.uri("x", port=nobody), "NETWORK_CONNECTION"),
        "silent": (server.uri("x", port=silent), "must answer within"),
    }[kind]
    argv = ["--model", str(tiny_model), "--train-data", str(data), "--output", str(tmp_path / "o")]
    start = time.monotonic()
    if kind == "credentials":
        with server.asking_for_credentials():
            code = run_command(command.main, [*argv, "--storage", uri])
    else:
        code = run_command(command.main, [*argv, "--storage", uri])
    assert time.monotonic() - start < SECONDS
    shown = capsys.readouterr()
    assert code == DiskError.exit_code, shown.err
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("error: storage s3://")
    assert said in line
    assert KEY not in shown.err
    assert SECRET not in shown.err
    assert not (tmp_path / "o").exists()


def test_a_node_must_read_what_the_driver_wrote_and_answer_in_time(
    server, silent, nobody, tmp_path, monkeypatch
):
    uri = server.uri(f"{tmp_path.name}/p")
    Storage(uri).write("mark", b"mark")
    assert reads_storage(uri, "mark")
    assert not reads_storage(uri, "other")
    assert not reads_storage((tmp_path / "of_its_own").as_uri(), "mark")
    monkeypatch.setattr(storage, "CHECK_SECONDS", 4.0)
    start = time.monotonic()
    assert not reads_storage(server.uri("x", port=nobody), "mark")
    assert not reads_storage(server.uri("x", port=silent), "mark")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("command", [tune, evaluate, suggest, compare, record_command, train])
def test_an_address_is_no_output_directory(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(command.main, ["--output", "s3://bucket/runs"]) == 3
    assert "--output must be a directory, got the address s3://" in capsys.readouterr().err
    assert list(tmp_path.glob("s3*")) == []


# A record


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "train.jsonl", num_rows=30)


def settings_for(tiny_model, data, uri=None):
    where = [f'resources.storage="{uri}"'] if uri else []
    return load_settings(
        None, [f'model.name="{tiny_model}"', f'data.train="{data}"', "train.tau=0.9", *where]
    )


@pytest.fixture(scope="module")
def local(tiny_model, data, tmp_path_factory):
    """The same record, in a directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_run, "run_actors", actors_here)
        patch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 300)
        return record(settings_for(tiny_model, data), tmp_path_factory.mktemp("local"))


def assert_same_record(directory, local):
    """Byte for byte, whatever the storage calls its objects."""
    one, other = (read_manifest(path, made_by="") for path in (directory, local))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    records, expected = Records(directory), Records(local)
    for number in range(len(records.parts)):
        assert records.part_path(number).read_bytes() == expected.part_path(number).read_bytes()
    assert records.index_path().read_bytes() == expected.index_path().read_bytes()


def test_a_record_in_the_storage_is_the_local_one_byte_for_byte(uri, tiny_model, data, local):
    settings = settings_for(tiny_model, data, uri)
    output = local.parent.parent / "other"
    shutil.rmtree(output, ignore_errors=True)
    final = record(settings, output)
    assert final.name == local.name
    # What the driver keeps: a view, no file of samples.
    assert {path.name for path in final.iterdir()} == {*("manifest.json", VIEW, INDEX, ".lock")}
    assert {path.name for path in final.parent.iterdir()} == {final.name}
    stored = StoredRecord(Storage(uri), final.name)
    kept = [name for name in stored.storage.children(f"records/{final.name}") if name]
    files = read_manifest(final, made_by="")["files"]
    assert len(kept) == len(files) + 2  # the manifest and the index; nothing of its making
    assert_same_record(final, local)
    assert len(Records(final)) == 30
    assert sample_names(Records(final)) == sample_names(Records(local))


def test_another_machine_finds_the_record(uri, tiny_model, data, local, tmp_path, monkeypatch):
    settings = settings_for(tiny_model, data, uri)
    first = record(settings, tmp_path / "one")
    monkeypatch.setattr(record_run, "run_actors", lambda *_: pytest.fail("recorded again"))
    monkeypatch.setattr(prepare_module, "tokenize", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "other_cache"))
    second = record(settings, tmp_path / "two")
    assert second.name == first.name
    assert_same_record(second, local)
    assert record(settings, tmp_path / "two") == second


POINTS = [
    (stored_record, "storage.part_put", 1),
    (stored_record, "storage.part_put", 3),
    (record_run, "record.part_counted", 2),
    (record_run, "record.parts_complete", 1),
    (stored_record, "storage.record_committed", 1),
    (commit_module, "record.manifest_written", 1),
    (storage, "storage.files_put", 1),
]


@pytest.mark.parametrize(("module", "point", "number"), POINTS, ids=lambda v: str(v)[-24:])
@pytest.mark.parametrize("is_same_machine", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recording_that_was_killed_goes_on(
    server, tiny_model, data, local, tmp_path, monkeypatch, module, point, number, is_same_machine
):
    prefix = f"{tmp_path.name}/p"
    settings = settings_for(tiny_model, data, server.uri(prefix))
    with monkeypatch.context() as patch:
        kill_at(patch, module, point, number)
        with pytest.raises(Killed):
            record(settings, tmp_path / "one")
    is_committed = point in ("storage.record_committed", "record.manifest_written")
    assert ("manifest.json" in server.objects(f"{prefix}/records/{local.name}")) == is_committed
    done = len(StoredRecord(Storage(server.uri(prefix)), local.name).described())
    begun: list[Any] = []
    original = Recorder.record

    def begin(recorder, shard):
        begun.append(shard)
        return original(recorder, shard)

    monkeypatch.setattr(Recorder, "record", begin)
    final = record(settings, tmp_path / ("one" if is_same_machine else "two"))
    assert_same_record(final, local)
    assert len(begun) == (0 if is_committed else len(Records(final).parts) - done)
    # Nothing is left of the interrupted attempt, but for a machine that came after the commit.
    names = set(server.objects(f"{prefix}/records/{local.name}"))
    if not is_committed:
        assert len(names) == len(Records(final).parts) + 2


def test_an_actor_that_was_thought_dead_changes_nothing(
    server, tiny_model, data, local, tmp_path, monkeypatch
):
    """It writes its file again behind the end, on a processor that rounds otherwise."""
    settings = settings_for(tiny_model, data, server.uri(f"{tmp_path.name}/p"))
    options: dict[str, Any] = {}

    def keeping(prepared, shards, tokenizer_size):
        options.update(recorder_options(prepared, tokenizer_size), shard=shards[0])
        return actors_here(prepared, shards, tokenizer_size)

    monkeypatch.setattr(record_run, "run_actors", keeping)
    final = record(settings, tmp_path / "one")
    stored = StoredRecord(Storage(options["place"].uri), options["record"])
    path = tmp_path / options["shard"]["name"]
    source = local / options["shard"]["name"]
    path.write_bytes(source.read_bytes() + b"rounded otherwise")
    stored.put_part(path, {"sha256": file_digest(path), "name": path.name})
    assert_same_record(final, local)


@pytest.mark.parametrize(
    ("module", "point", "number"),
    [
        (actors, "record.shard_started", 1),
        (actors, "record.shard_started", 3),
        (stored_record, "storage.part_put", 2),
        (stored_record, "storage.part_put", "last"),
        (record_run, "record.parts_complete", 1),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_another_command_finishes_the_same_record_first(
    server, tiny_model, data, local, tmp_path, monkeypatch, module, point, number
):
    """Both end with the one record, although the slower one's processor rounds otherwise."""
    prefix = f"{tmp_path.name}/p"
    settings = settings_for(tiny_model, data, server.uri(prefix))
    number = len(Records(local).parts) if number == "last" else number
    seen: list[str] = []
    faster: list[Path] = []

    def otherwise(prepared, shards, tokenizer_size):
        recorder = Recorder(**recorder_options(prepared, tokenizer_size) | {"tau": 0.95})
        for shard in shards:
            yield recorder.record(shard)

    def passed(name, note=""):
        seen.append(name)
        if not faster and seen.count(point) == number:
            with monkeypatch.context() as patch:
                patch.setattr(module, "passed", lambda *_: None)
                patch.setattr(record_run, "run_actors", actors_here)
                faster.append(record(settings, tmp_path / "two"))

    monkeypatch.setattr(record_run, "run_actors", otherwise)
    monkeypatch.setattr(module, "passed", passed)
    slower = record(settings, tmp_path / "one")
    assert is_finished(slower)
    assert_same_record(slower, faster[0])
    assert [path.name for path in slower.parent.iterdir()] == [slower.name]
    listed = {part.name for part in Records(slower).parts} | {"index.parquet", "manifest.json"}
    left = {name.split("/")[0] for name in server.objects(f"{prefix}/records/{slower.name}")}
    assert {re.sub(r"\.[0-9a-f]{16}\.", ".", name) for name in left} == listed
    # Those that began after the other had ended make the record that a single command makes.
    if number == 1 and point == "record.shard_started":
        assert_same_record(slower, local)


def test_a_recording_that_fails_by_itself_fails(
    server, tiny_model, data, local, tmp_path, monkeypatch
):
    """That another command might have finished the record hides no error."""
    settings = settings_for(tiny_model, data, server.uri(f"{tmp_path.name}/p"))

    def broken(*_):
        raise FileNotFoundError("examples")
        yield

    def full(*_):
        record_there(settings)
        raise DiskError("the disk is full")
        yield

    def record_there(settings):
        with monkeypatch.context() as patch:
            patch.setattr(record_run, "run_actors", actors_here)
            record(settings, tmp_path / "two")

    monkeypatch.setattr(record_run, "run_actors", broken)
    with pytest.raises(FileNotFoundError, match="examples"):
        record(settings, tmp_path / "one")
    monkeypatch.setattr(record_run, "run_actors", full)
    with pytest.raises(DiskError, match="full"):
        record(settings, tmp_path / "one")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_in_the_storage_is_found_before_a_sample_is_read(
    server, tiny_model, data, tmp_path, damage
):
    prefix = f"{tmp_path.name}/p"
    final = record(settings_for(tiny_model, data, server.uri(prefix)), tmp_path / "one")
    where = f"{prefix}/records/{final.name}"
    name, content = next(
        (n, c) for n, c in server.objects(where).items() if n.startswith("part-00001.")
    )
    if damage == "remove":
        server.delete(f"{where}/{name}")
    else:
        damaged = bytearray(content)
        if damage == "flip":
            damaged[len(damaged) // 2] ^= 1
        else:
            del damaged[-7:]
        server.put(f"{where}/{name}", bytes(damaged))
    records = Records(final)
    assert records[0].sample_id
    with pytest.raises(DataError, match=r"part-00001\.") as caught:
        list(records.samples_of_part(1))
    assert caught.value.exit_code == 4
    assert not (final / "part-00001.parquet").exists()


def test_a_file_that_went_bad_on_this_node_is_fetched_again(server, tiny_model, data, tmp_path):
    uri = server.uri(f"{tmp_path.name}/p")
    final = record(settings_for(tiny_model, data, uri), tmp_path / "one")
    path = Records(final).part_path(0)
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert Records(final).part_path(0).read_bytes() == good


def test_a_local_record_is_brought_to_the_storage(uri, tiny_model, data, local, tmp_path):
    output = tmp_path / "runs"
    shutil.copytree(local, output / "records" / local.name)
    settings = settings_for(tiny_model, data, uri)
    final = record(settings, output)
    assert not (final / VIEW).exists()
    stored = StoredRecord(Storage(uri), local.name)
    view = stored.view(tmp_path / "elsewhere")
    assert_same_record(view, local)


def test_examples_that_a_killed_command_uploaded_in_part_are_uploaded_again(
    server, tiny_model, data, local, tmp_path
):
    prefix = f"{tmp_path.name}/p"
    settings = settings_for(tiny_model, data, server.uri(prefix))
    prepared = prepare(settings, tmp_path / "one")
    digest = file_digest(prepared.partial / EXAMPLES)
    server.put(f"{prefix}/records/{local.name}/examples.{digest[:16]}.parquet", b"PAR1")
    assert_same_record(record(settings, tmp_path / "one"), local)


def test_no_credential_is_written_anywhere(server, tiny_model, data, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="lrmc_ray")
    prefix = f"{tmp_path.name}/p"
    record(settings_for(tiny_model, data, server.uri(prefix)), tmp_path / "one")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [*server.objects(prefix).values(), caplog.text.encode()]
    assert len(written) > 10
    for content in written:
        assert KEY.encode() not in content
        assert SECRET.encode() not in content


def test_two_workers_of_a_node_make_its_view_one_after_the_other(tmp_path, monkeypatch):
    """Both are let to the rename of their file at once, unless one waits for the other."""
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    stored = StoredRecord(Storage((tmp_path / "files").as_uri()), "abc")
    assert stored.commit({"kind": "record"})
    both, replace = threading.Barrier(2), os.replace

    def meet_and_replace(source, target):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        replace(source, target)

    monkeypatch.setattr(artifacts.os, "replace", meet_and_replace)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: stored.view_here(), range(2))
    assert one == two
    assert json.loads((one / "manifest.json").read_text()) == {"kind": "record"}
    view = StoredRecord.of_view(one)
    assert (view.name, view.storage.uri) == ("abc", stored.storage.uri)


def test_a_view_says_where_its_files_are(server, tiny_model, data, tmp_path):
    uri = server.uri(f"{tmp_path.name}/p")
    final = record(settings_for(tiny_model, data, uri), tmp_path / "one")
    assert json.loads((final / VIEW).read_text()) == {"storage": uri, "record": final.name}
    assert is_finished(final)
    (final / VIEW).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Records(final)
    with pytest.raises(IncompleteArtifactError, match="has no manifest"):
        StoredRecord(Storage(uri), "other").view(tmp_path / "other")
    assert BUCKET in uri
    assert not Path(tmp_path / "other").exists()
