"""A record in the storage: the same files as on a disk, and a view of it in a directory.

A view is a directory with the record's manifest and ``storage.json``, which says where the files
are; a file is fetched when it is first read, verified, and kept. An object's name ends in its
digest: an actor that was thought dead may write its file again, on a processor that rounds
otherwise, and must not change one that the manifest lists.
"""

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import MANIFEST, json_content, write_atomically, write_json
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.node_cache import trim, use
from lrmc_ray.files.place import Place
from lrmc_ray.files.storage import Storage
from lrmc_ray.record.names import EXAMPLES, MADE_BY, VIEW

_DESCRIBED = "described"
"""Below it, what each finished file holds, until the manifest does."""


class StoredRecord:
    """One record in a storage."""

    def __init__(self, storage: Storage, name: str) -> None:
        """The record ``name``, a fingerprint; it need not be there yet."""
        self.storage = storage
        self.name = name
        self._prefix = f"records/{name}"

    @classmethod
    def of_view(cls, directory: Path) -> Self | None:
        """The record that ``directory`` is a view of; None if it holds the files itself.

        Raises:
            DataError: what says where they are is damaged.
        """
        path = directory / VIEW
        if not path.is_file():
            return None
        try:
            view = json.loads(path.read_text(encoding="utf-8"))
            uri, name = str(view["storage"]), str(view["record"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error}); remove {directory} and run the same command again"
            ) from None
        return cls(Storage(uri), name)

    def _key(self, name: str, sha256: str) -> str:
        path = PurePosixPath(name)
        return f"{self._prefix}/{path.stem}.{sha256[:16]}{path.suffix}"

    # While it is made

    def put(self, path: Path, sha256: str) -> None:
        """Write a file of the record."""
        key = self._key(path.name, sha256)
        if self.storage.size(key) != path.stat().st_size:
            self.storage.put(path, key)

    def put_part(self, path: Path, described: Mapping[str, Any]) -> None:
        """Write a file of samples, and then what it holds."""
        self.put(path, described["sha256"])
        passed("storage.part_put", path.name)
        self.storage.write_json(f"{self._prefix}/{_DESCRIBED}/{path.name}.json", described)

    def described(self) -> dict[str, dict[str, Any]]:
        """What finished files hold, by their names; those of a command that was killed."""
        found = {}
        for name in self.storage.children(f"{self._prefix}/{_DESCRIBED}"):
            part = self.storage.read_json(f"{self._prefix}/{_DESCRIBED}/{name}")
            if part and self.storage.size(self._key(part["name"], part["sha256"])) == part["bytes"]:
                found[str(part["name"])] = part
        return found

    def open(self, name: str, sha256: str) -> Any:
        """A file of the record as pyarrow reads it, of which only parts are needed."""
        path = f"{self.storage.root}/{self._key(name, sha256)}"
        return self.storage.filesystem.open_input_file(path)

    def commit(self, manifest: Mapping[str, Any]) -> bool:
        """Declare the record finished, unless another command has.

        What only its making needs is removed. A file that the manifest does not list stays: another
        command may be about to list it.

        Returns:
            Whether ``manifest`` is the record's. If not, that of the other command is.
        """
        is_first = not self.is_finished()
        if is_first:
            self.storage.write(f"{self._prefix}/{MANIFEST}", json_content(manifest))
            passed("storage.record_committed", self.name)
        self.tidy()
        return is_first

    def tidy(self) -> None:
        """Remove what only the making of the record needs: it is finished."""
        self.storage.delete_all(f"{self._prefix}/{_DESCRIBED}")
        for name, size in self.storage.children(self._prefix).items():
            if size is not None and name.startswith(EXAMPLES.removesuffix("parquet")):
                self.storage.delete(f"{self._prefix}/{name}")

    # Once it is there

    def is_finished(self) -> bool:
        """Whether its manifest is there."""
        return self.storage.exists(f"{self._prefix}/{MANIFEST}")

    def view(self, directory: Path) -> Path:
        """Make ``directory`` a view of the record, if it is not one; returns it.

        Raises:
            IncompleteArtifactError: the record is not finished.
        """
        if (directory / VIEW).is_file() and (directory / MANIFEST).is_file():
            return directory
        manifest = self.storage.read(f"{self._prefix}/{MANIFEST}")
        if manifest is None:
            raise IncompleteArtifactError(
                f"{self.storage.place(self._prefix)} has no {MANIFEST}, so its stage did not "
                f"finish; run `{MADE_BY}` (again: it goes on where it stopped)"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self.mark(directory)
        write_atomically(directory / MANIFEST, manifest)
        return directory

    def mark(self, directory: Path) -> None:
        """Say in ``directory`` where the files are."""
        write_json(directory / VIEW, {"storage": self.storage.uri, "record": self.name})

    def view_here(self) -> Path:
        """The view of this node, whose processes wait for each other."""
        directory = self.storage.cache / self._prefix
        use(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_name(f".{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self.view(directory)

    def get(self, path: Path, sha256: str) -> None:
        """Fetch a file of the record to ``path``, of the same name.

        Raises:
            DataError: it is missing, or not what was written.
        """
        trim()
        free = shutil.disk_usage(path.parent).free
        size = self.storage.size(self._key(path.name, sha256))
        if size is not None and size > free:
            raise OSError(28, "No space left on device", str(path))
        self.storage.get(self._key(path.name, sha256), path, sha256)
        trim()


def record_here(place: Place, record: Path) -> Path:
    """The finished record ``record``, a path that the driver knows it by, as this node has it.

    Raises:
        IncompleteArtifactError: it is not in the storage.
    """
    return place.either(
        lambda: record, lambda storage: StoredRecord(storage, record.name).view_here()
    )
