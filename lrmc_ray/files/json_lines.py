"""An append-only file of JSON lines, whose every line is whole or not there."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JsonLines:
    """The one writer of such a file; a context manager.

    Every line is written by one system call, so a reader, or a ``kill -9``, never sees half a line
    except where the power fails. Such a torn end is cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path``, made with its directory where it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._file.truncate(len(whole_lines(path.read_bytes())))

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            OSError: the disk is full; the file then ends with the line before.
        """
        content = json.dumps(fields).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(before)
            # A failed write does not say where.
            error.filename = str(self._path)
            raise

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def whole_lines(content: bytes) -> bytes:
    """``content`` without a torn last line."""
    return content[: content.rfind(b"\n") + 1]
