"""The Parquet contract between Stage 0 and Stage 1: one file of a record, written and read.

One row per sample. A file can be read back only if it is what was written: pages carry checksums,
the schema its version and the fingerprints of what the record was made with.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import PARTIAL
from lrmc_ray.files.fault_points import passed

if TYPE_CHECKING:
    from lrmc_ray.method.microbatch import Sample

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


LAYOUT: dict[str, Any] = {
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


def stamped_schema(provenance: Mapping[str, str]) -> pa.Schema:
    """``RECORD_SCHEMA`` with the schema version and the writer's fingerprints."""
    return RECORD_SCHEMA.with_metadata({"lrmc.schema_version": SCHEMA_VERSION, **provenance})


def to_table(samples: "Sequence[Sample]", provenance: Mapping[str, str]) -> pa.Table:
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


def write_part(path: Path, samples: "Sequence[Sample]", provenance: Mapping[str, str]) -> None:
    """Write one file of the record, whole or not at all."""
    # An actor on another machine, or one thought dead, may be writing the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        pq.write_table(to_table(samples, provenance), partial, **LAYOUT)
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
