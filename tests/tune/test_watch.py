"""What the terminal shows while trials run."""

import io
import time

from rich.console import Console

from lrmc_ray.files.metrics_log import MetricsLog
from lrmc_ray.files.study import StudyFile
from lrmc_ray.tune.watch import trial_line, trials_table
from tests.support.searches import make_description, trial_entry

DONE = {
    "results": {"eval/domain_gain": 0.3, "eval/forgetting": 0.01, "eval/combined": 0.29},
    "cost": {
        "train_seconds": 3600.0, "train_cores": 2, "evaluate_seconds": 1800.0, "evaluate_cores": 1
    },
}  # fmt: skip


def shown(trials, directory, best=None):
    study = StudyFile(
        schema=1,
        id="s-1",
        name="s",
        created="now",
        state="RUNNING",
        forgetting_weight=1.0,
        trials=trials,
        best=best,
    )
    now = time.time()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(trials_table(directory, study, 4, now - 600))
    return console.export_text()


def test_the_table_marks_the_best_and_counts_core_hours(tmp_path):
    ended = time.time() - 1
    text = shown(
        [
            trial_entry(0, "COMPLETE", ended=ended, **DONE),
            trial_entry(1, "COMPLETE", ended=ended, **DONE),
            trial_entry(2, "FAIL", cause="its process died", ended=ended),
            trial_entry(3, "RUNNING"),
        ],
        tmp_path,
        best=1,
    )
    lines = {line.strip("│┃ ")[:1]: line for line in text.splitlines()}
    assert "best so far" in lines["1"]
    assert "best so far" not in lines["0"]
    assert "failed: its process died" in lines["2"]
    assert "starting" in lines["3"]
    assert "3 of 4 trials ended" in text
    assert "3 min 20 s left" in text  # three in ten minutes
    assert "5 core hours so far" in text  # twice 1 h on 2 cores and half an hour on 1


def test_a_trial_that_stopped_early_is_told_from_one_that_failed(tmp_path):
    cause = "after 3 of 6 steps its combined score was low"
    early = trial_entry(2, "PRUNED", cause=cause, ended=time.time() - 1)
    assert "stopped early: after 3 of 6 steps" in shown([early], tmp_path)
    assert trial_line(early, 4, is_best=False) == f"trial 2 of 4 (search) stopped early: {cause}"
    with MetricsLog(tmp_path / "none.jsonl") as log:
        log.log(1, {"train/loss": 0.7, "train/step_seconds": 90.0})
    # What the first step takes says nothing of the others.
    assert "left" not in shown([trial_entry(1, "RUNNING")], tmp_path).partition("loss 0.700")[2]
    with MetricsLog(tmp_path / "none.jsonl") as log:
        log.log(2, {"train/loss": 0.6, "train/step_seconds": 2.0})
        log.log(3, {"train/loss": 0.5, "train/step_seconds": 1.0, "slice/combined": 0.125})
        log.log(4, {"train/loss": 0.4, "train/step_seconds": 3.0})
    assert "loss 0.400, combined +12.5 on the way, 12 s" in shown(
        [trial_entry(1, "RUNNING")], tmp_path
    )


def test_a_terminal_of_80_columns_says_that_the_base_is_being_scored(tmp_path):
    study = make_description(tmp_path, [(0.9, 0.0)]).file
    study.trials = [
        trial_entry(0, "RUNNING", params={"lr": 3e-5, "tau": 0.9, "optimizer": "moclip"}),
    ]

    def text():
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(trials_table(tmp_path, study, 6, time.time()))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 80
        return " ".join(" ".join(lines).replace("│", " ").split())

    with MetricsLog(tmp_path / "none.jsonl") as log:
        log.log(10, {"train/loss": 0.7})
    assert "base not trained being scored" in text()
    assert "waits for the base's scores" in text()
    study.base_scores = "../scores/b"
    assert "base" not in text()
    assert " scoring " in text()


def test_without_costs_there_are_no_core_hours(tmp_path):
    assert "core hours" not in shown([trial_entry(0, "RUNNING")], tmp_path)


def test_a_line_says_which_trial_is_the_best():
    done = trial_entry(1, "COMPLETE", **DONE)
    assert trial_line(done, 4, is_best=True).endswith("the best so far")
    assert trial_line(done, 4, is_best=False).endswith("combined +29.0")


def test_the_table_of_many_trials_has_room_in_a_terminal(tmp_path):
    study = make_description(tmp_path, [(0.9, 0.0), *[(0.1, 0.0)] * 99]).file
    study.trials[5] = trial_entry(5, "RUNNING")
    study.best, study.base_scores = 0, "base"
    table = trials_table(tmp_path, study, 200, 0.0)
    numbers = list(table.columns[0].cells)
    assert numbers == [str(number) for number in (0, 5, *range(61, 100))]
    assert table.caption == "59 that ended earlier are not shown"
    few = make_description(tmp_path / "few", [(0.9, 0.0)] * 3).file
    assert trials_table(tmp_path, few, 3, 0.0).caption is None
