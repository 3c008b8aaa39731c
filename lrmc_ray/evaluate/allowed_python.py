"""Python that task files name runs where the user of this machine has asked for it.

A task that a command names is asked for. A model or a study may come from anybody: the Python of a
task that only these name runs where the same task has been asked for before. What was asked for is
kept in the user's cache, by the content of all its files, so that no name or place can forge it.
"""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from lrmc_ray.errors import ConfigError
from lrmc_ray.evaluate.task_sources import named_functions, task_sources
from lrmc_ray.files.artifacts import cache_directory, content_digest

_FOLDER = "allowed_python"
"""Holds an empty file for each task that was asked for."""


def allow_python(names: Iterable[str]) -> None:
    """Note that the user asks for these tasks; one that names no Python needs no note.

    Args:
        names: of tasks; those that are no files are not the user's own.

    Raises:
        ConfigError: a task file cannot be read.
    """
    for name in _with_python(names):
        with contextlib.suppress(OSError):  # the next command is told to name the task, too
            _note(name).parent.mkdir(parents=True, exist_ok=True)
            _note(name).touch()


def check_allowed(names: Iterable[str], *, named_by: Path, remedy: str) -> None:
    """Refuse tasks whose Python nobody at this machine has asked for.

    Args:
        names: of tasks.
        named_by: the file that names them.
        remedy: how to ask for them.

    Raises:
        ConfigError: one names Python, and was not asked for.
    """
    for name in _with_python(names):
        if not _note(name).is_file():
            raise ConfigError(
                f"Python must be run at your own wish, and {name}, which runs some, is named by "
                f"{named_by} alone; look at it, and {remedy}"
            )


def _with_python(names: Iterable[str]) -> list[str]:
    return [name for name in names if Path(name).is_file() and named_functions(Path(name))]


def _note(name: str) -> Path:
    digests = sorted(content_digest(path) for path in task_sources(Path(name)).values())
    return cache_directory() / _FOLDER / hashlib.sha256("\n".join(digests).encode()).hexdigest()
