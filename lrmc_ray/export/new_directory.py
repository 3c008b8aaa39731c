"""A directory that appears whole under its name, or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lrmc_ray.errors import ConfigError, DiskError
from lrmc_ray.files.artifacts import PARTIAL
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.sizes import size_text


def check_target(target: Path) -> None:
    """Refuse a directory that is not free, before anything is done for it.

    Raises:
        ConfigError: there is something already.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        what = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"--to must be a new or empty directory, {target} {what}; name another")


def check_space(target: Path, size_bytes: int) -> None:
    """Refuse to begin where there is no room.

    Raises:
        DiskError: names what is needed and what is free.
    """
    there = target.absolute().parent
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size_bytes:
        raise DiskError(
            f"{target} takes {size_text(size_bytes)}, and {size_text(free)} are free there; free "
            "space, or choose another --to"
        )


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside ``target``, which gets that name when the block has ended well.

    What a killed command left there is removed. Its own is removed if the block fails.

    Raises:
        ConfigError: there is something at ``target``.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    partial.mkdir()  # with the permissions that the umask leaves
    with _held(partial) as is_held:
        assert is_held, "nobody else knows it"
        try:
            yield partial
            check_target(target)
            _write_through(partial)
            passed("export.written")
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    passed("export.published")


def remove_leftovers(target: Path) -> None:
    """Remove what killed commands have left beside ``target``; those that run keep theirs."""
    for left in target.parent.glob(f".{target.name}.*{PARTIAL}"):
        with _held(left) as is_held:
            if is_held:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Hold a directory; false if another process does. The kernel lets go when this one dies."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _write_through(directory: Path) -> None:
    """See that everything is on the disk before it has its name."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
