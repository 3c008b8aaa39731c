"""The tokenized examples between preparing and recording: written in windows, read by range."""

import sys
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.record.encode import Example

SORT_WINDOW = 4096
"""Examples that are sorted by length together, one row group; bounds the driver's memory."""

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("is_target", pa.list_(pa.bool_()), nullable=False),
    ]
)


class ExamplesWriter:
    """Writes examples to one file, sorted by length within windows of ``SORT_WINDOW``."""

    def __init__(self, path: Path) -> None:
        self.lengths = array("I")  # all that is kept of an example, 4 bytes
        """Tokens of every example written so far, in the order of the file."""
        self._window: list[Example] = []
        self._writer = pq.ParquetWriter(
            path, EXAMPLES_SCHEMA, compression="zstd", write_page_checksum=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush()
        finally:
            self._writer.close()

    def add(self, example: Example) -> None:
        """Write ``example``, or keep it until its window is full."""
        self._window.append(example)
        if len(self._window) == SORT_WINDOW:
            self._flush()

    def _flush(self) -> None:
        window = self._window
        window.sort(key=lambda example: (len(example.input_ids), example.sample_id))
        self.lengths.extend(len(example.input_ids) for example in window)
        columns = {
            name: [getattr(example, name) for example in window] for name in EXAMPLES_SCHEMA.names
        }
        table = pa.table(columns, schema=EXAMPLES_SCHEMA)
        self._writer.write_table(table, row_group_size=SORT_WINDOW)
        window.clear()


def read_examples(source: Any, start: int, stop: int) -> list[dict[str, Any]]:
    """The examples [start, stop) of a file that :class:`ExamplesWriter` wrote.

    Args:
        source: its path, or an open file of which only parts are read.
        start: index of the first example.
        stop: index behind the last one.
    """
    groups = range(start // SORT_WINDOW, (stop - 1) // SORT_WINDOW + 1)
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        table = file.read_row_groups(groups)
    rows: list[dict[str, Any]] = table.slice(
        start - groups[0] * SORT_WINDOW, stop - start
    ).to_pylist()
    return rows


def read_domains(examples: Path) -> list[str]:
    """The domain of every example, in their order."""
    with pq.ParquetFile(examples, page_checksum_verification=True) as file:
        batches = file.iter_batches(columns=["domain"])
        # Few, so one copy of each.
        return [sys.intern(name) for batch in batches for name in batch["domain"].to_pylist()]


def write_index(examples: Path, path: Path) -> None:
    """Write what training must know of every sample, in the order of ``examples``.

    The examples are read a window at a time.
    """
    names = ["sample_id", "domain"]
    with pq.ParquetFile(examples, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        for name in set(schema.names) - set(names):
            schema = schema.remove(schema.get_field_index(name))
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group, columns=names))
