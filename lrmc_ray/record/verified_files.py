"""The files of a finished record, each verified before it is used."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import file_digest, read_manifest
from lrmc_ray.record.names import MADE_BY
from lrmc_ray.record.schema import read_part
from lrmc_ray.record.stored import StoredRecord


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one file."""

    name: str
    rows: int
    sha256: str


class FinishedRecord:
    """A finished record, file by file; fetched from the storage where the directory is a view."""

    def __init__(self, directory: Path) -> None:
        """Open the record in ``directory``.

        Raises:
            IncompleteArtifactError: it is not finished.
            DataError: its manifest is not one of a record.
        """
        self.directory = directory
        self.manifest = read_manifest(directory, made_by=MADE_BY)
        if self.manifest.get("kind") != "records":
            raise DataError(f"{directory} is no record but {self.manifest.get('kind')}; give one")
        try:
            self.parts = [PartInfo(**part) for part in self.manifest["files"]]
            self._provenance: dict[str, str] = self.manifest["provenance"]
            self._vocabulary_size: int = self.manifest["vocabulary_size"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"the manifest of {directory} is damaged ({error}); remove {directory} and run "
                f"`{MADE_BY}` again"
            ) from None
        self._stored = StoredRecord.of_view(directory)

    def verify_part(self, part: int) -> pa.Table:
        """One file's table, its digest, checksums, contract and row count verified.

        Raises:
            DataError: the file is missing or not what was written.
        """
        info = self.parts[part]
        path = self.part_path(part)
        table = read_part(path, self._provenance)
        if table.num_rows != info.rows:
            raise DataError(f"{path} has {table.num_rows} rows, not {info.rows}; {self._remedy}")
        return table

    def part_path(self, part: int) -> Path:
        """Where one file is, its digest verified; fetched where this is a view.

        Raises:
            DataError: the file is missing or not what was written.
        """
        return self._verified(self.parts[part].name, self.parts[part].sha256)

    def index_path(self) -> Path | None:
        """Where the index of the samples is, verified; None in a record that has none.

        Raises:
            DataError: it is missing or not what was written.
        """
        index = self.manifest.get("index")  # records made before there was one have none
        return None if index is None else self._verified(index["name"], index["sha256"])

    def _verified(self, name: str, sha256: str) -> Path:
        path = self.directory / name
        if self._stored is not None and not (path.is_file() and file_digest(path) == sha256):
            self._stored.get(path, sha256)
            return path
        if not path.is_file():
            raise DataError(f"{path} is missing; {self._remedy}")
        if file_digest(path) != sha256:
            raise DataError(
                f"{path} is not the file that was recorded (SHA-256 differs); {self._remedy}"
            )
        return path

    @property
    def _remedy(self) -> str:
        return f"remove {self.directory} and run `{MADE_BY}` again"
