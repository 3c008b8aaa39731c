"""Data sets of the Hugging Face Hub: which of their files a split is, downloaded as they are.

``datasets`` says which files make a split. They are read like any other file, so that a value is
what the file says; ``datasets`` itself would turn a text that looks like a date into a date.
"""

import functools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import IncompleteArtifactError, first_line
from lrmc_ray.files.artifacts import cache_directory, fingerprint, write_json
from lrmc_ray.files.hub_calls import limit_hub_calls

_log = logging.getLogger(__name__)

HUB = "hf://"

FORM = "org/name, hf://org/name, or org/name@REVISION:SPLIT"

TIMEOUT_SECONDS = 10.0
"""For the Hub's first answer; behind it, the libraries try again by themselves."""

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class _Wanted:
    name: str
    revision: str | None
    split: str


@dataclass(frozen=True)
class _Found:
    commit: str
    files: tuple[str, ...]
    """Paths in the repository."""


def is_hub_name(name: str) -> bool:
    """Whether ``name`` may be one of the Hub, without ``hf://``."""
    return _NAME.fullmatch(name) is not None


@functools.cache
def hub_files(name: str) -> tuple[Path, ...]:
    """The files of a data set, in the cache of ``huggingface_hub``; one commit for the process.

    Where the Hub is out of reach, what was found there before is taken.

    Args:
        name: ``org/name`` or ``hf://org/name``, with ``@REVISION`` and ``:SPLIT`` behind it where
            they are not the main branch and ``train``.

    Raises:
        IncompleteArtifactError: it cannot be had.
    """
    match = _NAME.fullmatch(name.removeprefix(HUB).removeprefix("datasets/"))
    if match is None:
        raise IncompleteArtifactError(f"a data set of the Hub is written {FORM}, got {name}")
    wanted = _Wanted(match["name"], match["revision"], match["split"] or "train")
    from huggingface_hub import hf_hub_download

    limit_hub_calls()
    try:
        found = _find(wanted)
        # What is in the cache of this commit is not asked for again.
        return tuple(
            Path(hf_hub_download(wanted.name, file, repo_type="dataset", revision=found.commit))
            for file in found.files
        )
    except Exception as error:  # of the network, the Hub, and the data set's description
        raise IncompleteArtifactError(
            f"training data {name} is neither a file nor to be had from the Hugging Face Hub "
            f"({first_line(error).rstrip('.')}); check the name ({FORM}), the network and "
            "`hf auth login`, or give a file"
        ) from None


def _find(wanted: _Wanted) -> _Found:
    """The files of the split; without the Hub those of last time.

    Raises:
        ValueError: the Hub does not have them, or not for everybody.
        Exception: whatever an unreachable Hub makes the libraries raise.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    names = [wanted.name, wanted.revision, wanted.split]
    known = cache_directory() / "hub" / f"{fingerprint(names)}.json"
    try:
        # Without a network this ends at once, where the libraries try for half a minute.
        HfApi().dataset_info(wanted.name, revision=wanted.revision, timeout=TIMEOUT_SECONDS)
    except GatedRepoError:  # a kind of the next one
        raise ValueError("its terms must be accepted there first") from None
    except RepositoryNotFoundError:
        raise ValueError("there is no such data set, or it is private") from None
    except RevisionNotFoundError:
        raise ValueError(f"it has no revision {wanted.revision}") from None
    except Exception:  # of the network, or the Hub's own
        if not known.is_file():
            raise
        _log.warning("the Hugging Face Hub is out of reach; %s is as of last time", wanted.name)
        values: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return _Found(values["commit"], tuple(values["files"]))
    found = _files_of_split(wanted)
    known.parent.mkdir(parents=True, exist_ok=True)
    write_json(known, {"commit": found.commit, "files": list(found.files)})
    return found


def _files_of_split(wanted: _Wanted) -> _Found:
    """What ``datasets`` takes for the split.

    Raises:
        ValueError: there is no such split, or its files are not in the repository.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(wanted.name, revision=wanted.revision)
    splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if wanted.split not in splits:
        raise ValueError(f"it has the splits {', '.join(splits) or 'none'}, not {wanted.split}")
    place = re.compile(rf"hf://datasets/{re.escape(wanted.name)}@(?P<commit>[^/]+)/(?P<file>.+)")
    matches = [place.fullmatch(str(file)) for file in splits[wanted.split]]
    found = [match for match in matches if match is not None]
    if len(found) < len(matches):
        raise ValueError("some of its files lie outside of its repository")
    return _Found(found[0]["commit"], tuple(match["file"] for match in found))
