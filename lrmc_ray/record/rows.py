"""From JSONL and Parquet to token ids and a label mask.

A row holds ``messages`` (chat), or ``prompt`` and ``completion``, or plain ``text``; looked for in
this order. Of a conversation only what the assistant says is supervised, up to and with its
end-of-turn token; of plain text every token but the first. Every rendered piece of a conversation
is tokenized by itself, as it is at inference, where the prompt's tokens are fixed before the first
answer token exists. ``id`` and ``domain`` are optional, other fields are left alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow.parquet as pq

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.record.sources import Source

MAX_LISTED = 20
"""Bad rows that an error lists."""

MAX_LINE_BYTES = 64 * 2**20
"""A longer line of JSONL is a bad row; it is not read into memory."""

_CONTENT = ("messages", "prompt", "completion", "text")
_COLUMNS = ("id", "domain", *_CONTENT)
_PARQUET_ROWS = 256  # that are Python objects at one time


@dataclass(frozen=True)
class Row:
    """One row of a file, as it stands there."""

    place: str
    """``file:line``, for messages."""
    content: Mapping[str, Any]
    domain: str = ""
    """Of the file; the row's own ``domain`` wins."""


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


def read_rows(sources: Sequence[Source], rejects: Rejects) -> Iterator[Row]:
    """Every row of the JSONL and Parquet files; lines that are no JSON objects are rejected.

    Raises:
        IncompleteArtifactError: a file does not exist.
        DataError: a Parquet file is damaged or has other columns, or there are no rows at all.
    """
    for source in sources:
        if not source.path.is_file():
            raise IncompleteArtifactError(
                f"training data {source.path} does not exist; give an existing JSONL or Parquet "
                "file"
            )
        read = _parquet_rows if source.path.suffix == ".parquet" else _jsonl_rows
        yield from read(source, rejects)
    if rejects.rows == 0:
        names = ", ".join(str(source.path) for source in sources)
        raise DataError(f"{names}: no rows; training data need at least one")


def _jsonl_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    with source.path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            rejects.rows += 1
            place = f"{source.path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                rejects.add(place, f"longer than {MAX_LINE_BYTES} bytes")
                continue
            try:
                content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                # JSON can spell half a surrogate pair, which no text contains.
                json.dumps(content, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                rejects.add(place, f"not valid JSON in UTF-8: {error}")
                continue
            if isinstance(content, dict):
                yield Row(place, content, source.domain)
            else:
                rejects.add(place, "not a JSON object")


def _parquet_rows(source: Source, rejects: Rejects) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in _COLUMNS if name in names]
            if not set(columns) & set(_CONTENT):
                raise DataError(
                    f"{source.path}: needs a column messages, or prompt and completion, or text; "
                    f"has {', '.join(names) or 'none'}"
                )
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                batch.validate(full=True)
                for content in batch.to_pylist():
                    number += 1
                    rejects.rows += 1
                    # A column is there for every row; what is null was not given.
                    given = {name: value for name, value in content.items() if value is not None}
                    yield Row(f"{source.path}:row {number}", given, source.domain)
    except DataError:
        raise
    except Exception as error:  # extension types that others registered raise whatever they like
        raise DataError(
            f"{source.path} is no readable Parquet file ({error}); save it again"
        ) from None


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row as chat messages.

    Raises:
        DataError: a field is missing, of the wrong type or empty.
    """
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError("'messages' must be a non-empty list")
        for message in messages:
            if (
                not isinstance(message, dict)
                or not isinstance(message.get("role"), str)
                or not isinstance(message.get("content"), str)
            ):
                raise DataError("each message needs the strings 'role' and 'content'")
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            raise DataError("no assistant message with text, so nothing to learn")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError("'prompt' and 'completion' must be strings")
        if not completion.strip():
            raise DataError("'completion' is empty, so there is nothing to learn")
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    raise DataError(
        "needs 'messages', or 'prompt' and 'completion', or 'text'; has "
        f"{', '.join(sorted(row)) or 'nothing'}"
    )


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether the row is no conversation but ``text``."""
    is_conversation = "messages" in row or {"prompt", "completion"} <= row.keys()
    return "text" in row and not is_conversation


def sample_id_of(row: Mapping[str, Any]) -> str:
    """The row's own ``id``, or the first 16 hex digits of its content's SHA-256.

    Raises:
        DataError: the ``id`` is neither text nor a whole number.
    """
    if "id" in row:
        if type(row["id"]) not in (str, int):
            raise DataError(f"'id' must be a string or an integer, got {row['id']!r}")
        return str(row["id"])
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
