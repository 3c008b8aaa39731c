"""The search around its trials: the choice, what is kept, time limits, faults, interruption."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrmc_ray.config import RunSettings
from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.files.study import trial_directory
from lrmc_ray.tune.description import study_identity
from lrmc_ray.tune.processes import PROCESSES, kill_process, last_process, process_birth
from lrmc_ray.tune.run import Search, _kill_trial
from lrmc_ray.tune.trial import FAILURE, failure_cause
from tests.support.tiny import make_data

ROOT = Path(__file__).parents[2]


def make_search(tmp_path, points, **search):
    """A search with finished trials of these (gain, forgetting), the second the yardstick."""
    settings = RunSettings.model_validate({"search": {"trials": len(points), **search}})
    made = Search(settings, tmp_path)
    made.directory.mkdir(parents=True)
    made.description = {"trials": [], "best": None, "closest": None, "final": {}}
    for number, (gain, forgetting) in enumerate(points):
        results = {"eval/domain_gain": gain, "eval/forgetting": forgetting}
        directory = f"trials/{number:04d}"
        (made.directory / directory / "training" / "model").mkdir(parents=True)
        made.description["trials"].append(
            {
                "number": number,
                "role": "yardstick" if number == 1 else "search",
                "state": "COMPLETE",
                "directory": directory,
                "results": results | {"eval/combined": gain - forgetting},
            }
        )
    return made


def models_left(search):
    search._choose_best()
    search._remove_models()
    return [
        trial["number"]
        for trial in search.description["trials"]
        if (search.directory / trial["directory"] / "training" / "model").is_dir()
    ]


POINTS = [(0.2, 0.001), (0.5, 0.09), (0.45, 0.008), (0.6, 0.05), (0.1, 0.02)]


def test_the_highest_combined_score_is_the_best_and_keeps_its_model(tmp_path):
    search = make_search(tmp_path, POINTS)
    assert models_left(search) == [1, 3]
    assert (search.description["best"], search.description["closest"]) == (3, None)


def test_by_budget_the_best_is_within_it(tmp_path):
    search = make_search(tmp_path, POINTS, objective="budget", max_forgetting=0.01)
    assert models_left(search) == [1, 2]
    assert search.description["best"] == 2


def test_without_a_trial_in_the_budget_there_is_no_best_but_the_closest_model_is_kept(tmp_path):
    search = make_search(tmp_path, POINTS, objective="budget", max_forgetting=0.0)
    assert models_left(search) == [0, 1]
    assert (search.description["best"], search.description["closest"]) == (None, 0)
    assert search.export() is None


def test_of_a_front_all_models_are_kept_since_its_knee_may_move_back(tmp_path):
    search = make_search(tmp_path, POINTS, objective="pareto")
    assert models_left(search) == [0, 1, 2, 3]
    assert search.description["best"] == 2
    # A new end of the front moves the knee to an older trial, whose model must be there.
    search.description["trials"].append(
        {
            "number": 5,
            "role": "search",
            "state": "COMPLETE",
            "directory": "trials/0005",
            "results": {"eval/domain_gain": 0.62, "eval/forgetting": 0.9, "eval/combined": -0.28},
        }
    )
    assert 3 in models_left(search)
    assert search.description["best"] == 3


def test_a_new_best_makes_the_final_scores_void(tmp_path):
    search = make_search(tmp_path, POINTS)
    search.description |= {"best": 0, "final": {"base": "x"}}
    search._choose_best()
    assert search.description["final"] == {}


@pytest.mark.parametrize("final_limit", [None, 30])
def test_finalists_are_scored_on_test_questions_of_their_own_number(
    tmp_path, monkeypatch, final_limit
):
    from lrmc_ray import models
    from lrmc_ray.evaluate import run as evaluate

    search = make_search(tmp_path, POINTS, final_limit=final_limit)
    scored = search.settings.evaluate.model_copy(update={"limit": 10})
    search.settings = search.settings.model_copy(update={"evaluate": scored})
    search.description |= {"best": 0, "base_scores": "base", "state": "FINISHED"}
    for trial in search.description["trials"]:
        trial["scores"] = f"scores/{trial['number']}"
    asked = []

    def record_request(settings, model, output, *, split, base, general_from):
        asked.append((settings.evaluate.limit, split, general_from.name, base is None))
        return output / model.parent.parent.name

    monkeypatch.setattr(evaluate, "evaluate", record_request)
    monkeypatch.setattr(models, "local_directory", lambda _: tmp_path / "base" / "x" / "y")
    monkeypatch.setattr(search, "write", lambda: None)
    assert not search.is_finished
    search.score_finalists()
    limit = final_limit or 10
    assert sorted(asked) == [
        (limit, "test", "0", False),
        (limit, "test", "1", False),
        (limit, "test", "base", True),
    ]
    assert search.is_finished  # until more are asked for
    more = search.settings.search.model_copy(update={"final_limit": 40})
    search.settings = search.settings.model_copy(update={"search": more})
    assert not search.is_finished


def test_the_time_limit_is_ten_times_the_longest_trial_and_never_short(tmp_path):
    search = make_search(tmp_path, POINTS)
    assert search.time_limit() == float("inf")
    trials = search.description["trials"]
    trials[0]["cost"] = {"train_seconds": 3.0, "evaluate_seconds": 1.0}
    assert search.time_limit() == 600.0
    trials[2]["cost"] = {"train_seconds": 100.0, "evaluate_seconds": 20.0}
    assert search.time_limit() == 1200.0
    chosen = make_search(tmp_path / "other", POINTS, trial_timeout_seconds=7.5)
    assert chosen.time_limit() == 7.5


def test_a_longer_limit_and_more_trials_are_the_same_search():
    def identity(**search):
        return study_identity(RunSettings.model_validate({"search": search}))

    assert identity() == identity(
        trials=99, trial_timeout_seconds=5.0, keep_models="all", final_limit=7
    )
    assert identity() != identity(objective="pareto")
    assert identity(objective="budget") != identity(objective="budget", max_forgetting=0.02)


# Trials that stopped themselves


def test_a_trial_that_stopped_early_is_described_and_never_the_best(tmp_path):
    import optuna

    from lrmc_ray.files.artifacts import write_json
    from lrmc_ray.train.early_stopping import Decision
    from lrmc_ray.tune.queue import TrialQueue, open_study
    from lrmc_ray.tune.trial import RESULT

    search = make_search(tmp_path, POINTS[:1], early_stopping="median", yardstick_lr=None)
    study = open_study(search.directory / "study.db", search.id)
    queue = TrialQueue(study, search.settings)
    queue.next()
    directory = trial_directory(search.directory, 0)
    decision = Decision(0, 12, 0.9, 0.9, 0.0, 0.9, {"3": 1.0, "4": 1.2}, 1.1, True, 2.5)
    write_json(directory / "training" / "rung.json", dataclasses.asdict(decision))
    cost = {"train_seconds": 30.0, "evaluate_seconds": 0.0, "train_cores": 1, "evaluate_cores": 1}
    train = {"steps": 24}
    write_json(directory / RESULT, {"results": {}, "scores": None, "train": train, "cost": cost})
    queue.report(0, 12, 0.9)
    queue.prune(0, 0.0)
    search._adopt(study)
    entry = search.entry(0)
    assert (entry["state"], entry["scores"], entry["results"]) == ("PRUNED", None, {})
    assert entry["cause"].startswith("after 12 of 24 steps its combined score on a few items was")
    assert (entry["rung"]["value"], entry["cost"]["train_seconds"]) == (0.9, 30.0)
    assert "ended" in entry
    assert search.description["best"] is None
    assert search.num_failed == 0
    search.end()
    assert search.is_finished
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED


def test_epochs_of_a_trial_are_described_as_its_steps(tmp_path, tiny_model):
    """8 samples: 3 epochs in batches of 4 are 6 steps; what a trial cannot have is left to it."""
    from tests.support.training import record_of

    data = make_data(tmp_path / "train.jsonl", num_rows=8)
    search = make_search(tmp_path, POINTS[:1])
    epochs = {"epochs": 3.0, "batch_size": 4, "micro_batches": 2, "steps": 500}
    train = search.settings.train.model_copy(update=epochs)
    assert search._with_steps(train).steps == 500  # no record yet
    search._recorded = record_of(tiny_model, data, tmp_path / "record")
    assert (search._with_steps(train).steps, search._with_steps(train).epochs) == (6, None)
    too_warm = train.model_copy(update={"warmup_steps": 7})
    assert search._with_steps(too_warm) is too_warm


# Ending a trial's process


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_only_the_process_that_was_written_down_is_killed(sleeper):
    born = process_birth(sleeper.pid)
    assert not kill_process(sleeper.pid, born + 1)  # the number went to another process
    assert not kill_process(sleeper.pid, None)
    assert sleeper.poll() is None
    assert kill_process(sleeper.pid, born)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert process_birth(sleeper.pid) is None
    assert not kill_process(sleeper.pid, born)


def test_the_birth_of_a_process_is_its_start_since_boot():
    boot = float(Path("/proc/uptime").read_text().split()[0])
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_birth(child.pid) / os.sysconf("SC_CLK_TCK")
    child.communicate(b"\n")
    assert boot - 0.1 <= started <= float(Path("/proc/uptime").read_text().split()[0])


def test_processes_of_a_killed_sitting_are_ended_first(tmp_path, sleeper):
    search = make_search(tmp_path, POINTS)
    directory = trial_directory(search.directory, 2)
    old = {"pid": 2**22 + 1, "born": 5, "node": "gone"}
    now = {"pid": sleeper.pid, "born": process_birth(sleeper.pid), "node": "gone"}
    (directory / PROCESSES).write_text(f"{json.dumps(old)}\n{json.dumps(now)}\n")
    assert last_process(directory) == now
    search._end_leftovers()
    assert sleeper.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("content", ["", '{"pid": 1', None])
def test_a_trial_without_a_process_is_not_found(tmp_path, content):
    if content is not None:
        (tmp_path / PROCESSES).write_text(content)
    assert last_process(tmp_path) is None
    assert not _kill_trial(tmp_path)


def test_an_overdue_trial_gets_its_cause_once(tmp_path, monkeypatch):
    search = make_search(tmp_path, POINTS, trial_timeout_seconds=5.0)
    killed = []
    monkeypatch.setattr("lrmc_ray.tune.run._kill_trial", lambda path: killed.append(path) or True)
    now = time.time()
    search._began = {0: now - 60.0, 2: now - 60.0, 3: now - 60.0, 4: now - 60.0}
    # Trial 0 has not begun yet, and 4 only in an earlier sitting.
    for number, seconds in ((2, 6.0), (3, 4.0), (4, 99.0)):
        process = {"pid": 1, "born": 0, "node": "x", "began": now - seconds}
        (trial_directory(search.directory, number) / PROCESSES).write_text(json.dumps(process))
    search._stop_overdue()
    search._stop_overdue()
    directory = trial_directory(search.directory, 2)
    assert killed == [directory]
    assert "not ended after 6.0 s, more than 5.0 s" in failure_cause(directory)
    assert len(list(search.directory.glob(f"trials/*/{FAILURE}"))) == 1


def test_an_interrupted_search_asks_its_trials_for_a_checkpoint_and_waits(tmp_path, monkeypatch):
    from lrmc_ray.files.names import CHECKPOINT_NOW
    from lrmc_ray.tune import run as tune

    search = make_search(tmp_path, POINTS)
    search._began = dict.fromkeys((2, 3, 4), time.time())
    training = {n: trial_directory(search.directory, n) / "training" for n in (2, 3, 4)}
    write_manifest(training[4], {})  # it trains no more
    answered = []

    def answer(seconds):  # trial 2 saves a checkpoint, trial 3 never does
        answered.append((training[3] / CHECKPOINT_NOW).exists())
        assert not (training[4] / CHECKPOINT_NOW).exists()
        (training[2] / CHECKPOINT_NOW).unlink(missing_ok=True)

    monkeypatch.setattr(tune, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(tune.time, "sleep", answer)
    search._finish_steps()
    assert answered
    assert all(answered)
    assert not any((path / CHECKPOINT_NOW).exists() for path in training.values())


# With Ray


@pytest.mark.ray
def test_groups_of_dead_creators_are_released_and_others_stay(tmp_path):
    """Also where the creator is killed with the actor that started it, as a trial's trainer is."""
    from lrmc_ray.cluster.session import ray_session, release_orphaned_groups

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
from lrmc_ray.tune.run import Search

directory, data = Path(sys.argv[1]), sys.argv[2]
settings = load_settings(None, [
    f'data.train="{data}"', "search.trials=13", "search.trial_timeout_seconds=4",
    "search.yardstick_lr=1e-4", "parameters.tau={low=0.8, high=0.999}",
    "resources.max_concurrent=2",
])
with ray_session(log=directory / "ray.log", num_cpus=2):
    import ray
    before = ray.available_resources()
    search = Search(settings, directory)
    search.open()
    search.run_trials(directory, directory)
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
    import optuna

    data = make_data(tmp_path / "train.jsonl", num_rows=3)
    faults = ["none", "raise", "exit", "kill", "memory", "nan", "hang", "prune"]
    faults += ["scoring_raise", "scoring_kill", "scoring_hang", "none", "none"]
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
        "raise search.trial_timeout_seconds",
        None,
        "ValueError: a fault was asked for",
        "its process died while its model was scored",
        "raise search.trial_timeout_seconds",
        None,
        None,
    ]
    for cause, part in zip(causes, expected, strict=True):
        assert (cause is None) == (part is None)
        assert part is None or part in cause
    told = json.loads((directory / "study.json").read_text())["trials"]
    assert told[7].pop("cause").startswith("after 3 of 6 steps its combined score on a few items")
    assert [trial.get("cause") for trial in told] == causes
    assert [trial["state"] for trial in told] == [t.state.name for t in study.trials]
    assert descendants(str(tmp_path)) == []
    # The process of a trial that ended well serves the next one; of the others, each had its own.
    ran = [last_process(directory / "trials" / f"{n:04d}")["pid"] for n in range(len(faults))]
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
    pattern = "runs/smoke-*/trials/*/training/checkpoints/step_*"
    while not any(tmp_path.glob(pattern)) and time.monotonic() < deadline:
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130
    said = (tmp_path / "log").read_text()
    assert "what there is so far" in said
    assert "run the same command again to go on" in said
    (study,) = tmp_path.glob("runs/smoke-*/study.json")
    assert (study.parent / "report.html").is_file()
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 0, again.stderr[-3000:]
    trials = json.loads(study.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert len(json.loads(study.read_text())["sessions"]) == 2
