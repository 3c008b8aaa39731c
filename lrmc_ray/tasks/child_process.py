"""A child process that runs what models write: a line of JSON for a request, one for its answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from lrmc_ray.errors import IncompleteArtifactError, ResourceError

INSTALL = {"libpcap": "install it: apt install tcpdump, which brings it"}
"""How to get what a child says is missing."""

_START_SECONDS = 30.0


class ChildProcess:
    """A script that answers requests, one after the other.

    It is started on first use, and again after a request that cost it its life. Safe to share
    between threads. Close it, or use it in a ``with`` block.

    Args:
        script: It imports the standard library alone, and says ``{"ready": true}`` once it is.
        file: What the requests are about: the script's first argument.
        memory_bytes: Address space of the child: its second argument.
        wall_seconds: Time after which this process kills a child that does not answer.
    """

    def __init__(self, script: Path, file: Path, *, memory_bytes: int, wall_seconds: float) -> None:
        self.num_restarts = 0
        self._script = script
        self._file = file
        self._memory_bytes = memory_bytes
        self._wall_seconds = wall_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's answer, or an ``error`` where it was stopped.

        Raises:
            IncompleteArtifactError: This machine lacks what the child needs.
            ResourceError: The child process cannot be started.
        """
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            answer = self._exchange(process, line)
            if answer is None:
                self._stop()
                self.num_restarts += 1
                return {"error": "stopped: too much time or memory"}
        return answer

    def close(self) -> None:
        """End the child process. The next request would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        # -I -S: neither the environment nor site packages have a say in what the child imports.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(self._script),
                str(self._file),
                str(self._memory_bytes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"LC_ALL": "C.UTF-8"},
        )
        self._unread = b""
        answer = self._read_line(self._process, _START_SECONDS)
        if answer is None or "missing" in answer:
            self._stop()
            if answer is not None:
                raise IncompleteArtifactError(
                    f"{self._script.name} needs {answer['missing']}, which this machine does not "
                    f"have; {INSTALL[answer['missing']]}"
                )
            raise ResourceError(
                f"the process that runs answers must say so within {_START_SECONDS:.0f} seconds of "
                f"its start, and did not: {sys.executable} {self._script} {self._file}. "
                "Is the file what it should be?"
            )
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read_line(process, self._wall_seconds)

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """The next answer; None if the child dies or the time is over."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        poll = select.poll()  # unlike select.select, it takes descriptors above 1,023
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return None
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request the child did not live to read
                pipe.close()
        process.wait()
