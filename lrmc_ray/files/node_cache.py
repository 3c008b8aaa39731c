"""What a node keeps of storages: what is in use, what was used last, and what is removed.

Beside each kept directory lies a lock, ``.NAME.used``. A process that uses the directory holds it,
shared with others, until it ends; the kernel lets go of it, also after kill -9. The time of the
lock is that of the last use. Who removes a directory holds its lock alone, so nothing that is in
use goes, and whoever asks for it in that moment fetches it again.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import cache_directory

_log = logging.getLogger(__name__)

LIMIT = "LRMC_CACHE_GB"
"""The environment variable with the most that is kept, in GB."""

SHARE = 0.5
"""Of the space that is free or kept, what may be kept where ``LIMIT`` is not set."""

TRIM_SECONDS = 60.0
"""Shortest time between two looks of one process at what is kept."""

_in_use: dict[Path, IO[str]] = {}
_looked: dict[Path, float] = {}


def lock_of(directory: Path) -> Path:
    """The lock of a kept directory."""
    return directory.with_name(f".{directory.name}.used")


def use(directory: Path) -> None:
    """Keep ``directory``, which need not be there yet, for as long as this process lives."""
    lock = lock_of(directory)
    if directory not in _in_use:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_SH)
        _in_use[directory] = file
    os.utime(lock)


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[bool]:
    """Whether no process uses ``directory``; none can begin to while the context lasts."""
    try:
        file = lock_of(directory).open("rb")
    except FileNotFoundError:  # it is no directory that a node keeps
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def size_of(directory: Path) -> int:
    """Bytes of the files below ``directory``; what vanishes meanwhile is not counted."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total


def limit_bytes(cache: Path, kept: int) -> float:
    """Most bytes that are kept.

    Args:
        cache: where they are.
        kept: bytes that are kept now.

    Raises:
        ConfigError: the environment says something that is no size.
    """
    chosen = os.environ.get(LIMIT)
    if chosen is None:
        return SHARE * (shutil.disk_usage(cache).free + kept)
    try:
        limit = float(chosen) * 1e9
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ConfigError(f"{LIMIT} must be a number of GB, 0 or more, got {chosen!r}")
    return limit


def trim(cache: Path | None = None, *, at_once: bool = False) -> list[Path]:
    """Remove what was used the longest ago until the rest is within the limit.

    Args:
        cache: holds a folder for each storage; by default this node's.
        at_once: also if this process has looked just now.

    Returns:
        The directories that were removed. What a process uses stays, whatever the limit.
    """
    cache = cache_directory().resolve() / "storage" if cache is None else cache
    now = time.monotonic()
    if not at_once and now - _looked.get(cache, -TRIM_SECONDS) < TRIM_SECONDS:
        return []
    _looked[cache] = now
    found = []
    for lock in cache.rglob(".*.used"):
        directory = lock.with_name(lock.name[1:].removesuffix(".used"))
        if directory.is_dir():
            found.append((lock.stat().st_mtime_ns, directory, size_of(directory)))
    kept = sum(size for _, _, size in found)
    limit = limit_bytes(cache, kept) if found else 0.0
    removed = []
    for _, directory, size in sorted(found):
        if kept <= limit:
            break
        with unused(directory) as is_free:
            if not is_free:
                continue
            # A directory loses its name first, so that a kill leaves none that looks whole.
            doomed = directory.with_name(f".{directory.name}.trimmed")
            shutil.rmtree(doomed, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                directory.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        kept -= size
        removed.append(directory)
        _log.info("%s was removed to make room; it is fetched again when it is needed", directory)
    return removed
