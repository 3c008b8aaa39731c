"""What every command shares: how it ends, where it logs, how it shows progress.

rich is imported when a live bar is drawn, not before, so that ``lrmc --help`` answers at once.
Results go to stdout; everything here goes to stderr.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from lrmc_ray.errors import DiskError, LrmcError

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0
"""Shortest time between two progress lines where there is no terminal."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_DISK_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space or raise the quota",
    errno.EROFS: "choose a writable directory",
    errno.EACCES: "give this user permission or choose another path",
    errno.ENOTDIR: "choose a directory, not a file",
    errno.EEXIST: "choose a directory, not a file",
}


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and turn the way it ends into an exit code and at most one line.

    SIGTERM and SIGHUP become exceptions, so that ``finally`` blocks run.

    Args:
        main: takes the arguments after the program's name, returns its exit code.
        argv: default ``sys.argv[1:]``.

    Returns:
        The code of ``main``; an ``LrmcError``'s own; 7 for a full, read-only or forbidden disk;
        130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP; 141 if stdout was closed by its
        reader (``lrmc ... | head``); 1, with a traceback, for anything else.
    """
    previous = {}
    for number in _SIGNALS:
        # nohup ignores SIGHUP on purpose.
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, _raise_exit)
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except SystemExit as end:
        return _exit_code(end)
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on where it stopped")
        return 130
    except Exception as error:
        return _report(error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _exit_code(end: SystemExit) -> int:
    code = end.code
    if code is None:
        return 0
    if not isinstance(code, int):
        _say(str(code))
        return 1
    # Ray's driver replaces our SIGTERM handler by one that exits with the signal's number.
    if code == signal.SIGTERM:
        code = 128 + signal.SIGTERM
    if code in {128 + number for number in _SIGNALS}:
        name = signal.Signals(code - 128).name
        _say(f"stopped by {name}; run the same command again to go on where it stopped")
    return code


def _report(error: Exception) -> int:
    # Ray raises a subclass of the task's error whose text is the remote traceback.
    cause = getattr(error, "cause", None)
    plain = cause if isinstance(cause, Exception) else error
    if isinstance(plain, LrmcError):
        _say(f"error: {plain}")
        return plain.exit_code
    if isinstance(plain, OSError) and plain.errno in _DISK_REMEDIES:
        path = plain.filename if plain.filename is not None else "an output file"
        _say(
            f"error: reading or writing {path} failed: {plain.strerror}; "
            f"{_DISK_REMEDIES[plain.errno]}, then run the same command again"
        )
        return DiskError.exit_code
    if (number := _told_of_disk(error)) is not None:
        _say(
            f"error: writing an output file failed: {os.strerror(number)}; "
            f"{_DISK_REMEDIES[number]}, then run the same command again"
        )
        return DiskError.exit_code
    if isinstance(plain, BrokenPipeError) and _drop_closed_stdout():
        return 128 + signal.SIGPIPE
    with contextlib.suppress(BrokenPipeError):
        traceback.print_exception(error)
    return 1


def _told_of_disk(error: BaseException) -> int | None:
    """The number of a disk's error that another process met, or a library that wraps it."""
    told = ""
    inner: BaseException | None = error
    while inner is not None and len(told) < 100_000:
        told += f"{inner} {getattr(inner, 'cause', '')}"
        inner = inner.__cause__ or inner.__context__
    if "database or disk is full" in told:  # SQLite's words
        return errno.ENOSPC
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return next((number for number in numbers if os.strerror(number) in told), None)


def _drop_closed_stdout() -> bool:
    """Whether nobody reads stdout any more; what is left in its buffer is then dropped."""
    poll = select.poll()
    poll.register(1, 0)
    if not poll.poll(0):
        return False
    # The interpreter flushes once more at exit and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        # Ray colours the tracebacks of its tasks.
        print(harmless(_COLOURS.sub("", line)), file=sys.stderr, flush=True)


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """``text`` without the control characters by which it could act on the terminal.

    Data, models and file names may hold any. Line breaks and tabs stay.
    """
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def public(text: str) -> str:
    """``text`` without the user, the password and the token of any address in it."""
    text = re.sub(r"(?<=://)[^/\s]+@", "***@", text)
    return re.sub(r"(?i)\b(password|passwd|pwd|token|secret)=[^&\s]+", r"\1=***", text)


def plain_console(
    *, highlight: bool = False, stderr: bool = False, width: int | None = None
) -> "Console":
    """A console of rich that shows texts as they are: brackets and colons in them do nothing.

    Args:
        highlight: colour numbers and paths.
        stderr: write there.
        width: in characters; by default the terminal's.
    """
    from rich.console import Console

    return Console(highlight=highlight, stderr=stderr, width=width, markup=False, emoji=False)


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment: a live bar replaces it to keep its place."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record))


_quiet = False


def is_quiet() -> bool:
    """Whether only warnings, errors and results are wanted."""
    return _quiet


def setup_logging(verbose: bool = False, *, quiet: bool = False) -> None:
    """Log to stderr: our own messages from INFO (``verbose``: DEBUG), others' from WARNING.

    With ``quiet`` nothing below a warning is said, and no progress is shown.
    """
    global _quiet
    _quiet = quiet
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("lrmc_ray", "__main__"):  # the latter is ours under `python -m`
        own = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        logging.getLogger(name).setLevel(own)


class ProgressBar(Protocol):
    """What :func:`progress` hands out."""

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Add ``count`` finished units; a ``note`` replaces the one before."""


class _Silent:
    """No progress."""

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Nothing."""


@contextlib.contextmanager
def progress(
    title: str, *, total: int | None = None, unit: str = "items", completed: int = 0
) -> Iterator[ProgressBar]:
    """Show progress on stderr: a live bar on a terminal, else a line now and then.

    Args:
        title: what is being done, for example ``"Recording"``.
        total: units in all; none if unknown.
        unit: what is counted, in the plural.
        completed: units that an earlier run finished; they do not count towards the speed.
    """
    if _quiet:
        yield _Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        with _live_bar(title, total, unit, completed) as bar:
            yield bar
    else:
        lines = _Lines(title, total, unit, completed)
        try:
            yield lines
        except BaseException:
            lines.end("stopped at ")
            raise
        lines.end("")


@functools.cache
def _terminal() -> "Console":
    """One console for all bars: that is what lets rich stack them."""
    return plain_console(stderr=True, highlight=True)


@contextlib.contextmanager
def _live_bar(title: str, total: int | None, unit: str, completed: int) -> Iterator[ProgressBar]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=_terminal()) as shown:
        task = shown.add_task(title, total=total, completed=completed, note="")

        class Live:
            def advance(self, count: int = 1, *, note: str = "") -> None:
                if note:
                    shown.update(task, advance=count, note=note)
                else:
                    shown.advance(task, count)

        yield Live()


class _Lines:
    """Progress for log files."""

    def __init__(self, title: str, total: int | None, unit: str, completed: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._first = self._completed = completed
        self._note = ""
        self._start = self._printed = time.monotonic()
        _say(f"{title}: {self._count()}")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._completed += count
        self._note = note or self._note
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        done_here = self._completed - self._first
        parts = [f"{self._title}: {self._count()}"]
        if done_here > 0:
            per_second = done_here / (now - self._start)
            parts.append(speed_text(per_second))
            if self._total is not None:
                left_seconds = max(0, self._total - self._completed) / per_second
                parts.append(f"{format_seconds(left_seconds)} left")
        _say(", ".join(parts + [self._note] * bool(self._note)))

    def end(self, how: str) -> None:
        elapsed = format_seconds(time.monotonic() - self._start)
        note = f", {self._note}" if self._note else ""
        _say(f"{self._title}: {how}{self._count()} after {elapsed}{note}")

    def _count(self) -> str:
        if self._total is None:
            return f"{self._completed} {self._unit}"
        return f"{self._completed}/{self._total} {self._unit}"


def speed_text(per_second: float) -> str:
    """How fast it goes; less than one in a second is told by what one takes."""
    if per_second >= 1.0:
        return f"{per_second:.3g} per second"
    return f"{format_seconds(1.0 / per_second)} each"


def format_seconds(seconds: float) -> str:
    """A duration as people say it: ``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
