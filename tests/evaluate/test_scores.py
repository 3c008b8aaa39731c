import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.changes import compare, difference, receipt
from lrmc_ray.evaluate.items import ITEMS_FILE, ITEMS_SCHEMA, Scores
from lrmc_ray.evaluate.statistics import paired_bootstrap

Row = dict[str, object]


def rows_of(
    task, group, kind, metric, values, *, weights=None, ids=None, outputs=None
) -> list[Row]:
    """Long-format rows of one metric of one task."""
    return [
        {
            "task": task,
            "group": group,
            "kind": kind,
            "metric": metric,
            "item_id": ids[index] if ids else f"item-{index:03d}",
            "value": float(value),
            "weight": 1.0 if weights is None else float(weights[index]),
            "output": outputs[index] if outputs else None,
        }
        for index, value in enumerate(values)
    ]


def model_rows(seed: int, skill: float, damage: float) -> list[Row]:
    """One domain task of each kind, one general task of each kind, as a model would score.

    Item difficulty is common to all models (its own generator), so pairing matters.
    """
    items = np.random.default_rng(1234)
    rng = np.random.default_rng(seed)
    rows: list[Row] = []

    difficulty = items.uniform(0, 1, 60)
    right = (difficulty + rng.normal(0, 0.15, 60) < skill).astype(float)
    gold = np.clip(skill + 0.2 - 0.3 * difficulty + rng.normal(0, 0.05, 60), 0, 1)
    outputs = [f"SELECT {index}" for index in range(60)]
    rows += rows_of("nl2sql", "domain", "generation", "accuracy", right, outputs=outputs)
    rows += rows_of("nl2sql", "domain", "generation", "gold_probability", gold)

    difficulty = items.uniform(0, 1, 50)
    probability = np.clip(0.3 + 0.5 * skill - 0.4 * difficulty + rng.normal(0, 0.05, 50), 0, 1)
    rows += rows_of("radio", "domain", "choice", "accuracy", probability > 0.4)
    rows += rows_of("radio", "domain", "choice", "probability", probability)

    difficulty = items.uniform(0, 1, 80)
    probability = np.clip(0.9 - damage - 0.5 * difficulty + rng.normal(0, 0.03, 80), 0, 1)
    rows += rows_of("wordnet", "general", "choice", "accuracy", probability > 0.5)
    rows += rows_of("wordnet", "general", "choice", "probability", probability)

    tokens = items.integers(40, 256, 30)
    entropy = 3.0 + items.normal(0, 0.5, 30) + damage + rng.normal(0, 0.05, 30)
    rows += rows_of("english", "general", "text", "cross_entropy", entropy, weights=tokens)
    return rows


@pytest.fixture(scope="module")
def base() -> Scores:
    return Scores.from_rows(model_rows(0, skill=0.1, damage=0.0))


@pytest.fixture(scope="module")
def tuned() -> Scores:
    return Scores.from_rows(model_rows(1, skill=0.7, damage=0.02))


# The file


def test_saved_scores_load_unchanged(base, tmp_path):
    base.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    assert loaded == base
    assert loaded.items.schema.equals(ITEMS_SCHEMA, check_metadata=True)
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [ITEMS_FILE]


def test_the_file_is_plain_parquet_with_the_promised_columns(base, tmp_path):
    base.save(tmp_path)
    table = pq.read_table(tmp_path / ITEMS_FILE)
    assert table.column_names == [
        "task", "group", "kind", "metric", "item_id", "value", "weight", "output",
    ]  # fmt: skip
    assert table.schema.metadata[b"lrmc.schema_version"] == b"1"
    assert table.num_rows == 60 * 2 + 50 * 2 + 80 * 2 + 30
    assert table.to_pylist()[7]["output"] == "SELECT 7"


def test_no_file_is_an_unfinished_evaluation(tmp_path):
    with pytest.raises(IncompleteArtifactError, match=r"lrmc_ray\.evaluate"):
        Scores.load(tmp_path)


def test_no_flipped_bit_changes_a_score_in_silence(base, tmp_path):
    base.save(tmp_path)
    path = tmp_path / ITEMS_FILE
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            loaded = Scores.load(tmp_path)
        except DataError:
            refused += 1
        else:
            # The flip hit a byte that carries no data, such as an unused column statistic.
            assert loaded == base
    assert refused >= 150


def test_a_cut_file_is_refused(base, tmp_path):
    base.save(tmp_path)
    path = tmp_path / ITEMS_FILE
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="damaged"):
            Scores.load(tmp_path)


def test_another_schema_version_is_refused(base):
    other = base.items.replace_schema_metadata({"lrmc.schema_version": "99"})
    with pytest.raises(DataError, match="version 99, this build reads 1"):
        Scores(other)
    with pytest.raises(DataError, match="version absent"):
        Scores(base.items.replace_schema_metadata(None))


def test_other_columns_are_refused(base):
    with pytest.raises(DataError, match="columns differ"):
        Scores(base.items.drop_columns(["output"]))


def test_nulls_are_refused_where_the_schema_forbids_them(base):
    rows = base.items.to_pylist()
    rows[3]["weight"] = None
    with pytest.raises(DataError, match="column weight must not have nulls"):
        Scores.from_rows(rows)


def with_change(rows: list[Row], index: int, **change: object) -> list[Row]:
    return [row | change if number == index else row for number, row in enumerate(rows)]


choice = rows_of("t", "general", "choice", "accuracy", [1, 0, 1]) + rows_of(
    "t", "general", "choice", "probability", [0.9, 0.2, 0.6]
)
text = rows_of("t", "general", "text", "cross_entropy", [3.0, 2.5], weights=[10, 20])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no items"),
        (with_change(choice, 0, group="other"), "group must be the same"),
        (with_change(choice, 0, kind="text"), "kind must be the same"),
        ([row | {"group": "other"} for row in choice], "group must be one of"),
        ([row | {"kind": "other"} for row in choice], "kind must be one of"),
        ([row | {"group": "domain"} for row in choice[:3]] + choice[3:], "group must be the same"),
        (with_change(choice, 1, item_id="item-000"), "'item-000' occurs more than once"),
        (with_change(choice, 5, item_id="zzz"), "'item-002' is in t/accuracy and not in"),
        (with_change(choice, 4, value=math.nan), r"got nan for item 'item-001'"),
        (with_change(choice, 4, value=1.01), r"must be in \[0, 1\], got 1.01"),
        (with_change(choice, 4, value=-0.01), r"must be in \[0, 1\], got -0.01"),
        (with_change(choice, 4, weight=0.0), "weights must be finite and positive"),
        (with_change(choice, 4, weight=2.0), "'item-001' weighs 1 in t/accuracy and 2"),
        (choice[:3], "probability is missing"),
        (with_change(text, 0, value=0.0), "must be finite and positive, got 0.0"),
        (with_change(text, 0, value=math.inf), "must be finite and positive, got inf"),
        (text[:1], "at least 2 items, got 1"),
        (rows_of("t", "domain", "generation", "score", [1, 0]), "score is derived"),
        (rows_of("t", "domain", "generation", "gold_probability", [1, 0]), "accuracy is missing"),
    ],
)
def test_rows_that_break_a_rule_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        Scores.from_rows(rows)


def test_rounding_errors_of_a_softmax_are_accepted():
    scores = Scores.from_rows(with_change(choice, 3, value=1.0 + 2e-7))
    assert scores.metric("t", "probability").values[0] == 1.0 + 2e-7


# Values of one model


def test_values_have_standard_errors_and_intervals():
    scores = Scores.from_rows(choice + [row | {"task": "u"} for row in text])
    accuracy = scores.metric("t", "accuracy")
    assert accuracy.num_items == 3
    assert accuracy.value.value == 2 / 3
    assert accuracy.standard_error == pytest.approx(stats.sem([1, 0, 1]))
    wilson = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (accuracy.value.low, accuracy.value.high) == pytest.approx(tuple(wilson))

    probability = scores.metric("t", "probability")
    low, high = stats.t.interval(0.95, 2, np.mean([0.9, 0.2, 0.6]), stats.sem([0.9, 0.2, 0.6]))
    assert low < 0.0
    assert high > 1.0
    assert (probability.value.low, probability.value.high) == (0.0, 1.0)

    entropy = scores.metric("u", "cross_entropy")
    assert entropy.value.value == pytest.approx((10 * 3.0 + 20 * 2.5) / 30)
    # By hand: residuals 1/3 and -1/6; weighted 10/3 and -10/3; N / (N - 1) = 2.
    assert entropy.standard_error == pytest.approx(math.sqrt(2 * 2 * (10 / 3) ** 2) / 30)
    assert scores.tasks == ("t", "u")


def test_the_score_of_a_generation_task_is_the_mean_of_its_parts():
    rows = rows_of("g", "domain", "generation", "accuracy", [1, 0, 1])
    scores = Scores.from_rows(rows)
    assert scores.objective("g").values.tolist() == [1, 0, 1]
    rows += rows_of("g", "domain", "generation", "gold_probability", [0.5, 0.4, 1.0])
    rows += rows_of("g", "domain", "generation", "exact_match", [0, 0, 1])
    scores = Scores.from_rows(rows)
    assert scores.objective("g").metric == "score"
    assert scores.objective("g").values.tolist() == [0.75, 0.2, 1.0]
    assert set(scores.metrics) == {
        ("g", "accuracy"), ("g", "gold_probability"), ("g", "exact_match"), ("g", "score"),
    }  # fmt: skip


def test_an_unknown_metric_is_named_with_the_known_ones(base):
    with pytest.raises(DataError, match="no scores of radio/f1; there are nl2sql/accuracy"):
        base.metric("radio", "f1")


# Comparison


def objective_deltas(base: Scores, tuned: Scores, task: str) -> np.ndarray:
    return tuned.objective(task).values - base.objective(task).values


def relative_change(base: Scores, tuned: Scores, task: str = "english") -> float:
    before, after = base.metric(task, "cross_entropy"), tuned.metric(task, "cross_entropy")
    return float(1 - (after.weights @ after.values) / (before.weights @ before.values))


def test_the_headline_numbers_follow_their_definitions(base, tuned):
    comparison = compare(base, tuned, forgetting_weight=2.0)
    gain = np.mean([objective_deltas(base, tuned, task).mean() for task in ("nl2sql", "radio")])
    forgetting = -np.mean(
        [objective_deltas(base, tuned, "wordnet").mean(), relative_change(base, tuned)]
    )
    assert comparison.domain_gain.value == pytest.approx(gain, abs=1e-12)
    assert comparison.forgetting.value == pytest.approx(forgetting, abs=1e-12)
    assert comparison.combined.value == pytest.approx(gain - 2 * forgetting, abs=1e-12)
    assert gain > 0.2
    assert forgetting > 0.0
    for interval in (comparison.domain_gain, comparison.forgetting, comparison.combined):
        assert interval.low < interval.value < interval.high
    entropy = comparison.task("english").metric("cross_entropy")
    assert comparison.general_ce_delta.value == pytest.approx(
        entropy.after.value - entropy.before.value, abs=1e-12
    )
    assert comparison.task("english").objective.value == pytest.approx(
        relative_change(base, tuned), abs=1e-12
    )


def test_a_cautious_weight_moves_combined_only(base, tuned):
    light = compare(base, tuned, forgetting_weight=0.0)
    heavy = compare(base, tuned, forgetting_weight=5.0)
    assert light.combined == light.domain_gain
    assert heavy.domain_gain == light.domain_gain
    assert heavy.forgetting == light.forgetting
    assert heavy.combined.value == pytest.approx(
        light.domain_gain.value - 5 * light.forgetting.value, abs=1e-12
    )


def test_intervals_agree_with_scipys_bootstrap_of_independent_tasks(base, tuned):
    """Domain gain is a mean of two means of independent samples: scipy resamples each."""
    samples = [objective_deltas(base, tuned, task) for task in ("nl2sql", "radio")]
    expected = stats.bootstrap(
        samples,
        lambda first, second, axis: (first.mean(axis) + second.mean(axis)) / 2,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    interval = compare(base, tuned, forgetting_weight=1.0, resamples=20_000).domain_gain
    tolerance = 0.08 * expected.standard_error
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def test_the_interval_of_a_text_agrees_with_scipys_paired_bootstrap(base, tuned):
    before, after = (side.metric("english", "cross_entropy") for side in (base, tuned))
    expected = stats.bootstrap(
        (before.values, after.values, before.weights),
        lambda b, a, w, axis: 1 - (w * a).sum(axis) / (w * b).sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    comparison = compare(base, tuned, forgetting_weight=1.0, resamples=20_000)
    interval = comparison.task("english").objective
    tolerance = 0.08 * expected.standard_error
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def test_a_metrics_interval_agrees_with_the_paired_bootstrap(base, tuned):
    accuracy = compare(base, tuned, forgetting_weight=1.0, resamples=20_000).task("nl2sql")
    delta = accuracy.metric("accuracy").delta
    expected = paired_bootstrap(
        base.metric("nl2sql", "accuracy").values,
        tuned.metric("nl2sql", "accuracy").values,
        resamples=20_000,
        seed=77,
    )
    assert delta.value == pytest.approx(expected.value)
    # Accuracies of 60 items move in steps of 1/60.
    assert delta.low == pytest.approx(expected.low, abs=1 / 60 + 1e-9)
    assert delta.high == pytest.approx(expected.high, abs=1 / 60 + 1e-9)


def test_a_comparison_repeats_whatever_the_order_of_the_rows(base, tuned):
    rows = tuned.items.to_pylist()
    np.random.default_rng(0).shuffle(rows)
    first = compare(base, tuned, forgetting_weight=1.0, seed=3)
    again = compare(base, Scores.from_rows(rows), forgetting_weight=1.0, seed=3)
    np.testing.assert_array_equal(first.domain_gain_replicates, again.domain_gain_replicates)
    np.testing.assert_array_equal(first.forgetting_replicates, again.forgetting_replicates)
    assert first.metrics() == again.metrics()
    other = compare(base, tuned, forgetting_weight=1.0, seed=4)
    assert other.domain_gain.value == first.domain_gain.value
    assert other.domain_gain.low != first.domain_gain.low


def test_tasks_are_resampled_independently():
    """Two tasks with the same item scores: their mean spreads 1 / sqrt(2) as far as one."""
    deltas = np.random.default_rng(0).normal(0.1, 0.1, 40)

    def scores(shift: np.ndarray) -> Scores:
        return Scores.from_rows(
            row
            for task in ("first", "second", "general")
            for metric in ("accuracy", "probability")
            for row in rows_of(
                task,
                "general" if task == "general" else "domain",
                "choice",
                metric,
                (0.5 + shift) if metric == "probability" else np.ones(40),
            )
        )

    comparison = compare(
        scores(0 * deltas), scores(deltas), forgetting_weight=1.0, resamples=20_000
    )
    two, one = comparison.domain_gain_replicates, comparison.forgetting_replicates
    # The relative error of each standard deviation is 0.005.
    assert two.std() / one.std() == pytest.approx(1 / math.sqrt(2), rel=0.03)
    # Groups are independent, too: the correlation's error is 0.007.
    assert abs(np.corrcoef(two, one)[0, 1]) < 0.03


def test_another_task_does_not_change_a_tasks_draws(base, tuned):
    def without(scores: Scores, task: str) -> Scores:
        return Scores.from_rows(row for row in scores.items.to_pylist() if row["task"] != task)

    whole = compare(base, tuned, forgetting_weight=1.0)
    smaller = compare(without(base, "nl2sql"), without(tuned, "nl2sql"), forgetting_weight=1.0)
    assert smaller.task("radio") == whole.task("radio")
    assert smaller.forgetting == whole.forgetting
    assert smaller.domain_gain.value != whole.domain_gain.value


def test_a_model_compared_with_itself_has_changed_nothing(base):
    comparison = compare(base, base, forgetting_weight=1.0)
    for interval in (comparison.domain_gain, comparison.forgetting, comparison.combined):
        assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert not interval.distinguishable
    assert receipt(base, base).num_rows == 0


def test_logged_names_and_values(base, tuned):
    comparison = compare(base, tuned, forgetting_weight=1.0)
    metrics = comparison.metrics()
    assert set(metrics) == {
        "eval/domain_gain", "eval/domain_gain_low", "eval/domain_gain_high",
        "eval/forgetting", "eval/forgetting_low", "eval/forgetting_high",
        "eval/combined", "eval/combined_low", "eval/combined_high",
        "eval/domain/nl2sql/accuracy", "eval/domain/nl2sql/gold_probability",
        "eval/domain/nl2sql/score",
        "eval/domain/radio/accuracy", "eval/domain/radio/probability",
        "eval/general/wordnet/accuracy", "eval/general/wordnet/probability",
        "eval/general/english/cross_entropy", "eval/general_ce_delta",
    }  # fmt: skip
    assert metrics["eval/domain/nl2sql/accuracy"] == np.mean(
        tuned.metric("nl2sql", "accuracy").values
    )
    assert metrics["eval/forgetting_low"] == comparison.forgetting.low
    assert metrics["eval/general_ce_delta"] == comparison.general_ce_delta.value


def test_without_a_general_text_there_is_no_cross_entropy_delta(base, tuned):
    def without_text(scores: Scores) -> Scores:
        return Scores.from_rows(row for row in scores.items.to_pylist() if row["kind"] != "text")

    comparison = compare(without_text(base), without_text(tuned), forgetting_weight=1.0)
    assert comparison.general_ce_delta is None
    assert "eval/general_ce_delta" not in comparison.metrics()


def test_a_differing_item_is_named(base, tuned):
    rows = [row for row in tuned.items.to_pylist() if row["item_id"] != "item-041"]
    with pytest.raises(DataError, match=r"nl2sql: .* item 'item-041' is in the base model's"):
        compare(base, Scores.from_rows(rows), forgetting_weight=1.0)
    with pytest.raises(DataError, match=r"item 'item-041' is in the tuned model's scores and not"):
        compare(Scores.from_rows(rows), base, forgetting_weight=1.0)
    with pytest.raises(DataError, match="'item-041'"):
        receipt(base, Scores.from_rows(rows))


def test_a_differing_task_metric_or_weight_is_named(base, tuned):
    rows = tuned.items.to_pylist()
    fewer = Scores.from_rows(row for row in rows if row["task"] != "english")
    with pytest.raises(DataError, match="english is in the base model's scores only"):
        compare(base, fewer, forgetting_weight=1.0)
    no_gold = Scores.from_rows(row for row in rows if row["metric"] != "gold_probability")
    with pytest.raises(DataError, match="nl2sql: gold_probability is in the base"):
        compare(base, no_gold, forgetting_weight=1.0)
    retokenized = Scores.from_rows(
        row | {"weight": row["weight"] + 1} if row["kind"] == "text" else row for row in rows
    )
    with pytest.raises(DataError, match="same tokenizer"):
        compare(base, retokenized, forgetting_weight=1.0)


@pytest.mark.parametrize("group", ["domain", "general"])
def test_both_groups_are_needed(base, tuned, group):
    def without(scores: Scores) -> Scores:
        return Scores.from_rows(row for row in scores.items.to_pylist() if row["group"] != group)

    with pytest.raises(DataError, match=f"got no {group} task"):
        compare(without(base), without(tuned), forgetting_weight=1.0)


# Two tuned models against each other


def test_the_difference_of_two_models_is_paired(base, tuned):
    """Two near-equal models differ far less than their own intervals suggest."""
    twin = Scores.from_rows(
        row | {"value": row["value"] * 0.999} if row["metric"] == "probability" else row
        for row in tuned.items.to_pylist()
    )
    first = compare(base, tuned, forgetting_weight=1.0)
    second = compare(base, twin, forgetting_weight=1.0)
    delta = difference(first, second)
    assert delta.domain_gain.value == pytest.approx(
        first.domain_gain.value - second.domain_gain.value, abs=1e-12
    )
    assert delta.domain_gain.distinguishable
    assert delta.domain_gain.high - delta.domain_gain.low < 0.01 * (
        first.domain_gain.high - first.domain_gain.low
    )
    assert delta.combined.value == pytest.approx(
        first.combined.value - second.combined.value, abs=1e-12
    )


def test_without_texts_the_difference_is_the_direct_comparison(base, tuned):
    def without_text(scores: Scores) -> Scores:
        return Scores.from_rows(row for row in scores.items.to_pylist() if row["kind"] != "text")

    base, tuned = without_text(base), without_text(tuned)
    other = without_text(Scores.from_rows(model_rows(2, skill=0.6, damage=0.05)))
    delta = difference(
        compare(base, tuned, forgetting_weight=1.5), compare(base, other, forgetting_weight=1.5)
    )
    direct = compare(other, tuned, forgetting_weight=1.5)
    for name in ("domain_gain", "forgetting", "combined"):
        first, second = getattr(delta, name), getattr(direct, name)
        assert (first.value, first.low, first.high) == pytest.approx(
            (second.value, second.low, second.high), abs=1e-12
        )


def test_comparisons_with_other_draws_cannot_be_subtracted(base, tuned):
    first = compare(base, tuned, forgetting_weight=1.0)
    for other in (
        compare(base, tuned, forgetting_weight=1.0, seed=1),
        compare(base, tuned, forgetting_weight=2.0),
        compare(base, tuned, forgetting_weight=1.0, resamples=100),
    ):
        with pytest.raises(ValueError, match="same tasks, seed, resamples and weight"):
            difference(first, other)


# The forgetting receipt


def test_the_receipt_lists_lost_and_gained_items_with_their_outputs():
    def answers(accuracy, outputs):
        return Scores.from_rows(
            rows_of("g", "general", "generation", "accuracy", accuracy, outputs=outputs)
        )

    before = answers([1, 0, 1, 0, 1], ["a", "b", "c", "d", "e"])
    after = answers([1, 1, 0, 0, 0.5], ["A", "B", "C", "D", "E"])
    table = receipt(before, after)
    assert table.to_pylist() == [
        {
            "task": "g", "group": "general", "item_id": "item-001", "change": "gained",
            "output_before": "b", "output_after": "B",
        },
        {
            "task": "g", "group": "general", "item_id": "item-002", "change": "lost",
            "output_before": "c", "output_after": "C",
        },
    ]  # fmt: skip


def test_the_receipt_agrees_with_the_change_of_accuracy(base, tuned):
    table = receipt(base, tuned)
    comparison = compare(base, tuned, forgetting_weight=1.0)
    for task in ("nl2sql", "radio", "wordnet"):
        changes = [row["change"] for row in table.to_pylist() if row["task"] == task]
        net = changes.count("gained") - changes.count("lost")
        change = comparison.task(task)
        assert net / change.num_items == pytest.approx(change.metric("accuracy").delta.value)
    assert "english" not in pa.compute.unique(table["task"]).to_pylist()
