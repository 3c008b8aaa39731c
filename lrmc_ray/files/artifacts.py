"""A stage's output: a directory that has an identity and is whole or absent.

A directory's name ends in the fingerprint of what made it. ``manifest.json`` is written last and
by one rename: without it the directory is unfinished, and readers refuse it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, DirectoryInUseError, IncompleteArtifactError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
"""Suffix of a directory that is still being written."""


def cache_directory() -> Path:
    """What this node keeps between commands: ``$LRMC_CACHE``, or ``~/.cache/lrmc_ray``."""
    return Path(os.environ.get("LRMC_CACHE", "~/.cache/lrmc_ray")).expanduser()


def fingerprint(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of ``value`` as sorted JSON."""
    canonical = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_SETTLED_SECONDS = 2.0
"""Age from which a file's time of change tells it from every later content."""


def content_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; read once as long as its size and time stay the same.

    For what an identity rests on. What is to be verified needs :func:`file_digest`: a damaged disk
    changes the bytes and not the time.
    """
    stat = path.stat()
    # The clock of a file system is coarse: a file that has just been written may be written again.
    if time.time() - stat.st_mtime < _SETTLED_SECONDS:
        return file_digest(path)
    return _known_digest(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=100_000)
def _known_digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return file_digest(path)


def relative_path(path: Path, directory: Path) -> str:
    """``path`` as seen from ``directory``, both with their links resolved."""
    return os.path.relpath(path.resolve(), directory.resolve())


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``path`` so that a reader, or a crash, sees all of it or none."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def json_content(value: Any) -> bytes:
    """``value`` as readable JSON."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomically(path, json_content(value))


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Declare ``directory`` finished."""
    write_json(directory / MANIFEST, manifest)


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` has its manifest."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path, *, made_by: str) -> dict[str, Any]:
    """The manifest of a finished directory.

    Args:
        directory: the stage's output.
        made_by: the command that makes it, named in the error.

    Raises:
        IncompleteArtifactError: there is none; the stage has not run or not finished.
        DataError: it is not JSON.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteArtifactError(
            f"{directory} has no {MANIFEST}, so it does not exist or its stage did not finish; "
            f"run `{made_by}` (again: it goes on where it stopped)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not readable JSON ({error}); remove {directory} and run `{made_by}` again"
        ) from None
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is not a JSON object; remove {directory} and run `{made_by}`")
    return manifest


def publish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into ``partial`` and move it to ``final`` in one rename.

    What stood at ``final`` without a manifest was unfinished and is removed.
    """
    write_manifest(partial, manifest)
    if final.exists() and not is_finished(final):
        shutil.rmtree(final)
    os.replace(partial, final)


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold ``directory`` for this process; the kernel lets go of it even after kill -9.

    Raises:
        DirectoryInUseError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DirectoryInUseError(
                f"{directory} may be used by one command at a time, and {holder} is working in it; "
                "wait for it, stop it, or choose another --output"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
