import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.errors import DataError, DirectoryInUseError, IncompleteArtifactError
from lrmc_ray.files.artifacts import (
    MANIFEST,
    content_digest,
    file_digest,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_atomically,
    write_json,
    write_manifest,
)

MADE_BY = "python -m lrmc_ray.record"

quick = settings(deadline=None, max_examples=50, derandomize=True)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
leaves = leaves.filter(lambda x: x not in (float("inf"), float("-inf")))
documents = st.dictionaries(
    st.text(max_size=5),
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    min_size=1,
    max_size=5,
)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Fingerprints


def test_fingerprint_is_the_one_that_names_existing_directories():
    # printf '{"a": 1, "b": [1.5, null, "x"], "tau": 0.99}' | sha256sum
    value = {"tau": 0.99, "b": [1.5, None, "x"], "a": 1}
    assert fingerprint(value) == "c2119a7f496c"


@given(value=documents, data=st.data())
@quick
def test_fingerprint_ignores_the_order_of_keys(value, data):
    keys = data.draw(st.permutations(list(value)))
    assert fingerprint({key: value[key] for key in keys}) == fingerprint(value)


@given(value=documents, data=st.data())
@quick
def test_fingerprint_changes_with_every_value_and_every_key(value, data):
    key = data.draw(st.sampled_from(sorted(value)))
    other = data.draw(leaves)
    changed = value | {key: other}
    without = {k: v for k, v in value.items() if k != key}
    renamed = without | {key + "x": value[key]}
    if json.dumps(changed, sort_keys=True) != json.dumps(value, sort_keys=True):
        assert fingerprint(changed) != fingerprint(value)
    assert fingerprint(without) != fingerprint(value)
    if key + "x" not in value:
        assert fingerprint(renamed) != fingerprint(value)


def test_fingerprint_tells_types_apart_and_refuses_nan():
    values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}]
    assert len({fingerprint(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_file_digest_is_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Manifests


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = {"kind": "records", "tau": 0.1 + 0.2, "files": [{"name": "ü"}], "none": None}
    assert not is_finished(tmp_path)
    write_manifest(tmp_path, manifest)
    assert is_finished(tmp_path)
    assert read_manifest(tmp_path, made_by=MADE_BY) == manifest
    assert json.loads((tmp_path / MANIFEST).read_bytes()) == manifest
    assert os.listdir(tmp_path) == [MANIFEST]


def test_a_missing_manifest_is_exit_code_3_and_names_the_command(tmp_path):
    (tmp_path / "a file").write_text("")
    for directory in (tmp_path, tmp_path / "none", tmp_path / "a file"):
        with pytest.raises(IncompleteArtifactError) as caught:
            read_manifest(directory, made_by=MADE_BY)
        assert caught.value.exit_code == 3
        assert str(caught.value).startswith(f"{directory} has no {MANIFEST}")
        assert f"run `{MADE_BY}`" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"kind": "records"', b"\xff\xfe{}", b"\0" * 64, b"[]", b"null", b'"records"'],
)
def test_a_garbled_manifest_is_exit_code_4_and_names_file_and_remedy(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path, made_by=MADE_BY)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / MANIFEST} is not ")
    assert f"remove {tmp_path} and run `{MADE_BY}`" in message
    assert "\n" not in message


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "study.json"
    write_json(path, {"trial": 1})

    def full(_number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"trial": 2})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"trial": float("inf")})
    assert json.loads(path.read_text()) == {"trial": 1}


def test_write_atomically_replaces_the_content(tmp_path):
    path = tmp_path / "file"
    for content in (b"long content", b"", b"\0\xff"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


# Publishing


def test_publish_moves_everything_with_its_manifest(tmp_path):
    partial, final = tmp_path / "x.partial", tmp_path / "x"
    partial.mkdir()
    (partial / "data").write_bytes(b"1234")
    publish(partial, final, {"kind": "test"})
    assert not partial.exists()
    assert sorted(os.listdir(final)) == ["data", MANIFEST]
    assert (final / "data").read_bytes() == b"1234"
    assert read_manifest(final, made_by=MADE_BY) == {"kind": "test"}


def test_publish_replaces_the_unfinished_and_never_the_finished(tmp_path):
    partial, final = tmp_path / "x.partial", tmp_path / "x"
    for directory, content in ((partial, b"new"), (final, b"old")):
        directory.mkdir()
        (directory / "data").write_bytes(content)
    (final / "stray").write_bytes(b"")
    publish(partial, final, {"number": 1})
    assert (final / "data").read_bytes() == b"new"
    assert not (final / "stray").exists()

    partial.mkdir()
    (partial / "data").write_bytes(b"second")
    with pytest.raises(OSError, match="not empty"):
        publish(partial, final, {"number": 2})
    assert (final / "data").read_bytes() == b"new"
    assert read_manifest(final, made_by=MADE_BY) == {"number": 1}


KILLED = """
import os, signal, sys
from pathlib import Path
from lrmc_ray.files import artifacts

directory, function, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
original = getattr(os, function)
calls = 0

def kill_at(*arguments):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

partial = directory / "x.partial"
partial.mkdir()
(partial / "data").write_bytes(b"1234")
setattr(os, function, kill_at)
artifacts.publish(partial, directory / "x", {"kind": "test"})
print("published")
"""


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize(
    ("function", "count", "is_whole"),
    [
        ("fsync", 1, False),  # data written, the manifest not yet safe
        ("replace", 1, False),  # the manifest written under another name
        ("replace", 2, False),  # finished, but not yet in its place
        ("replace", 3, True),  # never reached: the control
    ],
)
def test_kill_9_at_any_point_of_publishing_leaves_all_or_nothing(
    tmp_path, function, count, is_whole, has_old
):
    final = tmp_path / "x"
    if has_old:
        final.mkdir()
        (final / "data").write_bytes(b"unfinished")
    process = start(KILLED, tmp_path, function, count)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if is_whole else -signal.SIGKILL)
    assert output == ("published\n" if is_whole else "")
    if is_whole:
        assert read_manifest(final, made_by=MADE_BY) == {"kind": "test"}
        assert (final / "data").read_bytes() == b"1234"
        return
    with pytest.raises(IncompleteArtifactError):
        read_manifest(final, made_by=MADE_BY)
    if (function, count) != ("replace", 2):
        with pytest.raises(IncompleteArtifactError):
            read_manifest(tmp_path / "x.partial", made_by=MADE_BY)
    # The same command again finishes it.
    publish(tmp_path / "x.partial", final, {"kind": "again"})
    assert read_manifest(final, made_by=MADE_BY) == {"kind": "again"}
    assert (final / "data").read_bytes() == b"1234"


# Locks

HOLDER = """
import sys, time
from pathlib import Path
from lrmc_ray.files.artifacts import lock_directory

with lock_directory(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

SECOND = """
import sys
from pathlib import Path
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.console import run_command

def main(argv):
    with lock_directory(Path(argv[0])):
        return 0

sys.exit(run_command(main))
"""


@pytest.fixture
def holder(tmp_path):
    process = start(HOLDER, tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_at_once_and_told_who_works_there(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(DirectoryInUseError) as caught, lock_directory(tmp_path):
        pytest.fail("two processes hold the directory")
    assert time.monotonic() - began < 1
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} may be used by one command at a time")
    assert f"process {holder.pid} on " in message
    assert "--output" in message


def test_a_second_command_ends_with_exit_code_5_and_one_line(tmp_path, holder):
    second = start(SECOND, tmp_path)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 5
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_kill_9_of_the_holder_releases_the_directory(tmp_path, holder):
    holder.kill()
    holder.wait()
    with lock_directory(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_released_at_the_end_also_after_an_error(tmp_path):
    directory = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError, match="inside"), lock_directory(directory):
        raise RuntimeError("inside")
    with lock_directory(directory), lock_directory(tmp_path / "a"):
        second = start(SECOND, directory)
        assert second.wait(timeout=60) == 5
    second = start(SECOND, directory)
    assert second.wait(timeout=60) == 0


def test_a_digest_is_read_once_as_long_as_size_and_time_stay(tmp_path, monkeypatch):
    from lrmc_ray.files import artifacts

    read = []

    def counted(path):
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(artifacts, "file_digest", counted)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert content_digest(path) == content_digest(path) == file_digest(path)
    assert len(read) == 2  # just written: it may be written again within the clock's grain
    for content, age in ((b"one", 100), (b"two", 90), (b"more", 90)):
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)
        read.clear()
        assert content_digest(path) == content_digest(path) == file_digest(path)
        assert len(read) == 1
