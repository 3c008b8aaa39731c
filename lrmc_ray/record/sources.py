"""Which files a list of names stands for: files, folders, glob patterns, each with its domain."""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import CT, DEMO, ENGLISH, RunSettings
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.tasks.built import ct_files
from lrmc_ray.tasks.demo.english import english_file
from lrmc_ray.tasks.demo.files import demo_files

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
"""What is read of a folder."""

_LABELLED = re.compile(r"(?P<domain>[\w.+-]{1,64})=(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One file of examples."""

    path: Path
    domain: str = ""
    """Domain of the rows that do not name their own."""


def split_domain(name: str) -> tuple[str, str]:
    """``sql=train.jsonl`` as domain and name; a name without a label has the domain ``""``."""
    match = _LABELLED.fullmatch(name)
    if match is None or Path(name).exists():
        return "", name
    return match["domain"], match["name"]


def find_sources(names: Iterable[str]) -> list[Source]:
    """The files that ``names`` stand for, each once, in the order of the names.

    A name is a file, a folder (its JSONL and Parquet files, those of subfolders included, hidden
    ones left out) or a glob pattern (``**`` for any depth); ``DOMAIN=`` before it labels the rows.

    Raises:
        IncompleteArtifactError: a name stands for no file.
        ConfigError: a file is named under two domains.
    """
    found: dict[Path, Source] = {}
    for labelled in names:
        domain, name = split_domain(labelled)
        for path in _files_of(name):
            source = Source(path, domain)
            earlier = found.setdefault(path.resolve(), source)
            if earlier.domain != domain:
                raise ConfigError(
                    f"data.train must give a file one domain, {path} has {earlier.domain!r} and "
                    f"{domain!r}; name it once"
                )
    return list(found.values())


def _files_of(name: str) -> list[Path]:
    if not name:
        raise IncompleteArtifactError("training data '' is no name; give a file, folder or pattern")
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise IncompleteArtifactError(
                f"training data {name} is a folder without {', '.join(SUFFIXES)} files; give one "
                "that has some"
            )
        return files
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        is_pattern = glob.has_magic(name)
        raise IncompleteArtifactError(
            f"training data {name} "
            + ("matches no file" if is_pattern else "does not exist")
            + "; give existing JSONL or Parquet files, folders or patterns"
        )
    return files


def training_sources(settings: RunSettings) -> list[Source]:
    """The files that ``data.train`` names, the demo's made where they are asked for.

    Raises:
        IncompleteArtifactError: a name stands for no file.
        ConfigError: a file is named under two domains.
    """
    names = []
    for labelled in settings.data.train:
        domain, name = split_domain(labelled)
        if name == DEMO:
            name = str(demo_files(cache_directory()).train)
        elif name == CT and not Path(CT).exists():
            name = str(ct_files(cache_directory()).train)
        elif name == ENGLISH and not Path(ENGLISH).exists():
            name = str(english_file(cache_directory()))
        names.append(f"{domain}={name}" if domain else name)
    return find_sources(names)


def training_files(settings: RunSettings) -> list[Path]:
    """The paths of :func:`training_sources`."""
    return [source.path for source in training_sources(settings)]
