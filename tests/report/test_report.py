import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import plotly.offline
import pytest
from rich.console import Console
from scipy import stats

from lrmc_ray.console import format_seconds, run_command
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.changes import compare, difference, receipt
from lrmc_ray.evaluate.front import front_probability, pareto_front
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.numbers import flatten, number, percent, percent_range, points, points_range
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.record.capped import capped_text
from lrmc_ray.report.command import main
from lrmc_ray.report.console import as_json, summary_table
from lrmc_ray.report.figures_html import (
    Curve,
    FrontPoint,
    canvas_of,
    curve_figure,
    front_figure,
)
from lrmc_ray.report.figures_png import draw_front, point_label
from lrmc_ray.report.page import write_report
from lrmc_ray.report.study import Study, load_study
from lrmc_ray.report.template import PLOTLY, drawing, whisker
from lrmc_ray.report.words import chosen_settings, headline, knee_advice, record_sentences
from tests.support.synthetic_study import (
    SEED,
    TRIALS,
    add_final,
    edit,
    item_rows,
    make_study,
    save_scores,
)

CHROMIUM = shutil.which("chromium")
FINISHED = [index for index, plan in enumerate(TRIALS) if plan["state"] == "COMPLETE"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study directory with its report; not to be changed."""
    directory = make_study(tmp_path_factory.mktemp("runs") / "demo-0123")
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def study(made: Path) -> Study:
    return load_study(made)


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def visible_text(html: str) -> str:
    """What a reader sees: no scripts, no styles, entities resolved, spaces collapsed."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.is_hidden = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.is_hidden = self.is_hidden or tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.is_hidden = self.is_hidden and tag not in ("script", "style")

        def handle_data(self, data: str) -> None:
            if not self.is_hidden:
                self.words.append(data)

    reader = Reader()
    reader.feed(html)
    return re.sub(r"\s+", " ", " ".join(reader.words))


def figures(html: str) -> dict[str, Any]:
    """The figures' data as the page holds it."""
    found = re.findall(r"\{const f = (\{.*?\}); Plotly\.newPlot\(\"([^\"]+)\"", html)
    return {name: json.loads(data) for data, name in found}


def terminal(study: Study, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary_table(study))
    return console.export_text()


# Numbers as text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0342, "+3.4"), (-0.0342, "\u22123.4"), (0.0, "0.0"), (-0.0001, "0.0"), (1.0, "+100.0")],
)
def test_points_are_signed_hundredths(value, expected):
    assert points(value) == expected


def test_numbers_as_text():
    assert points_range(Interval(0.0, -0.012, 0.5)) == "\u22121.2 to +50.0"
    assert percent(0.614) == "61 %"
    assert number(-0.0004, 3) == "0.000"
    assert flatten({"a": {"b": 1e-5, "c": {"d": "x"}}, "e": [1, 2]}) == [
        ("a.b", "1e-05"),
        ("a.c.d", "x"),
        ("e", "[1, 2]"),
    ]


def test_a_whisker_places_its_marks_on_the_axis():
    """An axis from -1 to 1 is drawn from x = 4 to x = 116, so 0 is at 60."""
    svg = whisker(Interval(0.5, 0.25, 1.0), -1.0, 1.0)
    assert 'x1="60.0" x2="60.0" y1="0" y2="16" class="zero"' in svg
    assert 'x1="74.0" x2="116.0" y1="8" y2="8" class="bar better"' in svg
    assert 'cx="88.0"' in svg
    assert "bar worse" in whisker(Interval(-0.5, -0.6, -0.4), -1.0, 1.0)
    assert "bar unclear" in whisker(Interval(0.5, 0.0, 0.6), -1.0, 1.0)


# Reading a study


def test_every_finished_trial_is_compared_with_the_base(made, study):
    base = Scores.load(made / "base_scores")
    assert [trial.entry.number for trial in study.compared] == FINISHED
    for trial in study.compared:
        scores = Scores.load(made / f"trials/{trial.entry.number:04d}/scores")
        expected = compare(base, scores, forgetting_weight=1.0, seed=SEED)
        assert trial.comparison.metrics() == expected.metrics()


def test_the_forgetting_weight_of_the_study_is_used(own, study):
    edit(own, forgetting_weight=3.0)
    before, after = study.trials[1].comparison, load_study(own).trials[1].comparison
    assert after.combined.value == pytest.approx(
        before.domain_gain.value - 3 * before.forgetting.value
    )


def test_the_front_is_that_of_the_finished_trials(study):
    points_ = [
        (trial.comparison.domain_gain.value, trial.comparison.forgetting.value)
        for trial in study.compared
    ]
    expected = {FINISHED[index] for index in pareto_front(points_)}
    assert {trial.entry.number for trial in study.trials if trial.is_on_front} == expected
    assert 3 in expected
    assert 5 not in expected
    probabilities = front_probability(
        [trial.comparison.domain_gain_replicates for trial in study.compared],
        [trial.comparison.forgetting_replicates for trial in study.compared],
    )
    assert [trial.front_probability for trial in study.compared] == pytest.approx(probabilities)


def test_best_and_yardstick(study):
    assert study.best.entry.number == 3
    assert study.yardstick.entry.number == 1
    assert study.candidate is study.best
    expected = difference(study.trials[3].comparison, study.trials[1].comparison)
    assert study.verdict.versus == expected
    assert study.verdict.plain is study.yardstick.comparison
    assert study.verdict.fresh_tasks == ()
    assert study.notes == ()


def test_the_row_of_plain_fine_tuning_has_its_learning_rate(own):
    settings = load_study(own).yardstick.entry.settings
    edit(own, trials={1: {"settings": {**settings, "lr": 3e-05}}})  # that of the study
    study = load_study(own)
    assert dict(chosen_settings(study, study.yardstick))["lr"] == "3e-05"
    assert "lr 3e-05" in terminal(study)


def test_trials_without_scores_keep_their_cause(study):
    assert [(trial.entry.number, trial.problem) for trial in study.problems] == [
        (4, "failed: loss is NaN for 5 steps in a row at step 12"),
        (7, "stopped early: worse than the median at step 10"),
        (9, "not finished"),
    ]
    text = re.sub(r"\s+", " ", terminal(study))
    assert "failed: loss is NaN for 5 steps in a row at step 12" in text
    assert "stopped early: worse than the median at step 10" in text
    assert "not finished" in text
    states = {trial["number"]: trial for trial in as_json(study)["trials"]}
    assert sorted(states) == list(range(10))
    assert states[4]["results"] is None
    assert "NaN for 5 steps" in states[4]["problem"]


def test_without_a_chosen_best_the_highest_combined_is_shown(own):
    edit(own, best=None)
    loaded = load_study(own)
    combined = {trial.entry.number: trial.comparison.combined.value for trial in loaded.compared}
    assert loaded.best.entry.number == max(combined, key=combined.get)


def test_the_studys_choice_counts_even_if_another_scores_higher(own):
    edit(own, best=2)
    assert load_study(own).best.entry.number == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "other items", "no name"])
def test_a_complete_trial_with_unusable_scores_is_shown_as_failed(own, damage):
    path = own / "trials/0003/scores/items.parquet"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        # The middle of a page: page checksums find it.
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "missing":
        path.unlink()
    elif damage == "other items":
        rows = [row for row in item_rows(3, 0.7, 0.0) if row["item_id"] != "capitals-007"]
        Scores.from_rows(rows).save(path.parent)
    else:
        edit(own, trials={3: {"scores": None}})
    loaded = load_study(own)
    assert loaded.trials[3].comparison is None
    assert loaded.trials[3].problem.startswith("failed: ")
    if damage == "other items":
        assert "capitals-007" in loaded.trials[3].problem
    assert loaded.best.entry.number != 3
    assert len(loaded.notes) == 2
    assert "trial 3 is marked complete, but cannot be used" in loaded.notes[0]
    assert "trial 3 was chosen as the best" in loaded.notes[1]
    text = visible_text(write_report(own).read_text())
    assert loaded.notes[0] in text
    assert text.count(loaded.trials[3].problem) == 2


def test_no_study_is_an_unfinished_input_with_a_remedy(tmp_path):
    with pytest.raises(IncompleteArtifactError, match=r"python -m lrmc_ray\.tune"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: "),
        ({"forgetting_weight": -1}, "forgetting_weight: "),
        ({"trials": {0: {"state": "DONE"}}}, r"trials\.0\.state: .*'COMPLETE'"),
        ({"trials": {0: {"role": None}}}, r"trials\.0\.role: "),
        ({"best": 99}, "best must be the number of a trial, got 99"),
    ],
)
def test_a_wrong_study_file_is_refused_by_field(own, change, message):
    edit(own, **change)
    with pytest.raises(DataError, match=message):
        load_study(own)


def test_a_torn_study_file_is_refused(own):
    path = own / "study.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"study\.json"):
        load_study(own)


def test_keys_of_a_newer_version_are_ignored(own):
    edit(own, invented=1, trials={0: {"invented": 2}})
    assert len(load_study(own).trials) == 10


def test_without_base_scores_there_is_no_report(own):
    edit(own, base_scores=None)
    with pytest.raises(IncompleteArtifactError, match="base model is not evaluated yet"):
        load_study(own)


# What is said


def right_answers(rows: list[dict[str, Any]]) -> float:
    return sum(
        row["value"] for row in rows if row["metric"] == "accuracy" and row["task"] == "nl2sql"
    )


def test_the_headline_states_what_was_learned_and_forgotten(study):
    learned, forgotten, versus = headline(study)
    tuned = round(100 * right_answers(item_rows(3, 0.72, 0.012)) / 60)
    base = round(100 * right_answers(item_rows(1000, 0.03, 0.0)) / 60)
    seen = "60 nl2sql items that the search also chose by"
    assert learned.text.startswith(f"Trial 3 answers {tuned} % of the {seen} (")
    low, high = stats.binomtest(round(0.6 * base), 60).proportion_ci(method="wilson")
    assert f"; base {base} %, {100 * low:.0f} to {100 * high:.0f} %)." in learned.text
    assert learned.distinguishable
    forgetting = study.best.comparison.forgetting
    assert forgotten.text == (
        f"On the general tasks it lost {100 * forgetting.value:.1f} points of 100 "
        f"(search items, 95 % interval +{100 * forgetting.low:.1f} to "
        f"+{100 * forgetting.high:.1f})."
    )
    combined = study.verdict.versus.combined
    assert combined.low > 0
    assert "trial 3 is better than plain fine-tuning (trial 1, search items): " in versus.text
    assert (
        f"{points(combined.value)} points (95 % interval {points_range(combined)})" in versus.text
    )
    others = sum(trial.entry.role != "yardstick" for trial in study.compared)
    rate = study.yardstick.entry.settings["lr"]
    assert versus.text.endswith(
        f"Plain fine-tuning ran once at the learning rate {rate:g}, the other is the best of "
        f"{others} trials: tune both before you call one method the better."
    )


def test_what_may_be_luck_is_said_and_shown_in_grey(own):
    """The best trial gets the yardstick's own scores with a breath of noise."""
    rng = np.random.default_rng(0)
    rows = [
        row | {"value": row["value"] * (1 + rng.normal(0, 1e-4))}
        if row["metric"] in ("gold_probability", "cross_entropy")
        else row
        for row in item_rows(1, TRIALS[1]["learned"], TRIALS[1]["damage"])
    ]
    save_scores(own / "trials/0003/scores", rows, "model-3")
    loaded = load_study(own)
    versus = headline(loaded)[2]
    assert not versus.distinguishable
    assert "trial 3 is not distinguishable from plain fine-tuning (trial 1" in versus.text
    html = write_report(own).read_text()
    assert re.search(r'<p class=" unclear-text">Item by item, trial 3 is not', html)
    assert re.search(r'<div class="tile unclear">\s*<div class="name">Against plain', html)


def test_worse_than_plain_fine_tuning_is_said(own):
    edit(own, best=8)
    versus = headline(load_study(own))[2]
    assert "trial 8 is worse than plain fine-tuning (trial 1" in versus.text
    assert versus.distinguishable


def test_plain_fine_tuning_may_be_the_best(own):
    edit(own, best=1)
    loaded = load_study(own)
    assert loaded.best is loaded.yardstick
    assert loaded.candidate.entry.number == 3
    learned, _, versus = headline(loaded)
    assert learned.text.startswith("Trial 1, plain fine-tuning, answers ")
    assert versus.text.startswith(
        "Plain fine-tuning itself scored best; the best other is trial 3. "
    )
    text = visible_text(write_report(own).read_text())
    assert "Trial 3, against plain fine-tuning" in text


def test_a_gain_in_general_scores_is_not_called_a_loss(own):
    rows = item_rows(8, TRIALS[8]["learned"], -0.05)
    save_scores(own / "trials/0003/scores", rows, "model-3")
    loaded = load_study(own)
    forgetting = loaded.best.comparison.forgetting
    assert forgetting.high < 0
    assert headline(loaded)[1].text == (
        f"On the general tasks it gained {-100 * forgetting.value:.1f} points of 100 "
        f"(search items, 95 % interval +{-100 * forgetting.high:.1f} to "
        f"+{-100 * forgetting.low:.1f})."
    )


def test_a_domain_of_texts_is_told_in_nats(own):
    for path in [own / "base_scores", *(own / f"trials/{n:04d}/scores" for n in FINISHED)]:
        rows = [
            row | {"task": "manual", "group": "domain"}
            if row["task"] == "plain_english"
            else row | {"group": "general"}
            for row in Scores.load(path).items.to_pylist()
        ]
        Scores.from_rows(rows).save(path)
    loaded = load_study(own)
    change = loaded.best.comparison.task("manual").metric("cross_entropy")
    assert headline(loaded)[0].text.startswith(
        f"Trial 3 raises the cross-entropy of manual from {change.before.value:.3f} to "
        f"{change.after.value:.3f} nats per token."
    )


def test_a_cross_entropy_below_one_is_no_percentage(own):
    for path in [own / "base_scores", *(own / f"trials/{n:04d}/scores" for n in FINISHED)]:
        rows = [
            row | {"value": row["value"] / 10} if row["metric"] == "cross_entropy" else row
            for row in Scores.load(path).items.to_pylist()
        ]
        Scores.from_rows(rows).save(path)
    before = load_study(own).best.comparison.task("plain_english").metric("cross_entropy").before
    assert before.value < 1
    text = visible_text(write_report(own).read_text())
    assert f"cross entropy, counts in the objective {before.value:.3f} {before.low:.3f} to" in text


def test_without_a_finished_trial_the_report_says_so(own):
    edit(own, best=None, trials={n: {"state": "FAIL", "cause": "no disk"} for n in range(10)})
    loaded = load_study(own)
    assert headline(loaded)[0].text == "No trial has scores yet: 10 of 10 failed or unfinished."
    text = visible_text(write_report(own).read_text())
    assert text.count("failed: no disk") == 10
    assert (own / "gain_vs_forgetting.png").stat().st_size > 10_000
    assert as_json(loaded)["best"] is None


def test_a_cap_that_decides_in_place_of_tau_is_said(own):
    assert record_sentences(load_study(own)) == []
    study = json.loads((own / "study.json").read_text())
    edit(
        own,
        record=study["record"] | {"capped_share": 0.63},
        settings=study["settings"] | {"record": {"k_max": 64}},
    )
    (warning,) = record_sentences(load_study(own))
    assert warning == capped_text(0.63, 64)
    assert warning in visible_text(write_report(own).read_text())


def test_the_knee_beside_the_best_comes_with_advice(study):
    bend = study.compared[study.trade_off.knee]
    assert bend is not study.best
    gain = bend.comparison.domain_gain.value - study.best.comparison.domain_gain.value
    advice = knee_advice(study)
    assert advice.startswith("Take trial 3, the best by the study's own objective, unless")
    assert f"{bend.name}, differs from it by {points(gain)} points of gain" in advice


def test_the_page_is_small_and_says_nothing_of_what_is_not_set(own):
    study = json.loads((own / "study.json").read_text())
    model = study["settings"]["model"] | {"revision": None}
    edit(own, settings=study["settings"] | {"model": model})
    page = write_report(own).read_text()
    assert len(page.encode()) < 1_500_000
    assert "None" not in visible_text(page)
    assert "model.revision" not in visible_text(page)


def test_the_packed_figures_are_those_of_plotly_for_python():
    packed = resources.files("lrmc_ray.report").joinpath(PLOTLY).read_bytes()
    code = gzip.decompress(packed).decode()
    assert code.startswith("/**\n* plotly.js (cartesian - minified) v")
    version = code.partition(") v")[2].split()[0]
    installed = plotly.offline.get_plotlyjs_version()
    assert version.split(".")[0] == installed.split(".")[0]


def point(label, role, gain, forgetting, spread=0.01):
    return FrontPoint(
        label,
        role,
        Interval(gain, gain - spread, gain + spread),
        Interval(forgetting, forgetting - spread, forgetting + spread),
        "",
        is_on_front=False,
    )


def test_the_axes_are_filled_by_the_trials():
    """Trials far from the base model: it is a mark at the corner, and the way to it is said."""
    far = [point("a", "best", 0.52, 0.03), point("b", "search", 0.50, 0.05, spread=0.3)]
    canvas = canvas_of(far)
    # The interval of a trial that is not marked does not count.
    assert canvas.gain == pytest.approx((50 - 0.08 * 3, 53 + 0.08 * 3))
    assert canvas.forgetting == pytest.approx((2 - 0.08 * 3, 5 + 0.08 * 3))
    assert not canvas.shows_base
    assert canvas.nearest_to_base == (canvas.forgetting[0], canvas.gain[0])
    near = [point("a", "best", 0.02, 0.0), point("b", "yardstick", 0.01, 0.01)]
    assert canvas_of(near).shows_base
    assert canvas_of(near).nearest_to_base == (0.0, 0.0)
    mark = front_figure(far).data[-1]
    assert (mark.x, mark.y) == ((canvas.forgetting[0],), (canvas.gain[0],))
    assert mark.text == ("base model (0, 0) lies this way",)


def test_trials_are_called_by_their_roles(study):
    labels = {trial.entry.number: point_label(study, trial) for trial in study.compared}
    assert labels[0] == "defaults"
    assert labels[1] == "plain fine-tuning"
    assert labels[3] == "best: trial 3"
    assert labels[5] == "trial 5"


# Test items


def test_final_scores_replace_the_searchs_in_the_verdict(own):
    add_final(own)
    loaded = load_study(own)
    base, best, plain = (Scores.load(own / "final" / n) for n in ("base", "best", "yardstick"))
    expected = compare(base, best, forgetting_weight=1.0, seed=SEED)
    assert loaded.verdict.comparison.metrics() == expected.metrics()
    assert loaded.verdict.versus == difference(
        expected, compare(base, plain, forgetting_weight=1.0, seed=SEED)
    )
    # Only the demo's questions have two splits; the general items are the search's own.
    assert loaded.verdict.fresh_tasks == ("nl2sql",)
    assert " % of the 60 nl2sql test items (" in headline(loaded)[0].text
    assert "(search items, 95 % interval" in headline(loaded)[1].text
    assert ", domain: test items, general: search items)" in headline(loaded)[2].text
    assert loaded.trials[3].comparison.metrics() != expected.metrics()
    accuracy = expected.task("nl2sql").metric("accuracy").after
    assert headline(loaded)[0].text.startswith(f"Trial 3 answers {percent(accuracy.value)} of")
    text = visible_text(write_report(own).read_text())
    assert "Test items, which no trial was chosen by: nl2sql. Search items: wordnet" in text
    assert "lucky side" not in text


def test_rounding_does_not_make_items_fresh(own):
    """The general items are scored again, on a machine that rounds differently."""
    add_final(own)
    path = own / "final/base"
    rows = [
        row | {"value": row["value"] * (1 - 1e-4)} if row["metric"] != "accuracy" else row
        for row in Scores.load(path).items.to_pylist()
    ]
    Scores.from_rows(rows).save(path)
    assert load_study(own).verdict.fresh_tasks == ("nl2sql",)


def test_final_scores_of_another_model_are_not_used(own, study):
    add_final(own)
    edit(own, best=6)
    loaded = load_study(own)
    assert loaded.verdict.comparison is loaded.trials[6].comparison
    assert "they are not of trial 6's model" in loaded.notes[0]


def test_missing_final_scores_are_noted(own):
    add_final(own)
    (own / "final/best/items.parquet").unlink()
    loaded = load_study(own)
    assert loaded.verdict.comparison is loaded.best.comparison
    assert "the final scores cannot be used" in loaded.notes[0]


# The terminal and JSON


def test_the_table_fits_80_columns_and_shows_all_numbers(study):
    text = terminal(study)
    assert max(map(len, text.splitlines())) <= 80
    best = study.best.comparison
    for interval in (best.domain_gain, best.forgetting, best.combined):
        assert points(interval.value) in text
        assert points_range(interval) in text
    accuracy = best.task("nl2sql").metric("accuracy").after
    assert percent_range(accuracy) in text
    assert "3 best, on the front" in text
    assert "1 plain fine-tuning" in text
    assert "0 defaults" in text
    assert "\u2026" not in text


def test_json_has_the_numbers_of_the_comparison(made, capsys):
    assert main([str(made), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["best"] == 3
    assert result["yardstick"] == 1
    loaded = load_study(made)
    trial = result["trials"][6]
    assert trial["results"] == (
        {
            "eval/kl_base_domain": 0.31,
            "eval/kl_base_domain_low": 0.2764,
            "eval/kl_base_domain_high": 0.3461,
            "eval/kl_base_general": 0.0074,
        }
        | loaded.trials[6].comparison.metrics()
    )
    combined = loaded.verdict.versus.combined
    assert result["versus_yardstick"]["trial"] == 3
    assert result["versus_yardstick"]["combined"] == {
        "value": combined.value,
        "low": combined.low,
        "high": combined.high,
    }
    assert result["report"] == str(made / "report.html")
    assert result["headline"] == [sentence.text for sentence in headline(loaded)]


def test_the_command_prints_the_table_and_where_things_are(made, capsys):
    assert main([str(made.parent)]) == 0
    output = capsys.readouterr().out
    assert f"Report  {made / 'report.html'}\n" in output
    assert "plain fine-tuning (trial 1" in output.replace("\n", " ")


def test_errors_are_one_line_with_their_exit_code(tmp_path, capsys):
    assert run_command(main, [str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path} has no study.json")
    assert captured.err.count("\n") == 1


def test_the_help_imports_nothing_heavy():
    code = (
        "import sys; from lrmc_ray.report.command import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'matplotlib', 'plotly', 'torch', 'ray', 'scipy', 'rich', 'jinja2'} "
        "& set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


# The figure


def test_the_figure_draws_every_finished_trial_in_points(study):
    axes = draw_front(study).axes[0]
    drawn = {}
    for container in axes.containers:
        line, _, bars = container
        drawn[container.get_label()] = (line.get_xydata(), [bar.get_segments() for bar in bars])
    assert set(drawn) == {"best trial", "plain fine-tuning", "defaults", "other trials"}
    best = study.best.comparison
    position, (x_bars, y_bars) = drawn["best trial"]
    centre = (100 * best.forgetting.value, 100 * best.domain_gain.value)
    np.testing.assert_allclose(position, [centre])
    np.testing.assert_allclose(
        x_bars[0][:, 0], [100 * best.forgetting.low, 100 * best.forgetting.high]
    )
    np.testing.assert_allclose(
        y_bars[0][:, 1], [100 * best.domain_gain.low, 100 * best.domain_gain.high]
    )
    assert len(drawn["other trials"][0]) == len(FINISHED) - 3
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_array_equal(lines["base"], [[0, 0]])
    front = lines["Pareto front"]
    assert (np.diff(front[:, 0]) > 0).all()
    assert (np.diff(front[:, 1]) > 0).all()
    assert len(front) == sum(trial.is_on_front for trial in study.trials)
    assert axes.get_xlabel() == "Forgetting on search items\n(points of 100; left is better)"
    assert axes.get_ylabel() == "Domain gain on search items\n(points of 100; up is better)"
    labels = {text.get_text() for text in axes.texts}
    assert {"best: trial 3", "plain fine-tuning", "defaults", "2", "5", "6", "8"} <= labels
    assert any("4, 7, 9" in text.get_text() for text in axes.figure.texts)


def test_the_png_is_a_png(made):
    content = (made / "gain_vs_forgetting.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert 1000 < width < 2000
    assert 700 < height < 1600


# The page


def test_the_page_loads_nothing(page):
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.tags: set[str] = set()

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.add(tag)
            self.found += [value for name, value in attrs if name in ("src", "href", "data")]

    links = Links()
    links.feed(page)
    assert links.found == []
    assert not links.tags & {"link", "img", "iframe", "object", "embed"}
    assert "default-src 'none'; script-src 'unsafe-inline'" in page
    assert len(page) < 6_000_000


def test_the_page_shows_every_trial_with_its_intervals(page, study):
    text = visible_text(page)
    for trial in study.compared:
        for interval in (
            trial.comparison.domain_gain,
            trial.comparison.forgetting,
            trial.comparison.combined,
        ):
            assert f"{points(interval.value)} {points_range(interval)}" in text
    for trial in study.problems:
        assert trial.problem in text
    for sentence in headline(study):
        assert sentence.text in text
    assert "lucky side" in text
    # The yardstick's row names the settings in which it differs, and no others.
    assert "loss full optimizer adamw lr 2e-05 +" in text


def test_the_page_compares_task_by_task(page, study):
    text = visible_text(page)
    for task in study.best.comparison.tasks:
        assert f"{task.task} ({task.num_items} search items)" in text
    change = study.best.comparison.task("wordnet").metric("accuracy")
    plain = study.yardstick.comparison.task("wordnet").metric("accuracy").after
    assert (
        f"wordnet (200 search items) accuracy {percent(change.before.value)} "
        f"{100 * change.before.low:.0f} to {100 * change.before.high:.0f} % "
        f"{percent(plain.value)} {100 * plain.low:.0f} to {100 * plain.high:.0f} % "
        f"{percent(change.after.value)} {100 * change.after.low:.0f} to "
        f"{100 * change.after.high:.0f} % {points(change.delta.value)} {points_range(change.delta)}"
    ) in text
    entropy = study.best.comparison.task("plain_english").metric("cross_entropy")
    assert (
        f"plain_english (40 search items) cross entropy, counts in the objective "
        f"{entropy.before.value:.3f} {entropy.before.low:.3f} to {entropy.before.high:.3f}"
    ) in text
    assert f"+{entropy.delta.value:.3f} +{entropy.delta.low:.3f} to" in text
    assert (
        "KL(base || trial 3): 0.310 (0.276 to 0.346) on domain texts, 0.007 on general texts"
        in text
    )


def test_the_interactive_front_has_the_same_points(page, study):
    traces = {trace["name"]: trace for trace in figures(page)["front"]["data"]}
    best = study.best.comparison
    trace = traces["best trial"]
    assert trace["x"] == pytest.approx([100 * best.forgetting.value])
    assert trace["y"] == pytest.approx([100 * best.domain_gain.value])
    assert trace["error_y"]["array"] == pytest.approx(
        [100 * (best.domain_gain.high - best.domain_gain.value)]
    )
    assert trace["error_x"]["arrayminus"] == pytest.approx(
        [100 * (best.forgetting.value - best.forgetting.low)]
    )
    params = study.best.entry.params
    assert f"tau {params['tau']}" in trace["customdata"][0]
    assert len(traces["other trials"]["x"]) == len(FINISHED) - 3
    assert (traces["base model"]["x"], traces["base model"]["y"]) == ([0], [0])
    front = traces["Pareto front"]
    assert front["line"]["shape"] == "hv"
    assert front["x"] == sorted(front["x"])
    assert front["y"] == sorted(front["y"])


def test_the_training_curves_are_those_of_the_metrics_files(page, made):
    data = figures(page)
    across = {"front", "hypervolume", "surface", "importance"}
    assert set(data) == across | {"train-loss", "subset-rho", "moclip-angle_deg"}
    traces = {trace["name"]: trace for trace in data["train-loss"]["data"]}
    assert set(traces) == {f"trial {index}" for index in range(10)}
    lines = [
        json.loads(line) for line in (made / "trials/0003/metrics.jsonl").read_text().splitlines()
    ]
    assert traces["trial 3"]["x"] == [line["step"] for line in lines]
    assert traces["trial 3"]["y"] == [line["metrics"]["train/loss"] for line in lines]
    angles = {trace["name"] for trace in data["moclip-angle_deg"]["data"]}
    assert "trial 1" not in angles
    assert len(angles) == 9
    rho = {trace["name"]: trace for trace in data["subset-rho"]["data"]}
    assert rho["trial 3"]["x"] == [10, 20, 30]


def test_a_curve_with_a_gap_stays_valid_json():
    figure = curve_figure([Curve("trial 0", "best", [1, 2, 3], [0.5, math.nan, 0.25])], "nats")
    assert json.loads(figure.to_json())["data"][0]["y"] == [0.5, None, 0.25]


def test_only_grey_curves_are_thinned():
    steps = list(range(10_000))
    curves = [Curve("trial 0", "search", steps, steps), Curve("trial 1", "best", steps, steps)]
    sizes = {trace.name: len(trace.x) for trace in curve_figure(curves, "nats").data}
    assert sizes["trial 1"] == 10_000
    assert 200 <= sizes["trial 0"] <= 300


def test_damaged_metrics_are_noted(own):
    path = own / "trials/0002/metrics.jsonl"
    path.write_text('{"step": "x"}\n' + path.read_text())
    html = write_report(own).read_text()
    assert "The training curves of trial 2 cannot be shown" in visible_text(html)
    assert "trial 2" not in {trace["name"] for trace in figures(html)["train-loss"]["data"]}


def test_costs_add_up(page, made):
    entries = json.loads((made / "study.json").read_text())["trials"]
    processed = sum(entry["cost"]["processed_tokens"] for entry in entries)
    original = sum(entry["cost"]["original_tokens"] for entry in entries)
    text = visible_text(page)
    assert f"{processed:,} of {original:,} {100 * processed / original:.0f} %" in text
    seconds = round(24.2 + entries[3]["cost"]["train_seconds"])
    plain = round(entries[1]["cost"]["train_seconds"])
    assert (
        f"With Stage 0 counted in full, trial 3 took {seconds // 60} min {seconds % 60:02d} s to "
        f"train, plain fine-tuning {plain // 60} min {plain % 60:02d} s."
    ) in text
    assert "Stage 0: record (once) 24 s" in text
    assert "k_mean 79.2" in text


def test_the_receipt_counts_lost_and_gained_items(page, made):
    table = receipt(
        Scores.load(made / "base_scores"), Scores.load(made / "trials/0003/scores")
    ).to_pylist()
    text = visible_text(page)
    for task, items in (("nl2sql (domain)", 60), ("wordnet (general)", 200)):
        rows = [row["change"] for row in table if row["task"] == task.split()[0]]
        assert f"{task} {items} {rows.count('lost')} {rows.count('gained')}" in text
    gained = next(row for row in table if row["task"] == "nl2sql" and row["change"] == "gained")
    assert f"before I can't <do> that after {gained['output_after']}" in text
    total = sum(row["change"] == "lost" for row in table)
    assert f"Lost: {total} items" in text


def test_how_it_was_made_is_in_the_page(page):
    text = visible_text(page)
    for expected in ("tau.low 0.9", "train.batch_size 8", "torch 2.13.0", "search.seed 5",
                     "bootstrap 5, 2000 resamples"):  # fmt: skip
        assert expected in text


def test_hostile_text_stays_text(own):
    evil = "</script><script>alert(1)</script>"
    rows = [
        row | {"output": evil} if row["output"] else row
        for row in item_rows(3, TRIALS[3]["learned"], TRIALS[3]["damage"])
    ]
    save_scores(own / "trials/0003/scores", rows, "model-3")
    edit(own, name=f"demo {evil}", trials={4: {"cause": evil}, 3: {"params": {"x": evil}}})
    html = write_report(own).read_text()
    assert "<script>alert" not in html
    assert html.count("</script>") == 2
    assert evil in visible_text(html)
    assert "&lt;/script&gt;" in figures(html)["front"]["data"][-2]["customdata"][0]


def test_a_figure_cannot_end_its_script():
    curve = Curve("</script><b>", "best", [1], [0.5])
    shown = drawing(curve_figure([curve], "</script>"), "loss")
    assert "<" not in shown.script
    assert (
        json.loads(re.search(r"const f = (\{.*\}); Plotly", shown.script)[1])["data"][0]["name"]
        == "</script><b>"
    )


def test_the_head_says_when_it_began_and_what_has_no_scores(own):
    assert "Started 2026-11-22 04:40 UTC." in visible_text(write_report(own).read_text())
    edit(own, created="2026-11-29T06:17:17+00:00")
    text = visible_text(write_report(own).read_text())
    assert re.search(
        r"\b\d+ trials, [1-9]\d* of them without scores\. Started 2026-11-29 06:17 UTC", text
    )


@pytest.mark.parametrize(("domains", "shown"), [({"": 7}, False), ({"": 7, "law": 3}, True)])
def test_the_record_is_told_by_domain_where_the_data_name_any(own, domains, shown):
    edit(own, record={"samples": 10, "domains": {name: {"n": n} for name, n in domains.items()}})
    text = visible_text(write_report(own).read_text())
    assert "samples 10" in text
    assert ("domains.law.n" in text) == shown
    assert ("domains." in text) == shown


def test_the_same_study_gives_the_same_page(own, page):
    for _ in range(2):
        assert write_report(own).read_text() == page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_figures_and_nothing_sticks_out(made, tmp_path, width):
    """The page in a frame of a phone's and a desktop's width."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<iframe src="{made / "report.html"}" style="width:{width}px;height:900px;border:0">
</iframe><pre id="result"></pre><script>
onload = () => setTimeout(() => {{
  const page = document.querySelector("iframe").contentDocument;
  document.querySelector("#result").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    figures: [...page.querySelectorAll(".figure")].map(f => [
      f.id, f.querySelectorAll("svg .trace").length, Math.round(f.getBoundingClientRect().right)]),
  }});
}}, 1500)</script>"""
    )
    result = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-background-networking", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
            "--window-size=1400,1000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    measured = json.loads(re.search(r'<pre id="result">(.*?)</pre>', result.stdout)[1])
    assert measured["width"] <= width
    traces = {name: count for name, count, _ in measured["figures"]}
    # The front's 4 groups of trials, its line and the base; one line per trial elsewhere.
    across = {"front": 6, "hypervolume": 2, "surface": 1, "importance": 2}
    assert traces == across | {"train-loss": 10, "subset-rho": 10, "moclip-angle_deg": 9}
    assert all(right <= width for _, _, right in measured["figures"])


# Objectives and the front as a whole


def best_of(directory: Path, **changes: Any) -> Study:
    edit(directory, best=None, **changes)
    return load_study(directory)


def test_by_budget_only_a_trial_within_it_is_the_best(own):
    """By the search's numbers: trials 2 and 8 forget at most 0.005, 0 and others more."""
    study = best_of(own, objective="budget", max_forgetting=0.005)
    values = {
        trial.entry.number: (trial.comparison.domain_gain.value, trial.comparison.forgetting.value)
        for trial in study.compared
    }
    inside = {number: gain for number, (gain, forgetting) in values.items() if forgetting <= 0.005}
    assert 0 < len(inside) < len(values)
    assert study.best.entry.number == max(inside, key=inside.get)
    assert study.closest is None
    said = " ".join(sentence.text for sentence in headline(study))
    share = study.best.budget_probability
    assert f"within the budget of +0.5 points in {100 * share:.0f} % of the resamples" in said
    replicates = study.best.comparison.forgetting_replicates
    assert share == pytest.approx(sum(f <= 0.005 for f in replicates) / len(replicates))


def test_where_no_trial_keeps_the_budget_the_least_forgetting_one_is_shown_and_none_is_best(own):
    study = best_of(own, objective="budget", max_forgetting=-0.05)
    least = min(study.compared, key=lambda trial: trial.comparison.forgetting.value)
    assert study.best is None
    assert study.closest is least is study.shown
    assert study.verdict.comparison is least.comparison
    summary = as_json(study)
    assert (summary["best"], summary["closest"]) == (None, least.entry.number)
    html = write_report(own).read_text(encoding="utf-8")
    assert 'class="tag best"' not in html
    text = visible_text(html)
    assert (
        f"No trial stays within the budget of \N{MINUS SIGN}5.0 points of forgetting, so there is "
        f"no best one; {least.name} forgets least."
    ) in text
    assert "closest to the budget" in text


def test_of_a_whole_front_the_knee_is_the_best(own):
    from lrmc_ray.evaluate.front import knee

    study = best_of(own, objective="pareto")
    values = [
        (trial.comparison.domain_gain.value, trial.comparison.forgetting.value)
        for trial in study.compared
    ]
    assert study.best is study.compared[knee(values)]
    front = sum(trial.is_on_front for trial in study.compared)
    said = " ".join(sentence.text for sentence in headline(study))
    assert f"the knee of a front of {front} trials" in said


@pytest.mark.parametrize("objective", ["combined", "budget", "pareto"])
def test_the_front_is_shown_as_a_whole_for_every_objective(own, objective):
    from lrmc_ray.evaluate.front import HYPERVOLUME_REFERENCE, hypervolume, knee

    study = best_of(own, objective=objective)
    values = [
        (trial.comparison.domain_gain.value, trial.comparison.forgetting.value)
        for trial in study.compared
    ]
    html = write_report(own).read_text(encoding="utf-8")
    text = visible_text(html)
    bend = study.compared[knee(values)]
    assert f"Its knee is {bend.name}, in {100 * bend.knee_probability:.0f} %" in text
    area = 1e4 * hypervolume(values, HYPERVOLUME_REFERENCE)
    assert f"now {area:.0f} points x points" in text
    line = figures(html)["hypervolume"]["data"][1]["y"]
    assert line == pytest.approx(
        [1e4 * hypervolume(values[: n + 1], HYPERVOLUME_REFERENCE) for n in range(len(values))]
    )
    assert sum(trial.knee_probability for trial in study.compared) == pytest.approx(1.0)


def test_the_surface_goes_through_the_trials_region_and_importance_is_drawn(page, study):
    drawn = figures(page)
    dots = drawn["surface"]["data"][1]
    assert len(dots["x"]) == sum("tau" in trial.entry.params for trial in study.compared)
    assert {bar["name"] for bar in drawn["importance"]["data"]} == {"domain gain", "forgetting"}
    gain = next(bar for bar in drawn["importance"]["data"] if bar["name"] == "domain gain")
    assert dict(zip(gain["y"], gain["x"], strict=True)) == {"lr": 60, "tau": 30, "delta_max": 10}


def test_the_report_says_what_early_stopping_cost_and_saved(own):
    rung = {"seconds": 4.0, "value": 0.1, "stop": True}
    edit(own, trials={number: {"rung": rung} for number in (2, 3, 5, 6, 7)})
    entries = json.loads((own / "study.json").read_text())["trials"]
    whole = [sum(entries[n]["cost"][f"{part}_seconds"] for part in ("train", "evaluate"))
             for n in (2, 3, 5, 6)]  # fmt: skip
    saved = sum(whole) / 4 - entries[7]["cost"]["train_seconds"]
    text = visible_text(write_report(own).read_text())
    assert (
        "1 of 5 trials that were scored on the way, which took 20 s in all, stopped early: about "
        f"{format_seconds(saved)} of training and scoring less"
    ) in text
    assert as_json(load_study(own))["trials"][7]["rung"] == rung
    edit(own, trials={7: {"state": "FAIL"}})
    text = visible_text(write_report(own).read_text())
    assert "0 of 5 trials that were scored on the way" in text


def test_costs_are_given_in_core_hours_and_beside_the_forecast(page, made):
    entries = json.loads((made / "study.json").read_text())["trials"]
    hours = sum(
        2 * entry["cost"]["train_seconds"] + entry["cost"].get("evaluate_seconds", 0.0)
        for entry in entries
    )
    text = visible_text(page)
    assert f"{hours / 3600:.3f}" in text
    assert "The search took 15 min 00 s by the clock in 2 sittings." in text
    assert "The forecast for 10 trials was 14 min 00 s (measured: median of 3 trials)." in text
