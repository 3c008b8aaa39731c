"""The domain ``ct``, communication technology: where its questions are once they are built."""

from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import CT
from lrmc_ray.errors import IncompleteArtifactError

BUILD = "python scripts/build_ct.py"


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
                f"the questions of the domain ct are not in {directory}; build them with `{BUILD}`"
            )
    return files
