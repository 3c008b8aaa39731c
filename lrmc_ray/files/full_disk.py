"""Was it a disk that is full, or cannot be written, that made a run fail?

Such a run is not at fault: it goes on where it stopped once there is space.
"""

import errno
import os
from pathlib import Path

from lrmc_ray.errors import DiskError

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

PROBE_BYTES = 1 << 18
"""Less than this is no space to go on with."""


def full_disk(directory: Path, cause: str = "") -> DiskError | None:
    """The error that ends a command whose run failed for want of space; None if there is space.

    Args:
        directory: of the run.
        cause: what the run said of its failure.
    """
    for number in ERRORS:
        if os.strerror(number) in cause:
            return _error(directory, os.strerror(number))
    probe = directory / ".probe"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(os.urandom(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        if error.errno in ERRORS:
            return _error(directory, os.strerror(error.errno))
    finally:
        _remove(probe)
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the disk is read-only, so it is not there
        return


def _error(directory: Path, what: str) -> DiskError:
    return DiskError(
        f"writing into {directory} failed: {what}; free space there, then run the same "
        "command again"
    )
