"""The items of a task's local JSON files as the files have them.

`datasets` guesses types: it turns a text such as "2024-01-01" into a time, and 7 beside 7.5 into
7.0. Answers are compared as texts, so that would change scores. Here every column keeps what the
file says.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.task_sources import JSON_SUFFIXES, PACKED

_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNDERSTOOD = {"data_files", "data_dir", "field", "trust_remote_code"}
"""Options of a task's data under which its files are read here."""


@dataclass(frozen=True)
class JsonItem:
    """One item, and where it stands."""

    place: str
    """File and line, or file and number."""
    row: dict[str, Any]


def is_json(files: Mapping[str, Sequence[Path | str]], config: Mapping[str, Any]) -> bool:
    """Whether the data of a task are local JSON, to be read here."""
    options = config.get("dataset_kwargs") or {}
    flat = [file for part in files.values() for file in part]
    is_declared = config.get("dataset_path") == "json"
    return (
        bool(flat)
        and options.keys() <= _UNDERSTOOD
        and not callable(config.get("custom_dataset"))
        and all(isinstance(file, Path) and (is_declared or _is_named_json(file)) for file in flat)
    )


def _is_named_json(file: Path) -> bool:
    return any(file.name.endswith(end + packed) for end in JSON_SUFFIXES for packed in PACKED)


def read_items(files: Sequence[Path], field: str | None = None) -> list[JsonItem]:
    """The items of JSON files: a line each, or a list of them.

    Args:
        files: in the order of the items.
        field: of an object that is the whole file; it holds the items.

    Raises:
        DataError: a file is no such JSON; the message names file and line.
    """
    return [item for file in files for item in _items_of(file, field)]


def _items_of(file: Path, field: str | None) -> list[JsonItem]:
    try:
        with _OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8") as opened:
            text: str = opened.read().removeprefix("\ufeff")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(
            f"{file} must be JSON in UTF-8, plain or packed as {', '.join(_OPEN)}, and cannot be "
            f"read as that ({error}); unpack it or save it again"
        ) from error
    if field is not None or text.lstrip().startswith("["):
        value = _parsed(text, str(file))
        if field is not None:
            value = value.get(field) if isinstance(value, dict) else None
        if not isinstance(value, list):
            raise DataError(f"{file} must hold a list of items{f' under {field}' if field else ''}")
        found = [(f"{file}, item {number}", row) for number, row in enumerate(value, start=1)]
    else:
        found = [
            (place, _parsed(line, place))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip() and (place := f"{file}:{number}")
        ]
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{place} must be an object with the fields of an item")
    return [JsonItem(place, row) for place, row in found]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); correct it") from None


def read_dataset(
    files: Mapping[str, Sequence[Path | str]], field: str | None = None, /, **_options: Any
) -> Any:
    """What lm-eval takes for the data of a task (``custom_dataset``).

    Args:
        files: by split.
        field: see :func:`read_items`.
        **_options: what lm-eval gives besides, of no use here.

    Raises:
        DataError: a file is no JSON, or holds a value that cannot be kept.
    """
    import datasets

    return datasets.DatasetDict(
        {
            split: _dataset(read_items([Path(file) for file in part], field))
            for split, part in files.items()
        }
    )


def _dataset(items: Sequence[JsonItem]) -> Any:
    import datasets

    names = list(dict.fromkeys(name for item in items for name in item.row))
    columns = {name: [item.row.get(name) for item in items] for name in names}
    features = datasets.Features({name: _feature(values) for name, values in columns.items()})
    try:
        made = datasets.Dataset.from_dict(columns, features=features)
        kept = list(made)
    except Exception as error:  # of Arrow and of JSON writers, each with classes of its own
        raise DataError(f"{items[0].place.rpartition(':')[0]} cannot be kept: {error}") from error
    for item, row in zip(items, kept, strict=True):
        for name, value in item.row.items():
            if json.dumps(row[name]) != json.dumps(value):
                remedy = "write it as a text"
                if isinstance(value, str):
                    remedy = f"let {name} be a text in every item, no number, list or object"
                raise DataError(
                    f"{item.place}: the value of {name} cannot be kept as it is: {value!r} becomes "
                    f"{row[name]!r}; {remedy}"
                )
    return made


def _feature(values: Sequence[Any]) -> Any:
    """A type that keeps every value of a column as it is."""
    import datasets
    import pyarrow as pa

    try:
        array = pa.array(values)
        if json.dumps(array.to_pylist()) == json.dumps(values):
            return datasets.Features.from_arrow_schema(pa.schema([("x", array.type)]))["x"]
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        pass  # values of several kinds
    return datasets.Json()
