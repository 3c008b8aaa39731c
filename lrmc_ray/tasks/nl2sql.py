"""Run generated SQL safely, and say whether it answers like the reference query.

The metric is execution accuracy: a prediction is right if its rows are those of the gold query.
A model writes whatever it likes, so every statement runs in a child process that can only read one
database (:mod:`lrmc_ray.tasks.sql_child` says how), and that is killed when it takes too long.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.tasks.child_process import ChildProcess

Cell = int | float | str | tuple[str, str] | None
"""A blob is the pair ("blob", its hex digits)."""
Row = tuple[Cell, ...]

MAX_SQL_CHARACTERS = 10_000
REL_TOLERANCE = 1e-6
ABS_TOLERANCE = 1e-9

_CHILD = Path(__file__).with_name("sql_child.py")


@dataclass(frozen=True, slots=True)
class Result:
    """What a statement returned: ``rows``, or the ``error`` that stopped it."""

    rows: tuple[Row, ...] | None = None
    error: str | None = None


class SqlRunner(ChildProcess):
    """A child process that runs statements on one database, one after the other.

    It is started on first use, and again after a statement that cost it its life. Safe to share
    between threads. Close it, or use it in a ``with`` block.

    Args:
        database: The SQLite file. Nothing ever writes to it.
        query_seconds: Time after which the child stops a statement by itself.
        wall_seconds: Time after which this process kills a child that does not answer.
        memory_bytes: Address space of the child (RLIMIT_AS).
        max_rows: A result with more rows is an error.
        max_bytes: So is one with more bytes.

    Raises:
        IncompleteArtifactError: There is no such file.
    """

    def __init__(
        self,
        database: str | os.PathLike[str],
        *,
        query_seconds: float = 2.0,
        wall_seconds: float = 10.0,
        memory_bytes: int = 512 * 2**20,
        max_rows: int = 10_000,
        max_bytes: int = 4 * 2**20,
    ) -> None:
        self.database = Path(database).resolve()
        if not self.database.is_file():
            raise IncompleteArtifactError(
                f"the database of an NL2SQL task must be a SQLite file, and {self.database} is "
                "none. Run the stage that prepares the data, or correct the path."
            )
        super().__init__(
            _CHILD, self.database, memory_bytes=memory_bytes, wall_seconds=wall_seconds
        )
        self._request = {"seconds": query_seconds, "max_rows": max_rows, "max_bytes": max_bytes}

    def execute(self, sql: str) -> Result:
        """Run one statement. Whatever it is, the answer comes within ``wall_seconds``.

        Raises:
            ResourceError: The child process cannot be started.
        """
        if len(sql) > MAX_SQL_CHARACTERS:
            return Result(error=f"longer than {MAX_SQL_CHARACTERS} characters")
        answer = self.ask({"sql": sql, **self._request})
        if "error" in answer:
            return Result(error=answer["error"])
        return Result(rows=tuple(tuple(map(_cell, row)) for row in answer["rows"]))

    def execution_match(self, predicted_sql: str, gold_sql: str) -> bool:
        """Whether the prediction returns the gold query's rows.

        Rows count as a multiset, and as a list where the gold query orders them. Columns count in
        their order, their names do not; numbers may differ by one in a million.

        Raises:
            DataError: The gold query itself fails.
        """
        gold = self.execute(gold_sql)
        if gold.rows is None:
            raise DataError(f"a gold query must run, got {gold.error!r} from: {gold_sql}")
        predicted = self.execute(predicted_sql)
        return predicted.rows is not None and rows_match(
            predicted.rows, gold.rows, ordered=orders_rows(gold_sql)
        )


@functools.cache
def runner_for(database: str) -> SqlRunner:
    """This process's runner for ``database``; its child ends with this process."""
    runner = SqlRunner(database)
    atexit.register(runner.close)
    return runner


def score(doc: Mapping[str, Any], results: Sequence[str], *, database: str) -> dict[str, float]:
    """lm-eval's ``process_results``: the metrics of one generated answer.

    Args:
        doc: A row of the test file, with the gold query under ``sql``.
        results: The generated text, as its only element.
        database: The SQLite file that the question is about.

    Returns:
        ``execution_accuracy`` (the rows are right), ``exact_match`` (the query is the gold one up
        to spacing and case) and ``valid_sql`` (it runs), each 0.0 or 1.0.
    """
    runner = runner_for(database)
    predicted, gold = extract_sql(results[0]), doc["sql"]
    return {
        "execution_accuracy": float(runner.execution_match(predicted, gold)),
        "exact_match": float(exact_match(predicted, gold)),
        "valid_sql": float(runner.execute(predicted).error is None),
    }


# One quoted piece, comment or single character of SQL. Quotes and comments may be unfinished.
_TOKEN = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'?|"(?:[^"]|"")*"?|`[^`]*`?|\[[^\]]*\]?)"""
    r"""|(?P<comment>--[^\n]*|/\*.*?(?:\*/|$))|(?P<word>\w+)|(?P<other>.)""",
    re.DOTALL,
)
_FENCE = re.compile(r"```(?:[ \t]*\w*[ \t]*\n)?(.*?)(?:```|$)", re.DOTALL)
_QUERY_START = re.compile(r"\b(?:SELECT|WITH(?:\s+RECURSIVE)?\s+\w+\s*(?:\([^)]*\)\s*)?AS)\b", re.I)


def extract_sql(text: str) -> str:
    """The first SQL statement in generated text, without its semicolon.

    Takes what a code fence holds, where there is one, and skips words before the query. Text
    without a query comes back as it is, stripped.
    """
    fence = _FENCE.search(text)
    if fence:
        text = fence.group(1)
    start = _QUERY_START.search(text)
    if start:
        text = text[start.start() :]
    end = next(
        (token.start() for token in _TOKEN.finditer(text) if token.group("other") == ";"), len(text)
    )
    return text[:end].split("\n\n")[0].strip()


def exact_match(predicted_sql: str, gold_sql: str) -> bool:
    """Whether two queries are equal up to spacing, comments, and case outside quotes."""
    return _normalized(predicted_sql) == _normalized(gold_sql)


def _normalized(sql: str) -> list[str]:
    tokens = [
        token.group() if token.group("quoted") else token.group().lower()
        for token in _TOKEN.finditer(sql)
        if not token.group("comment") and not token.group().isspace()
    ]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return tokens


def orders_rows(sql: str) -> bool:
    """Whether the query's outermost level has an ORDER BY."""
    depth = 0
    previous = ""
    for token in _TOKEN.finditer(sql):
        piece = token.group().lower()
        if token.group("comment") or piece.isspace():
            continue
        if token.group("other"):
            depth += {"(": 1, ")": -1}.get(piece, 0)
        if depth == 0 and (previous, piece) == ("order", "by"):
            return True
        previous = piece
    return False


def rows_match(predicted: Sequence[Row], gold: Sequence[Row], *, ordered: bool) -> bool:
    """Whether two results hold the same rows; in the same order if ``ordered``."""
    if len(predicted) != len(gold):
        return False
    if not ordered:
        predicted, gold = sorted(predicted, key=_sort_key), sorted(gold, key=_sort_key)
    return all(
        len(row) == len(gold_row) and all(map(_cells_match, row, gold_row))
        for row, gold_row in zip(predicted, gold, strict=True)
    )


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        return ("blob", value["blob"])
    cell: int | float | str | None = value
    return cell


def _cells_match(left: Cell, right: Cell) -> bool:
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return math.isclose(left, right, rel_tol=REL_TOLERANCE, abs_tol=ABS_TOLERANCE)
    return left == right


def _sort_key(row: Row) -> tuple[list[tuple[int, str]], list[float]]:
    """Orders rows so that equal ones meet: by the exact cells first, then by the numbers."""
    exact: list[tuple[int, str]] = []
    numbers: list[float] = []
    for position, cell in enumerate(row):
        if isinstance(cell, (int, float)):
            numbers.append(cell)
        else:
            exact.append((position, repr(cell)))
    return exact, numbers
