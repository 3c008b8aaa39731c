"""The way from the base to reported models: what is between, and beyond the reference's."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from lrmc_ray.compare.blends import BlendPlace, blend_places
from lrmc_ray.compare.description import Description
from lrmc_ray.compare.jobs import num_jobs, open_jobs, reported_jobs
from lrmc_ray.compare.measure import Estimate, general_half, most_gain
from lrmc_ray.compare.report import as_html, as_json_object, as_markdown
from lrmc_ray.compare.run import Comparing
from lrmc_ray.compare.table import load_table
from lrmc_ray.compare.words import sentences
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.files.artifacts import write_json
from tests.support.synthetic_comparison import METHODS, make_space, skill, write_base, write_run
from tests.support.synthetic_study import item_rows, save_scores

# What a curve gains


def test_the_most_gain_by_hand():
    """From the base over (5, 1) and (8, 4) to (6, 6), gain and forgetting."""
    gains, forgettings = np.array([0.0, 5.0, 8.0, 6.0]), np.array([0.0, 1.0, 4.0, 6.0])
    for allowed, expected in [
        (0.0, 0.0), (0.5, 2.5), (1.0, 5.0), (2.0, 6.0), (4.0, 8.0), (5.0, 8.0), (9.0, 8.0),
    ]:  # fmt: skip
        assert most_gain(gains, forgettings, np.asarray(allowed)) == pytest.approx(expected)


def test_a_curve_that_cannot_forget_so_little_is_held_to_its_least():
    gains, forgettings = np.array([0.0, 3.0, 9.0]), np.array([0.0, -2.0, 5.0])
    for allowed, expected in [(-7.0, 3.0), (-2.0, 3.0), (-1.0, 3.0 + 6.0 / 7.0), (5.0, 9.0)]:
        assert most_gain(gains, forgettings, np.asarray(allowed)) == pytest.approx(expected)


def test_many_random_curves_against_fine_steps_along_them():
    rng = np.random.default_rng(0)
    gains_PZ, forgettings_PZ = rng.normal(size=(5, 300)), rng.normal(size=(5, 300))
    allowed_Z = rng.normal(size=300)
    found_Z = most_gain(gains_PZ, forgettings_PZ, allowed_Z)
    share = np.linspace(0, 1, 20001)[:, None]
    for z in range(300):
        steps = [
            (values[:-1] + share * (values[1:] - values[:-1])).ravel()
            for values in (gains_PZ[:, z], forgettings_PZ[:, z])
        ]
        allowed = max(allowed_Z[z], forgettings_PZ[:, z].min())
        assert found_Z[z] == pytest.approx(steps[0][steps[1] <= allowed + 1e-12].max(), abs=1e-3)


def test_places_are_in_order_and_have_names():
    places = blend_places([0.75, 0.25], [0.5])
    assert places == [
        BlendPlace("even", 0.25), BlendPlace("even", 0.75), BlendPlace("depth", 0.5),
    ]  # fmt: skip
    assert [place.name for place in places] == ["0.25", "0.75", "0.5 by depth"]


# A comparison


def make(folder, *, blended, **changes):
    """All runs made up; those of ``blended`` methods have the models between, too."""
    space = make_space(**changes)
    comparing = Comparing(Description(space, list(space.methods), folder, {}))
    description = comparing.description
    description.open()
    write_base(comparing)
    places = blend_places(space.compare.blend_weights, space.compare.depth_blend_weights)
    while jobs := open_jobs(space, comparing.methods, description.outcomes):
        job = jobs[0]
        write_run(comparing, job)
        if job.split == "test" and job.method in blended:
            found = []
            for number, place in enumerate(places):
                learned, damage = skill(job)
                rows = item_rows(
                    700 + number, learned * place.weight, damage * place.weight**3, split="test"
                )
                directory = description.run_directory(job)
                save_scores(directory / "scores" / f"blend-{number}", rows, f"blend-{number}")
                found.append(
                    {"form": place.form, "weight": place.weight, "scores": f"scores/blend-{number}"}
                )
            write_json(description.run_directory(job) / "blends.json", found)
        description.complete(job)
    description.write()
    return comparing


CURVES = {"compare": {"blend_weights": [0.5, 0.25], "depth_blend_weights": [0.5]}}


@pytest.fixture(scope="module")
def comparing(tmp_path_factory):
    return make(tmp_path_factory.mktemp("curves"), blended={"sft", "lrmc"}, **CURVES)


@pytest.fixture(scope="module")
def table(comparing):
    return load_table(comparing.directory)


def test_every_place_of_every_method_has_a_row(table):
    rows = [(row.method, row.place.name, row.seeds) for row in table.curves]
    places = ["0.25", "0.5", "0.5 by depth", "1"]
    assert rows == [
        *[("sft", name, (0, 1, 2)) for name in places],
        *[("lrmc", name, (0, 1, 2)) for name in places],
        ("lora", "1", (0, 1, 2)),
    ]
    on_it = {(r.method, r.place.name) for r in table.curves if r.beyond is None}
    assert on_it == {("sft", name) for name in ("0.25", "0.5", "1")}
    for row in table.rows:
        (whole,) = [r for r in table.curves if (r.method, r.place.weight) == (row.name, 1.0)]
        assert whole.trade == row.trade


@pytest.mark.parametrize(
    ("scores", "place"), [("blend-0", "0.25"), ("blend-1", "0.5"), ("test", "1")]
)
def test_what_is_beyond_the_curve_is_the_mean_over_seeds_of_each_ones_own(
    comparing, table, scores, place
):
    """With the scores read and compared once more, and a walk along the curve in small steps."""
    description = comparing.description
    base = general_half(Scores.load(comparing.output / "scores" / "test"), "test")

    def compared(job, name):
        read = Scores.load(description.run_directory(job) / "scores" / name)
        return compare(
            base, general_half(read, "test"), forgetting_weight=1.0,
            seed=description.values["bootstrap_seed"], resamples=2,
        )  # fmt: skip

    chosen = description.values["chosen"]
    values = []
    for seed in range(3):
        (sft,) = [j for j in reported_jobs(comparing.space, "sft", chosen["sft"]) if j.seed == seed]
        (own,) = [
            j for j in reported_jobs(comparing.space, "lrmc", chosen["lrmc"]) if j.seed == seed
        ]
        points = [(0.0, 0.0)]
        for name in ("blend-0", "blend-1", "test"):
            one = compared(sft, name)
            points.append((one.domain_gain.value, one.forgetting.value))
        mine = compared(own, scores)
        allowed = max(mine.forgetting.value, min(f for _, f in points))
        most = max(
            a[0] + t * (b[0] - a[0])
            for a, b in itertools.pairwise(points)
            for t in np.linspace(0, 1, 20001)
            if a[1] + t * (b[1] - a[1]) <= allowed + 1e-12
        )
        values.append(mine.domain_gain.value - most)
    (row,) = [r for r in table.curves if (r.method, r.place.name) == ("lrmc", place)]
    assert row.beyond.value == pytest.approx(np.mean(values), abs=1e-4)
    assert row.beyond.over_seeds.low < row.beyond.value < row.beyond.over_seeds.high
    assert row.beyond.over_items.low <= row.beyond.value <= row.beyond.over_items.high


def test_the_tables_have_the_curves_and_other_comparisons_say_nothing_of_them(table, tmp_path):
    for text in (as_markdown(table), as_html(table, {})):
        assert "From the base, 0, to the tuned model, 1, test items" in text.replace("&#39;", "'")
        assert "0.5 by depth" in text
    assert len(as_json_object(table)["curves"]) == 9
    json.dumps(as_json_object(table))
    without = load_table(make(tmp_path, blended=()).directory)
    assert without.curves == ()
    assert "From the base" not in as_markdown(without) + as_html(without, {})


def test_a_sentence_says_which_method_gains_beyond_the_curve(table):
    """With differences put in their place: told from none, in either direction, or not."""
    apart, near = Interval(0.03, 0.01, 0.05), Interval(0.03, -0.01, 0.07)

    def said(lrmc, lora):
        rows = []
        for row in table.curves:
            beyond = {"lrmc": lrmc, "lora": lora}.get(row.method)
            rows.append(replace(row, beyond=beyond))
        (sentence,) = [
            text
            for text in sentences(replace(table, curves=tuple(rows)))
            if text.startswith("By gain against models between the base and full SFT that")
        ]
        return sentence.partition("seed by seed: ")[2]

    above, unclear = Estimate(0.03, apart, apart), Estimate(0.03, apart, near)
    below = Estimate(-0.03, Interval(-0.03, -0.05, -0.01), None)
    lrmc = "restricted + MoClip"
    assert said(above, below) == f"better {lrmc}; worse LoRA; 0 of 2 not distinguishable."
    assert said(above, unclear) == f"better {lrmc}; worse none; 1 of 2 not distinguishable."


def test_a_reference_without_a_curve_is_no_yardstick(tmp_path):
    table = load_table(make(tmp_path, blended={"lrmc"}, **CURVES).directory)
    assert {row.beyond for row in table.curves} == {None}
    assert len(table.curves) == 6


# Seeds of their own


def test_a_method_may_have_more_seeds_than_the_others(tmp_path):
    methods = {**METHODS, "lrmc": {**METHODS["lrmc"], "seeds": [0, 1, 2, 5]}}
    comparing = make(tmp_path, blended=(), methods=methods)
    assert num_jobs(comparing.space, list(METHODS)) == (3 + 3) + (3 + 4) + (2 + 3)
    table = load_table(comparing.directory)
    assert table.seeds == (0, 1, 2, 5)
    assert {row.name: row.seeds for row in table.rows} == {
        "sft": (0, 1, 2), "lrmc": (0, 1, 2, 5), "lora": (0, 1, 2),
    }  # fmt: skip
    assert {row.problems for row in table.rows} == {()}
    assert not any("seeds so far" in sentence for sentence in sentences(table))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {**METHODS, "sft": {**METHODS["sft"], "seeds": [1, 0]}}},
         "methods.sft.seeds must begin with that of compare.seeds, 0"),
        ({"methods": {**METHODS, "sft": {**METHODS["sft"], "seeds": [0, 3, 3]}}},
         "methods.sft.seeds must differ from one another"),
        ({"compare": {"blend_weights": [0.5, 0.5]}}, "compare.blend_weights must differ"),
        ({"compare": {"blend_weights": [1.0]}}, "less than 1"),
        ({"compare": {"depth_blend_weights": [0.0]}}, "greater than 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        CompareSpace.model_validate({**make_space().model_dump(), **changes})
