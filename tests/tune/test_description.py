"""What ``study.json`` says of a search: against files and trials made by hand."""

import dataclasses
import json

import optuna

from lrmc_ray.config import RunSettings
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.files.names import RUNG
from lrmc_ray.files.study import trial_directory
from lrmc_ray.train.early_stopping import Decision
from lrmc_ray.tune.description import Description, study_directory, study_identity
from lrmc_ray.tune.queue import TrialQueue, open_study
from lrmc_ray.tune.result import RunResult, write_result
from tests.support.searches import POINTS, make_description, search_settings
from tests.support.tiny import make_data
from tests.support.training import record_of


def test_a_longer_limit_and_more_trials_are_the_same_search():
    def identity(**search):
        return study_identity(RunSettings.model_validate({"search": search}))

    assert identity() == identity(
        trials=99, trial_timeout_seconds=5.0, keep_models="all", final_limit=7
    )
    assert identity() != identity(objective="pareto")
    assert identity(objective="budget") != identity(objective="budget", max_forgetting=0.02)


def test_a_study_begins_with_every_key_that_it_later_fills(tmp_path):
    settings = search_settings(objective="budget", max_forgetting=0.02)
    directory = study_directory(settings, tmp_path, {"model": "a"})
    made = Description(directory, settings, {"model": "a"}, experiment="mine")
    written = json.loads((made.directory / "study.json").read_text())
    assert set(written) == {
        *("artifacts", "asked", "best", "closest", "contents", "created", "datasets"),
        *("experiment", "final"),
        *("forecast", "forgetting_weight", "id", "importance", "max_forgetting", "name"),
        *("objective", "record", "schema", "sessions", "settings", "space", "stage_seconds"),
        *("state", "trials", "versions"),
    }
    assert (written["schema"], written["state"], written["experiment"]) == (1, "RUNNING", "mine")
    assert (written["objective"], written["max_forgetting"]) == ("budget", 0.02)
    assert written["id"] == made.directory.name
    assert written["contents"] == {"model": "a"}
    assert written["settings"] == settings.model_dump(mode="json", exclude={"parameters"})
    [(began, ended)] = written["sessions"]
    assert began <= ended


def test_a_study_that_goes_on_keeps_what_a_newer_version_wrote(tmp_path):
    first = make_description(tmp_path, POINTS)
    first.write()
    path = first.directory / "study.json"
    written = json.loads(path.read_text())
    written["invented"] = {"a": [1, 2.0]}
    written["trials"][2]["invented"] = "b"
    written["trials"][2]["cost"] = {"train_seconds": 3, "evaluate_seconds": 4.5}
    path.write_text(json.dumps(written))
    again = Description(first.directory, first.settings, {})
    again.file.trials[2].cause = "c"
    again.write()
    now = json.loads(path.read_text())
    assert len(now.pop("sessions")) == len(written.pop("sessions")) + 1
    written["trials"][2]["cause"] = "c"
    assert json.dumps(now, sort_keys=True) == json.dumps(written, sort_keys=True)


def test_a_trial_that_stopped_early_is_described_and_never_the_best(tmp_path):
    search = make_description(tmp_path, POINTS[:1], early_stopping="median", yardstick_lr=None)
    search.file.trials = []
    study = open_study(search.directory / "study.db", "s")
    queue = TrialQueue(study, search.settings)
    queue.next()
    directory = trial_directory(search.directory, 0)
    decision = Decision(0, 12, 0.9, 0.9, 0.0, 0.9, {"3": 1.0, "4": 1.2}, 1.1, True, 2.5)
    write_json(directory / "training" / RUNG, dataclasses.asdict(decision))
    cost = {"train_seconds": 30.0, "evaluate_seconds": 0.0, "train_cores": 1, "evaluate_cores": 1}
    write_result(directory, RunResult({}, None, {"steps": 24}, cost))
    queue.report(0, 12, 0.9)
    queue.prune(0, 0.0)
    entry = search.describe(queue.trial(0))
    search.choose_best()
    assert search.file.trials == [entry]
    assert (entry.state, entry.scores, entry.results) == ("PRUNED", None, {})
    assert entry.cause.startswith("after 12 of 24 steps its combined score on a few items was")
    assert (entry.rung["value"], entry.cost["train_seconds"]) == (0.9, 30.0)
    assert entry.ended is not None
    assert search.file.best is None
    assert search.num_failed == 0
    search.end()
    assert search.is_finished
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED


def test_epochs_of_a_trial_are_described_as_its_steps(tmp_path, tiny_model):
    """8 samples: 3 epochs in batches of 4 are 6 steps; what a trial cannot have is left to it."""
    data = make_data(tmp_path / "train.jsonl", num_rows=8)
    search = make_description(tmp_path, POINTS[:1])
    epochs = {"epochs": 3.0, "batch_size": 4, "micro_batches": 2, "steps": 500}
    train = search.settings.train.model_copy(update=epochs)
    assert search.with_steps(train).steps == 500  # no record yet
    search.recorded = record_of(tiny_model, data, tmp_path / "record")
    assert (search.with_steps(train).steps, search.with_steps(train).epochs) == (6, None)
    too_warm = train.model_copy(update={"warmup_steps": 7})
    assert search.with_steps(too_warm) is too_warm
