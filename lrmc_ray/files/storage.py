"""What all nodes reach where they share no disk: an object store, by pyarrow's file systems.

An object is written whole or not at all, but there is no rename: a directory is committed by one
small object, ``committed.json``, that lists its files with their digests and is written last.
Readers look for it first and verify what it lists, so an upload that was cut off is not there.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lrmc_ray.config import check_storage_uri
from lrmc_ray.errors import ConfigError, DataError, DiskError, IncompleteArtifactError
from lrmc_ray.files.artifacts import (
    PARTIAL,
    cache_directory,
    file_digest,
    fingerprint,
    json_content,
    write_json,
)
from lrmc_ray.files.beats import beat
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.node_cache import trim

_log = logging.getLogger(__name__)
COMMITTED = "committed.json"
CHECK_SECONDS = 20.0
"""How long the storage may take to answer at the start of a command."""
RETRY_SECONDS = (1.0, 5.0, 15.0)
"""Pauses between attempts at what failed; the client of S3 tries three times in each."""
CHUNK_BYTES = 8 << 20
Result = TypeVar("Result")


class Storage:
    """A prefix in an object store. Names are relative to it, parts separated by ``/``.

    Whatever fails is tried again some times. Every method raises DiskError where the storage does
    not answer or refuses.
    """

    def __init__(self, uri: str, *, retry_seconds: Sequence[float] = RETRY_SECONDS) -> None:
        """Open the storage at ``uri``, which is not yet asked for anything.

        Args:
            uri: see :func:`check_storage_uri`; parameters of pyarrow's ``FileSystem.from_uri`` may
                follow.
            retry_seconds: pauses before what failed is tried again.

        Raises:
            ConfigError: pyarrow does not know a parameter.
        """
        import pyarrow as pa
        from pyarrow.fs import FileSystem, LocalFileSystem

        self.uri = check_storage_uri(uri)
        self._retry_seconds = retry_seconds
        self.cache = cache_directory().resolve() / "storage" / fingerprint(uri)
        """What this node keeps of it."""
        try:
            # The region of a bucket is asked for where the address does not say it.
            self.filesystem, root = self._tried(lambda: FileSystem.from_uri(uri), uri)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"storage {uri} is not understood: {error}") from None
        self.root: str = root.rstrip("/")
        """Of pyarrow's paths, as ``filesystem`` wants them."""
        self._is_local = isinstance(self.filesystem, LocalFileSystem)

    # Objects

    def put(self, path: Path, name: str) -> None:
        """Write the content of a file, in place of what was there."""

        def upload() -> None:
            with path.open("rb") as source, self._writing(name) as sink:
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
                    beat()

        self._tried(upload, name)

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of what was there."""

        def upload() -> None:
            with self._writing(name) as sink:
                sink.write(content)

        self._tried(upload, name)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON."""
        self.write(name, json_content(value))

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""

        def download() -> bytes:
            with self.filesystem.open_input_stream(self._path(name)) as source:
                content: bytes = source.read()
            return content

        try:
            return self._tried(download, name)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any:
        """The content of an object that :meth:`write_json` wrote; None if there is none.

        Raises:
            DataError: it is no JSON.
        """
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError as error:
            raise DataError(
                f"{self.place(name)} is not readable JSON ({error}); remove it"
            ) from None

    def get(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Write an object into a file of this node, whole or not at all.

        Raises:
            DataError: there is none, or it is not what ``sha256`` says.
        """

        def download() -> str:
            digest = hashlib.sha256()
            with (
                self.filesystem.open_input_stream(self._path(name)) as source,
                partial.open("wb") as sink,
            ):
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                    beat()
            return digest.hexdigest()

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            seen = self._tried(download, name)
            if sha256 is not None and seen != sha256:
                raise DataError(f"{self.place(name)} is not what was written (SHA-256 differs)")
            os.replace(partial, path)
        except FileNotFoundError:
            raise DataError(f"{self.place(name)} is missing") from None
        finally:
            partial.unlink(missing_ok=True)

    def children(self, name: str) -> dict[str, int | None]:
        """The last parts of the names one level below ``name``, with their sizes in bytes.

        Those that have others below them have no size.
        """
        from pyarrow.fs import FileSelector

        found = self._tried(
            lambda: self.filesystem.get_file_info(
                FileSelector(self._path(name), allow_not_found=True)
            ),
            name,
        )
        return {info.base_name: info.size for info in found}

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none."""
        info = self._tried(lambda: self.filesystem.get_file_info(self._path(name)), name)
        return info.size if info.is_file else None

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self.filesystem.delete_file(self._path(name)), name)

    def delete_all(self, name: str) -> None:
        """Remove everything below ``name``, the marker of a directory first."""
        self.delete(f"{name}/{COMMITTED}")
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self.filesystem.delete_dir(self._path(name)), name)

    # Directories

    def publish(self, name: str, files: Mapping[str, Path]) -> None:
        """Write a directory: its files, by their names in it, and the marker last.

        A directory with the same content is left as it is.
        """
        digests = {relative: file_digest(path) for relative, path in files.items()}
        before = self.committed(name)
        if before == digests:
            return
        if before is not None:
            self.delete(f"{name}/{COMMITTED}")
        for relative, path in files.items():
            self.put(path, f"{name}/{relative}")
        passed("storage.files_put", name)
        self.write_json(f"{name}/{COMMITTED}", {"files": digests})
        passed("storage.committed", name)

    def committed(self, name: str) -> dict[str, str] | None:
        """Digests of the files of a directory; None if it is not there, or not whole.

        Raises:
            DataError: its marker is damaged.
        """
        marker = self.read_json(f"{name}/{COMMITTED}")
        if marker is None:
            return None
        try:
            return {str(key): str(value) for key, value in marker["files"].items()}
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{self.place(name)}/{COMMITTED} is damaged; remove it") from None

    def fetch(self, name: str, directory: Path) -> Path:
        """Bring ``directory`` of this node up to what :meth:`publish` wrote; returns it.

        Processes of one node wait for each other, and one alone downloads.

        Raises:
            IncompleteArtifactError: it is not there, or not whole.
            DataError: a file is not what was written.
        """
        files = self.committed(name)
        if files is None:
            raise IncompleteArtifactError(
                f"{self.place(name)} has no {COMMITTED}, so it was not written to its end; run the "
                "command that makes it again"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_name(f".{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _holds(directory, files):
                return directory
            partial = directory.with_name(directory.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for relative, sha256 in files.items():
                self.get(f"{name}/{relative}", partial / relative, sha256)
            write_json(partial / COMMITTED, {"files": files})
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)
        trim()
        return directory

    # Of the storage as a whole

    def place(self, name: str) -> str:
        """Where ``name`` is, for people to read."""
        return f"{self.uri.partition('?')[0].rstrip('/')}/{name}"

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        path = self._path(name)
        if not self._is_local:
            with self.filesystem.open_output_stream(path) as sink:
                yield sink
            return
        # A file can be seen half written, but renamed.
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
        try:
            with self.filesystem.open_output_stream(partial) as sink:
                yield sink
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _tried(self, work: Callable[[], Result], what: str) -> Result:
        """What ``work`` returns, tried again where the storage fails; ``what`` is its object."""
        return _tried(work, f"storage {self.uri}", what, self._retry_seconds)


def check_storage(uri: str) -> None:
    """Refuse a storage that cannot be written and read, within ``CHECK_SECONDS``.

    In a process of its own: a server that takes a connection and is silent holds up its client,
    and that the end of its process, for ever.

    Raises:
        DiskError: it does not work; says why.
    """
    check_storage_uri(uri)
    command = [sys.executable, "-m", "lrmc_ray.files.storage"]
    environment = {
        **os.environ,
        "LRMC_STORAGE": uri,  # not where `ps` shows it
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a job's own code, on a node
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DiskError(
            f"storage {uri} must answer within {CHECK_SECONDS:.0f} s and did not; see to its "
            "address and the network"
        ) from None
    if done.returncode:
        code, _, message = (done.stdout.strip().splitlines() or [""])[-1].partition(" ")
        if code == str(ConfigError.exit_code):
            raise ConfigError(message)
        raise DiskError(message or f"storage {uri} cannot be used: {done.stderr.strip()[-200:]}")


def _tried(work: Callable[[], Result], storage: str, what: str, pauses: Sequence[float]) -> Result:
    """What ``work`` returns, tried again behind each of ``pauses`` where the storage fails."""
    import pyarrow as pa

    for pause in (*pauses, None):
        try:
            return work()
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, pa.ArrowInvalid):
                raise
            if isinstance(error, OSError) and error.filename is not None:
                raise  # a file of this node
            if pause is None or _is_final(error):
                raise DiskError(
                    f"{storage} cannot be used: {_first_line(error)} (at {what}); "
                    "see to the address, the bucket and the credentials of this node, then run "
                    "the same command again"
                ) from None
            _log.warning("%s; trying again in %.0f s", _first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def files_below(directory: Path) -> dict[str, Path]:
    """The files of a directory by their names in it, hidden ones left out."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != COMMITTED
    }


def _holds(directory: Path, files: Mapping[str, str]) -> bool:
    """Whether ``directory`` was fetched with this content, and nobody took files away."""
    try:
        marker = json.loads((directory / COMMITTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(marker == {"files": dict(files)}) and all(
        (directory / relative).is_file() for relative in files
    )


_FINAL = ("NO_SUCH_BUCKET", "ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "INVALID_CLIENT")
"""What S3's client calls errors that no second attempt mends."""


def _is_final(error: Exception) -> bool:
    return any(word in str(error).upper() for word in _FINAL)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _check(storage: Storage) -> None:
    """Write, read and remove a small object.

    Raises:
        DiskError: that did not work.
    """
    name = f".check_{uuid.uuid4().hex}"
    storage.write(name, name.encode())
    if storage.read(name) != name.encode():
        raise DiskError(f"storage {storage.uri} does not give back what was written there")
    storage.delete(name)


def _main() -> int:
    """What :func:`check_storage` runs."""
    try:
        _check(Storage(os.environ["LRMC_STORAGE"], retry_seconds=()))
    except (ConfigError, DiskError) as error:
        print(error.exit_code, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
