"""The process that runs untrusted SQL: a request per line on stdin, an answer per line on stdout.

:class:`lrmc_ray.tasks.nl2sql.SqlRunner` starts it by path, isolated from site packages, so it may
import the standard library alone. What keeps a statement from doing harm, from the inside out:

1. an authorizer that knows SELECT and reading this database's tables, and functions by name;
2. limits of SQLite on lengths, depths and memory, and a deadline checked every 1,000 operations;
3. limits of the kernel on memory, processor time and file size (no file can grow at all);
4. the parent, which kills this process when an answer does not come in time.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
import time
from typing import Any
from urllib.parse import quote

# What is not named here is refused; so are, among others, load_extension, readfile, writefile,
# edit, fts3_tokenizer, zeroblob, randomblob, random, printf and format, whatever SQLite offers.
_FUNCTION_NAMES = """
    abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling char char_length coalesce concat
    concat_ws cos cosh count cume_dist current_date current_time current_timestamp date datetime
    degrees dense_rank exp first_value floor glob group_concat hex if ifnull iif instr julianday
    lag last_value lead length like ln log log10 log2 lower ltrim max min mod nth_value ntile
    nullif octet_length percent_rank pi pow power quote radians rank replace round row_number rtrim
    sign sin sinh sqrt strftime string_agg substr substring subtype sum tan tanh time timediff total
    trim trunc typeof unicode unixepoch upper
"""
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of one value or row
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
HEAP_BYTES = 128 * 2**20
OPERATIONS_PER_CHECK = 1_000


def restrict_process(memory_bytes: int) -> None:
    """Let the kernel hold this process to its memory and keep it from growing files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu_seconds(seconds: int) -> None:
    """Let the kernel kill this process ``seconds`` of processor time from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def open_database(path: str) -> sqlite3.Connection:
    """Open ``path`` so that SQL can read its tables and do nothing else."""
    connection = sqlite3.connect(
        f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None
    )
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")  # no temporary file for a large sort
    connection.execute("PRAGMA trusted_schema = OFF")
    tables = {
        name.lower()
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')"
        )
    }
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)

    def authorize(
        action: int, first: str | None, second: str | None, schema: str | None, _source: str | None
    ) -> int:
        match action:
            case sqlite3.SQLITE_SELECT | sqlite3.SQLITE_RECURSIVE:
                allowed = True
            case sqlite3.SQLITE_READ:
                # No schema: rows of a WITH clause or a subquery, which are checked by themselves.
                allowed = schema is None or str(first).lower() in tables
            case sqlite3.SQLITE_FUNCTION:
                allowed = str(second).lower() in FUNCTIONS
            case _:
                allowed = False
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    return connection


def run(
    connection: sqlite3.Connection, sql: str, *, seconds: float, max_rows: int, max_bytes: int
) -> dict[str, Any]:
    """Run one statement: ``{"rows": [[...], ...]}`` or ``{"error": "..."}``.

    A blob is ``{"blob": "<hex digits>"}``, so that it differs from every text.
    """
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, OPERATIONS_PER_CHECK)
    rows: list[list[Any]] = []
    num_bytes = 0
    try:
        cursor = connection.execute(sql)
        if cursor.description is None:
            return {"error": "not a query: it returns no columns"}
        for row in cursor:
            num_bytes += sum(len(cell) if isinstance(cell, (str, bytes)) else 8 for cell in row)
            if len(rows) == max_rows or num_bytes > max_bytes:
                cursor.close()
                return {"error": f"more than {max_rows} rows or {max_bytes} bytes"}
            rows.append([{"blob": cell.hex()} if isinstance(cell, bytes) else cell for cell in row])
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except MemoryError:
        return {"error": "MemoryError: out of memory"}
    return {"rows": rows}


def main(database: str, memory_bytes: str) -> None:
    """Answer requests until stdin closes."""
    connection = open_database(database)
    restrict_process(int(memory_bytes))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        allow_cpu_seconds(int(request["seconds"]) + 1)
        print(json.dumps(run(connection, **request)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
