"""The demo's files, made once into a cache: a country database and questions about it."""

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.files.artifacts import PARTIAL
from lrmc_ray.tasks.demo.countries import build_database
from lrmc_ray.tasks.demo.questions import make_examples

VERSION = 1
"""Of the files' content: count it up with every change of the database or of the questions.

Files of another version that a cache holds are left alone.
"""

SEED = 0
NUM_TRAIN = 500
NUM_DEV = 60
NUM_TEST = 120


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's data are."""

    database: Path
    """SQLite, countries and cities."""
    train: Path
    """JSONL of ``messages``: what is learned."""
    dev: Path
    """The same for choices made during a search."""
    test: Path
    """The same with entities and paraphrases that the others do not have."""


def demo_files(cache: Path) -> DemoFiles:
    """The demo's files in ``cache``, made now unless they are there already."""
    directory = cache / f"nl2sql-v{VERSION}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".nl2sql.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.is_dir():
                _make(directory)
    return DemoFiles(
        database=directory / "countries.sqlite",
        train=directory / "train.jsonl",
        dev=directory / "dev.jsonl",
        test=directory / "test.jsonl",
    )


def _make(directory: Path) -> None:
    partial = directory.with_name(directory.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    database = partial / "countries.sqlite"
    build_database(database)
    examples = make_examples(
        database, seed=SEED, num_train=NUM_TRAIN, num_dev=NUM_DEV, num_test=NUM_TEST
    )
    for split, rows in examples.items():
        lines = [json.dumps(row, sort_keys=True) + "\n" for row in rows]
        (partial / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    partial.rename(directory)
