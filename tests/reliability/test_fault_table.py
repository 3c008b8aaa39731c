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

import json
import os
import signal
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


def search(output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        log = output.with_suffix(".trained")

        def note(number: int) -> None:
            with log.open("a") as file:
                file.write(f"{number}\n")

        fake = install(patch, FakeSearch(settings_of(TRIALS), output, on_train=note))
        patch.setattr("lrmc_ray.tune.finish.write_report", lambda path: touch(path, "report.html"))
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
    for point in ("tune.prepared", "tune.trial_described", "tune.model_copied", "compare.run_ended")
    for kind in ("full", "interrupt")
    # A Ctrl-C comes to the main thread, in which trials are not handed out.
    if (point, kind) != ("tune.trial_described", "interrupt")
]


@pytest.mark.parametrize(("point", "kind"), ROWS, ids=lambda value: str(value))
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


@pytest.mark.parametrize("days", [1, -1])
@pytest.mark.parametrize("name", ["tune", "compare"])
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
