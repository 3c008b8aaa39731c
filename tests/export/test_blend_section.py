"""Curves over the blend: measured points only, with the command that makes each model."""

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest

from lrmc_ray.console import run_command
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.export.blend_command import _weights, main
from lrmc_ray.export.curve import curve_trials
from lrmc_ray.files.blend import BlendFile, BlendPoint, read_blend
from lrmc_ray.files.study import read_study
from lrmc_ray.report.blends import blend_curves
from lrmc_ray.report.page import write_report
from lrmc_ray.report.study import load_study
from tests.support.study_with_models import add_blend
from tests.support.synthetic_study import SEED, item_rows, make_study


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = make_study(tmp_path_factory.mktemp("curves of mine") / "demo")
    for trial, learned, damage in ((3, 0.4, 0.006), (1, 0.35, 0.02)):
        for weight in (0.5, 0.25):
            add_blend(directory, trial, weight, item_rows(trial, learned * weight, damage))
    return directory


def test_the_points_are_those_that_were_scored(made):
    best, plain = blend_curves(load_study(made))[::-1]
    assert (best.trial.entry.number, plain.trial.entry.number) == (3, 1)
    assert [place.weight for place in best.places] == [0.25, 0.5, 1.0]
    base = Scores.load(made / "base_scores")
    for place in best.places[:2]:
        scores = Scores.load(made / f"blends/scores/3-{place.weight:g}")
        own = compare(base, scores, forgetting_weight=1.0, seed=SEED)
        assert place.comparison.domain_gain.value == own.domain_gain.value
        assert place.comparison.forgetting.value == own.forgetting.value
    assert best.places[2].comparison is best.trial.comparison
    below, above = best.around(0.3)
    assert (below.weight, above.weight) == (0.25, 0.5)
    assert best.around(0.1)[0] is None


def test_the_page_has_the_figure_and_commands_that_can_be_pasted(made):
    page = write_report(made).read_text()
    data = json.loads(re.search(r'const f = (\{.*\}); Plotly.newPlot\("blend"', page)[1])["data"]
    best, _ = blend_curves(load_study(made), [3, 1])[::-1]
    gains = [0.0, *(100 * place.comparison.domain_gain.value for place in best.places)]
    losses = [0.0, *(100 * place.comparison.forgetting.value for place in best.places)]
    (drawn,) = [one for one in data if one["marker"]["symbol"] == "star"]
    assert (drawn["y"], drawn["x"]) == (pytest.approx(gains), pytest.approx(losses))
    assert drawn["text"] == ["", "0.25", "0.5", "1"]
    commands = [shlex.split(unescape(c)) for c in re.findall(r"<code>(.*?)</code>", page)]
    words = ["export", str(made), "--trial", "3"]
    assert [c[1:] for c in commands[:3]] == [
        [*words, "--blend", "0.25", "--to", "my_model"],
        [*words, "--blend", "0.5", "--to", "my_model"],
        [*words, "--to", "my_model"],
    ]
    assert [c[4] for c in commands] == ["3"] * 3 + ["1"] * 3


def test_a_curve_by_depth_stands_beside_the_even_one(made, tmp_path):
    own = Path(shutil.copytree(made, tmp_path / "study"))
    for weight, learned in ((0.5, 0.3), (0.0, 0.1)):
        add_blend(own, 3, weight, item_rows(3, learned, 0.004), "depth")
    plain, even, depth = blend_curves(load_study(own))
    assert [(c.trial.entry.number, c.form) for c in (plain, even, depth)] == [
        (1, "even"), (3, "even"), (3, "depth"),
    ]  # fmt: skip
    assert [place.weight for place in even.places] == [0.25, 0.5, 1.0]
    assert [place.weight for place in depth.places] == [0.0, 0.5, 1.0]
    base = Scores.load(own / "base_scores")
    scores = Scores.load(own / "blends/scores/3-0.5-depth")
    expected = compare(base, scores, forgetting_weight=1.0, seed=SEED)
    assert depth.places[1].comparison.domain_gain.value == expected.domain_gain.value
    page = write_report(own).read_text()
    data = json.loads(re.search(r'const f = (\{.*\}); Plotly.newPlot\("blend"', page)[1])["data"]
    solid, dotted = [one for one in data if one["marker"]["symbol"] == "star"]
    assert (solid["line"]["dash"], dotted["line"]["dash"]) == ("solid", "dot")
    # The base is on the even curve alone: at 0 the last layer is the tuned one.
    assert (len(solid["y"]), len(solid["error_x"]["array"])) == (4, 4)
    assert dotted["y"] == pytest.approx(
        [100 * p.comparison.domain_gain.value for p in depth.places]
    )
    assert len(dotted["error_x"]["array"]) == len(dotted["customdata"]) == 3
    assert dotted["text"] == ["0 by depth", "0.5 by depth", "1"]
    assert "On the dotted line" in page
    commands = [shlex.split(unescape(c))[5:] for c in re.findall(r"<code>(.*?)</code>", page)]
    assert commands[:5] == [  # the trial itself is there once
        ["--blend", "0.25", "--to", "my_model"],
        ["--blend", "0.5", "--to", "my_model"],
        ["--to", "my_model"],
        ["--blend", "0", "--by-depth", "--to", "my_model"],
        ["--blend", "0.5", "--by-depth", "--to", "my_model"],
    ]
    assert len(commands) == 8
    assert "On the dotted line" not in write_report(made).read_text()


def test_points_of_another_base_do_not_count_and_damage_is_said(made, tmp_path):
    own = Path(shutil.copytree(made, tmp_path / "study"))
    file = json.loads((own / "blend.json").read_text())
    for point in file["points"]:
        point["base_scores"] = "other"
    (own / "blend.json").write_text(json.dumps(file))
    assert blend_curves(load_study(own)) == []
    assert "Part of the way" not in write_report(own).read_text()
    (own / "blend.json").write_text("{")
    page = unescape(write_report(own).read_text())
    assert "The curves over the blend cannot be shown: " in page
    assert "run `lrmc blend` again" in page


def test_a_newer_point_takes_the_place_of_an_older_one(tmp_path):
    file = BlendFile()
    for scores in ("a", "b"):
        for weight in (0.5, 0.25):
            file.add(BlendPoint(trial=3, weight=weight, tuned="-", base_scores="-", scores=scores))
    file.add(BlendPoint(trial=3, weight=0.5, form="depth", tuned="-", base_scores="-", scores="c"))
    found = [(point.form, point.weight, point.scores) for point in file.points]
    assert found == [("depth", 0.5, "c"), ("even", 0.25, "b"), ("even", 0.5, "b")]
    assert file.point(3, 0.5).scores == "b"
    assert file.point(3, 0.5, "depth").scores == "c"
    assert file.point(3, 0.25, "depth") is None
    assert read_blend(tmp_path).points == []


def test_the_best_trial_and_plain_fine_tuning_are_measured_by_default(made):
    study = read_study(made)
    assert [trial.number for trial in curve_trials(study, None)] == [3, 1]
    assert [trial.number for trial in curve_trials(study, [2, 2])] == [2]


@pytest.mark.parametrize("at", ["0", "0,1", "half", "0.5,1", "", "nan"])
def test_weights_are_between_the_two_models(made, capsys, at):
    assert run_command(main, [str(made), "--at", at]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --at must be numbers between 0 and 1, got {at}; write them")
    assert said.count("\n") == 1


@pytest.mark.parametrize("at", ["1", "-0.5"])
def test_by_depth_they_may_begin_at_0(made, capsys, at):
    assert run_command(main, [str(made), f"--at={at}", "--by-depth"]) == 2
    assert f"between 0 and 1, got {at}" in capsys.readouterr().err
    assert _weights("0.5,0", by_depth=True) == [0.0, 0.5]
