"""The rows of training files: JSON lines and arrays, CSV, Parquet and Arrow, as they stand there.

What a row may hold says :mod:`lrmc_ray.record.formats`. A value that is null was not given, in
every kind of file: a column is there for all rows.

Files are read row by row, so that memory does not grow with them, and their values stay what they
are. ``datasets`` would make dates of texts that look like dates, floats of whole numbers beside
floats, and a second copy of every file in its cache.
"""

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.record.formats import FIELDS, has_form, without_nulls
from lrmc_ray.record.json_array import elements_of
from lrmc_ray.record.sources import Source, kind_of

MAX_LISTED = 20
"""Bad rows that an error lists."""


MAX_LINE_BYTES = 64 * 2**20
"""A longer line of JSONL is a bad row; it is not read into memory."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half a surrogate pair, as JSON spells it."""

_PARQUET_ROWS = 256  # that are Python objects at one time


@dataclass(frozen=True)
class Row:
    """One row of a file, as it stands there."""

    place: str
    """``file:line``, for messages."""
    content: Mapping[str, Any]
    domain: str = ""
    """Of the file; the row's own ``domain`` wins."""
    problem: str = ""
    """Why it could not be read; "" if it could."""


class Rejects:
    """Rows that cannot be used: listed in one error, or skipped up to a limit.

    Args:
        file: where every rejected row is noted, one JSON object a line; None if a bad row is an
            error.
        max_share: largest share of all rows that may be skipped, in [0, 1].
    """

    def __init__(self, file: TextIO | None = None, *, max_share: float = 0.0):
        self.rows = 0
        """Rows that were looked at."""
        self.count = 0
        self._file, self._max_share = file, max_share
        self._first: list[str] = []

    def add(self, place: str, problem: str) -> None:
        """Reject the row at ``place``."""
        self.count += 1
        if len(self._first) < MAX_LISTED:
            self._first.append(f"{place}: {problem}")
        if self._file is not None:
            self._file.write(json.dumps({"place": place, "problem": problem}) + "\n")

    def settle(self) -> None:
        """Say how it ended.

        Raises:
            DataError: bad rows that may not be skipped; the first are listed, the rest counted.
        """
        if not self.count or (self._file is not None and self.count <= self._max_share * self.rows):
            return
        listed = "\n  ".join(self._first)
        rest = self.count - len(self._first)
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        rule = f"{self.count} unusable row(s); mend or remove them"
        if self._file is not None:
            rule = (
                f"at most {self._max_share:.2%} of the rows may be skipped "
                f"(data.max_rejected_share), {self.count} of {self.rows} are unusable; mend or "
                "remove them, or raise it"
            )
        raise DataError(f"{rule}:\n  {listed}{more}")


def first_rows(sources: Sequence[Source], rejects: Rejects, count: int) -> Iterator[Row]:
    """The first ``count`` rows of each file; otherwise as :func:`read_rows`."""
    for source in sources:
        yield from itertools.islice(_READERS[kind_of(source.path)](source, rejects), count)
    _check_some(sources, rejects)


def read_rows(sources: Sequence[Source], rejects: Rejects) -> Iterator[Row]:
    """Every row of the files, those that cannot be read with what is wrong; ``rejects`` counts all.

    Raises:
        IncompleteArtifactError: a file does not exist.
        DataError: a file is damaged or has columns of no known form, or there are no rows at all.
    """
    for source in sources:
        if not source.path.is_file():
            raise IncompleteArtifactError(
                f"training data {source.path} does not exist; give an existing file"
            )
        yield from _READERS[kind_of(source.path)](source, rejects)
    _check_some(sources, rejects)


def _check_some(sources: Sequence[Source], rejects: Rejects) -> None:
    if rejects.rows == 0:
        names = ", ".join(str(source.path) for source in sources)
        raise DataError(f"{names}: no rows; training data need at least one")


def _opened(source: Source) -> Any:
    """The file's bytes, unpacked where its name ends with .gz or .zst."""
    packed = {".gz": "gzip", ".zst": "zstd"}.get(source.path.suffix)
    return pa.input_stream(str(source.path), compression=packed) if packed else None


def _lines_of(source: Source) -> Iterator[bytes]:
    """Lines, each cut at ``MAX_LINE_BYTES``; the rest of a longer one is not kept in memory."""
    packed = _opened(source)
    stream: Any = source.path.open("rb") if packed is None else io.BufferedReader(packed)
    with stream as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            yield line


def _json_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    """A file that is called .json holds an array, or lines after all."""
    with io.BufferedReader(_opened(source) or pa.input_stream(str(source.path))) as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    yield from (_array_rows if is_array else _jsonl_rows)(source, rejects)


def _array_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    file: Any = _opened(source) or pa.input_stream(str(source.path))
    number = 0
    try:
        for number, content in enumerate(elements_of(file, MAX_LINE_BYTES), 1):
            rejects.rows += 1
            yield _json_row(f"{source.path}:row {number}", content, source)
    except (ValueError, RecursionError, OSError) as error:
        # What stands behind it cannot be told apart, so these are not rows that may be skipped.
        raise DataError(
            f"{source.path}:row {number + 1}: not readable as JSON in UTF-8 ({error}); mend the "
            "array, or write one object a line"
        ) from None


def _json_row(place: str, content: Any, source: Source, *, escapes: bool = True) -> Row:
    """A row from what JSON says; ``escapes`` says whether surrogates may be spelled in it."""
    if not isinstance(content, dict):
        return Row(place, {}, problem="not a JSON object")
    try:
        # JSON can spell half a surrogate pair, which no text contains.
        if escapes:
            json.dumps(content, ensure_ascii=False).encode()
        return Row(place, without_nulls(content), source.domain)
    except (ValueError, RecursionError) as error:
        return Row(place, {}, problem=f"not valid JSON in UTF-8: {error}")


def _jsonl_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    try:
        for number, line in enumerate(_lines_of(source), 1):
            if not line.strip():
                continue
            rejects.rows += 1
            place = f"{source.path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield Row(place, {}, problem=f"longer than {MAX_LINE_BYTES} bytes")
                continue
            try:
                content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield Row(place, {}, problem=f"not valid JSON in UTF-8: {error}")
                continue
            yield _json_row(place, content, source, escapes=_SURROGATE.search(line) is not None)
    except OSError as error:  # of a packed file: one that is not packed fails elsewhere
        if source.path.suffix not in (".gz", ".zst"):
            raise
        raise DataError(f"{source.path} cannot be unpacked ({error}); pack it again") from None


def _csv_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    """An empty cell was not given; lists and objects are written in a cell as JSON."""
    delimiter = "\t" if ".tsv" in source.path.suffixes else ","
    stream = io.BufferedReader(_opened(source) or pa.input_stream(str(source.path)))
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_columns(source, reader.fieldnames or [])
            before = reader.line_num
            for cells in reader:
                place = f"{source.path}:{before + 1}"
                before = reader.line_num
                rejects.rows += 1
                if None in cells or None in cells.values():
                    yield Row(place, {}, problem=f"must have {len(reader.fieldnames or [])} cells")
                    continue
                content = {name: _cell(name, cell) for name, cell in cells.items() if cell}
                yield Row(place, without_nulls(content), source.domain)
        except (csv.Error, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{source.path}:{reader.line_num} is no readable CSV ({error}); save it again"
            ) from None


def _cell(name: str, cell: str) -> Any:
    if name in ("messages", "conversations", "tools", "functions") or cell.startswith('[{"'):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _check_columns(source: Source, names: Sequence[str]) -> None:
    if not has_form(names):
        raise DataError(
            f"{source.path}: needs a column messages, or prompt and completion, or text, or those "
            f"of another known form; has {', '.join(names) or 'none'}"
        )


def _parquet_batches(source: Source) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        _check_columns(source, names)
        columns = [name for name in FIELDS if name in names]
        yield from file.iter_batches(_PARQUET_ROWS, columns=columns)


def _arrow_batches(source: Source) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(source.path)) as file:
        try:
            reader = pa.ipc.open_stream(file)
            batches: Iterable[pa.RecordBatch] = reader
        except pa.ArrowInvalid:
            file.seek(0)
            whole = pa.ipc.open_file(file)
            reader = whole
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        _check_columns(source, reader.schema.names)
        columns = [name for name in FIELDS if name in reader.schema.names]
        for batch in batches:
            for start in range(0, batch.num_rows, _PARQUET_ROWS):
                yield batch.select(columns).slice(start, _PARQUET_ROWS)


def _column_rows(
    batches_of: Callable[[Source], Iterator[pa.RecordBatch]], kind: str
) -> Callable[[Source, Rejects], Iterator[Row]]:
    def read(source: Source, rejects: Rejects) -> Iterator[Row]:
        number = 0
        try:
            for batch in batches_of(source):
                batch.validate(full=True)
                for content in batch.to_pylist():
                    number += 1
                    rejects.rows += 1
                    yield Row(f"{source.path}:row {number}", without_nulls(content), source.domain)
        except DataError:
            raise
        except Exception as error:  # extension types that others registered raise what they like
            raise DataError(
                f"{source.path} is no readable {kind} file ({error}); save it again"
            ) from None

    return read


_READERS: dict[str, Callable[[Source, Rejects], Iterator[Row]]] = {
    "json lines": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _column_rows(_parquet_batches, "Parquet"),
    "arrow": _column_rows(_arrow_batches, "Arrow"),
}


def sample_id_of(row: Mapping[str, Any]) -> str:
    """The row's own ``id``, or the first 16 hex digits of its content's SHA-256.

    Raises:
        DataError: the ``id`` is neither text nor a whole number.
    """
    if row.get("id") is not None:
        if type(row["id"]) not in (str, int):
            raise DataError(f"'id' must be a string or an integer, got {row['id']!r}")
        return str(row["id"])
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
