"""The study's queue: which trial comes next, and that none stays RUNNING."""

import contextlib
import itertools
import math

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher
from sqlalchemy.orm import Session

from lrmc_ray.config import RunSettings
from lrmc_ray.tune.queue import (
    StudySearcher,
    TrialQueue,
    distribution,
    open_study,
)
from lrmc_ray.tune.result import COMBINED, FORGETTING, GAIN


def results(gain=0.0, forgetting=0.0):
    return {GAIN: gain, FORGETTING: forgetting, COMBINED: gain - forgetting}


def make_settings(**search):
    return RunSettings.model_validate(
        {
            "search": {"trials": 5, "startup_trials": 2, **search},
            "train": {"tau": 0.99, "delta_max": 45.0, "clip": "scale"},
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
        queue.complete(trial.number, results(value + trial.number))
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


def test_defaults_that_are_no_choice_or_no_number_are_drawn_from_the_space(tmp_path):
    settings = RunSettings.model_validate(
        {
            "parameters": {
                "optimizer": {"choices": ["adamw", "mofo"]},
                "max_grad_norm": {"low": 0.5, "high": 2.0},
                "lr": {"low": 1e-6, "high": 1e-3, "log": True},
            },
        }
    )
    assert (settings.train.optimizer, settings.train.max_grad_norm) == ("moclip", None)
    first = TrialQueue(open_study(tmp_path / "s.db", "s"), settings).next()
    assert first.params["optimizer"] in ("adamw", "mofo")
    assert 0.5 <= first.params["max_grad_norm"] <= 2.0
    assert first.params["lr"] == 3e-5


def test_no_yardstick_where_none_is_wanted(tmp_path):
    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(yardstick_lr=None))
    assert [trial.user_attrs["role"] for trial in drain(queue)] == ["defaults", *["search"] * 4]


def test_a_reopened_study_hands_out_unfinished_trials_first_and_repeats_no_point(tmp_path):
    settings = make_settings(trials=6, startup_trials=10)
    whole = drain(TrialQueue(open_study(tmp_path / "whole.db", "s"), settings))

    queue = TrialQueue(open_study(tmp_path / "s.db", "s"), settings)
    done = queue.next()
    queue.complete(done.number, results())
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


class Killed(BaseException):
    """What stands for kill -9."""


@contextlib.contextmanager
def killed_behind(transaction=0):
    """End what is done within behind its ``transaction``-th commit; yields what counts them."""
    count, commit = itertools.count(1), Session.commit

    def commit_and_die(session):
        commit(session)
        if next(count) == transaction:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "commit", commit_and_die)
        yield count


def test_killed_behind_any_transaction_the_same_trials_come(tmp_path):
    settings = make_settings(trials=3)

    def asked(path):
        queue = TrialQueue(open_study(path, "s"), settings)
        assert queue.is_finished
        trials = queue.ready_trials()
        assert {trial.state for trial in trials} == {TrialState.COMPLETE}
        return [(trial.user_attrs["role"], trial.params) for trial in trials]

    study = open_study(tmp_path / "alone.db", "s")
    with killed_behind() as count:
        drain(TrialQueue(study, settings))
    alone = asked(tmp_path / "alone.db")
    num_transactions = next(count) - 1
    assert [role for role, _ in alone] == ["defaults", "yardstick", "search"]
    assert num_transactions > 20
    for transaction in range(1, num_transactions + 1):
        path = tmp_path / f"{transaction}.db"
        study = open_study(path, "s")
        with pytest.raises(Killed), killed_behind(transaction):
            drain(TrialQueue(study, settings))
        drain(TrialQueue(open_study(path, "s"), settings))
        found = asked(path)
        assert found[:2] == alone[:2], transaction
        assert [role for role, _ in found[2:]] == ["search"], transaction


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
        queue.complete(trial.number, results(value))
    assert sum(values[-15:]) / 15 > sum(values[2:10]) / 8


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        (results(0.6, 0.1), False, TrialState.COMPLETE),
        (results(float("nan")), False, TrialState.FAIL),
        (results(float("inf")), False, TrialState.FAIL),
        (results() | {FORGETTING: float("nan")}, False, TrialState.FAIL),
        ({}, False, TrialState.FAIL),
        (None, False, TrialState.FAIL),
        (None, True, TrialState.FAIL),
        (results(0.5), True, TrialState.FAIL),
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
    searcher.on_trial_complete("a", results())
    searcher.on_trial_complete("b", results())
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


# Early stopping


def on_the_way(step, value, *, forgetting=0.0, stop=False, scores=None):
    told = {"rung/step": float(step), "rung/value": value, "rung/forgetting": forgetting}
    return told | {"rung/pruned": float(stop)} | (scores or {})


def test_a_trial_that_stopped_itself_is_pruned_and_its_score_is_kept(tmp_path):
    study = open_study(tmp_path / "s.db", "s")
    queue = TrialQueue(study, make_settings(trials=4, early_stopping="median"))
    changes = []
    searcher = StudySearcher(queue, lambda *change: changes.append(change))
    configs = [searcher.suggest(name) for name in "abc"]
    assert [config["role"] for config in configs] == ["defaults", "yardstick", "search"]
    searcher.on_trial_complete("a", on_the_way(15, 0.4, scores=results(0.6)))
    searcher.on_trial_complete("c", on_the_way(12, -0.2, stop=True))
    # The driver dies, and what a trial had told before is told again.
    queue.report(1, 15, 0.1)
    again = TrialQueue(open_study(tmp_path / "s.db", "s"), make_settings(trials=4))
    again.report(1, 15, 0.1)
    assert [trial.number for trial in drain(again)] == [1, 3]
    trials = open_study(tmp_path / "s.db", "s").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [trial.intermediate_values for trial in trials] == [{15: 0.4}, {15: 0.1}, {12: -0.2}, {}]
    assert trials[0].value == 0.6
    assert open_study(tmp_path / "s.db", "s").best_trial.number == 3
    assert changes[-1][0] == 2
    assert changes[-1][2] is None  # no cause: it has not failed
    assert again.is_finished


def test_the_sampler_learns_from_trials_that_stopped_beyond_the_budget(tmp_path):
    settings = make_settings(trials=4, objective="budget", max_forgetting=0.02)
    study = open_study(tmp_path / "s.db", "s", "budget")
    searcher = StudySearcher(TrialQueue(study, settings), lambda *change: None)
    for name in "abcd":
        searcher.suggest(name)
    searcher.on_trial_complete("c", on_the_way(5, -1.3, forgetting=0.32, stop=True))
    assert study.trials[2].constraints == {"forgetting": pytest.approx(0.3)}
    searcher.on_trial_complete("a", on_the_way(5, 0.5, forgetting=0.01, scores=results(0.6, 0.01)))
    assert study.best_trial.number == 0


# Objectives


def play(path, settings, outcome):
    """Run a whole search in which ``outcome`` says what a trial's parameters lead to."""
    study = open_study(path, "s", settings.search.objective)
    queue = TrialQueue(study, settings)
    while (trial := queue.next()) is not None:
        queue.complete(trial.number, results(*outcome(trial.params)))
    return study


def trade_off(params):
    """A higher learning rate learns more and forgets more; the plain trial forgets a lot."""
    strength = (math.log10(params.get("lr", 1e-3)) + 6) / 3
    return strength, strength**2 / 10


def test_trials_beyond_the_budget_are_constrained_and_never_the_best(tmp_path):

    def search(max_forgetting):
        settings = make_settings(
            trials=20, objective="budget", max_forgetting=max_forgetting, startup_trials=6
        )
        study = play(tmp_path / f"{max_forgetting}.db", settings, trade_off)
        gains = {trial.number: trial.value for trial in study.trials}
        return study, gains, {n: gain for n, gain in gains.items() if gain**2 / 10 <= 0.02}

    study, gains, feasible = search(0.02)
    assert 2 < len(feasible) < 20
    assert max(gains, key=gains.get) not in feasible
    assert study.best_trial.number == max(feasible, key=feasible.get)
    # The sampler knows: without the constraint it looks elsewhere.
    _, _, without = search(1.0)
    late, late_without = (sum(n >= 8 for n in inside) for inside in (feasible, without))
    assert late >= late_without + 3


def test_the_budget_survives_a_restart(tmp_path):
    settings = make_settings(trials=4, objective="budget", max_forgetting=0.02)
    study = open_study(tmp_path / "s.db", "s", "budget")
    queue = TrialQueue(study, settings)
    queue.complete(queue.next().number, results(0.9, 0.3))
    queue.complete(queue.next().number, results(0.2, 0.01))
    again = open_study(tmp_path / "s.db", "s", "budget")
    TrialQueue(again, settings)
    assert again.best_trial.number == 1
    assert [trial.constraints for trial in again.trials[:2]] == [
        {"forgetting": pytest.approx(0.28)},
        {"forgetting": pytest.approx(-0.01)},
    ]


def test_a_pareto_search_has_two_objectives(tmp_path):
    settings = make_settings(trials=12, objective="pareto")
    study = play(tmp_path / "s.db", settings, trade_off)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    for trial in study.trials:
        assert trial.values == pytest.approx(trade_off(trial.params))
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert len(study.best_trials) >= 10  # all lie on one curve


# Conditions


def test_a_parameter_is_searched_only_where_its_condition_holds(tmp_path):
    settings = RunSettings.model_validate(
        {
            "search": {"trials": 14, "startup_trials": 4},
            "parameters": {
                "delta_max": {"low": 10, "high": 120, "when": {"optimizer": "moclip"}},
                "optimizer": {"choices": ["moclip", "adamw"]},
                "lr": {"low": 1e-6, "high": 1e-3, "log": True},
            },
        }
    )
    trials = drain(TrialQueue(open_study(tmp_path / "s.db", "s"), settings))
    searched = [trial.params for trial in trials if trial.user_attrs["role"] != "yardstick"]
    assert {params["optimizer"] for params in searched} == {"moclip", "adamw"}
    for params in searched:
        assert ("delta_max" in params) == (params["optimizer"] == "moclip")
    assert searched[0] == {"optimizer": "moclip", "lr": 3e-5, "delta_max": 90.0}


def test_a_condition_on_a_fixed_setting_holds_always(tmp_path):
    settings = RunSettings.model_validate(
        {
            "search": {"trials": 3},
            "train": {"clip": "momentum"},
            "parameters": {"delta_max": {"low": 10, "high": 120, "when": {"clip": "momentum"}}},
        }
    )
    trials = drain(TrialQueue(open_study(tmp_path / "s.db", "s"), settings))
    assert ["delta_max" in trial.params for trial in trials] == [True, False, True]


def test_a_trial_that_lost_its_process_comes_before_all_others(tmp_path):
    queue = TrialQueue(open_study(tmp_path / "study.db", "s"), make_settings(trials=2))
    changes = []

    def on_change(number, result, cause):
        changes.append((number, cause))
        if cause is not None:
            queue.again(number)

    searcher = StudySearcher(queue, on_change)
    configs = [searcher.suggest("a"), searcher.suggest("b")]
    assert searcher.suggest("c") is None  # Tune asks again: one of these may be handed out anew
    searcher.on_trial_complete("b", results(0.3))
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("d") == configs[0]
    assert searcher.suggest("e") is None
    searcher.on_trial_complete("d", results(0.2))
    assert searcher.suggest("f") == Searcher.FINISHED
    assert queue.is_finished
    assert {trial.state for trial in queue.ready_trials()} == {TrialState.COMPLETE}
    assert [number for number, _ in changes] == [0, 1, 1, 0, 0, 0]
