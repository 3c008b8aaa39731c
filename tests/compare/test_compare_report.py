"""The comparison's table: arithmetic against closed forms; what is said where little is there."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lrmc_ray.compare.description import Description
from lrmc_ray.compare.jobs import Job
from lrmc_ray.compare.measure import (
    choice_score,
    estimate,
    excess_forgetting,
    general_half,
    loss_spikes,
)
from lrmc_ray.compare.report import (
    as_csv,
    as_html,
    as_json_object,
    as_markdown,
    console_effects,
    console_table,
    write_report,
)
from lrmc_ray.compare.run import Comparing
from lrmc_ray.compare.table import SearchPoint, forgetting_predictors, load_table
from lrmc_ray.compare.words import sentences
from lrmc_ray.console import plain_console
from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.numbers import points
from lrmc_ray.evaluate.statistics import Interval
from tests.support.synthetic_comparison import RATES, make_space, write_base, write_run
from tests.support.synthetic_study import item_rows, save_scores

# The choice


def test_general_items_are_dealt_in_turn_and_domain_items_all_stay():
    whole = Scores.from_rows(item_rows(3, 0.5, 0.01))
    dev, test = general_half(whole, "dev"), general_half(whole, "test")
    for task, count in (("wordnet", 200), ("capitals", 150), ("plain_english", 40)):
        halves = [set(half.objective(task).item_ids) for half in (dev, test)]
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == set(whole.objective(task).item_ids)
        assert [len(half) for half in halves] == [count // 2, count // 2]
        assert f"{task}-000" in halves[0]
    for half in (dev, test):
        assert half.objective("nl2sql").item_ids == whole.objective("nl2sql").item_ids
        assert half.metric("wordnet", "accuracy").num_items == 100  # every metric alike


def damaged(rows, places, amount):
    """General choice items at even (0) or odd (1) places lose that much probability."""
    return [
        {**row, "value": max(0.0, row["value"] - amount)}
        if row["metric"] == "probability" and int(row["item_id"][-3:]) % 2 == places
        else row
        for row in rows
    ]


def test_the_choice_sees_its_own_half_of_the_general_items_alone(tmp_path):
    """Damage to what is reported must not matter; choosing on it would be choosing on the test."""
    rows = item_rows(3, 0.5, 0.0)
    save_scores(tmp_path / "base", item_rows(1000, 0.03, 0.0), "base")
    save_scores(tmp_path / "whole", rows, "a")
    save_scores(tmp_path / "even", damaged(rows, 0, 0.3), "b")
    save_scores(tmp_path / "odd", damaged(rows, 1, 0.3), "c")

    def score(name, weight=1.0):
        return choice_score(tmp_path / "base", tmp_path / name, forgetting_weight=weight, seed=0)

    assert score("odd") == score("whole")
    assert score("even") < score("whole") - 0.1
    assert score("even", weight=0.0) == score("whole", weight=0.0)
    base, tuned = (Scores.load(tmp_path / name) for name in ("base", "whole"))
    gain = compare(base, tuned, forgetting_weight=0.0).domain_gain.value
    assert score("whole", weight=0.0) == pytest.approx(gain, abs=1e-12)


# Arithmetic


def test_an_estimate_by_hand():
    values = [0.50, 0.56, 0.53]
    replicates = np.random.default_rng(0).normal(0.53, 0.05, (3, 4000))
    found = estimate(values, replicates)
    assert found.value == pytest.approx(0.53)
    half = stats.t.ppf(0.975, 2) * 0.03 / math.sqrt(3)
    assert found.over_seeds.low == pytest.approx(0.53 - half)
    assert found.over_seeds.high == pytest.approx(0.53 + half)
    means = np.sort(replicates.mean(axis=0))
    assert found.over_items.low == pytest.approx(np.quantile(means, 0.025))
    assert found.over_items.high == pytest.approx(np.quantile(means, 0.975))
    assert found.distinguishable
    one = estimate([0.5], replicates[:1])
    assert one.over_seeds is None
    assert one.value == 0.5
    assert estimate([1.0, 1.2]).over_items is None
    # Both intervals must exclude zero.
    assert not estimate([0.5, -0.4, 0.3], replicates).distinguishable
    assert not estimate([0.5, 0.5, 0.51], replicates - 0.53).distinguishable


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([1.0] * 20, 0),
        ([3.0 * 0.8**step for step in range(30)], 0),
        ([1.0, 1.1, 0.9, 1.0, 1.1, 9.0], 1),
        ([1.0, 1.1, 0.9, 1.0, 9.0], 0),  # four steps before are too few to say
        ([1.0, 1.1, 0.9, 1.0, 1.1, 9.0, 1.0, 1.0, 1.0], 1),
        ([1.0, 1.1, 0.9, 1.0, 1.1, math.inf], 1),
        ([1.0, 1.1, 0.9, 1.0, 1.1, math.nan], 1),
        ([], 0),
    ],
)
def test_loss_spikes_by_hand(losses, spikes):
    assert loss_spikes(losses) == spikes
    assert loss_spikes([1000 * loss for loss in losses]) == spikes


def test_a_spike_is_three_deviations_above_the_ten_steps_before():
    before = [5.0] + [1.0, 2.0] * 5
    limit = float(np.mean(before[1:]) + 3 * np.std(before[1:], ddof=1))
    assert loss_spikes([*before, limit - 1e-9]) == 0
    assert loss_spikes([*before, limit + 1e-9]) == 1


def test_excess_forgetting_is_measured_from_the_line_between_the_references_points():
    # By rising learning rate; the fourth gains less than the third and forgets more.
    reference = [(0.2, 0.03), (0.4, 0.02), (0.6, 0.05), (0.5, 0.20)]
    assert excess_forgetting(0.3, 0.05, reference) == pytest.approx(0.05 - 0.025)
    assert excess_forgetting(0.5, 0.01, reference) == pytest.approx(0.01 - 0.035)
    assert excess_forgetting(0.6, 0.05, reference) == pytest.approx(0.0)
    assert excess_forgetting(0.2, 0.05, reference) == pytest.approx(0.02)
    assert excess_forgetting(0.61, 0.05, reference) is None
    assert excess_forgetting(0.19, 0.05, reference) is None
    assert excess_forgetting(0.19, 0.05, []) is None
    # One that gains less than a smaller rate does, on the way up, is where its gain is.
    assert excess_forgetting(0.3, 0.0, [(0.2, 0.0), (0.1, 0.3), (0.4, 0.2)]) == pytest.approx(-0.1)


# The table of a whole comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All runs made up; LoRA's third seed failed."""
    return make(tmp_path_factory.mktemp("finished"), failed=[Job("lora", 1e-4, 2, "test")])


def make(folder, *, failed=(), only=None, **changes):
    comparing = Comparing(
        Description(make_space(**changes), only or ["sft", "lrmc", "lora"], folder, {})
    )
    comparing.description.open()
    write_base(comparing)
    from lrmc_ray.compare.jobs import open_jobs

    while jobs := open_jobs(comparing.space, comparing.methods, comparing.description.outcomes):
        if jobs[0] in failed:
            comparing.description.fail(jobs[0], "its process died")
        else:
            write_run(comparing, jobs[0])
            comparing.description.complete(jobs[0])
    comparing.description.write()
    return comparing


@pytest.fixture(scope="module")
def table(finished):
    return load_table(finished.directory)


def scores_of(comparing, job):
    return general_half(
        Scores.load(comparing.description.run_directory(job) / "scores" / job.split), job.split
    )


def base_of(comparing, split):
    return general_half(Scores.load(comparing.output / "scores" / split), split)


def test_items_that_chose_the_learning_rates_as_well_are_not_called_test_items(tmp_path, table):
    """A domain task with too few items to be divided has the same ones in both splits."""
    assert table.undivided_tasks == ()
    written = [as_markdown(table), as_html(table, {})]
    assert all("too few to be divided" not in text for text in written)
    comparing = make(tmp_path, effects=EFFECTS)
    same = item_rows(1000, 0.03, 0.0, split="dev")
    save_scores(comparing.output / "scores" / "test", same, "base")
    undivided = load_table(comparing.directory)
    assert undivided.undivided_tasks == ("nl2sql",)
    for text in (as_markdown(undivided), as_html(undivided, {"figure": b"", "methods": b""})):
        assert "Not so the items of nl2sql: too few to be divided" in text
        assert "test items" not in text
        assert "with it less without it, reported items" in text


def test_a_row_is_the_mean_over_seeds_on_the_reported_items(finished, table):
    row = next(row for row in table.rows if row.name == "lrmc")
    assert (row.lr, row.seeds, row.problems) == (3e-5, (0, 1, 2), ())
    base = base_of(finished, "test")
    found = []
    for seed in range(3):
        tuned = scores_of(finished, Job("lrmc", 3e-5, seed, "test"))
        gain = tuned.objective("nl2sql").values.mean() - base.objective("nl2sql").values.mean()
        lost = [
            base.objective(task).values.mean() - tuned.objective(task).values.mean()
            for task in ("wordnet", "capitals")
        ]
        text = [scores.objective("plain_english") for scores in (base, tuned)]
        before, after = (np.average(t.values, weights=t.weights) for t in text)
        lost.append(after / before - 1)
        found.append((gain, np.mean(lost)))
    gains, forgotten = zip(*found, strict=True)
    assert row.trade.domain_gain.value == pytest.approx(np.mean(gains), abs=1e-12)
    assert row.trade.forgetting.value == pytest.approx(np.mean(forgotten), abs=1e-12)
    assert row.trade.combined.value == pytest.approx(np.mean(gains) - np.mean(forgotten), abs=1e-12)
    half = stats.t.ppf(0.975, 2) * np.std(gains, ddof=1) / math.sqrt(3)
    assert row.trade.domain_gain.over_seeds.high == pytest.approx(np.mean(gains) + half)
    accuracy = [
        scores_of(finished, Job("lrmc", 3e-5, seed, "test")).metric("nl2sql", "accuracy")
        for seed in range(3)
    ]
    assert row.accuracy.value == pytest.approx(np.mean([a.values.mean() for a in accuracy]))
    spread = stats.t.interval(
        0.95, 2, np.mean([a.values.mean() for a in accuracy]),
        stats.sem([a.values.mean() for a in accuracy]),
    )  # fmt: skip
    over_seeds = row.accuracy.over_seeds
    assert (over_seeds.low, over_seeds.high) == pytest.approx(spread)
    ends = [
        stats.binomtest(int(a.values.sum()), len(a.values)).proportion_ci(method="wilson")
        for a in accuracy
    ]
    assert row.accuracy.over_items.low == pytest.approx(np.mean([e.low for e in ends]))
    assert row.accuracy.over_items.high == pytest.approx(np.mean([e.high for e in ends]))
    # General drift of the first seed comes from its development scores.
    assert row.kl_general.value == pytest.approx(np.mean([0.01, 0.02, 0.03]))
    assert row.kl_domain.value == pytest.approx(np.mean([0.2, 0.3, 0.4]))


def test_the_difference_from_the_reference_is_paired_by_seed_and_by_item(finished, table):
    rows = {row.name: row for row in table.rows}
    assert rows["sft"].versus is None
    base = base_of(finished, "test")

    def compared(method, lr, seed):
        tuned = scores_of(finished, Job(method, lr, seed, "test"))
        return compare(base, tuned, forgetting_weight=1.0, seed=0)

    differences = []
    replicates = []
    for seed in range(3):
        own, other = compared("lrmc", 3e-5, seed), compared("sft", 3e-5, seed)
        differences.append(own.combined.value - other.combined.value)
        replicates.append(
            own.domain_gain_replicates
            - own.forgetting_replicates
            - other.domain_gain_replicates
            + other.forgetting_replicates
        )
    versus = rows["lrmc"].versus.combined
    assert versus.value == pytest.approx(np.mean(differences), abs=1e-12)
    half = stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / math.sqrt(3)
    assert versus.over_seeds.low == pytest.approx(np.mean(differences) - half)
    low, high = np.quantile(np.mean(replicates, axis=0), [0.025, 0.975])
    assert (versus.over_items.low, versus.over_items.high) == pytest.approx((low, high))
    # Only seeds that both have.
    assert rows["lora"].seeds == (0, 1)
    own = [compared("lora", 1e-4, seed).domain_gain.value for seed in (0, 1)]
    other = [compared("sft", 3e-5, seed).domain_gain.value for seed in (0, 1)]
    assert rows["lora"].versus.domain_gain.value == pytest.approx(
        np.mean(np.subtract(own, other)), abs=1e-12
    )


EFFECTS = [
    {"title": "both", "pairs": [["lrmc", "sft"], ["lora", "lrmc"]]},
    {"title": "one", "pairs": [["lrmc", "sft"]]},
    {"title": "the other way", "pairs": [["sft", "lrmc"]]},
]


@pytest.fixture(scope="module")
def parts_directory(tmp_path_factory):
    failed = [Job("lora", 1e-4, 2, "test")]
    return make(tmp_path_factory.mktemp("parts"), failed=failed, effects=EFFECTS).directory


@pytest.fixture(scope="module")
def parts(parts_directory):
    """The effects of the finished comparison: LoRA has two seeds, the others three."""
    return load_table(parts_directory)


def test_an_effect_is_the_mean_of_its_pairs_differences_seed_by_seed_and_item_by_item(
    finished, parts
):
    both, one, reversed_ = parts.effects
    base = base_of(finished, "test")

    def compared(method, lr, seed):
        tuned = scores_of(finished, Job(method, lr, seed, "test"))
        return compare(base, tuned, forgetting_weight=1.0, seed=0)

    values, replicates = [], []
    for seed in (0, 1):
        sft, lrmc = compared("sft", 3e-5, seed), compared("lrmc", 3e-5, seed)
        lora = compared("lora", 1e-4, seed)
        first = lrmc.forgetting.value - sft.forgetting.value
        second = lora.forgetting.value - lrmc.forgetting.value
        values.append((first + second) / 2)
        first_B = lrmc.forgetting_replicates - sft.forgetting_replicates
        second_B = lora.forgetting_replicates - lrmc.forgetting_replicates
        replicates.append((first_B + second_B) / 2)
    assert both.seeds == (0, 1)
    assert both.pairs == (("lrmc", "sft"), ("lora", "lrmc"))
    forgetting = both.trade.forgetting
    assert forgetting.value == pytest.approx(np.mean(values), abs=1e-12)
    half = stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / math.sqrt(2)
    assert forgetting.over_seeds.low == pytest.approx(np.mean(values) - half)
    low, high = np.quantile(np.mean(replicates, axis=0), [0.025, 0.975])
    assert (forgetting.over_items.low, forgetting.over_items.high) == pytest.approx((low, high))
    # A single pair is the difference from the reference, and turned round it is its negative.
    versus = {row.name: row.versus for row in parts.rows}["lrmc"]
    assert one.seeds == (0, 1, 2)
    for part in ("domain_gain", "forgetting", "combined"):
        assert getattr(one.trade, part) == getattr(versus, part)
        assert getattr(reversed_.trade, part).value == pytest.approx(-getattr(versus, part).value)


def test_the_ratio_of_drifts_is_a_geometric_mean(tmp_path):
    comparing = make(tmp_path, effects=EFFECTS[:1])
    drifts = {"sft": 0.02, "lrmc": 0.01, "lora": 0.08}
    for run in comparing.description.values["runs"]:
        if "eval/kl_base_general" in run["results"]:
            run["results"]["eval/kl_base_general"] = drifts[run["method"]]
    comparing.description.write()
    (effect,) = load_table(comparing.directory).effects
    assert effect.kl_general_ratio == pytest.approx(math.sqrt(0.5 * 8.0))
    for run in comparing.description.values["runs"]:
        if run["method"] == "lora":
            run["results"].pop("eval/kl_base_general", None)
    comparing.description.write()
    table = load_table(comparing.directory)
    assert table.effects[0].kl_general_ratio is None
    row = next(line for line in as_markdown(table).splitlines() if line.startswith("| both |"))
    assert row.endswith("| - |")


def test_an_effect_has_the_pairs_that_are_reported(tmp_path):
    table = load_table(make(tmp_path, only=["sft", "lrmc"], effects=EFFECTS[:1]).directory)
    assert [(effect.title, effect.pairs) for effect in table.effects] == [
        ("both", (("lrmc", "sft"),))
    ]
    assert load_table(make(tmp_path / "none").directory).effects == ()


def test_every_form_shows_the_effects(parts):
    effect = parts.effects[0]
    gain = points(effect.trade.domain_gain.value)
    pairs = "restricted + MoClip - full SFT; LoRA - restricted + MoClip"
    row = next(line for line in as_markdown(parts).splitlines() if line.startswith("| both |"))
    assert row.startswith(f"| both | {pairs} | 2 | {gain} (")
    page = as_html(parts, {})
    assert f"<td>both</td><td>{pairs}</td><td>2</td><td>{gain} (" in page
    said = as_json_object(parts)["effects"][0]
    assert said["trade"]["domain_gain"]["value"] == effect.trade.domain_gain.value
    console = plain_console(width=140)
    with console.capture() as captured:
        console.print(console_effects(parts))
    shown = captured.get()
    assert "\\" not in shown
    assert "2 pairs, 2 seeds" in shown
    assert f" {gain} " in shown


def test_costs_with_the_share_of_stage_0(table):
    rows = {row.name: row for row in table.rows}
    cost = rows["lrmc"].cost
    assert cost.train_seconds == pytest.approx(160.0)
    assert cost.cpu_seconds == pytest.approx(150.0)
    # 12 steps of 8 of 192 recorded samples: half of 100 seconds on 2 cores.
    assert (cost.record_seconds, cost.record_core_seconds) == (50.0, 100.0)
    assert cost.peak_memory_bytes == 3e9
    assert (cost.processed_tokens, cost.original_tokens) == (6000, 9000)
    assert rows["sft"].cost.record_seconds == 0.0


def test_learning_rates_are_shown_on_the_items_that_chose(finished, table):
    own = [point for point in table.points if point.method == "lrmc"]
    assert [(point.lr, point.is_chosen) for point in own] == [
        (1e-5, False), (3e-5, True), (1e-4, False),
    ]  # fmt: skip
    base = base_of(finished, "dev")
    tuned = scores_of(finished, Job("lrmc", 1e-5, 0, "dev"))
    expected = compare(base, tuned, forgetting_weight=1.0, seed=0)
    assert own[0].domain_gain == expected.domain_gain
    assert own[0].forgetting == expected.forgetting
    whole = [
        Scores.load(path)
        for path in (
            finished.output / "scores" / "dev",
            finished.description.run_directory(Job("lrmc", 1e-5, 0, "dev")) / "scores" / "dev",
        )
    ]
    of_all = compare(*whole, forgetting_weight=1.0, seed=0).forgetting.value
    assert own[0].forgetting_of_all == pytest.approx(of_all, abs=1e-12)
    assert of_all != pytest.approx(expected.forgetting.value, abs=1e-4)
    best = max(own, key=lambda point: point.combined.value)
    assert best.is_chosen
    plain = [p for p in table.points if p.method == "sft"]
    assert plain[1].excess_forgetting == pytest.approx(0.0, abs=1e-12)


def test_what_ranks_forgetting_over_methods_and_learning_rates():
    def point(method, forgetting, kl_domain, kl_general, gain=0.1):
        other = Interval(-forgetting, -forgetting, -forgetting)  # of the half that chooses
        gained = Interval(gain, gain, gain)
        return SearchPoint(
            method, 1e-5, gained, other, other, forgetting, kl_domain, kl_general, False, None
        )

    levels = (0.01, 0.03, 0.02)
    made = [
        point(method, level * factor, kl_domain=-level * factor, kl_general=(level * factor) ** 2)
        for factor, method in enumerate("abcd", start=1)
        for level in levels
    ]
    found = {p.name: p for p in forgetting_predictors(made)}
    assert list(found) == ["KL on the domain's texts", "KL on general texts"]  # the gain is one
    assert found["KL on the domain's texts"].correlation.value == pytest.approx(-1.0)
    assert found["KL on general texts"].correlation.value == pytest.approx(1.0)
    assert found["KL on general texts"].points == 12
    without = [replace(p, kl_domain=None) if p.method == "a" else p for p in made]
    assert [p.name for p in forgetting_predictors(without)] == ["KL on general texts"]


def test_failures_and_what_is_missing_are_named(table, tmp_path):
    lora = next(row for row in table.rows if row.name == "lora")
    assert lora.problems == ("lr 0.0001, seed 2, test: failed: its process died",)
    said = " ".join(sentences(table))
    assert "Some methods have only 2 of 3 seeds so far." in said
    assert "Runs failed of: LoRA." in said
    assert "a better one may lie beyond: LoRA (lowest)." in said
    assert "about one in twenty would stand out by luck" in said
    assert "seed 2, test: failed: its process died" in as_markdown(table)

    begun = Comparing(Description(make_space(), ["sft"], tmp_path, {}))
    begun.description.open()
    write_base(begun)
    write_run(begun, Job("sft", 1e-5, 0, "dev"))
    begun.description.complete(Job("sft", 1e-5, 0, "dev"))
    begun.description.write()
    table = load_table(begun.directory)
    assert sentences(table) == ["No method has scores on the test questions yet."]
    assert table.rows[0].problems == ("2 of 3 runs are not there yet",)
    assert table.rows[0].lr is None
    assert [row.name for row in table.rows] == ["sft"]
    assert table.not_begun == ["restricted + MoClip", "LoRA"]
    write_report(begun.directory)
    with pytest.raises(IncompleteArtifactError, match="no comparison has begun there"):
        load_table(tmp_path / "nowhere")


def test_the_best_is_best_seed_by_seed_against_the_reference(table):
    """A method that has run on lucky seeds alone does not win by them."""

    def with_lrmc(combined, versus):
        rows = []
        for row in table.rows:
            if row.name == "lrmc":
                trade = replace(row.trade, combined=replace(row.trade.combined, value=combined))
                against = replace(row.versus, combined=replace(row.versus.combined, value=versus))
                row = replace(row, trade=trade, versus=against)
            rows.append(row)
        return sentences(replace(table, rows=tuple(rows)))[0]

    assert with_lrmc(0.99, -0.01).startswith("Highest combined score: full SFT at")
    assert with_lrmc(0.01, 0.02).startswith("Highest combined score: restricted + MoClip at")
    without = replace(table, rows=tuple(row for row in table.rows if row.name != "sft"))
    best = max(without.rows, key=lambda row: row.trade.combined.value)
    assert sentences(without)[0].startswith(f"Highest combined score: {best.title} at")


def test_one_seed_is_said_in_place_of_an_interval(tmp_path):
    comparing = make(tmp_path, only=["sft", "lrmc"], compare={"seeds": [4]})
    table = load_table(comparing.directory)
    assert sentences(table)[-1] == "Not run yet: LoRA."
    assert "LoRA" not in as_csv(table)
    row = table.rows[1]
    assert row.seeds == (4,)
    assert row.trade.domain_gain.over_seeds is None
    assert row.versus.combined.over_seeds is None
    text = as_markdown(table)
    line = next(line for line in text.splitlines() if line.startswith("| restricted + MoClip"))
    assert line.count("(one seed)") == 7
    assert "to" in line.split("(one seed)")[1]  # the interval over items is there


# For people and programs


def test_every_form_has_the_same_numbers(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["method"] for row in rows] == ["sft", "lrmc", "lora"]
    told = as_json_object(table)
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(told, allow_nan=False))
    for flat, row, nested in zip(rows, table.rows, told["methods"], strict=True):
        assert float(flat["combined"]) == row.trade.combined.value
        assert float(flat["combined_seeds_low"]) == row.trade.combined.over_seeds.low
        assert float(flat["combined_items_high"]) == row.trade.combined.over_items.high
        assert nested["trade"]["combined"]["value"] == row.trade.combined.value
        assert float(flat["peak_memory_bytes"]) == 3e9
        gain = f"{100 * row.trade.domain_gain.value:.1f}"
        assert f"+{gain} (" in as_markdown(table)
    assert rows[0]["minus_reference_combined"] == ""
    assert float(rows[1]["minus_reference_combined"]) == table.rows[1].versus.combined.value


def test_the_page_loads_nothing_and_escapes_what_it_is_given(tmp_path):
    methods = {
        "sft": {
            "title": "full <script>alert(1)</script>",
            "train": {"loss": "full", "optimizer": "adamw"},
        }
    }
    comparing = Comparing(Description(make_space(methods=methods), ["sft"], tmp_path, {}))
    comparing.description.open()
    write_base(comparing)
    page = as_html(load_table(comparing.directory), {"figure": b"png", "methods": b"png"})
    assert "<script" not in page
    assert "full &lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "default-src 'none'" in page


def test_the_files_are_written_and_the_page_has_every_figure(finished, parts_directory):
    for directory, with_effects in ((finished.directory, False), (parts_directory, True)):
        files = write_report(directory)
        figures = {"figure", "methods"} | ({"effects"} if with_effects else set())
        assert set(files) == {"csv", "html", "json", "markdown"} | figures
        assert all(path.stat().st_size > 500 for path in files.values())
        page = files["html"].read_text()
        for kind in figures:
            png = files[kind].read_bytes()
            assert png.startswith(b"\x89PNG")
            assert base64.b64encode(png).decode() in page
        assert page.count("<img") == len(figures)


def test_methods_are_ordered_by_what_they_have_over_the_reference_on_the_same_seeds(table):
    rows = {row.name: row for row in table.rows}
    for row in rows.values():
        alone = replace(table, rows=(row,), reference="another")
        assert alone.advantage(row) == row.trade.combined.value
        if row.name == table.reference:
            assert table.advantage(row) == 0.0
        else:
            assert table.advantage(row) == row.versus.combined.value


def test_the_terminal_shows_intervals_in_brackets(table):
    console = plain_console(width=150)
    with console.capture() as captured:
        console.print(console_table(table))
    text = captured.get()
    assert "\\" not in text
    assert "restricted + MoClip" in text
    assert re.search(r"\[.\d+\.\d to .\d+\.\d\]", text)
    assert "its process died" in text


def test_rates_of_the_made_up_comparison_are_those_that_its_table_expects():
    assert RATES == (1e-5, 3e-5, 1e-4)
