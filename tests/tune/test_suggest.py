"""Automatic ranges, against candidate sets and histograms made by hand."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.files.study import FoundRange
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.tune.suggest import (
    STEPS,
    TAU_GRID,
    WARM_UP_STEPS,
    TauRow,
    automatic,
    measured_angles,
    quantile_of_histogram,
    suggest_delta_max,
    suggest_tau,
    tau_table,
    with_ranges,
)
from tests.support.tiny import make_data
from tests.support.training import record_of

ROOT = Path(__file__).parents[2]
TAUS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def candidates(tops, *, vocabulary=64, k_max=32):
    """Positions whose first token is gold and has probability ``top``, the others equal shares."""
    tops_N = torch.tensor(tops, dtype=torch.float64)
    rest_N = (1 - tops_N) / (vocabulary - 1)
    probabilities_NV = rest_N[:, None].repeat(1, vocabulary)
    probabilities_NV[:, 0] = tops_N
    gold_N = torch.zeros(len(tops), dtype=torch.long)
    return select_candidates(probabilities_NV.log(), gold_N, tau=0.99, k_min=2, k_max=k_max)


def test_the_table_counts_active_and_capped_positions_by_hand():
    """Tops 0.6 and 0.97: below a top the gold alone suffices; 31 tail tokens carry 31/63 of it."""
    rows = {row.tau: row for row in tau_table(candidates([0.6, 0.6, 0.6, 0.97]), TAUS)}
    assert [rows[tau].active_share for tau in TAUS] == [0.0, 0.75, 0.75, 0.75, 0.75, 1.0]
    # 0.6 + 0.4 * 31/63 = 0.797 and 0.97 + 0.03 * 31/63 = 0.985 are all that 32 candidates hold.
    assert [rows[tau].capped_share for tau in TAUS] == [0.0, 0.0, 0.75, 0.75, 0.75, 1.0]
    # (0.7 - 0.6) / (0.4 / 63) = 15.75, so 16 tail tokens and the gold.
    assert rows[0.7].k_median == 17


def test_tau_reaches_from_what_is_enough_to_hardly_capped():
    sets = candidates([0.55] * 6 + [0.85] * 3 + [0.98], vocabulary=40, k_max=39)
    rows = tau_table(sets, TAUS)
    assert [row.active_share for row in rows] == [0.0, 0.6, 0.6, 0.9, 0.9, 1.0]
    assert max(row.capped_share for row in rows[:-1]) == 0.0
    found = suggest_tau(rows)
    assert (found.low, found.high) == (0.95, 0.99)
    assert "at 0.95 90% of the positions are active" in found.reason


def test_inactive_positions_raise_the_lower_end():
    rows = [
        TauRow(tau, 1.0, 1.0, active_share=0.6 if tau >= 0.98 else 0.4, capped_share=0.0)
        for tau in TAU_GRID
    ]
    assert (suggest_tau(rows).low, suggest_tau(rows).high) == (0.98, 0.999)


def test_a_small_cap_does_not_lower_the_upper_end_below_what_is_good():
    rows = [TauRow(tau, 1.0, 1.0, 1.0, capped_share=float(tau > 0.5)) for tau in TAU_GRID]
    assert (suggest_tau(rows).low, suggest_tau(rows).high) == (0.95, 0.99)


def test_a_record_of_a_small_tau_gets_a_range_with_a_word_of_doubt():
    rows = [TauRow(tau, 1.0, 1.0, 1.0, 0.0) for tau in TAU_GRID if tau <= 0.9]
    found = suggest_tau(rows)
    assert (found.low, found.high) == (0.85, 0.9)
    assert found.reason.endswith("record a larger tau: 0.9 cost much before")


def test_the_rule_agrees_with_the_experiments():
    """Whatever the record is like: what gained most is in the range, what cost a quarter is not."""
    gains: dict[float, float] = {}
    for line in (ROOT / "benchmarks/results/transfer.md").read_text().splitlines():
        if match := re.match(r"\| tau ([0-9.]+), delta_max \d+ \| [^|]+ \| ([0-9.]+) ", line):
            gains[float(match[1])] = max(float(match[2]), gains.get(float(match[1]), 0.0))
    assert set(gains) == {0.80, 0.99}
    best = max(gains, key=gains.__getitem__)
    costly = [tau for tau, gain in gains.items() if gain < 0.75 * gains[best]]
    assert (best, costly) == (0.99, [0.80])
    for active in (0.0, 0.6, 1.0):
        for capped in (0.0, 0.59, 1.0):
            found = suggest_tau([TauRow(tau, 1.0, 1.0, active, capped) for tau in TAU_GRID])
            assert found.high >= best
            assert all(found.low > tau for tau in costly)


def test_the_range_is_never_empty():
    for sets in (
        candidates([0.999] * 4),  # hardly ever active
        candidates([0.1] * 4, k_max=2),  # capped everywhere
    ):
        found = suggest_tau(tau_table(sets, TAUS))
        assert found.low < found.high


def histogram(**degrees):
    counts = [0] * 36
    for name, count in degrees.items():
        counts[int(name.removeprefix("at_")) // 5] = count
    return counts


def test_quantiles_of_a_histogram_by_hand():
    counts = histogram(at_80=50, at_90=50)  # bins 80-85 and 90-95
    assert quantile_of_histogram(counts, 0.25) == pytest.approx(82.5)
    assert quantile_of_histogram(counts, 0.5) == pytest.approx(85.0)
    assert quantile_of_histogram(counts, 0.95) == pytest.approx(94.5)
    assert quantile_of_histogram(counts, 0.0) == 0.0
    assert quantile_of_histogram(counts, 1.0) == pytest.approx(95.0)
    with pytest.raises(DataError, match="no angle"):
        quantile_of_histogram([0] * 36, 0.5)


def test_delta_max_reaches_from_a_quarter_of_the_median_to_the_95th_percentile():
    found = suggest_delta_max(histogram(at_80=50, at_90=50))
    assert found.low == pytest.approx(21.2, abs=0.06)
    assert found.high == 94.5
    aligned = suggest_delta_max(histogram(at_0=100))
    assert aligned.low == 1.0
    assert aligned.high == pytest.approx(4.8, abs=0.06)
    opposed = suggest_delta_max(histogram(at_175=100))
    assert opposed.high <= 180
    assert math.isclose(opposed.low, 0.25 * 177.5, abs_tol=0.1)


def test_found_ranges_take_the_place_of_auto_and_keep_conditions():
    settings = RunSettings.model_validate(
        {
            "parameters": {
                "tau": {"range": "auto"},
                "delta_max": {"range": "auto", "when": {"optimizer": "moclip"}},
                "lr": {"low": 1e-6, "high": 1e-4},
            }
        }
    )
    assert automatic(settings) == ["tau", "delta_max"]
    found = {"tau": FoundRange(0.7, 0.98, "why"), "delta_max": FoundRange(20.0, 95.0, "why")}
    made = with_ranges(settings, found)
    assert automatic(made) == []
    assert (made.parameters["tau"].low, made.parameters["tau"].high) == (0.7, 0.98)
    assert made.parameters["delta_max"].when == {"optimizer": "moclip"}
    assert made.parameters["lr"] == settings.parameters["lr"]


def test_angles_are_measured_on_every_tensor_after_the_warm_up(tiny_model, tmp_path):
    record = record_of(tiny_model, make_data(tmp_path / "train.jsonl"), tmp_path / "record")
    settings = RunSettings.model_validate(
        {"model": {"name": str(tiny_model)}, "train": {"clip": "none", "steps": 2, "epochs": 1.0}}
    )
    histogram = measured_angles(settings, record)
    with safe_open(tiny_model / "model.safetensors", "pt") as weights:
        tensors = len(weights.keys())
    assert sum(histogram) == (STEPS - WARM_UP_STEPS) * tensors
    # With random weights and unlike samples, gradients neither follow the momentum nor oppose it.
    assert 20 < quantile_of_histogram(histogram, 0.5) < 110
