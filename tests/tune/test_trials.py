"""Trials of a search with Ray: faults, killed drivers, interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from lrmc_ray.cluster.session import ray_session, release_orphaned_groups
from lrmc_ray.tune.processes import last_process
from tests.support.tiny import make_data

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_groups_of_dead_creators_are_released_and_others_stay(tmp_path):
    """Also where the creator is killed with the actor that started it, as a trial's trainer is."""
    with ray_session(log=tmp_path / "ray.log", num_cpus=4):
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        @ray.remote(num_cpus=0)
        class Creator:
            def make(self):
                self.group = placement_group([{"CPU": 1}])
                return ray.get(self.group.ready()) is not None

            def make_below(self):
                self.below = Creator.remote()
                return ray.get(self.below.make.remote())

        def free():
            return ray.available_resources().get("CPU", 0.0)

        def wait(cpus):
            deadline = time.monotonic() + 30
            while free() != cpus and time.monotonic() < deadline:
                release_orphaned_groups()
                time.sleep(0.1)
            return free()

        own = placement_group([{"CPU": 1}])
        direct, above, living = Creator.remote(), Creator.remote(), Creator.remote()
        made = [direct.make.remote(), above.make_below.remote(), living.make.remote(), own.ready()]
        ray.get(made)
        assert wait(0.0) == 0.0
        assert release_orphaned_groups() == 0
        ray.kill(direct)
        ray.kill(above)
        assert wait(2.0) == 2.0
        time.sleep(0.5)
        assert release_orphaned_groups() == 0
        assert ray.get(living.make.remote())
        remove_placement_group(own)


ALL_FAULTS = """
import json, os, sys, threading, time
from pathlib import Path
from lrmc_ray.config import load_settings
from lrmc_ray.cluster.session import ray_session
from lrmc_ray.tune.base_scores import BaseScores
from lrmc_ray.tune.run import Search

directory, data = Path(sys.argv[1]), sys.argv[2]
settings = load_settings(None, [
    f'data.train="{data}"', "search.trials=13", "resources.hang_seconds=4",
    "search.yardstick_lr=1e-4", "parameters.tau={low=0.8, high=0.999}",
    "resources.max_concurrent=2",
])
with ray_session(log=directory / "ray.log", num_cpus=2):
    import ray
    before = ray.available_resources()
    search = Search(settings, directory, {})
    search.run_trials(directory, BaseScores(directory, print, lambda: None))
    deadline = time.monotonic() + 30
    while any(ray.available_resources().get(name) != before[name] for name in before
              if name in ("CPU", "lrmc_trial")) and time.monotonic() < deadline:
        time.sleep(0.2)
    groups = [g["state"] for g in ray.util.placement_group_table().values()]
    after = ray.available_resources()
    names = ("CPU", "lrmc_trial")
    print(json.dumps({
        "directory": str(search.directory),
        "lost": {name: after.get(name) for name in names if after.get(name) != before[name]},
        "groups": [state for state in groups if state != "REMOVED"],
        "threads": [t.name for t in threading.enumerate() if t.name == "tune"],
    }))
"""


@pytest.mark.ray
def test_however_a_trial_ends_the_search_goes_on_and_nothing_is_left(tmp_path):
    """Trials that raise, exit, are killed, outgrow memory, give NaN, hang and stop themselves.

    Also while they score in their own process, with the cores that Ray holds for that.
    """
    data = make_data(tmp_path / "train.jsonl", num_rows=3)
    faults = ["none", "raise", "exit", "kill", "memory", "nan", "hang", "prune"]
    faults += ["scoring_raise", "scoring_kill", "scoring_hang_in_c", "none", "none"]
    environment = {
        **os.environ,
        "LRMC_TESTING": "1",
        "LRMC_TRIAL_FAULTS": ",".join(f"{n}:{fault}" for n, fault in enumerate(faults)),
        "LRMC_TEST_MARK": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", ALL_FAULTS, str(tmp_path), str(data)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout.splitlines()[-1])
    directory = Path(left.pop("directory"))
    assert left == {"lost": {}, "groups": [], "threads": []}

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{directory / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == [
        {"none": "COMPLETE", "prune": "PRUNED"}.get(fault, "FAIL") for fault in faults
    ]
    assert study.trials[7].intermediate_values == {3: -1.0}
    causes = [trial.user_attrs.get("cause") for trial in study.trials]
    expected = [
        None,
        "ValueError: a fault was asked for",
        "its process died",
        "its process died",
        "MemoryError",
        "its eval/domain_gain is nan, not a finite number",
        "it has shown no progress for",
        None,
        "ValueError: a fault was asked for",
        "its process died while its model was scored",
        "more than 4.0 s, and hangs; stacks.txt in its directory says where",
        None,
        None,
    ]
    for cause, part in zip(causes, expected, strict=True):
        assert (cause is None) == (part is None)
        assert part is None or part in cause
    for number in (6, 10):  # in Python, and in C code that holds the interpreter's lock
        stacks = (directory / "trials" / f"{number:04d}" / "stacks.txt").read_text()
        hung = re.findall(r'File ".*faults\.py", line \d+ in fail_on_purpose', stacks)
        assert hung, stacks
        assert stacks.count("Thread 0x") + stacks.count("Current thread 0x") > 1
        assert stacks in done.stderr
    told = json.loads((directory / "study.json").read_text())["trials"]
    assert told[7].pop("cause").startswith("after 3 of 6 steps its combined score on a few items")
    assert [trial.get("cause") for trial in told] == causes
    assert [trial["state"] for trial in told] == [t.state.name for t in study.trials]
    assert descendants(str(tmp_path)) == []
    # The process of a trial that ended well serves the next one; of the others, each had its own.
    ran = [last_process(directory / "trials" / f"{n:04d}").pid for n in range(len(faults))]
    ended = [
        pid for pid, fault in zip(ran, faults, strict=True) if fault not in ("none", "prune", "nan")
    ]
    assert len(set(ended)) == len(ended)
    assert len(set(ran)) < len(ran)


def descendants(mark):
    """Living processes whose environment carries the mark, after a grace of ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"LRMC_TEST_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append((path.parent / "comm").read_text().strip())
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


BASE_FAILS = """
import sys, time
from pathlib import Path
from lrmc_ray.cluster.session import ray_session
from lrmc_ray.console import run_command
from lrmc_ray.errors import DataError
from lrmc_ray.tune import run
from lrmc_ray.tune.command import main

directory, evaluate = Path(sys.argv[1]), run.evaluate

def fails(*arguments, **options):
    deadline = time.monotonic() + 120
    while not list(directory.glob("runs/*/trials/0000/training/checkpoints/step_*")):
        assert time.monotonic() < deadline, "no trial trains while the base is scored"
        time.sleep(0.1)
    raise DataError("a task cannot be scored")

if sys.argv[2] == "fails":
    run.evaluate = fails
with ray_session(log=directory / "ray.log", num_cpus=2):
    code = run_command(main, sys.argv[3:])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_base_that_cannot_be_scored_stops_a_trial_that_goes_on_later(tmp_path, tiny_model):
    data = make_data(tmp_path / "train.jsonl", num_rows=12)
    arguments = [
        *("--space", "smoke", "--model", str(tiny_model), "--train-data", str(data)),
        *("--output", str(tmp_path / "runs"), "--domain-tasks", "capitals"),
        *("--general-tasks", "plain_english", "search.trials=2", "evaluate.limit=4"),
        *("train.steps=40", "train.checkpoint_every=1", "train.probe_every=0"),
    ]

    def run(how):
        return run_script("-c", BASE_FAILS, str(tmp_path), how, *arguments)

    first = run("fails")
    assert first.returncode == 4, first.stderr[-3000:]
    assert [line for line in first.stderr.splitlines() if line.startswith("error: ")] == [
        "error: a task cannot be scored"
    ]
    assert "Traceback" not in first.stderr
    (study,) = tmp_path.glob("runs/*/study.json")
    assert json.loads(study.read_text())["trials"][0]["state"] == "RUNNING"
    ledger = study.parent / "trials/0000/training/ledger.jsonl"
    reached = json.loads(ledger.read_text().splitlines()[-1])["step"]
    assert reached < 40
    again = run("goes on")
    assert again.returncode == 0, again.stderr[-3000:]
    trials = json.loads(study.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    went_on = [json.loads(line) for line in ledger.read_text().splitlines()]
    first_again = next(line["step"] for line in went_on if line["attempt"] == 2)
    assert 1 < first_again <= reached + 1
    said = again.stderr
    assert "scoring the base model beside the first trial, on 1 of 2 slots" in said
    assert said.index("trial 0 of 2 (defaults) runs") < said.index("the base model is scored")


# With Ray: minutes


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_search_of_failing_trials_with_a_killed_driver_ends_and_leaves_nothing(tmp_path):
    """Row 24 of trials that raise, exit, are killed, outgrow memory, give NaN and hang."""
    done = run_script(
        "benchmarks/faults_tune.py", "--kills", "1", "--trials", "9", "--work", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("re_executed") <= 2  # one kill, two trials side by side
    assert told == {
        "trials": 9,
        "terminal": 9,
        "running_left": 0,
        "mlflow_children_duplicated": 0,
        "placement_groups_left": 0,
        "processes_left": 0,
    }
    assert "exit_code                    10" in done.stdout
    assert "resources_restored           True" in done.stdout
    study = json.loads(next(tmp_path.glob("runs/faults-*/study.json")).read_text())
    causes = {trial["number"]: trial["cause"] for trial in study["trials"] if trial["cause"]}
    assert set(causes) == {2, 3, 4, 5, 6, 7}
    assert "a fault was asked for" in causes[2]
    assert causes[3] == causes[4] == "its process died"
    assert "MemoryError" in causes[5]
    assert "nan, not a finite number" in causes[6]
    assert "raise search.trial_timeout_seconds" in causes[7]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ctrl_c_reports_what_there_is_and_the_same_command_goes_on(tmp_path, tiny_model):
    data = make_data(tmp_path / "train.jsonl")
    command = [
        *(sys.executable, "-m", "lrmc_ray.tune", "--space", "smoke", "--model", str(tiny_model)),
        *("--train-data", str(data), "--output", str(tmp_path / "runs")),
        *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        *("search.trials=2", "evaluate.limit=4", "train.steps=400", "train.checkpoint_every=1"),
    ]
    log = (tmp_path / "log").open("wb")
    first = subprocess.Popen(command, stderr=log, start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    pattern = "runs/*/trials/*/training/checkpoints/step_*"
    while not any(tmp_path.glob(pattern)) and time.monotonic() < deadline:
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130
    said = (tmp_path / "log").read_text()
    assert "what there is so far" in said
    assert "run the same command again to go on" in said
    (study,) = tmp_path.glob("runs/*/study.json")
    assert (study.parent / "report.html").is_file()
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 0, again.stderr[-3000:]
    trials = json.loads(study.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert len(json.loads(study.read_text())["sessions"]) == 2
