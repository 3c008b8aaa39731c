"""Questions in English about the demo's database, each with the SQL query that answers it.

31 kinds of query, each with seven wordings of ours. What the test asks is new in two ways: the test
alone uses two of the wordings of each kind, and no other split asks about its countries, cities,
currencies or numbers. Only the six continents, too few to divide, are shared.
"""

import random
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lrmc_ray.errors import ConfigError
from lrmc_ray.tasks.demo.countries import schema_text
from lrmc_ray.tasks.demo.question_kinds import (
    CITY_COUNTS,
    COUNTS,
    KINDS,
    MILLIONS,
    THOUSANDS,
    Kind,
    Split,
    Values,
)

Example = dict[str, Any]

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


MAX_ROWS = 60
"""Most rows of an answer. A list of 200 names is no answer that anyone would read."""


def make_examples(
    database: str | Path, *, seed: int, num_train: int, num_dev: int, num_test: int
) -> dict[Split, list[Example]]:
    """Questions and answers about ``database``, a function of the arguments alone.

    Each split has as many examples of one kind as of another, as far as there are enough. Every
    query returns at least one row, and which rows it returns, and in which order where it names
    one, follows from the data alone.

    Args:
        database: A file that :func:`lrmc_ray.tasks.demo.countries.build_database` wrote.
        seed: Decides which countries are held out and which questions are asked.
        num_train: Training examples.
        num_dev: Examples to tune settings with: new countries and numbers, wordings as in training.
        num_test: Examples with new countries, numbers and wordings.

    Returns:
        For "train", "dev" and "test" a list of examples with the keys ``id``, ``kind``,
        ``question``, ``sql`` and ``messages`` (the system's, a user's and an assistant's turn).

    Raises:
        ConfigError: A split asks for more examples than there are different ones.
    """
    wanted: dict[Split, int] = {"train": num_train, "dev": num_dev, "test": num_test}
    uri = f"{Path(database).absolute().as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        values = _divide_values(connection, seed)
        return {
            split: _draw_examples(connection, split, values[split], wanted[split], seed)
            for split in SPLITS
        }


def system_prompt() -> str:
    """What the model is told before every question.

    It stands in for the chat template's own system prompt, which would cost a fifth of all tokens.
    """
    return f"Answer in SQL.\n{schema_text()}"


def _draw_examples(
    connection: sqlite3.Connection, split: Split, values: Values, wanted: int, seed: int
) -> list[Example]:
    streams = [_questions_of_kind(connection, kind, split, values, seed) for kind in KINDS]
    examples: list[Example] = []
    while streams and len(examples) < wanted:
        for stream in list(streams):
            example = next(stream, None)
            if example is None:
                streams.remove(stream)
            elif len(examples) < wanted:
                examples.append({"id": f"{split}-{len(examples):04d}", **example})
    if len(examples) < wanted:
        raise ConfigError(
            f"num_{split} must be at most {len(examples)} for this database, got {wanted}"
        )
    random.Random(f"{seed} order {split}").shuffle(examples)
    return examples


def _questions_of_kind(
    connection: sqlite3.Connection, kind: Kind, split: Split, values: Values, seed: int
) -> Iterator[Example]:
    """All questions of one kind in random order, every filling once before any comes again."""
    wordings = kind.unseen_wordings if split == "test" else kind.wordings
    fillings = list(kind.slots(values))
    random.Random(f"{seed} {split} {kind.name}").shuffle(fillings)
    for shift in range(len(wordings)):
        for number, slots in enumerate(fillings):
            sql = kind.sql.format_map({name: _quoted(value) for name, value in slots.items()})
            if not _has_one_answer(connection, sql):
                continue
            question = wordings[(number + shift) % len(wordings)].format_map(slots)
            yield {
                "kind": kind.name,
                "question": question,
                "sql": sql,
                "messages": [
                    {"role": "system", "content": system_prompt()},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": sql},
                ],
            }


def _quoted(value: str | int) -> str:
    return str(value).replace("'", "''")


def _has_one_answer(connection: sqlite3.Connection, sql: str) -> bool:
    """Whether ``sql`` returns a short answer that depends on the data alone."""
    ranking = re.fullmatch(r"SELECT .+? FROM (.+) ORDER BY (\S+)( DESC)? LIMIT (\d+);", sql)
    if ranking:
        tables, key, direction, limit = ranking.groups(default="")
        top = connection.execute(
            f"SELECT {key} FROM {tables} ORDER BY {key}{direction} LIMIT {int(limit) + 1}"
        ).fetchall()
        # A tie would leave the order, or the last place, to chance; fewer rows than asked for
        # would make the limit pointless.
        if len(set(top)) < max(2, int(limit)) or len(set(top)) < len(top):
            return False
    rows = connection.execute(sql).fetchall()
    # Queries with a mistake often count nothing: such an answer would reward them.
    return 0 < len(rows) <= MAX_ROWS and rows not in ([(0,)], [(None,)])


def _divide_values(connection: sqlite3.Connection, seed: int) -> dict[Split, Values]:
    """Give every country, city, currency and number to one split."""

    def column(sql: str) -> list[str]:
        return [row[0] for row in connection.execute(sql)]

    countries = _divide(column("SELECT name FROM country ORDER BY name"), f"{seed} country")
    currencies = _divide(
        column("SELECT currency FROM country GROUP BY 1 HAVING COUNT(*) > 1 ORDER BY 1"),
        f"{seed} currency",
    )
    prefixes = _divide(
        column("SELECT DISTINCT substr(name, 1, 2) FROM country ORDER BY 1"), f"{seed} prefix"
    )
    urban = set(column("SELECT country FROM city GROUP BY country HAVING COUNT(*) >= 3"))
    cities = connection.execute(
        "SELECT name, country FROM city WHERE name NOT IN (SELECT capital FROM country) "
        "GROUP BY name HAVING COUNT(*) = 1 AND population >= 200000 ORDER BY name"
    ).fetchall()
    capitals = connection.execute(
        "SELECT capital, name FROM country GROUP BY capital HAVING COUNT(*) = 1 ORDER BY capital"
    ).fetchall()
    return {
        split: Values(
            countries=countries[split],
            urban_countries=[country for country in countries[split] if country in urban],
            cities=[(city, country) for city, country in cities if country in countries[split]],
            capitals=[capital for capital, country in capitals if country in countries[split]],
            currencies=currencies[split],
            prefixes=prefixes[split],
            millions=MILLIONS[split],
            thousands=THOUSANDS[split],
            counts=COUNTS[split],
            city_counts=CITY_COUNTS[split],
        )
        for split in SPLITS
    }


def _divide(values: Sequence[str], key: str) -> dict[Split, list[str]]:
    """Seven tenths for training, one for development, two for the test."""
    shuffled = list(values)
    random.Random(key).shuffle(shuffled)
    dev, test = len(shuffled) * 7 // 10, len(shuffled) * 8 // 10
    parts = {"train": shuffled[:dev], "dev": shuffled[dev:test], "test": shuffled[test:]}
    return {split: sorted(parts[split]) for split in SPLITS}
