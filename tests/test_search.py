"""The study's queue: which trial comes next, and that none stays RUNNING."""

import math

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from lrmc_ray.config import RunSettings
from lrmc_ray.search import OBJECTIVE, StudySearcher, TrialQueue, distribution, open_study


def make_settings(**search):
    return RunSettings.model_validate(
        {
            "search": {"trials": 5, "startup_trials": 2, **search},
            "train": {"tau": 0.99, "delta_max": 45.0},
            "parameters": {
                "tau": {"low": 0.8, "high": 0.999},
                "lr": {"low": 1e-6, "high": 1e-3, "log": True},
                "steps": {"low": 10, "high": 30},
                "clip": {"choices": ["scale", "momentum"]},
            },
        }
    )


def drain(queue, value=0.0):
    """Run every trial that the queue hands out; returns them."""
    trials = []
    while (trial := queue.next()) is not None:
        trials.append(trial)
        queue.complete(trial.number, value + trial.number)
    return trials


def test_first_trial_is_the_defaults_and_second_plain_fine_tuning(tmp_path):
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(yardstick_lr=2e-5))
    first, second, third = queue.next(), queue.next(), queue.next()
    assert first.number == 0
    assert first.params == {"tau": 0.99, "lr": 3e-5, "steps": 30, "clip": "scale"}
    assert first.user_attrs["role"] == "defaults"
    assert second.params == {}
    assert second.user_attrs["overrides"] == {
        "loss": "full",
        "optimizer": "adamw",
        "lr": 2e-5,
        "anchor_weight": 0.0,
    }
    assert third.user_attrs["role"] == "search"
    assert set(third.params) == {"tau", "lr", "steps", "clip"}
    assert isinstance(third.params["steps"], int)


def test_defaults_outside_the_space_are_drawn_from_it(tmp_path):
    settings = make_settings()
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"tau": 0.5, "lr": 1e-5})}
    )
    first = TrialQueue(open_study(tmp_path / "s.db", "s"), settings).next()
    assert first.params["lr"] == 1e-5
    assert 0.8 <= first.params["tau"] <= 0.999


def test_no_yardstick_where_none_is_wanted(tmp_path):
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(yardstick_lr=None))
    assert [trial.user_attrs["role"] for trial in drain(queue)] == ["defaults", *["search"] * 4]


def test_a_reopened_study_hands_out_unfinished_trials_first_and_repeats_no_point(tmp_path):
    settings = make_settings(trials=6, startup_trials=10)
    whole = drain(TrialQueue(open_study(tmp_path / "whole.db", "s"), settings))

    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), settings)
    done = queue.next()
    queue.complete(done.number, 0.0)
    left = [queue.next(), queue.next()]  # the driver dies here
    reopened = TrialQueue(open_study(tmp_path / "s.db", "s"), settings)
    rest = drain(reopened)
    assert [trial.number for trial in rest] == [trial.number for trial in left] + [3, 4, 5]
    assert rest[0].params == left[0].params
    points = [tuple(sorted(trial.params.items())) for trial in [done, *rest] if trial.params]
    assert len(set(points)) == len(points)
    # Seeded per trial: a random point does not depend on when the driver died.
    assert rest[1].params == whole[2].params
    assert reopened.is_finished
    states = {t.state for t in open_study(tmp_path / "s.db", "s").trials}
    assert states == {TrialState.COMPLETE}


def test_a_trial_cut_off_before_its_settings_were_complete_is_failed_and_replaced(tmp_path):
    study = open_study(tmp_path / "s.db", "s")
    study.ask()  # a crash right after this leaves a RUNNING trial without a role
    queue = TrialQueue(study, make_settings())
    assert study.trials[0].state == TrialState.FAIL
    assert [trial.number for trial in drain(queue)] == [1, 2, 3, 4, 5]
    assert queue.is_finished


def test_more_trials_may_be_asked_for_later(tmp_path):
    drain(TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(trials=3)))
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(trials=5))
    assert not queue.is_finished
    assert [trial.number for trial in drain(queue)] == [3, 4]


def test_the_sampler_learns_from_the_scores(tmp_path):
    """With 40 trials of a smooth objective TPE beats the median of random points clearly."""
    settings = make_settings(trials=40, startup_trials=8)
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), settings)
    values = []
    while (trial := queue.next()) is not None:
        lr = trial.params.get("lr", 1e-3)
        value = -((math.log10(lr) + 4.5) ** 2)
        values.append(value)
        queue.complete(trial.number, value)
    assert sum(values[-15:]) / 15 > sum(values[2:10]) / 8


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        ({OBJECTIVE: 0.5}, False, TrialState.COMPLETE),
        ({OBJECTIVE: float("nan")}, False, TrialState.FAIL),
        ({OBJECTIVE: float("inf")}, False, TrialState.FAIL),
        ({}, False, TrialState.FAIL),
        (None, False, TrialState.FAIL),
        (None, True, TrialState.FAIL),
        ({OBJECTIVE: 0.5}, True, TrialState.FAIL),
    ],
)
def test_every_way_of_ending_is_told_to_the_study(tmp_path, result, error, state):
    study = open_study(tmp_path / "s.db", "s")
    queue = TrialQueue(study, make_settings())
    changes = []

    def on_change(number, result, cause):
        changes.append((number, cause))
        if cause is not None:
            queue.fail(number, cause)

    searcher = StudySearcher(queue, on_change)
    config = searcher.suggest("t1")
    assert config["number"] == 0
    searcher.on_trial_complete("t1", result, error)
    assert study.trials[0].state == state
    assert changes[0] == (0, None)
    if state == TrialState.FAIL:
        assert study.trials[0].user_attrs["cause"] == changes[1][1]
    else:
        assert study.trials[0].value == 0.5


def test_the_searcher_says_when_it_is_finished(tmp_path):
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(trials=2))
    searcher = StudySearcher(queue, lambda *change: None)
    searcher.suggest("a")
    searcher.suggest("b")
    assert searcher.suggest("c") == Searcher.FINISHED


def test_distributions_follow_the_types_of_the_settings():
    parameters = make_settings().parameters
    assert distribution("lr", parameters["lr"]) == optuna.distributions.FloatDistribution(
        1e-6, 1e-3, log=True
    )
    assert distribution("steps", parameters["steps"]) == optuna.distributions.IntDistribution(
        10, 30
    )
    assert distribution("clip", parameters["clip"]).choices == ("scale", "momentum")
