import re
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from lrmc_ray.errors import ConfigError
from lrmc_ray.tasks.demo.countries import build_database, schema_text
from lrmc_ray.tasks.demo.question_kinds import KINDS
from lrmc_ray.tasks.demo.questions import make_examples

SIZES = {"num_train": 620, "num_dev": 62, "num_test": 186}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "countries.sqlite"
    build_database(path)
    return path


@pytest.fixture(scope="module")
def examples(database):
    return make_examples(database, seed=0, **SIZES)


@pytest.fixture(scope="module")
def connection(database):
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        yield connection


def everything(examples):
    return [example for split in ("train", "dev", "test") for example in examples[split]]


def test_sizes_kinds_and_ids(examples):
    assert {split: len(rows) for split, rows in examples.items()} == {
        "train": 620, "dev": 62, "test": 186,
    }  # fmt: skip
    for split, each in (("train", 20), ("dev", 2), ("test", 6)):
        assert set(Counter(row["kind"] for row in examples[split]).values()) == {each}
    assert len({row["kind"] for row in examples["train"]}) == 31
    assert len({row["id"] for row in everything(examples)}) == 868
    assert len({row["question"] for row in everything(examples)}) == 868


def test_every_gold_query_returns_the_same_rows_however_the_tables_are_read(examples, connection):
    queries = [row["sql"] for row in everything(examples)]
    forward = [connection.execute(sql).fetchall() for sql in queries]
    connection.execute("PRAGMA reverse_unordered_selects = ON")
    backward = [connection.execute(sql).fetchall() for sql in queries]
    connection.execute("PRAGMA reverse_unordered_selects = OFF")
    for sql, rows, other_rows in zip(queries, forward, backward, strict=True):
        assert 1 <= len(rows) <= 60, sql
        assert rows not in ([(0,)], [(None,)]), sql
        if "ORDER BY" in sql:
            assert rows == other_rows, sql
        else:
            assert Counter(rows) == Counter(other_rows), sql


def test_no_ranking_has_a_tie_at_its_end(examples, connection):
    rankings = 0
    for sql in {row["sql"] for row in everything(examples)}:
        found = re.search(r"ORDER BY (\S+)( DESC)? LIMIT (\d+);", sql)
        if found:
            rankings += 1
            tables = sql[sql.index(" FROM ") : found.start()]
            keys = [key for (key,) in connection.execute(f"SELECT {found[1]}{tables}")]
            keys.sort(reverse=bool(found[2]))
            limit = int(found[3])
            assert len(keys) >= max(2, limit)
            assert len(set(keys[: limit + 1])) == len(keys[: limit + 1]), sql
    assert rankings > 100


def test_the_test_split_asks_about_nothing_that_was_seen(examples, connection):
    entities = {
        "country": {name for (name,) in connection.execute("SELECT name FROM country")},
        "city": {name for (name,) in connection.execute("SELECT name FROM city")},
        "capital": {name for (name,) in connection.execute("SELECT capital FROM country")},
        "currency": {name for (name,) in connection.execute("SELECT currency FROM country")},
    }
    continents = {name for (name,) in connection.execute("SELECT name FROM continent")}
    named = set.union(*entities.values()) - continents
    used = {
        split: {
            text.replace("''", "'")
            for row in rows
            for text in re.findall(r"'((?:[^']|'')*)'", row["sql"])
            if text.replace("''", "'") in named
        }
        for split, rows in examples.items()
    }
    assert min(map(len, used.values())) > 20
    assert not used["test"] & used["train"]
    assert not used["test"] & used["dev"]
    assert not used["dev"] & used["train"]
    numbers = {
        split: {text for row in rows for text in re.findall(r"(?:[>=] |LIMIT |AND )(\d+)\b(?!\.)",
                                                             row["sql"]) if text != "1"}
        for split, rows in examples.items()
    }  # fmt: skip
    assert len(numbers["test"]) > 8
    assert not numbers["test"] & (numbers["train"] | numbers["dev"])


def test_the_test_split_words_nothing_as_it_was_seen(examples):
    def wording(row):
        """The question without its names and numbers."""
        slots = sorted(
            re.findall(r"'((?:[^']|'')*)'|(\d[\d,]*)", row["sql"]), key=str, reverse=True
        )
        text = row["question"]
        for quoted, _ in slots:
            for name in (quoted.replace("''", "'"), quoted.rstrip("%")):
                text = text.replace(name, "_") if name else text
        return row["kind"], re.sub(r"\d[\d,]*", "#", text)

    seen = {wording(row) for row in examples["train"] + examples["dev"]}
    asked = {wording(row) for row in examples["test"]}
    assert not seen & asked
    by_kind = Counter(kind for kind, _ in seen)
    assert min(by_kind.values()) >= 5


def test_no_wording_is_in_both_lists_and_none_repeats():
    texts = [text for kind in KINDS for text in kind.wordings + kind.unseen_wordings]
    pairs = [(kind.name, text) for kind in KINDS
             for text in kind.wordings + kind.unseen_wordings]  # fmt: skip
    assert len(pairs) == len(set(pairs)) == 31 * 7
    assert all(text[0].isupper() or text.startswith("{") for text in texts)
    assert all(text.endswith(("?", ".")) for text in texts)


def test_messages_hold_the_tables_the_question_and_the_query(examples):
    for row in examples["dev"]:
        system, user, assistant = row["messages"]
        assert system == {"role": "system", "content": f"Answer in SQL.\n{schema_text()}"}
        assert user == {"role": "user", "content": row["question"]}
        assert assistant == {"role": "assistant", "content": row["sql"]}


@pytest.mark.parametrize(
    ("kind", "slots", "answer"),
    [
        ("capital_of_country", {"country": "Japan"}, [("Tokyo",)]),
        ("currency_of_country", {"country": "India"}, [("Rupee",)]),
        ("country_of_capital", {"capital": "Lima"}, [("Peru",)]),
        ("country_of_city", {"city": "Marseille"}, [("France",)]),
        ("largest_city", {"country": "Egypt"}, [("Cairo",)]),
        ("northernmost_city", {"country": "Norway"}, [("Trondheim",)]),
        ("westernmost_city", {"country": "Portugal"}, [("Funchal",)]),
        ("neighbours", {"country": "Portugal"}, [("Spain",)]),
        ("number_of_neighbours", {"country": "Germany"}, [(9,)]),
        ("capitals_of_neighbours", {"country": "Portugal"}, [("Madrid",)]),
        ("currency_in_city", {"city": "Osaka"}, [("Yen",)]),
        ("number_of_large_countries", {"continent": "Asia", "million": 1000}, [(2,)]),
        ("wide_countries", {"continent": "South America", "thousand": 5000}, [("Brazil",)]),
        ("more_people_than", {"country": "India"}, [(1,)]),
        ("countries_starting_with", {"prefix": "Ja"}, [("Jamaica",), ("Japan",)]),
    ],
)
def test_gold_queries_are_true(connection, kind, slots, answer):
    sql = next(k.sql for k in KINDS if k.name == kind)
    assert sorted(connection.execute(sql.format(**slots)).fetchall()) == answer


def test_the_seed_alone_decides(database, examples):
    assert make_examples(database, seed=0, **SIZES) == examples
    other = make_examples(database, seed=1, **SIZES)
    assert other["test"] != examples["test"]
    # Asking for more of one split changes no other split.
    more = make_examples(database, seed=0, num_train=700, num_dev=62, num_test=186)
    assert more["test"] == examples["test"]


def test_too_many_examples_are_refused_with_the_number_there_is(database):
    with pytest.raises(ConfigError, match=r"num_dev must be at most \d{3,5} .* got 100000"):
        make_examples(database, seed=0, num_train=1, num_dev=100_000, num_test=1)
