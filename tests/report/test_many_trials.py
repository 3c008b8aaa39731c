"""The report of a search of many trials stays one that people read."""

import types

from lrmc_ray.report import page
from lrmc_ray.report.page import write_report
from lrmc_ray.report.words import note_on_not_drawn
from tests.support.synthetic_study import make_study


def test_long_tables_are_folded_and_short_ones_are_not(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    monkeypatch.setattr(page, "MOST_ROWS", 9)
    long = write_report(study).read_text()
    assert long.count("<details><summary>10 trials</summary>") == 1
    assert long.count("<details") == long.count("</details>")
    monkeypatch.setattr(page, "MOST_ROWS", 10)
    short = write_report(study).read_text()
    assert "<summary>10 trials</summary>" not in short
    assert long.count("<tr") == short.count("<tr")


def test_trials_without_scores_are_named_up_to_a_number():
    def note(count):
        problems = [
            types.SimpleNamespace(entry=types.SimpleNamespace(number=number))
            for number in range(count)
        ]
        return note_on_not_drawn(types.SimpleNamespace(problems=problems))

    assert note(0) == ""
    assert note(2) == "Not drawn, because they have no scores: 0, 1."
    assert note(20).endswith(" 18, 19.")
    assert note(23).endswith(" 18, 19 and 3 more.")
