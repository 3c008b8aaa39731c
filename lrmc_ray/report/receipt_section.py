"""What the best trial lost and gained, item by item, with questions and answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.changes import receipt
from lrmc_ray.evaluate.questions import Asked, read_questions
from lrmc_ray.report.study import Verdict

SHOWN = 6
"""Items of each kind that are shown at once."""
FOLDED = 60
"""Further ones that are shown when a reader asks for them."""


def receipt_section(verdict: Verdict | None) -> dict[str, Any]:
    """Counts per task, and the items themselves: lost ones first."""
    if verdict is None:
        return {"receipts": [], "examples": []}
    rows = receipt(verdict.base, verdict.scores).to_pylist()
    counts = [
        {
            "task": f"{task.task} ({task.group})",
            "num_items": task.num_items,
            "lost": _count(rows, task.task, "lost"),
            "gained": _count(rows, task.task, "gained"),
        }
        for task in verdict.comparison.tasks
        if any(change.metric == "accuracy" for change in task.metrics)
    ]
    questions = _questions(verdict)
    examples = []
    for change, group in (("lost", "general"), ("gained", "domain")):
        items = [row for row in rows if row["change"] == change]
        # What the search is about comes first: forgotten general items, learned domain items.
        items.sort(key=lambda row: row["group"] != group)
        if items:
            told = [_example(row, questions) for row in items[: SHOWN + FOLDED]]
            examples.append(
                {
                    "title": f"{change.capitalize()}: {len(items)} item{'s' * (len(items) != 1)}",
                    "shown": told[:SHOWN],
                    "folded": told[SHOWN:],
                    "more": len(items) - len(told),
                }
            )
    return {"receipts": counts, "examples": examples}


def _questions(verdict: Verdict) -> dict[tuple[str, str], Asked]:
    """What the items asked; nothing where that was not kept, or cannot be read."""
    if verdict.base.directory is None:
        return {}
    try:
        return read_questions(verdict.base.directory)
    except DataError:
        return {}


def _example(row: Mapping[str, Any], questions: Mapping[tuple[str, str], Asked]) -> dict[str, Any]:
    """One item as the page shows it: its name, and lines of a heading and a text."""
    asked = questions.get((row["task"], row["item_id"]))
    lines = [("question", asked.question), ("expected", asked.expected)] if asked else []
    lines += [("before", row["output_before"]), ("after", row["output_after"])]
    return {
        "task": row["task"],
        "item_id": row["item_id"],
        "lines": [(name, text or "(no text)") for name, text in lines if text is not None],
    }


def _count(rows: Sequence[Mapping[str, Any]], task: str, change: str) -> int:
    return sum(row["task"] == task and row["change"] == change for row in rows)
