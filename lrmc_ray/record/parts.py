"""The Parquet contract between Stage 0 and Stage 1.

One row per sample. A record can be read back only if it is what was written: pages carry
checksums, files a SHA-256 in the manifest, and every row is checked before it reaches a loss.
Only the files that the manifest lists are read.
"""

import bisect
import itertools
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import PARTIAL, file_digest, read_manifest
from lrmc_ray.files.fault_points import passed
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.record.stored import StoredRecord

SCHEMA_VERSION = "2"

RECORD_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        # What the data call it; empty where they do not.
        pa.field("domain", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        # One entry per recorded position, ascending; its label sits at position + 1.
        pa.field("positions", pa.list_(pa.int32()), nullable=False),
        # False at prompt positions, which the anchor uses.
        pa.field("is_supervised", pa.list_(pa.bool_()), nullable=False),
        pa.field("gold_ids", pa.list_(pa.int32()), nullable=False),
        # Candidates of position i: [offsets[i], offsets[i + 1]) of the two lists below.
        pa.field("candidate_offsets", pa.list_(pa.int32()), nullable=False),
        pa.field("candidate_ids", pa.list_(pa.int32()), nullable=False),
        # Natural logarithms, rounded down to float16.
        pa.field("candidate_logprobs", pa.list_(pa.float16()), nullable=False),
        # 1 - the stored probability of the candidates.
        pa.field("outside_mass", pa.list_(pa.float32()), nullable=False),
    ]
)


_BYTE_STREAM_SPLIT = (
    "input_ids",
    "gold_ids",
    "candidate_ids",
    "candidate_logprobs",
    "outside_mass",
)


_DELTA = ("positions", "candidate_offsets")


_LAYOUT: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": ["domain"],
    "column_encoding": {
        **{f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _BYTE_STREAM_SPLIT},
        **{f"{name}.list.element": "DELTA_BINARY_PACKED" for name in _DELTA},
    },
    "write_statistics": False,
    "write_page_checksum": True,
    "row_group_size": 64,
}
"""What benchmarks/record_size.py measured to be smallest. Split into streams of bytes, the high
bytes of an id that the vocabulary does not need cost nothing: no width to choose."""


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one file."""

    name: str
    rows: int
    sha256: str


def stamped_schema(provenance: Mapping[str, str]) -> pa.Schema:
    """``RECORD_SCHEMA`` with the schema version and the writer's fingerprints."""
    return RECORD_SCHEMA.with_metadata({"lrmc.schema_version": SCHEMA_VERSION, **provenance})


def to_table(samples: Sequence[Sample], provenance: Mapping[str, str]) -> pa.Table:
    """The samples as rows of the contract."""
    columns: dict[str, list[Any]] = {field.name: [] for field in RECORD_SCHEMA}
    for sample in samples:
        candidates = sample.candidates
        columns["sample_id"].append(sample.sample_id)
        columns["domain"].append(sample.domain)
        columns["input_ids"].append(sample.input_ids_T.numpy().astype(np.int32))
        columns["positions"].append(sample.positions_P.numpy().astype(np.int32))
        columns["is_supervised"].append(sample.is_supervised_P.numpy())
        columns["gold_ids"].append(candidates.gold_ids.numpy())
        columns["candidate_offsets"].append(candidates.offsets.numpy().astype(np.int32))
        columns["candidate_ids"].append(candidates.token_ids.numpy())
        columns["candidate_logprobs"].append(candidates.logprobs.numpy())
        columns["outside_mass"].append(candidates.outside_mass().numpy().astype(np.float32))
    arrays = [pa.array(columns[field.name], type=field.type) for field in RECORD_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=stamped_schema(provenance))


def write_part(path: Path, samples: Sequence[Sample], provenance: Mapping[str, str]) -> None:
    """Write one file of the record, whole or not at all."""
    # An actor on another machine, or one thought dead, may be writing the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        pq.write_table(to_table(samples, provenance), partial, **_LAYOUT)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        passed("record.part_written", path.name)
        os.replace(partial, path)
        passed("record.part_renamed", path.name)
    finally:
        partial.unlink(missing_ok=True)


def read_part(path: Path, provenance: Mapping[str, str]) -> pa.Table:
    """One file of the record, its checksums and its contract verified.

    Raises:
        DataError: the file is damaged, of another version, or of another record.
    """
    remedy = "record again: remove its directory and run the same command"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except Exception as error:  # extension types that others registered raise whatever they like
        raise DataError(f"{path} is damaged ({error}); {remedy}") from None
    version = metadata.get("lrmc.schema_version", "absent")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: record schema version {version}, not {SCHEMA_VERSION} as read here; {remedy}"
        )
    if not table.schema.equals(RECORD_SCHEMA, check_metadata=False):
        raise DataError(f"{path}: its columns are not those of a record; {remedy}")
    for key, value in provenance.items():
        if metadata.get(key) != value:
            raise DataError(
                f"{path}: {key} is {metadata.get(key)}, the record's is {value}; {remedy}"
            )
    return table


def to_sample(table: pa.Table, row: int, *, vocabulary_size: int, source: str) -> Sample:
    """Row ``row`` of a record's table, checked.

    Raises:
        DataError: the row contradicts itself or the vocabulary.
    """

    def values(name: str) -> Any:
        return table[name][row].values.to_numpy(zero_copy_only=False)

    input_ids_T = torch.tensor(values("input_ids"), dtype=torch.int64)
    positions_P = torch.tensor(values("positions"), dtype=torch.int64)
    candidates = CandidateSets(
        offsets=torch.tensor(values("candidate_offsets"), dtype=torch.int64),
        token_ids=torch.tensor(values("candidate_ids"), dtype=torch.int32),
        logprobs=torch.tensor(values("candidate_logprobs"), dtype=torch.float16),
        gold_ids=torch.tensor(values("gold_ids"), dtype=torch.int32),
    )
    sample_id = table["sample_id"][row].as_py()
    sample = Sample(
        sample_id=sample_id,
        input_ids_T=input_ids_T,
        positions_P=positions_P,
        is_supervised_P=torch.tensor(values("is_supervised"), dtype=torch.bool),
        candidates=candidates,
        domain=table["domain"][row].as_py(),
    )
    try:
        _check(sample, vocabulary_size)
    except ValueError as error:
        raise DataError(f"{source}, sample {sample_id}: {error}; record again") from None
    return sample


def _check(sample: Sample, vocabulary_size: int) -> None:
    ids_T, positions_P = sample.input_ids_T, sample.positions_P
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < vocabulary_size:
        raise ValueError(f"token ids must be in [0, {vocabulary_size})")
    if len(positions_P) != sample.candidates.num_rows or len(positions_P) != len(
        sample.is_supervised_P
    ):
        raise ValueError("positions, is_supervised and candidate sets must be equally many")
    if len(positions_P):
        if int(positions_P[0]) < 0 or int(positions_P[-1]) + 1 >= len(ids_T):
            raise ValueError("positions must be in [0, number of tokens - 1)")
        if not bool((positions_P.diff() > 0).all()):
            raise ValueError("positions must ascend")
        if not torch.equal(ids_T[positions_P + 1], sample.candidates.gold_ids.long()):
            raise ValueError("gold ids must be the next tokens")
    sample.candidates.check(vocabulary_size)


class Records:
    """A finished record, read by sample index.

    The files are read as they are needed; the most recent ones stay in memory.
    """

    def __init__(self, directory: Path, *, max_cached_bytes: int = 2 << 30):
        """Open the record in ``directory``.

        Raises:
            IncompleteArtifactError: it is not finished.
            DataError: its manifest is not one of a record.
        """
        self.directory = directory
        self.manifest = read_manifest(directory, made_by="python -m lrmc_ray.record")
        if self.manifest.get("kind") != "records":
            raise DataError(f"{directory} is no record but {self.manifest.get('kind')}; give one")
        try:
            self.parts = [PartInfo(**part) for part in self.manifest["files"]]
            self._provenance: dict[str, str] = self.manifest["provenance"]
            self._vocabulary_size: int = self.manifest["vocabulary_size"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"the manifest of {directory} is damaged ({error}); remove {directory} and run "
                "`python -m lrmc_ray.record` again"
            ) from None
        self._starts = [0, *itertools.accumulate(part.rows for part in self.parts)]
        self._stored = StoredRecord.of_view(directory)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._max_cached_bytes = max_cached_bytes

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        part = bisect.bisect_right(self._starts, index) - 1
        return to_sample(
            self._table(part),
            index - self._starts[part],
            vocabulary_size=self._vocabulary_size,
            source=str(self.directory / self.parts[part].name),
        )

    def _table(self, part: int) -> pa.Table:
        if part in self._cache:
            self._cache.move_to_end(part)
            return self._cache[part]
        table = self.verify_part(part)
        self._cache[part] = table
        while len(self._cache) > 1 and (
            sum(cached.nbytes for cached in self._cache.values()) > self._max_cached_bytes
        ):
            self._cache.popitem(last=False)
        return table

    def samples_of_part(self, part: int) -> Iterator[Sample]:
        """Every sample of one file, read anew and verified.

        Raises:
            DataError: the file is not what was written, or a sample contradicts itself.
        """
        table = self.verify_part(part)
        for row in range(table.num_rows):
            yield to_sample(
                table,
                row,
                vocabulary_size=self._vocabulary_size,
                source=str(self.directory / self.parts[part].name),
            )

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
        return f"remove {self.directory} and run `python -m lrmc_ray.record` again"
