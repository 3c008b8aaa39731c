"""The fault table: what is broken, where, and what must be true afterwards.

The promise, for every row: nothing is lost, nothing is done twice, the exit code is the documented
one, and there is one clear error. Then the same command goes on to the result of one that was left
alone.

A search and a comparison run here in a process of their own, with made-up trials (fake_search) and
without Ray; the rows that are marked slow run the real commands. Kills of a recording are in
tests/record/test_record_faults.py, of a training in tests/train/, of a storage in tests/files/.

A new command that goes on where it stopped adds its points to ``fault_points.POINTS`` and a
``Broken`` of its own: what runs it, and what its result is.
"""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lrmc_ray.compare import run as comparison
from lrmc_ray.compare.description import Description
from lrmc_ray.compare.run import Comparing
from lrmc_ray.console import run_command, setup_logging
from lrmc_ray.errors import DataError
from lrmc_ray.files import fault_points
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.files.fault_points import POINTS
from lrmc_ray.files.names import MODEL
from lrmc_ray.tune.description import study_directory
from tests.support.fake_search import FakeSearch, install, settings_of
from tests.support.synthetic_comparison import FakeRay, make_space, write_base
from tests.support.tiny import make_data

ROOT = Path(__file__).parents[2]
TRIALS = 4
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Broken:
    """A command that can be broken at named points.

    Attributes:
        run: runs it in an output directory.
        result: what it has found there, without times, if it has come to its end.
        done: how often each piece of work was done, by its name.
    """

    run: Callable[[Path], None]
    result: Callable[[Path], Any]
    done: Callable[[Path], Counter[str]]


def ended(run: Callable[[Path], None], output: Path, fault: str | None) -> tuple[int, str]:
    """How ``run`` ends in a process of its own: its exit code, minus a signal; and its stderr."""
    said = output.with_suffix(".stderr")
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with said.open("w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 2)
                sys.stderr = file
                setup_logging()
                fault_points._FAULT = fault
                fault_points._passes.clear()

                def main(_: Any) -> int:
                    run(output)
                    return 0

                code = run_command(main, [])
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8")


def errors_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def touch(directory: Path, name: str) -> None:
    """In place of a report, whose figures take seconds."""
    (directory / name).touch()


# A search


def search(output: Path, *, trial_timeout_seconds: float | None = None, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        log = output.with_suffix(".trained")

        def note(number: int) -> None:
            with log.open("a") as file:
                file.write(f"{number}\n")

        settings = settings_of(TRIALS, trial_timeout_seconds=trial_timeout_seconds)
        fake = install(patch, FakeSearch(settings, output, on_train=note, **options))
        finish = "lrmc_ray.tune.finish"
        patch.setattr(f"{finish}.load_study", lambda path: path)
        patch.setattr(f"{finish}.write_study_report", lambda path: touch(path, "report.html"))
        patch.setattr(f"{finish}.study_note", lambda _: "")
        patch.setattr(f"{finish}.study_scores", lambda _: {})
        fake.run()


def search_result(output: Path) -> Any:
    (path,) = output.glob("fake-*/study.json")
    study = json.loads(path.read_text())
    best = json.loads((path.parent / "best_model" / "config.json").read_text())
    assert study["state"] == "FINISHED"
    assert (path.parent / "report.html").is_file()
    assert not list(path.parent.glob("*.partial"))
    told = ("number", "role", "state", "params", "results", "cause", "directory", "scores")
    return {
        "trials": [{name: trial.get(name) for name in told} for trial in study["trials"]],
        "best": (study["best"], best["trial"]),
        "final": study["final"],
        "models": sorted(str(p.relative_to(path.parent)) for p in path.parent.rglob(MODEL)),
        "scores": sorted(p.name for p in (output / "scores").iterdir()),
    }


def trained(output: Path) -> Counter[str]:
    log = output.with_suffix(".trained")
    return Counter(log.read_text().split()) if log.is_file() else Counter()


# A comparison


class Noted(list[str]):
    """A list that a file follows."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = log

    def append(self, name: str) -> None:
        super().append(name)
        with self._log.open("a") as file:
            file.write(f"{name}\n")


def compare(output: Path) -> None:
    description = Description(make_space(), ["sft", "lrmc"], output, {})
    comparing = Comparing(description)
    log = output.with_suffix(".started")
    with pytest.MonkeyPatch.context() as patch, lock_directory(description.directory):
        description.open()
        if not description.values["base_scores"]:
            write_base(comparing)
        ray = FakeRay(comparing)
        ray.started = Noted(log)
        patch.setitem(sys.modules, "ray", ray)
        for name, stand_in in {
            "worker_slots": lambda _: 2,
            "release_orphaned_groups": lambda: 0,
            "check_trial_slots": lambda _: None,
            "forecast": lambda *_, **__: None,
            "end_leftovers": lambda _: None,
            "ray_session": lambda *_, **__: lock_directory(output / "session"),
            "write_report": lambda path: touch(path, "compare.html"),
        }.items():
            patch.setattr(comparison, name, stand_in)
        patch.setattr(comparing, "prepare", lambda: None)
        if not description.is_finished:
            comparing.run("local", verbose=False)
        touch(description.directory, "compare.html")


def compare_result(output: Path) -> Any:
    (path,) = output.glob("*/compare.json")
    written = json.loads(path.read_text())
    assert (path.parent / "compare.html").is_file()
    runs = [{k: v for k, v in run.items() if k != "cost"} for run in written["runs"]]
    key: Callable[[Any], Any] = lambda run: (run["method"], run["lr"], run["seed"], run["split"])  # noqa: E731
    return {"chosen": written["chosen"], "runs": sorted(runs, key=key)}


def started(output: Path) -> Counter[str]:
    log = output.with_suffix(".started")
    return Counter(log.read_text().splitlines()) if log.is_file() else Counter()


COMMANDS = {
    "tune": Broken(search, search_result, trained),
    "compare": Broken(compare, compare_result, started),
}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """What each command finds that nobody disturbs."""
    import lrmc_ray.tune.trials  # noqa: F401  (once, and not in every process)

    found = {}
    for name, command in COMMANDS.items():
        output = tmp_path_factory.mktemp(name) / "runs"
        output.mkdir()
        code, said = ended(command.run, output, None)
        assert code == 0, said
        found[name] = command.result(output)
        assert set(command.done(output).values()) == {1}
    return found


def number_of(point: str) -> int:
    """At which pass the fault comes: trials and runs are broken in the middle."""
    is_repeated = point.startswith(("tune.trial_", "tune.result", "compare.run_"))
    return 3 if is_repeated else 1


OWN_POINTS = [point for point in POINTS if point.partition(".")[0] in COMMANDS]
EXPECTED = {"kill": KILLED, "full": 7, "interrupt": 130}
ROWS = [(point, "kill") for point in OWN_POINTS] + [
    (point, kind)
    for point in (
        "tune.prepared",
        "tune.base_scored",
        "tune.trial_described",
        "tune.model_copied",
        "compare.run_ended",
    )
    for kind in ("full", "interrupt")
    # A Ctrl-C comes to the main thread, in which trials are not handed out.
    if (point, kind) != ("tune.trial_described", "interrupt")
]


QUICK = {
    ("tune.base_scored", "kill"),
    ("tune.trial_described", "kill"),
    ("tune.trial_told", "kill"),
    ("tune.trials_ended", "kill"),
    ("tune.model_copied", "full"),
    ("compare.run_ended", "kill"),
    ("compare.run_ended", "interrupt"),
}
"""Rows of the default tests: one of each kind of window. All others are slow."""


@pytest.mark.parametrize(
    ("point", "kind"),
    [row if row in QUICK else pytest.param(*row, marks=pytest.mark.slow) for row in ROWS],
)
def test_broken_at_a_point_the_same_command_goes_on(left_alone, tmp_path, point, kind):
    name = point.partition(".")[0]
    command, output = COMMANDS[name], tmp_path / "runs"
    output.mkdir()
    code, said = ended(command.run, output, f"{point}:{kind}:{number_of(point)}")
    assert code == EXPECTED[kind], said
    if kind == "full":
        (error,) = errors_in(said)
        assert "No space left on device; free space there, then run the same command" in error
    if kind == "interrupt":
        assert "interrupted; run the same command again to go on where it stopped" in said
    assert "Traceback" not in said
    code, said = ended(command.run, output, None)
    assert code == 0, said
    assert command.result(output) == left_alone[name]
    assert max(command.done(output).values()) == 1  # what had ended was not done again


@pytest.mark.slow
def test_every_point_of_these_commands_is_passed(tmp_path):
    for name, command in COMMANDS.items():
        output = tmp_path / name
        output.mkdir()
        log = tmp_path / f"{name}.log"
        fault_points._LOG = str(log)
        try:
            assert ended(command.run, output, None)[0] == 0
        finally:
            fault_points._LOG = None
        passed = {line.split()[0] for line in log.read_text().splitlines()}
        missing = {point for point in OWN_POINTS if point.startswith(name)} - passed
        # These two are passed where there is no stand-in.
        assert missing <= {"compare.prepared"}, missing


def test_a_trial_that_finds_the_disk_full_is_not_lost(left_alone, tmp_path, monkeypatch):
    """It has not failed: the search ends, and the trial goes on with the next command."""
    output = tmp_path / "runs"
    output.mkdir()
    monkeypatch.setenv("LRMC_TESTING", "1")
    monkeypatch.setenv("LRMC_TRIAL_FAULTS", "2:full")
    code, said = ended(search, output, None)
    assert code == 7, said
    (error,) = errors_in(said)
    assert "trials/0002 failed: No space left on device; free space there, then run" in error
    (path,) = output.glob("fake-*/study.json")
    states = [trial["state"] for trial in json.loads(path.read_text())["trials"]]
    assert states == ["COMPLETE", "COMPLETE", "RUNNING"]
    monkeypatch.delenv("LRMC_TRIAL_FAULTS")
    code, said = ended(search, output, None)
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert set(trained(output).values()) == {1}


# The base is scored beside the first trial


def when_trained(output: Path) -> None:
    """Return when the first trial has been trained."""
    deadline = time.monotonic() + 60
    while not trained(output):
        assert time.monotonic() < deadline, "no trial was trained while the base was scored"
        time.sleep(0.01)


def test_the_first_trial_trains_while_the_base_is_scored(left_alone, tmp_path):
    output = tmp_path / "runs"
    output.mkdir()
    code, said = ended(lambda path: search(path, on_score=lambda: when_trained(path)), output, None)
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert said.index("scoring the base model beside the first trial, on 1 of 2 slots") < (
        said.index("the base model is scored, after ")
    )


def test_a_trial_that_waits_for_cores_beside_the_scoring_is_not_overdue(left_alone, tmp_path):
    """Nor one that waits for the scores: the limit is for what it does itself."""
    output = tmp_path / "runs"
    output.mkdir()
    limit = 2.0

    def wait(number: int) -> None:
        if number == 0:
            time.sleep(2 * limit)

    def score(path: Path) -> None:
        when_trained(path)
        time.sleep(2 * limit)

    options = {"on_start": wait, "on_score": lambda: score(output)}
    code, said = ended(
        lambda path: search(path, trial_timeout_seconds=limit, **options), output, None
    )
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert "is ended" not in said


def test_with_one_slot_the_base_is_scored_first_and_the_result_is_the_same(left_alone, tmp_path):
    output = tmp_path / "runs"
    output.mkdir()

    def score() -> None:
        (study,) = output.glob("fake-*/study.json")
        assert json.loads(study.read_text())["trials"] == []

    code, said = ended(lambda path: search(path, on_score=score, slots=1), output, None)
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert set(trained(output).values()) == {1}
    assert "Scoring the base model: 0/" in said
    assert "beside" not in said


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("a task cannot be scored"), 4), (OSError(errno.ENOSPC, "No space left"), 7)],
)
def test_a_base_that_cannot_be_scored_ends_the_search_and_no_trial(
    left_alone, tmp_path, error, code
):
    """The first trial waits for its scores meanwhile, and is open for the next command."""
    output = tmp_path / "runs"
    output.mkdir()

    def fail() -> None:
        when_trained(output)
        raise error

    start = time.monotonic()
    found, said = ended(lambda path: search(path, on_score=fail), output, None)
    assert time.monotonic() - start < 15
    assert found == code, said
    (line,) = errors_in(said)
    assert error.args[-1] in line
    assert "Traceback" not in said
    assert "what there is so far" not in said
    (path,) = output.glob("fake-*/study.json")
    study = json.loads(path.read_text())
    assert {trial["state"] for trial in study["trials"]} == {"RUNNING"}
    assert study.get("base_scores") is None
    assert not list(output.glob("scores/*"))
    code, said = ended(search, output, None)
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert set(trained(output).values()) == {1}


@pytest.mark.parametrize("is_scored", [False, True])
def test_a_search_that_is_killed_while_a_trial_waits_goes_on(left_alone, tmp_path, is_scored):
    """Also where the scores were there at that moment: then they are not made again."""
    output = tmp_path / "runs"
    output.mkdir()

    def die() -> None:
        when_trained(output)
        if not is_scored:
            os.kill(os.getpid(), signal.SIGKILL)

    code, said = ended(
        lambda path: search(path, on_score=die),
        output,
        "tune.base_scored:kill:1" if is_scored else None,
    )
    assert code == KILLED, said
    assert bool(list(output.glob("scores/*/manifest.json"))) == is_scored

    def again() -> None:
        assert not is_scored, "the base is scored twice"

    code, said = ended(lambda path: search(path, on_score=again), output, None)
    assert code == 0, said
    assert search_result(output) == left_alone["tune"]
    assert set(trained(output).values()) == {1}


def test_trials_that_have_all_failed_wait_for_the_base_all_the_same(tmp_path, monkeypatch):
    output = tmp_path / "runs"
    output.mkdir()
    monkeypatch.setenv("LRMC_TESTING", "1")
    monkeypatch.setenv("LRMC_TRIAL_FAULTS", ",".join(f"{n}:raise" for n in range(TRIALS)))

    def study() -> Any:
        (path,) = output.glob("fake-*/study.json")
        return json.loads(path.read_text())

    def score() -> None:
        deadline = time.monotonic() + 60
        while [trial["state"] for trial in study()["trials"]] != ["FAIL"] * TRIALS:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    code, said = ended(lambda path: search(path, on_score=score), output, None)
    assert code == 0, said
    assert study()["state"] == "FINISHED"
    assert study()["base_scores"] is not None


# Two commands, other data, another time


def test_two_commands_in_one_output(left_alone, tmp_path):
    """Of one study the second is refused; of two studies both run, and share what they can."""
    output = tmp_path / "runs"
    output.mkdir()
    with lock_directory(study_directory(settings_of(TRIALS), output, {})):

        def second(path: Path) -> None:
            with lock_directory(study_directory(settings_of(TRIALS), path, {})):
                search(path)

        code, said = ended(second, output, None)
    assert code == 5
    (error,) = errors_in(said)
    assert f"process {os.getpid()} on" in error
    assert "wait for it, stop it, or choose another --output" in error
    assert trained(output) == Counter()


def test_data_that_change_in_mid_run_end_it_and_nothing_is_mixed(tmp_path):
    output, data = tmp_path / "runs", tmp_path / "train.jsonl"
    output.mkdir()

    def run(path: Path) -> None:
        contents = {"training data": data.read_text()}

        def check(*_: Any) -> None:
            if data.read_text() != contents["training data"]:
                raise DataError("the training data must not change while a study runs")

        def change(number: int) -> None:
            if number == 2 and data.read_text() == "old":
                data.write_text("new")

        with pytest.MonkeyPatch.context() as patch:
            fake = FakeSearch(settings_of(TRIALS), path, contents, on_train=change)
            install(patch, fake)
            patch.setattr("lrmc_ray.tune.run.check_unchanged", check)
            fake.run()

    data.write_text("old")
    code, said = ended(run, output, None)
    assert code == 4
    assert len(errors_in(said)) == 1
    (first,) = output.glob("fake-*/study.json")
    assert json.loads(first.read_text())["state"] == "RUNNING"
    assert not (first.parent / "best_model").exists()
    assert ended(run, output, None)[0] == 0
    studies = {path: json.loads(path.read_text()) for path in output.glob("fake-*/study.json")}
    assert sorted(study["state"] for study in studies.values()) == ["FINISHED", "RUNNING"]
    assert all(len(study["trials"]) == TRIALS for study in studies.values())


@pytest.mark.parametrize(
    ("name", "days"),
    [
        ("tune", -1),
        ("compare", 1),
        pytest.param("tune", 1, marks=pytest.mark.slow),
        pytest.param("compare", -1, marks=pytest.mark.slow),
    ],
)
def test_a_clock_that_jumps_by_a_day_changes_nothing(left_alone, tmp_path, name, days):
    command, output = COMMANDS[name], tmp_path / "runs"
    output.mkdir()
    real = time.time

    def run(path: Path) -> None:
        start = time.monotonic()
        # The jump comes in the middle, whoever asks for the time.
        time.time = lambda: real() + days * 86_400 * (time.monotonic() - start > 0.05)
        command.run(path)

    code, said = ended(run, output, None)
    assert code == 0, said
    assert command.result(output) == left_alone[name]
    found = [
        path for path in output.glob("*/*.json") if path.name in ("study.json", "compare.json")
    ]
    written = json.loads(found[0].read_text())
    for began, end in written["sessions"]:
        assert 0 <= end - began < 3600
    for trial in written.get("trials", []):
        assert 0 <= trial["ended"] - trial["started"] < 3600


# The real commands, in file systems of their own


def in_namespace(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that may mount; what it mounts is gone with it."""
    if os.getuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    (tmp_path / "script.sh").write_text(script)
    return subprocess.run(
        ["unshare", "-m", "bash", str(tmp_path / "script.sh")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def command_of(name: str, model: Path, tmp_path: Path) -> str:
    data = make_data(tmp_path / "train.jsonl")
    words = [sys.executable, "-m", "lrmc_ray", name, "--model", str(model)]
    words += ["--train-data", str(data), "--output", str(tmp_path / "runs")]
    if name == "tune":
        words += ["--space", "smoke", "--domain-tasks", "capitals"]
        words += ["--general-tasks", "plain_english", "evaluate.limit=4", "search.trials=2"]
    return shlex.join(words)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "kilobytes"),
    [("record", 100), ("record", 300), ("tune", 1000), ("tune", 2000), ("tune", 3000)],
)
def test_a_disk_that_fills_ends_the_command_and_with_space_it_goes_on(
    tiny_model, tmp_path, name, kilobytes
):
    output, command = tmp_path / "runs", command_of(name, tiny_model, tmp_path)
    output.mkdir()
    done = in_namespace(
        f"mount -t tmpfs -o size={kilobytes}k none {output}\n"
        f"{command} 2> {tmp_path}/first; echo $? > {tmp_path}/codes\n"
        f"mount -o remount,size=500m {output}\n"
        f"{command} 2> {tmp_path}/second; echo $? >> {tmp_path}/codes\n"
        f"cp {output}/*/study.json {tmp_path} || true\n",
        tmp_path,
    )
    first, second = (tmp_path / "first").read_text(), (tmp_path / "second").read_text()
    codes = (tmp_path / "codes").read_text().split()
    assert codes == ["7", "0"], f"{codes}\n{first[-3000:]}\n{second[-3000:]}\n{done.stderr}"
    assert len(errors_in(first)) == 1
    assert "Traceback" not in first
    assert "No space left on device; free space there" in errors_in(first)[0]
    if name == "tune":
        trials = json.loads((tmp_path / "study.json").read_text())["trials"]
        assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["record", "tune"])
def test_a_home_that_is_read_only_is_not_needed(tiny_model, tmp_path, name):
    home, command = tmp_path / "home", command_of(name, tiny_model, tmp_path)
    home.mkdir()
    done = in_namespace(
        f"mount -t tmpfs -o size=100k,ro none {home}\nexport HOME={home}\n"
        "unset LRMC_CACHE HF_HOME XDG_CACHE_HOME RAY_AUTH_TOKEN_PATH MPLCONFIGDIR\n"
        f"exec {command}\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", ["tune.trial_told", "tune.trials_ended", "tune.exported"])
def test_the_real_search_goes_on_after_kill_9(tiny_model, tmp_path, point):
    command = shlex.split(command_of("tune", tiny_model, tmp_path))
    fault = {"LRMC_TESTING": "1", "LRMC_FAULT": f"{point}:kill:1"}
    first = subprocess.run(command, cwd=ROOT, env={**os.environ, **fault}, check=False)
    assert first.returncode == KILLED
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    (path,) = (tmp_path / "runs").glob("*/study.json")
    study = json.loads(path.read_text())
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE"] * 2
    assert (path.parent / "best_model" / "config.json").is_file()
    starts = path.parent.glob("trials/*/processes.jsonl")
    assert sum(log.read_text().count("\n") for log in starts) <= 3
