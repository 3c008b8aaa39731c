"""Stopping hopeless trials: the score on the way, the rule, that it is decided once and for all."""

import dataclasses
import json
import statistics
import threading

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.names import METRICS, MODEL, RUNG
from lrmc_ray.files.place import LocalPlace
from lrmc_ray.train.early_stopping import (
    Decision,
    EarlyStopping,
    comparable,
    decide,
    read_decision,
    rung_of,
    slice_change,
    values_of_others,
)
from lrmc_ray.train.run_files import LocalRun
from tests.support.rung import RULE, change, write_decision
from tests.support.synthetic_study import item_rows
from tests.support.training import kill_after, run_alone, settings_of

OTHERS = {0: 0.1, 1: 0.2, 2: 0.3, 5: 0.6}


# The score


def test_a_slice_of_choices_and_texts_scores_as_the_whole_comparison_does():
    """Against the paired comparison of the same items, of which only the intervals are left out."""
    rows = {
        name: item_rows(*model) for name, model in {"b": (0, 0.1, 0.0), "t": (3, 0.6, 0.05)}.items()
    }
    kept = {
        name: [
            {**row, "group": "domain" if row["task"] == "capitals" else "general"}
            for row in these
            if row["task"] != "nl2sql" and int(row["item_id"][-3:]) < 16
        ]
        for name, these in rows.items()
    }
    expected = compare(
        Scores.from_rows(kept["b"]), Scores.from_rows(kept["t"]), forgetting_weight=2.0
    )
    smooth = [row for row in kept["t"] if row["metric"] != "accuracy"]
    # The base has been scored on all items, and on generated answers as well.
    base = Scores.from_rows(rows["b"])
    found = slice_change(base, reversed(smooth), forgetting_weight=2.0)
    assert found.domain_gain == pytest.approx(expected.domain_gain.value, abs=1e-12)
    assert found.forgetting == pytest.approx(expected.forgetting.value, abs=1e-12)
    assert found.combined == pytest.approx(expected.combined.value, abs=1e-12)
    spread = float(expected.forgetting_replicates.std())
    assert found.forgetting_error == pytest.approx(spread, rel=0.15)


def test_answers_count_by_their_gold_probability_alone():
    base, tuned = item_rows(0, 0.1, 0.0), item_rows(3, 0.6, 0.05)
    own = [r for r in tuned if r["metric"] in ("gold_probability", "probability")]
    gold = [
        statistics.fmean(r["value"] for r in rows if r["metric"] == "gold_probability")
        for rows in (base, tuned)
    ]
    found = slice_change(Scores.from_rows(base), own, forgetting_weight=1.0)
    assert found.domain_gain == pytest.approx(gold[1] - gold[0], abs=1e-12)


def test_items_that_the_base_was_not_asked_and_broken_scores_are_refused():
    base = Scores.from_rows(item_rows(0, 0.1, 0.0))
    rows = [r for r in item_rows(3, 0.6, 0.05) if r["metric"] != "accuracy"]
    with pytest.raises(DataError, match="'other' of the slice is not in the base model's scores"):
        slice_change(base, [{**rows[0], "item_id": "other"}, *rows[1:]], forgetting_weight=1.0)
    with pytest.raises(DataError, match="must be finite on the way"):
        slice_change(base, [{**rows[0], "value": float("nan")}, *rows[1:]], forgetting_weight=1.0)


def test_answers_are_not_generated_and_score_as_in_the_whole_evaluation(tiny_model, monkeypatch):
    from lrmc_ray.evaluate.harness import score, slice_rows
    from lrmc_ray.evaluate.prefix_lm import PrefixLM
    from lrmc_ray.evaluate.request import ScoreRequest
    from lrmc_ray.models.loading import load_model, load_tokenizer

    request = ScoreRequest(
        tasks=(("nl2sql", "domain"),), batch_tokens=512, precision="fp32", limit=2, split="dev",
        drift_samples={"domain": 0, "general": 0},
    )  # fmt: skip
    whole = [row for row in score(tiny_model, request).rows if row["metric"] == "gold_probability"]

    def generate(*arguments):
        raise AssertionError("generated")

    monkeypatch.setattr(PrefixLM, "generate_until", generate)
    found = slice_rows(
        load_model(tiny_model), load_tokenizer(tiny_model), request.tasks,
        items=2, batch_tokens=512, split="dev",
    )  # fmt: skip
    assert [row["item_id"] for row in found] == [row["item_id"] for row in whole[:2]]
    for row, expected in zip(found, whole[:2], strict=True):
        assert row.pop("value") == pytest.approx(expected.pop("value"), rel=1e-4)
        assert row == expected


# The rule


@pytest.mark.parametrize(
    ("value", "others", "may_stop", "stop"),
    [
        (0.24, OTHERS, True, True),  # the median is 0.25
        (0.25, OTHERS, True, False),
        (0.26, OTHERS, True, False),
        (0.24, OTHERS, False, False),
        (-9.0, {0: 0.1, 1: 0.2, 2: 0.3}, True, False),
        (-9.0, {}, True, False),
    ],
)
def test_a_trial_worse_than_the_median_of_enough_others_stops(value, others, may_stop, stop):
    rung = dataclasses.replace(RULE, may_stop=may_stop)
    assert decide(change(combined=value), others, rung, seconds=1.0).stop is stop


def test_within_the_budget_the_gain_counts_and_beyond_it_the_excess():
    budget = dataclasses.replace(RULE, objective="budget")
    within = [change(0.1, 0.005), change(0.3, 0.02, error=0.01), change(0.5, -0.1)]
    beyond = [change(0.9, 0.5), change(0.9, 0.2, error=0.02), change(-0.5, 0.05)]
    values = [comparable(one, budget) for one in (*beyond, *within)]
    assert values == sorted(values)
    assert values[3:] == [0.1, 0.3, 0.5]
    assert comparable(change(0.9, 0.5), RULE) == pytest.approx(0.4)  # combined knows no budget


def settings_with(search, **sections):
    return RunSettings.model_validate({"search": search, **sections})


def rung_for(settings, role="search"):
    return rung_of(settings, number=3, role=role, trials="t", base_scores="b")


def test_where_a_trial_is_scored_on_the_way():
    median = {"early_stopping": "median"}
    found = rung_for(settings_with(median, train={"steps": 25}))
    assert (found.step, found.items, found.least, found.may_stop) == (13, 16, 4, True)
    assert found.tasks[0] == ("nl2sql", "domain")
    assert {group for _, group in found.tasks[1:]} == {"general"}
    assert rung_for(settings_with(median), "yardstick").may_stop is False
    assert rung_for(settings_with(median), "defaults").may_stop is False
    # No more items than the base model was asked, and whole steps in floating point.
    few = settings_with(
        {**median, "early_stopping_after": 0.55}, evaluate={"limit": 6}, train={"steps": 20}
    )
    assert (rung_for(few).step, rung_for(few).items) == (11, 6)
    for nothing in ({}, {**median, "trials": 4}):
        assert rung_for(settings_with(nothing)) is None
    assert rung_for(settings_with(median, train={"steps": 1})) is None


def test_a_front_has_no_one_score_to_stop_by():
    with pytest.raises(ValueError, match="early_stopping must be 'none' with objective = 'pareto'"):
        settings_with({"early_stopping": "median", "objective": "pareto"})


def test_the_shipped_spaces_stop_early_where_there_are_many_trials():
    from lrmc_ray.config import find_space, load_settings

    stops = {
        name: load_settings(find_space(name)).search.stops_early
        for name in ("demo", "smoke", "pareto", "tau_delta_max", "with_lr", "auto", "budget")
    }
    assert [name for name, does in stops.items() if does] == [
        "tau_delta_max", "with_lr", "auto", "budget"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="early_stopping must be"):
        load_settings(find_space("with_lr"), ["search.objective=pareto"])


# What is on disk


def test_all_other_trials_of_the_study_are_compared_with(tmp_path):
    for number, value in OTHERS.items():
        write_decision(tmp_path, number, value)
    own = write_decision(tmp_path, 7, -1.0)
    (tmp_path / "0009" / "training").mkdir(parents=True)  # has not come so far
    assert values_of_others(dataclasses.replace(RULE, trials=str(tmp_path)), LocalPlace()) == OTHERS
    assert read_decision(own).value == -1.0
    assert read_decision(tmp_path / "0009" / "training") is None


@pytest.mark.parametrize("content", ["", "{", '{"value": 1}', "[]"])
def test_a_damaged_decision_is_an_error(tmp_path, content):
    (tmp_path / RUNG).write_text(content)
    with pytest.raises(DataError, match="is damaged"):
        read_decision(tmp_path)


# Training that stops itself


@pytest.fixture
def start(tiny_model, recorded, tmp_path, base_scores):
    def make(number=7, *, is_scored=True, others=None, **changes):
        trials = tmp_path / "trials"
        for other, value in (others or {}).items():
            if not (trials / f"{other:04d}").is_dir():
                write_decision(trials, other, value)
        directory = trials / f"{number:04d}" / "training"
        directory.mkdir(parents=True, exist_ok=True)
        rung = dataclasses.replace(
            RULE, number=number, trials=str(trials), base_scores=str(base_scores)
        )
        return run_alone(
            settings_of(**changes),
            record=recorded,
            model=tiny_model,
            directory=directory,
            rung=rung if is_scored else None,
        )

    return make


def test_scoring_on_the_way_does_not_change_what_is_trained(start):
    plain, scored = start(1, is_scored=False), start(2)
    told = [plain.run(), scored.run()]
    assert [run["pruned"] for run in told] == [False, False]
    assert [run["steps"] for run in told] == [6, 6]
    weights = [load_file(run.directory / MODEL / "model.safetensors") for run in (plain, scored)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [read_metrics(run.directory / METRICS) for run in (plain, scored)]
    assert [line.metrics["train/loss"] for line in lines[0]] == [
        line.metrics["train/loss"] for line in lines[1]
    ]
    # And of the machine at every step.
    assert all(line.metrics["system/process_memory_usage_megabytes"] > 50 for line in lines[1])
    assert scored.learner.model.training
    on_the_way = [line.step for line in lines[1] if "slice/combined" in line.metrics]
    assert on_the_way == [3]
    decision = read_decision(scored.directory)
    assert lines[1][2].metrics["slice/combined"] == decision.combined
    assert decision.step == 3
    assert decision.combined == pytest.approx(decision.domain_gain - 2 * decision.forgetting)


def test_the_score_on_the_way_is_that_of_the_saved_model(start, tiny_model, base_scores):
    """Three steps and saved, scored by the evaluation, against six steps scored at the third."""
    from lrmc_ray.evaluate.harness import score
    from lrmc_ray.evaluate.request import ScoreRequest

    short = start(1, is_scored=False, steps=3)
    short.run()
    way = start(2)
    way.run()
    request = ScoreRequest(
        tasks=RULE.tasks, batch_tokens=512, precision="fp32", limit=4, split="dev",
        drift_samples={"domain": 0, "general": 0},
    )  # fmt: skip
    rows = score(short.directory / MODEL, request).rows
    known = {(r["task"], r["item_id"]) for r in rows}
    base = Scores.load(base_scores).items.to_pylist()
    expected = compare(
        Scores.from_rows([r for r in base if (r["task"], r["item_id"]) in known]),
        Scores.from_rows(rows),
        forgetting_weight=2.0,
    )
    found = read_decision(way.directory)
    assert found.domain_gain == pytest.approx(expected.domain_gain.value, abs=1e-6)
    assert found.forgetting == pytest.approx(expected.forgetting.value, abs=1e-6)
    assert abs(found.domain_gain) > 1e-5  # it did learn something


HIGH = dict.fromkeys(range(4), 9.0)


def test_a_hopeless_run_ends_and_leaves_no_model(start):
    run = start(others=HIGH)
    told = run.run()
    assert (told["steps"], told["pruned"]) == (3, True)
    assert not (run.directory / MODEL).exists()
    assert [line.step for line in read_metrics(run.directory / METRICS)] == [1, 2, 3]
    decision = read_decision(run.directory)
    assert (decision.stop, decision.median) == (True, 9.0)
    assert decision.others == {"0": 9.0, "1": 9.0, "2": 9.0, "3": 9.0}
    assert "after 3 of 6 steps" in decision.reason(6)
    assert "worse than the median of 4 other trials" in decision.reason(6)


@pytest.mark.parametrize("others", [HIGH, dict.fromkeys(range(4), -9.0)])
def test_a_killed_run_comes_to_the_decision_that_was_written_down(start, others, monkeypatch):
    """Whatever the others have scored meanwhile, and without scoring again."""
    run = start(others=others)
    # Killed right behind the decision, before anything follows from it.
    decide_first = run.early_stopping.decide

    def decide_and_die(model):
        decide_first(model)
        raise KeyboardInterrupt

    run.early_stopping.decide = decide_and_die
    with pytest.raises(KeyboardInterrupt):
        run.run()
    before = (run.directory / RUNG).read_bytes()
    is_stopped = read_decision(run.directory).stop
    assert is_stopped == (others == HIGH)
    for number in others:
        path = run.directory.parents[1] / f"{number:04d}" / "training" / RUNG
        write_json(path, json.loads(path.read_text()) | {"value": -others[number]})

    def nothing(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr("lrmc_ray.train.early_stopping.slice_rows", nothing)
    again = start()
    assert again.run()["pruned"] is is_stopped
    assert (again.directory / RUNG).read_bytes() == before
    assert (again.directory / MODEL).exists() is not is_stopped


def test_a_run_killed_before_its_rung_ends_like_one_left_alone(start):
    whole = start(1)
    whole.run()
    cut = start(2)
    kill_after(cut, 1)
    again = start(2)
    again.run()
    first, second = read_decision(whole.directory), read_decision(again.directory)
    assert (first.value, first.domain_gain) == (second.value, second.domain_gain)


# Several workers


class Together:
    """A group of threads: ``gather`` as torch.distributed has it."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size)
        self.values = [None] * world_size

    def member(self, rank):
        together, size = self, len(self.values)

        class Member:
            world_size = size

            def gather(self, own):
                together.values[rank] = own
                together.barrier.wait(30)
                values = list(together.values)
                together.barrier.wait(30)
                return values

        Member.rank = rank
        return Member()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_workers_share_the_tasks_and_agree(tmp_path, tiny_model, monkeypatch, world_size):
    """With one file written by the first; more workers than tasks, too."""
    asked = []
    rows = [
        r for r in item_rows(3, 0.6, 0.05) if r["metric"] != "accuracy" and r["task"] != "nl2sql"
    ]
    rows = [{**r, "group": "domain" if r["task"] == "capitals" else "general"} for r in rows]

    def slice_rows(model, tokenizer, tasks, **how):
        asked.extend(tasks)
        return [r for r in rows if r["task"] in {name for name, _ in tasks}]

    monkeypatch.setattr("lrmc_ray.train.early_stopping.slice_rows", slice_rows)
    Scores.from_rows(item_rows(0, 0.1, 0.0)).save(tmp_path / "base")
    for number, value in OTHERS.items():
        write_decision(tmp_path / "trials", number, value)
    directory = tmp_path / "trials" / "0007" / "training"
    directory.mkdir(parents=True)
    rung = dataclasses.replace(
        RULE, trials=str(tmp_path / "trials"), base_scores=str(tmp_path / "base")
    )
    group = Together(world_size)
    made = {}

    def work(rank):
        worker = EarlyStopping(
            rung, files=LocalRun(directory), model_directory=tiny_model, group=group.member(rank)
        )
        made[rank] = worker.decide(None)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(asked) == sorted(RULE.tasks)  # each once
    expected = slice_change(Scores.load(tmp_path / "base"), rows, forgetting_weight=2.0)
    assert {one.value for one in made.values()} == {expected.combined}
    assert {one.stop for one in made.values()} == {expected.combined < 0.25}
    assert len(made) == world_size
    assert isinstance(made[0], Decision)
    assert read_decision(directory) == made[0]
