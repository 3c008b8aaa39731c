"""Exact set match by worked examples, the builder on a wheel, and the task on a model."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.tasks import spider
from lrmc_ray.tasks.built import spider_file
from lrmc_ray.tasks.spider import exact_set_match, schema_of

ROOT = Path(__file__).parents[2]
PROMPT = """Answer the following question with syntactically correct SQLite SQL.
Use only the following tables and columns:
Table: Singer. Columns: Singer_ID (number), Name (text), Country (text), Song release year (text), \
Age (number)
Table: concert. Columns: concert_ID (number), Theme (text), Singer_ID (number)

Question: How many singers do we have?"""
SCHEMA = schema_of(PROMPT)
GOLD = (
    "SELECT T1.Name, count(*) FROM singer AS T1 JOIN concert AS T2 ON T1.Singer_ID = T2.Singer_ID "
    "WHERE T1.Age > 20 AND T1.Country = 'France' GROUP BY T1.Name HAVING count(*) >= 2 "
    "ORDER BY T1.Age DESC, T1.Name LIMIT 3"
)


def test_the_schema_is_read_from_the_prompt():
    assert SCHEMA == {
        "singer": {"singer_id": "number", "name": "text", "country": "text",
                   "song release year": "text", "age": "number"},
        "concert": {"concert_id": "number", "theme": "text", "singer_id": "number"},
    }  # fmt: skip


def changed(old, new):
    assert old in GOLD
    return GOLD.replace(old, new)


SAME = [
    GOLD,
    GOLD.lower().replace("'france'", "'France'"),
    changed("T1.Name, count(*) FROM", "count(*), T1.Name FROM"),
    changed("'France'", '"France"'),
    changed("T1.Age > 20 AND T1.Country = 'France'", "(20 < T1.Age) AND 'France' = T1.Country"),
    changed("T1.Singer_ID = T2.Singer_ID", "T2.Singer_ID = T1.Singer_ID"),
    GOLD.replace("T1", "a").replace("T2", "other"),
    changed("singer AS T1 JOIN concert AS T2", "concert AS T2 JOIN singer AS T1"),
    changed("T1.Age DESC, T1.Name", "Age DESC, T1.Name"),
    changed("SELECT T1.Name, count(*)", "SELECT T1.Name AS who, COUNT(*) AS times"),
]
OTHER = [
    changed("T1.Age > 20", "T1.Age > 21"),
    changed("T1.Age > 20", "T1.Age >= 20"),
    changed("T1.Age > 20", "20 > T1.Age"),
    changed("AND", "OR"),
    changed("'France'", "'Spain'"),
    changed("'France'", "'france'"),
    changed("T1.Name, count(*)", "T1.Name"),
    changed("SELECT", "SELECT DISTINCT"),
    changed("JOIN", "LEFT JOIN"),
    changed("GROUP BY T1.Name", "GROUP BY T1.Country"),
    changed("HAVING count(*) >= 2 ", ""),
    changed("T1.Age DESC, T1.Name", "T1.Name, T1.Age DESC"),
    changed("DESC", "ASC"),
    changed("LIMIT 3", "LIMIT 4"),
    changed(" LIMIT 3", ""),
    changed("concert AS T2", "singer AS T2"),
    "",
    "no query",
    "DELETE FROM singer",
    "SELECT",
    "SELECT name FROM singer; SELECT 1",
    "(" * 3000,
]


@pytest.mark.parametrize("sql", SAME)
def test_the_same_clauses_match(sql):
    assert exact_set_match(sql, GOLD, SCHEMA)
    assert exact_set_match(GOLD, sql, SCHEMA)


@pytest.mark.parametrize("sql", OTHER)
def test_other_clauses_do_not_match(sql):
    assert not exact_set_match(sql, GOLD, SCHEMA)


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ("SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM concert)",
         "SELECT T.name FROM singer T WHERE T.singer_id NOT IN (SELECT c.singer_id FROM concert c)",
         True),
        ("SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM concert)",
         "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM concert)", False),
        ("SELECT name FROM singer UNION SELECT theme FROM concert",
         "SELECT theme FROM concert UNION SELECT name FROM singer", True),
        ("SELECT name FROM singer EXCEPT SELECT theme FROM concert",
         "SELECT theme FROM concert EXCEPT SELECT name FROM singer", False),
        ("SELECT name FROM singer UNION ALL SELECT theme FROM concert",
         "SELECT name FROM singer UNION SELECT theme FROM concert", False),
        ("SELECT count(*) FROM singer", "SELECT COUNT ( * ) FROM singer", True),
        ("SELECT count(age) FROM singer", "SELECT count(*) FROM singer", False),
        ("SELECT count(DISTINCT age) FROM singer", "SELECT count(age) FROM singer", False),
        ("SELECT max(age) FROM singer", "SELECT min(age) FROM singer", False),
        ("SELECT a.name FROM singer a JOIN singer b ON a.age = b.singer_id",
         "SELECT b.name FROM singer a JOIN singer b ON a.age = b.singer_id", False),
        ("SELECT name FROM singer WHERE age BETWEEN 2 AND 3.0",
         "SELECT name FROM singer WHERE age BETWEEN 2.0 AND 3", True),
        ("SELECT name FROM singer WHERE name LIKE '%a%'",
         "SELECT name FROM singer WHERE name LIKE '%b%'", False),
        ("SELECT name FROM concert", "SELECT name FROM singer", False),
        ("SELECT avg(x) FROM (SELECT count(*) AS x FROM singer GROUP BY country)",
         "SELECT avg(x) FROM (SELECT count(*) AS x FROM singer GROUP BY name)", False),
    ],
)  # fmt: skip
def test_pairs(predicted, gold, same):
    assert exact_set_match(predicted, gold, SCHEMA) is same


def test_a_gold_query_that_cannot_be_read_is_an_error():
    with pytest.raises(DataError, match="a gold query must be SQLite's SQL, got SELECT FROM"):
        exact_set_match("SELECT 1", "SELECT FROM WHERE", SCHEMA)


def test_an_answer_is_found_in_what_was_written():
    doc = {"question": PROMPT, "sql": "SELECT count(*) FROM singer"}
    written = "Sure:\n```sql\nSELECT COUNT(*) FROM Singer;\n```"
    assert spider.score(doc, [written]) == {"exact_set_match": 1.0}
    assert spider.score(doc, ["I cannot say"]) == {"exact_set_match": 0.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    wheel = cache / "evals-3.0.1.post1-py3-none-any.whl"
    rows = [
        {"ideal": f"SELECT name FROM singer WHERE age > {age} ;",
         "input": [{"role": "system", "content": f"{PROMPT}\n"}]}
        for age in range(5)
    ]  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "evals/registry/data/sql/spider_sql.jsonl", "".join(json.dumps(r) + "\n" for r in rows)
        )
    subprocess.run(
        [sys.executable, ROOT / "scripts/build_spider.py", wheel, "--output", spider_file(cache)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cache


def request():
    return ScoreRequest(
        tasks=(("nl2sql_spider", "domain"),), batch_tokens=512, precision="fp32", limit=None,
        split="test", drift_samples={"domain": 2, "general": 2},
    )  # fmt: skip


def test_the_task_scores_generated_and_gold_queries(built, tiny_model, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(built))
    scores = Scores.from_rows(score(tiny_model, request()).rows)
    assert {metric for _, metric in scores.metrics} == {"accuracy", "gold_probability", "score"}
    accuracy = scores.metric("nl2sql_spider", "accuracy")
    assert accuracy.item_ids == tuple(f"spider-{number:03}" for number in range(5))
    assert list(accuracy.values) == [0.0] * 5  # random weights write no SQL


def test_questions_that_were_not_built_are_missing_input(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    with pytest.raises(IncompleteArtifactError, match="pip download --no-deps evals"):
        score(tiny_model, request())


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing", "")
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/build_spider.py", wheel, "--output", tmp_path / "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 3
    assert "must be the wheel of evals 3.0.1.post1" in result.stderr
