"""Exit codes and lines as a shell sees them; progress with a clock of our own."""

import contextlib
import errno
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrmc_ray import console
from lrmc_ray.console import (
    format_seconds,
    is_quiet,
    plain_console,
    progress,
    run_command,
    setup_logging,
    speed_text,
)
from lrmc_ray.errors import (
    ConfigError,
    DataError,
    DirectoryInUseError,
    DiskError,
    IncompleteArtifactError,
    LrmcError,
    ResourceError,
)


def raising(error):
    def main(argv):
        raise error

    return main


def test_the_exit_code_and_the_arguments_are_mains_own(monkeypatch):
    seen = []

    def main(argv):
        seen.append(list(argv))
        return 10

    monkeypatch.setattr(sys, "argv", ["lrmc", "tune", "--help"])
    assert run_command(main) == 10
    assert run_command(main, ["train"]) == 10
    assert seen == [["tune", "--help"], ["train"]]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (LrmcError, 1),
        (ConfigError, 2),
        (IncompleteArtifactError, 3),
        (DataError, 4),
        (DirectoryInUseError, 5),
        (ResourceError, 6),
        (DiskError, 7),
    ],
)
def test_our_errors_are_one_line_and_their_own_code(kind, code, capsys):
    assert run_command(raising(kind("tau must be in (0, 1], got 2; lower it")), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: tau must be in (0, 1], got 2; lower it\n")


def test_an_error_does_not_act_on_the_terminal(capsys):
    """What data hold is repeated in messages; Ray's own colours are left out."""
    error = DataError("a.jsonl:2 is '\x1b]0;title\x07\x9b2J\r', \x1b[36mray::f\x1b[39m\n\tü")
    assert run_command(raising(error)) == 4
    assert capsys.readouterr().err == "error: a.jsonl:2 is '�]0;title��2J�', ray::f\n\tü\n"


def test_a_console_shows_brackets_and_colons_as_they_are(capsys):
    from rich.table import Table

    text = "failed: [/x] [bold] :smile: [link=http://a]"
    table = Table(title=text, box=None)
    table.add_column(text)
    table.add_row(text)
    shown = plain_console(width=200)
    shown.print(text)
    shown.print(table)
    assert capsys.readouterr().out.count(text) == 4


def test_every_console_is_a_plain_one():
    made = [
        path.name
        for path in Path(console.__file__).parent.rglob("*.py")
        if re.search(r"(?<!plain_)\bConsole\(", path.read_text(encoding="utf-8"))
    ]
    assert made == ["console.py"]


def test_our_error_from_a_ray_task_is_the_same_line(capsys):
    from ray.exceptions import RayTaskError

    remote = RayTaskError("work", "long\nremote\ntraceback", DataError("row 3 is empty"))
    assert run_command(raising(remote.as_instanceof_cause()), []) == 4
    assert capsys.readouterr().err == "error: row 3 is empty\n"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EROFS, "choose a writable directory"),
        (errno.EACCES, "give this user permission"),
    ],
)
def test_disk_errors_name_path_and_remedy(number, remedy, capsys):
    error = OSError(number, os.strerror(number), "/data/runs/x")
    assert run_command(raising(error), []) == 7
    err = capsys.readouterr().err
    assert err.startswith(f"error: reading or writing /data/runs/x failed: {os.strerror(number)}; ")
    assert remedy in err
    assert err.count("\n") == 1


def wrapped(text):
    try:
        try:
            raise ValueError(text)
        except ValueError as inner:
            raise RuntimeError("the commit failed") from inner
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("UDF failed: OSError: [Errno 28] No space left on device"),
        wrapped("(sqlite3.OperationalError) database or disk is full"),
        wrapped("[Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_that_another_process_or_a_library_met(error, capsys):
    assert run_command(raising(error), []) == 7
    err = capsys.readouterr().err
    assert err == (
        "error: writing an output file failed: No space left on device; free space there, then "
        "run the same command again\n"
    )


def test_a_really_full_disk(capsys):
    def main(argv):
        with open("/dev/full", "w") as file:
            file.write("x")
        return 0

    assert run_command(main, []) == 7
    assert "an output file failed: No space left on device; free space" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(errno.ENOENT, "no file", "x")])
def test_anything_else_is_a_traceback_and_1(error, capsys):
    assert run_command(raising(error), []) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert "in main" in err
    assert str(error) in err


@pytest.mark.parametrize(
    ("ended", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("no such trial"), 1, "no such trial"),
        # What Ray's own handler of SIGTERM does.
        (SystemExit(int(signal.SIGTERM)), 143, "stopped by SIGTERM; run the same command again"),
    ],
)
def test_other_ways_to_end(ended, code, line, capsys):
    assert run_command(raising(ended), []) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == bool(line)


def test_the_signal_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    run_command(lambda argv: 0, [])
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == before


WAITING = """
import signal, sys, time
from lrmc_ray.console import run_command
def main(argv):
    try:
        print("ready", flush=True)
        time.sleep(20)
    finally:
        print("cleaned", flush=True)
{before}
sys.exit(run_command(main, []))
"""


def ended_by(number, before=""):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(before=before)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    return process


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_runs_finally_and_says_one_line(number, code, name):
    out, err = (process := ended_by(number)).communicate(timeout=20)
    assert (process.returncode, out) == (code, "cleaned\n")
    assert err == f"{name}; run the same command again to go on where it stopped\n"


def test_nohup_is_respected():
    process = ended_by(signal.SIGHUP, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys; from lrmc_ray.console import run_command\n"
        "def main(argv):\n"
        "    for _ in range(10**6): print('a line of results')\n"
        "    return 0\n"
        "sys.exit(run_command(main, []))"
    )
    result = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1; echo ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "a line of results\n141\n"
    assert result.stderr == ""


def test_a_broken_pipe_elsewhere_is_an_error(capsys):
    assert run_command(raising(BrokenPipeError(errno.EPIPE, "a worker's socket")), []) == 1
    assert "a worker's socket" in capsys.readouterr().err


# --- logging and progress -----------------------------------------------------------------------


@pytest.fixture
def logging_as_before():
    root, ours = logging.getLogger(), logging.getLogger("lrmc_ray")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(("verbose", "expected"), [(False, "IW"), (True, "DIW")])
def test_logging_goes_to_stderr_once(verbose, expected, capsys):
    setup_logging()
    setup_logging(verbose)
    ours, other = logging.getLogger("lrmc_ray.tune"), logging.getLogger("other")
    ours.debug("D")
    ours.info("I")
    other.info("X")
    other.warning("W")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[1:] for line in err.splitlines()] == [
        [{"D": "DEBUG", "I": "INFO", "W": "WARNING"}[letter], letter] for letter in expected
    ]


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def test_progress_lines_without_a_terminal(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress("Recording", total=600, unit="samples", completed=100) as bar:
        for seconds, count in ((2, 10), (2, 10), (1, 30), (4, 1), (1, 49), (600, 0)):
            clock.now += seconds
            bar.advance(count, note="K 12.5" if count == 30 else "")
    # 50 of 500 samples in 5 s: 10 per second, so 450 left take 45 s.
    assert capsys.readouterr().err.splitlines() == [
        "Recording: 100/600 samples",
        "Recording: 150/600 samples, 10 per second, 45 s left, K 12.5",
        "Recording: 200/600 samples, 10 per second, 40 s left, K 12.5",
        "Recording: 200/600 samples, 6.1 s each, 40 min 40 s left, K 12.5",
        "Recording: 200/600 samples after 10 min 10 s, K 12.5",
    ]


def test_progress_of_unknown_length_and_failure(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with contextlib.suppress(ValueError), progress("Search", unit="trials") as bar:
        clock.now += 6
        bar.advance()
        clock.now += 1
        raise ValueError
    assert capsys.readouterr().err.splitlines() == [
        "Search: 0 trials",
        "Search: 1 trials, 6.0 s each",
        "Search: stopped at 1 trials after 7.0 s",
    ]


BARS = """
import logging
from lrmc_ray.console import progress, setup_logging
setup_logging()
with progress("Search", total=2, unit="trials") as outer:
    with progress("Evaluating [x]", total=30, unit="items") as bar:
        for i in range(30):
            bar.advance(note="loss 0.5")
        logging.getLogger("lrmc_ray").info("saved the model")
    outer.advance(2)
"""


def on_a_terminal(code, term):
    """What ``code`` writes to a terminal of 120 columns."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": term, "COLUMNS": "120"},
    )
    os.close(follower)
    written = b""
    with contextlib.suppress(OSError):  # how a closed terminal reads
        while chunk := os.read(leader, 4096):
            written += chunk
    os.close(leader)
    assert process.wait(timeout=20) == 0
    return written.decode()


def test_a_live_bar_on_a_terminal():
    written = on_a_terminal(BARS, "xterm")
    for text in (
        "Search",
        "Evaluating [x]",
        "30/30",
        "2/2",
        "items",
        "loss 0.5",
        "saved the model",
    ):
        assert text in written
    assert "\x1b[" in written
    assert "after" not in written


def test_plain_lines_on_a_dumb_terminal():
    written = on_a_terminal(BARS, "dumb")
    assert "Search: 2/2 trials after" in written
    assert "\x1b[" not in written


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.97, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_importing_is_light():
    heavy = "{'mlflow', 'torch', 'ray', 'rich', 'pydantic'}"
    code = f"import sys, lrmc_ray.console; print(sorted({heavy} & set(sys.modules)))"
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5


WITH_RAY = """
import os, signal, sys, time
from pathlib import Path
from lrmc_ray.console import run_command
from lrmc_ray.cluster.session import ray_session

def main(argv):
    with ray_session(log=Path(argv[0]), num_cpus=1):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            end = time.monotonic() + 5
            while time.monotonic() < end:
                time.sleep(0.1)
            print("cleaned", flush=True)
    return 0

sys.exit(run_command(main, [sys.argv[1]]))
"""


def test_sigterm_leaves_a_command_that_uses_ray_the_time_to_end_in_order(tmp_path):
    # Ray's own handler would abort the process three seconds after the signal.
    done = subprocess.run(
        [sys.executable, "-c", WITH_RAY, str(tmp_path / "ray.log")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    assert done.stdout == "cleaned\n"
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGTERM; run the same command again")


def test_quiet_commands_show_no_progress_and_say_warnings(capsys):
    log = logging.getLogger("lrmc_ray.anything")
    try:
        setup_logging(quiet=True)
        assert is_quiet()
        with progress("Recording", total=2, unit="samples") as bar:
            bar.advance(2)
        log.info("nobody needs this")
        log.warning("everybody needs this")
    finally:
        setup_logging()
    assert not is_quiet()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("WARNING everybody needs this")
    log.info("and this again")
    assert "and this again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(12.34, "12.3 per second"), (1.0, "1 per second"), (0.0303, "33 s each"), (0.5, "2.0 s each")],
)
def test_slow_progress_is_told_by_what_one_takes(per_second, text):
    assert speed_text(per_second) == text
