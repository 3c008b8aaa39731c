"""The comparison's figures: every number where it belongs, every label where it can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from lrmc_ray.compare.figure import (
    DROP,
    GREY,
    draw_effects,
    draw_methods,
    draw_scatter,
    named_methods,
    place_labels,
)
from lrmc_ray.compare.measure import Estimate, Trade
from lrmc_ray.compare.table import ComparisonTable, Effect, MethodRow
from lrmc_ray.evaluate.statistics import Interval

GREEN, ORANGE = "#0f766e", "#c2410c"


def estimate(value, seeds=0.02, items=0.04):
    """With intervals of half widths ``seeds`` and ``items``; None for none."""
    return Estimate(
        value,
        None if seeds is None else Interval(value, value - seeds, value + seeds),
        None if items is None else Interval(value, value - items, value + items),
    )


def trade(gain, forgetting, **widths):
    return Trade(
        estimate(gain, **widths), estimate(forgetting, **widths), estimate(gain - forgetting)
    )


def method(name, gain, forgetting, versus=None, title=None):
    return MethodRow(
        name=name, title=title or f"method {name}", lr=1e-4, seeds=(0, 1, 2),
        trade=None if gain is None else trade(gain, forgetting), accuracy=None, kl_domain=None,
        kl_general=None, cost=None,
        versus=None if versus is None else trade(versus, 0.0), problems=(),
    )  # fmt: skip


def comparison(rows, labels=None, effects=(), reference="sft"):
    described = [
        {"name": row.name, "title": row.title, "label": (labels or {}).get(row.name, "")}
        for row in rows
    ]
    return ComparisonTable(
        name="made-up", reference=reference, seeds=(0, 1, 2), rows=tuple(rows), points=(),
        predictors=(), effects=tuple(effects), curves=(), undivided_tasks=(),
        description={"methods": described},
    )  # fmt: skip


@pytest.fixture
def table():
    """Five methods; ``sft`` is the reference, ``b`` the best; the front is c, a, b."""
    rows = [
        method("sft", 0.50, 0.040),
        method("a", 0.55, 0.010, versus=0.08),
        method("b", 0.60, 0.020, versus=0.12),
        method("c", 0.30, -0.010, versus=-0.15),
        method("d", 0.45, 0.050, versus=-0.06),
        method("e", None, None),
    ]
    return comparison(rows, {"a": "the defaults", "sft": "plain fine-tuning"})


def marks(axes):
    """What was drawn, by its name."""
    return {line.get_gid(): line for line in axes.get_lines() if line.get_gid()}


# Which methods are named


def test_reference_best_and_labelled_methods_are_named_and_no_other(table):
    named = named_methods(table)
    assert {name: look.label for name, look in named.items()} == {
        "sft": "plain fine-tuning",
        "a": "the defaults",
        "b": "method b (best)",
    }
    colours = [look.colour for look in named.values()]
    assert len({*colours, GREY}) == 4
    assert (named["sft"].colour, named["b"].colour) == (ORANGE, GREEN)


def test_a_label_names_the_best_as_well_and_a_reference_that_is_best_keeps_its_colour():
    rows = [method("sft", 0.5, 0.0), method("a", 0.4, 0.0, versus=-0.1)]
    (look,) = named_methods(comparison(rows, {"sft": "plain"})).values()
    assert (look.label, look.colour) == ("plain (best)", ORANGE)
    assert named_methods(comparison([method("sft", None, None)])) == {}


# Gain against forgetting


def test_every_method_is_a_point_at_its_scores_grey_unless_it_is_named(table):
    (axes,) = draw_scatter(table).axes
    drawn = marks(axes)
    for row in table.rows[:5]:
        point = drawn[row.name]
        assert point.get_xdata()[0] == pytest.approx(100 * row.trade.forgetting.value)
        assert point.get_ydata()[0] == pytest.approx(100 * row.trade.domain_gain.value)
    assert {name: drawn[name].get_color() for name in "cd"} == {"c": GREY, "d": GREY}
    assert [drawn[name].get_color() for name in ("sft", "b")] == [ORANGE, GREEN]
    assert "e" not in drawn  # it has no scores
    assert (drawn["base model"].get_xdata()[0], drawn["base model"].get_ydata()[0]) == (0, 0)
    assert "forgetting" in axes.get_xlabel().lower()
    assert "gain" in axes.get_ylabel().lower()


def test_the_front_goes_from_the_least_forgetting_to_the_most_gain(table):
    (axes,) = draw_scatter(table).axes
    front = marks(axes)["front"]
    assert list(front.get_xdata()) == pytest.approx([-1, 1, 2])
    assert list(front.get_ydata()) == pytest.approx([30, 55, 60])
    assert front.get_drawstyle() == "steps-post"  # between two methods there is none


def test_named_methods_have_crosses_of_their_intervals_over_the_items(table):
    (axes,) = draw_scatter(table).axes
    crosses = [line for line in axes.get_lines() if not line.get_gid()]
    spans = {(tuple(map(float, c.get_xdata())), tuple(map(float, c.get_ydata()))) for c in crosses}
    expected = set()
    for x, y in ((4, 50), (1, 55), (2, 60)):
        expected |= {((x - 4, x + 4), (y, y)), ((x, x), (y - 4, y + 4))}
    assert len(spans) == len(expected) == 6
    found = np.array(sorted(a + b for a, b in spans))
    np.testing.assert_allclose(found, np.array(sorted(a + b for a, b in expected)), atol=1e-9)


def boxes_of(figure, texts):
    figure.draw_without_rendering()
    # Of the letters alone: an annotation's own extent has the line to its point in it.
    return [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_text()]


def assert_apart(boxes):
    for (one, box), (other, second) in itertools.combinations(boxes, 2):
        assert not box.overlaps(second), f"{one!r} is on {other!r}"


def assert_inside(text, box, frame):
    left, bottom, right, top = frame
    assert left <= box.x0 <= box.x1 <= right, text
    assert bottom <= box.y0 <= box.y1 <= top, text


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_a_crowd_overlap_no_other_and_stay_inside(seed):
    """Forty methods within a few points, as in the large comparison; six of them have labels."""
    random = np.random.default_rng(seed)
    rows = [method("sft", 0.52, 0.035)]
    for number in range(40):
        gain, forgetting = random.normal(0.52, 0.05), random.normal(0.03, 0.012)
        rows.append(method(f"m{number}", gain, forgetting, versus=gain - 0.52))
    labels = {"sft": "plain fine-tuning", "m1": "the paper", "m2": "the defaults", "m3": "another"}
    table = comparison(rows, labels)
    figure = draw_scatter(table)
    (axes,) = figure.axes
    boxes = boxes_of(figure, axes.texts)
    assert {text for text, _ in boxes} >= {"base model", "Pareto front", "plain fine-tuning"}
    assert len(boxes) == len(named_methods(table)) + 2
    assert_apart(boxes)
    frame = axes.get_window_extent()
    dots = [
        axes.transData.transform(
            (marks(axes)[row.name].get_xdata()[0], marks(axes)[row.name].get_ydata()[0])
        )
        for row in rows
        if row.name in named_methods(table)
    ]
    for text, box in boxes:
        assert_inside(text, box, frame.extents)
        assert not any(box.contains(*dot) for dot in dots), f"{text!r} covers a named method"


def test_a_label_stands_beside_its_point_and_moves_where_another_is():
    frame = (0.0, 0.0, 400.0, 400.0)
    alone = place_labels([(100, 100)], [(50, 10)], [(100, 100)], [], frame, unit=1.0)
    assert alone == [(108, 95, 158, 105)]  # to the right, in the middle
    ((left, *_),) = place_labels([(390, 100)], [(50, 10)], [], [], frame, unit=1.0)
    assert left + 50 <= 390  # to the left, where the right has no room
    first, second = place_labels([(100, 100), (102, 101)], [(50, 10)] * 2, [], [], frame, unit=1.0)
    assert (
        first[2] <= second[0]
        or second[2] <= first[0]
        or (first[3] <= second[1] or second[3] <= first[1])
    )
    points = [(120.0, 100.0), (140.0, 100.0)]
    (box,) = place_labels([(100, 100)], [(50, 10)], points, [], frame, unit=1.0)
    assert not any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points)
    # A line to the right through the point: above or below it is as near.
    line = [(float(x), 100.0) for x in range(100, 200, 3)]
    (box,) = place_labels([(100, 100)], [(50, 10)], [], line, frame, unit=1.0)
    assert not box[1] <= 100 <= box[3]


# Rows of intervals


def drawn_in(panel):
    """What a panel shows, by row and kind: the point, and the ends of both intervals."""
    shown = {}
    for line in panel.get_lines():
        x, y = line.get_xdata(), line.get_ydata()
        if y[0] == 0 and y[-1] == 1:
            continue  # the line at zero
        kind = "point" if len(x) == 1 else "items" if line.get_linewidth() > 5 else "seeds"
        shown[round(y[0] - DROP), kind] = ([float(value) for value in x], line.get_color())
    return shown


def expected_of(values):
    expected = {}
    for place, value in enumerate(values):
        if value is None:
            continue
        expected[place, "point"] = [100 * value.value]
        for kind, interval in (("seeds", value.over_seeds), ("items", value.over_items)):
            if interval is not None:
                expected[place, kind] = [100 * interval.low, 100 * interval.high]
    return expected


def assert_shows(panel, values):
    shown = {key: x for key, (x, _) in drawn_in(panel).items()}
    expected = expected_of(values)
    assert shown.keys() == expected.keys()
    for key in expected:
        assert shown[key] == pytest.approx(expected[key])
    top, bottom = panel.get_ylim()
    assert top > bottom  # the first row is on top


def test_the_methods_are_rows_best_first_with_both_intervals(table):
    figure = draw_methods(table)
    rows = {row.name: row for row in table.rows}
    order = [rows[name] for name in ("b", "a", "sft", "d", "c")]
    gain, forgetting, versus = figure.axes
    assert_shows(gain, [row.trade.domain_gain for row in order])
    assert_shows(forgetting, [row.trade.forgetting for row in order])
    assert_shows(versus, [row.versus.combined if row.versus else None for row in order])
    names = [text.get_text() for text in figure.texts[3:]]
    assert names == [
        "method b (best)",
        "method a = the defaults",
        "method sft = plain fine-tuning",
        "method d",
        "method c",
    ]
    points = {
        place: colour for (place, kind), (_, colour) in drawn_in(gain).items() if kind == "point"
    }
    assert (points[0], points[2], points[3], points[4]) == (GREEN, ORANGE, GREY, GREY)


def effect(title, gain, forgetting, combined):
    estimates = Trade(estimate(gain), estimate(forgetting), estimate(combined))
    return Effect(title, (("a", "sft"),), (0, 1, 2), estimates, None)


def test_the_effects_are_rows_in_colour_where_both_intervals_exclude_zero(table):
    unsure = Effect(
        "one interval alone", (("a", "sft"), ("b", "sft")), (0,),
        Trade(estimate(0.03), estimate(0.0), estimate(0.03, seeds=None)), None,
    )  # fmt: skip
    effects = [effect("helps", 0.10, -0.05, 0.15), effect("harms", -0.10, 0.05, -0.15), unsure]
    figure = draw_effects(comparison(table.rows, effects=effects))
    for panel, part in zip(figure.axes, ("domain_gain", "forgetting", "combined"), strict=True):
        assert_shows(panel, [getattr(one.trade, part) for one in effects])
        points = {place: c for (place, kind), (_, c) in drawn_in(panel).items() if kind == "point"}
        assert points == {0: GREEN, 1: ORANGE, 2: GREY}
        (zero,) = [line for line in panel.get_lines() if list(line.get_ydata()) == [0, 1]]
        assert list(zero.get_xdata()) == [0, 0]
    assert [text.get_text() for text in figure.texts[3:]] == [
        "helps (1 pair, 3 seeds)",
        "harms (1 pair, 3 seeds)",
        "one interval alone (2 pairs, 1 seed)",
    ]


@pytest.mark.parametrize("draw", [draw_methods, draw_effects])
def test_names_as_long_as_they_may_be_stay_on_the_page_and_off_each_other(draw):
    long = "w" * 36 + " and letters of an average width"[:24]
    assert len(long) == 60
    rows = [method("sft", 0.5, 0.03, title=long)]
    rows += [method(f"m{n}", 0.5, 0.03, versus=n / 100, title=long) for n in range(1, 5)]
    figure = draw(comparison(rows, effects=[effect(long, 0.1, 0.0, 0.1)] * 5))
    boxes = boxes_of(figure, figure.texts)
    assert len(boxes) == 3 + 5
    assert_apart(boxes)
    titles = [(axes.get_title(loc="left"), axes.title) for axes in figure.axes]
    assert [title for title, _ in titles][:2] == ["domain gain", "forgetting"]
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert_inside(text, box, (0, 0, width, height))
    # A name is above its own intervals, and below those of the row before.
    for place, (text, box) in enumerate(boxes[3:]):
        own, before = (
            figure.axes[0].transData.transform((0, row + DROP))[1] for row in (place, place - 1)
        )
        assert own < box.y0, text
        assert place == 0 or box.y1 < before, text


def test_nothing_scored_draws_an_empty_page():
    table = comparison([method("sft", None, None)])
    assert [len(draw(table).axes) for draw in (draw_scatter, draw_methods)] == [1, 3]
