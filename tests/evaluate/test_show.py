"""What `lrmc evaluate` says of its scores."""

import json

import numpy as np
import pytest

from lrmc_ray.config import EvaluateSettings, SearchSettings
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.show import items_text, show_changes, show_scores
from lrmc_ray.files.artifacts import write_manifest
from tests.support.synthetic_study import item_rows


@pytest.mark.parametrize(
    ("tasks", "share", "text"),
    [
        (("kinds",), 0.0, "all items of every task"),
        (("kinds",), 0.5, "the test items of kinds, all items of other tasks"),
        (("nl2sql",), 0.0, "the test items of nl2sql, all items of other tasks"),
    ],
)
def test_the_items_are_named(tasks, share, text):
    assert items_text(EvaluateSettings(domain_tasks=tasks, test_share=share)) == text


@pytest.fixture
def scored(tmp_path):
    paths = []
    for name, rows in (("base", item_rows(1, 0.1, 0.0)), ("tuned", item_rows(2, 0.6, 0.05))):
        path = tmp_path / name
        Scores.from_rows(rows).save(path)
        write_manifest(path, {"kind": "scores", "identity": {}, "drift": {}})
        paths.append(path)
    return paths


def test_changes_are_in_points_of_100_and_files_in_fractions(scored, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_changes(SearchSettings(), scored, items="all items of every task", as_json=True)
    fractions = json.loads(capsys.readouterr().out)
    show_changes(SearchSettings(), scored, items="all items of every task", as_json=False)
    shown = capsys.readouterr().out
    gain = fractions["eval/domain_gain"]
    assert 0.2 < gain < 0.9
    assert f"domain gain +{100 * gain:.1f} points (" in shown
    assert "Scored on all items of every task." in shown
    accuracy = np.mean([row["value"] for row in item_rows(2, 0.6, 0.05) if _is_accuracy(row)])
    assert f" {100 * accuracy:.0f} % " in shown
    assert max(map(len, shown.splitlines()[:20])) <= 80
    for task in ("nl2sql", "wordnet", "capitals", "plain_english"):
        assert task in shown  # the key column is whole


def _is_accuracy(row) -> bool:
    return row["task"] == "nl2sql" and row["metric"] == "accuracy"


def test_scores_of_one_model_are_percentages(scored, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_scores(scored[0], items="the test items of nl2sql", as_json=False)
    shown = capsys.readouterr().out
    accuracy = np.mean([row["value"] for row in item_rows(1, 0.1, 0.0) if _is_accuracy(row)])
    assert f" {100 * accuracy:.0f} % " in shown
    assert "Scored on the test items of nl2sql." in shown
