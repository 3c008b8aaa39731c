"""The report shows what was lost and gained in words: question, expected, before, after."""

import shutil
from pathlib import Path

import pytest

from lrmc_ray.evaluate.changes import receipt
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.questions import QUESTIONS_FILE, write_questions
from lrmc_ray.report.page import write_report
from lrmc_ray.report.receipt_section import FOLDED, SHOWN, receipt_section
from lrmc_ray.report.study import load_study
from tests.support.synthetic_study import make_study

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """With the questions of its items, but for those of capitals."""
    directory = make_study(tmp_path_factory.mktemp("receipts") / "demo")
    base = Scores.load(directory / "base_scores")
    write_questions(
        directory / "base_scores",
        [
            {"task": task, "item_id": item_id, "question": f"{item_id}? {EVIL}",
             "expected": f"right {item_id}" if task == "nl2sql" else None}
            for task in ("nl2sql", "wordnet")
            for item_id in base.metric(task, base.objective(task).metric).item_ids
        ],
    )  # fmt: skip
    return directory


def test_every_item_has_its_question_and_both_answers(made):
    study = load_study(made)
    section = receipt_section(study.verdict)
    rows = receipt(study.verdict.base, study.verdict.scores).to_pylist()
    assert [kind["title"] for kind in section["examples"]] == [
        f"{name.capitalize()}: {sum(row['change'] == name for row in rows)} items"
        for name in ("lost", "gained")
    ]
    for kind, change in zip(section["examples"], ("lost", "gained"), strict=True):
        told = kind["shown"] + kind["folded"]
        assert len(kind["shown"]) == min(SHOWN, len(told))
        assert len(told) + kind["more"] == sum(row["change"] == change for row in rows)
        assert len(told) <= SHOWN + FOLDED
        for item in told:
            row = next(
                r for r in rows if (r["task"], r["item_id"]) == (item["task"], item["item_id"])
            )
            assert row["change"] == change
            lines = dict(item["lines"])
            if row["task"] == "capitals":
                assert "question" not in lines
            else:
                assert lines["question"] == f"{row['item_id']}? {EVIL}"
            if row["task"] == "nl2sql":
                assert lines["expected"] == f"right {row['item_id']}"
                assert (lines["before"], lines["after"]) == (
                    row["output_before"], row["output_after"],
                )  # fmt: skip
    assert section["examples"][0]["shown"][0]["task"] in ("wordnet", "capitals")


def test_the_page_shows_them_escaped(made):
    page = write_report(made).read_text()
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<dt>question</dt>" in page
    assert "<dt>expected</dt><dd>right nl2sql-" in page


def test_damaged_questions_leave_the_answers(made, tmp_path):
    own = Path(shutil.copytree(made, tmp_path / "study"))
    (own / "base_scores" / QUESTIONS_FILE).write_bytes(b"x")
    section = receipt_section(load_study(own).verdict)
    names = {name for kind in section["examples"] for one in kind["shown"] for name, _ in
             one["lines"]}  # fmt: skip
    assert names == {"before", "after"}
