"""The files of a record while it is made: on a disk that all nodes share, or in a storage.

:func:`recording_of` takes the one that fits the place. Actors use it as the driver does.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from lrmc_ray.cluster.checks import check_model_shared
from lrmc_ray.console import progress
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.files.place import Place
from lrmc_ray.files.storage import Storage
from lrmc_ray.record.describe import describe
from lrmc_ray.record.names import EXAMPLES, INDEX
from lrmc_ray.record.schema import read_part
from lrmc_ray.record.stored import StoredRecord
from lrmc_ray.record.verified_files import FinishedRecord

_log = logging.getLogger(__name__)

Part = dict[str, Any]
"""What a finished file holds, as :func:`lrmc_ray.record.describe.describe` says it."""


class Recording(Protocol):
    """What both kinds offer."""

    def show_finished(self, final: Path) -> None:
        """Let ``final`` show the record, if it is finished where this node does not see it."""

    def bring(self, final: Path) -> None:
        """Bring the finished record ``final`` to where all nodes see it, if it is not there."""

    def taken_over(self, final: Path) -> bool:
        """Whether another command has finished the record; ``final`` shows it then."""

    def begin(self, plan: Mapping[str, Any]) -> dict[str, Part]:
        """Let all nodes see the examples; returns the parts that are done already, by name."""

    def check_model(self, directory: Path) -> None:
        """Refuse a model that some node cannot load.

        Raises:
            IncompleteArtifactError: a node does not see ``directory``.
        """

    def examples(self, sha256: str) -> AbstractContextManager[Any]:
        """The file of tokenized examples, as ``read_examples`` takes it."""

    def new_part(self, name: str) -> AbstractContextManager[Path]:
        """Where to write the part ``name``."""

    def keep_part(self, path: Path, part: Part) -> None:
        """Let the driver see a part that was written to ``path``."""

    def replaced(self, parts: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a file is not the one that was counted any more."""

    def claim(self, manifest: Mapping[str, Any], final: Path) -> bool:
        """Make the record this command's; False if another command was faster."""


class LocalRecording:
    """All nodes write into the same directory."""

    def __init__(self, partial: Path, provenance: Mapping[str, str]) -> None:
        self._partial, self._provenance = partial, provenance

    def show_finished(self, final: Path) -> None:
        """Every node sees ``final`` itself."""

    def bring(self, final: Path) -> None:
        """Every node sees ``final`` itself."""

    def taken_over(self, final: Path) -> bool:
        """False: the lock of the directory lets one command in."""
        return False

    def begin(self, plan: Mapping[str, Any]) -> dict[str, Part]:
        """What an interrupted run left behind, verified; whatever is damaged is made again."""
        done: dict[str, Part] = {}
        for shard in plan["shards"]:
            path = self._partial / str(shard["name"])
            if not path.is_file():
                continue
            try:
                table = read_part(path, self._provenance)
            except DataError as error:
                _log.warning("%s; recording that part again", error)
                path.unlink()
                continue
            if table.num_rows == shard["stop"] - shard["start"]:
                done[path.name] = describe(path, tokenizer_size=plan["tokenizer_size"])
        return done

    def check_model(self, directory: Path) -> None:
        """Actors load the model from ``directory``."""
        check_model_shared(directory)

    @contextlib.contextmanager
    def examples(self, sha256: str) -> Iterator[Path]:
        """The path of the examples."""
        yield self._partial / EXAMPLES

    @contextlib.contextmanager
    def new_part(self, name: str) -> Iterator[Path]:
        """The place where it stays."""
        yield self._partial / name

    def keep_part(self, path: Path, part: Part) -> None:
        """It is where the driver sees it."""

    def replaced(self, parts: Sequence[Mapping[str, Any]]) -> bool:
        """An actor that was thought dead may have written its file again.

        It has the same content, but another kind of processor rounds otherwise.
        """
        return any(file_digest(self._partial / part["name"]) != part["sha256"] for part in parts)

    def claim(self, manifest: Mapping[str, Any], final: Path) -> bool:
        """True: the manifest in the directory is all that it takes."""
        return True


class StoredRecording:
    """Nodes share nothing but a storage; the directory of each holds what it works on."""

    def __init__(self, partial: Path, record: StoredRecord) -> None:
        self._partial, self._record = partial, record

    def show_finished(self, final: Path) -> None:
        """Make ``final`` a view of the record in the storage, if that is finished."""
        if self._record.is_finished():
            self._record.view(final)

    def bring(self, final: Path) -> None:
        """Write a record that is on this disk, or in another storage, to the storage."""
        if self._record.is_finished():
            return
        finished = FinishedRecord(final)
        with progress("Uploading the record", total=len(finished.parts), unit="files") as bar:
            for number, part in enumerate(finished.parts):
                self._record.put(finished.part_path(number), part.sha256)
                bar.advance()
        if (index := finished.index_path()) is not None:
            self._record.put(index, finished.manifest["index"]["sha256"])
        self._record.commit(finished.manifest)

    def taken_over(self, final: Path) -> bool:
        """Whether the storage has the finished record; then the directory is given up.

        On another kind of processor its numbers may be rounded otherwise; there is one record, not
        two.
        """
        if not self._record.is_finished():
            return False
        _log.info("another command has finished the record %s; using that one", final.name)
        self._record.tidy()
        self._record.view(final)
        shutil.rmtree(self._partial)
        return True

    def begin(self, plan: Mapping[str, Any]) -> dict[str, Part]:
        """What an interrupted run left in the storage, whole or not listed there."""
        rows = {shard["name"]: shard["stop"] - shard["start"] for shard in plan["shards"]}
        done = {
            name: part
            for name, part in self._record.described().items()
            if part["rows"] == rows.get(name)
        }
        self._record.put(self._partial / EXAMPLES, plan["examples_sha256"])
        return done

    def check_model(self, directory: Path) -> None:
        """Actors fetch the model from the storage."""

    def examples(self, sha256: str) -> AbstractContextManager[Any]:
        """The object, open."""
        opened: AbstractContextManager[Any] = self._record.open(EXAMPLES, sha256)
        return opened

    @contextlib.contextmanager
    def new_part(self, name: str) -> Iterator[Path]:
        """A place on this node, for as long as it takes to write the part and to keep it."""
        directory = self._record.storage.cache / "recording"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            yield Path(scratch) / name

    def keep_part(self, path: Path, part: Part) -> None:
        """Write it to the storage, and then what it holds."""
        self._record.put_part(path, part)

    def replaced(self, parts: Sequence[Mapping[str, Any]]) -> bool:
        """False: the names of objects end in their digests."""
        return False

    def claim(self, manifest: Mapping[str, Any], final: Path) -> bool:
        """Write the manifest to the storage, unless another command has."""
        self._record.put(self._partial / INDEX, manifest["index"]["sha256"])
        if not self._record.commit(manifest):
            return not self.taken_over(final)
        self._record.mark(self._partial)
        return True


def recording_of(
    place: Place, partial: Path, provenance: Mapping[str, str], name: str
) -> Recording:
    """The record ``name`` that is made at ``place``.

    Args:
        place: of the run's files.
        partial: the directory that this process works in.
        provenance: what every file of the record says of itself.
        name: of the record, a fingerprint.
    """

    def local() -> Recording:
        return LocalRecording(partial, provenance)

    def stored(storage: Storage) -> Recording:
        return StoredRecording(partial, StoredRecord(storage, name))

    return place.either(local, stored)
