"""Items that a search chooses by and items that are kept for the end."""

import json
import math

import pytest

from lrmc_ray.evaluate.harness import ItemChoice, score
from lrmc_ray.evaluate.item_parts import FEWEST_ITEMS, divide_items, is_divided
from lrmc_ray.evaluate.request import ALL_ITEMS, KeptApart, ScoreRequest

HALF = KeptApart(0.5)


def items(number, start=0):
    return [{"question": f"What is {n}?", "answer": str(n)} for n in range(start, start + number)]


def both(rows, kept=HALF):
    parts = [divide_items({"mine": rows}, split, kept) for split in ("dev", "test")]
    return [part and part["mine"] for part in parts]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("number", [8, 9, 40, 1000])
def test_every_item_is_in_one_part_and_each_part_has_some(number, share):
    dev, test = both(items(number), KeptApart(share))
    assert sorted([*dev, *test]) == list(range(number))
    assert min(len(dev), len(test)) >= FEWEST_ITEMS
    assert len(test) >= min(math.floor(0.8 * share * number), number - FEWEST_ITEMS)
    assert len(dev) >= min(math.floor(0.8 * (1 - share) * number), number - FEWEST_ITEMS)
    if number == 1000:
        assert len(test) == pytest.approx(max(1000 * share, FEWEST_ITEMS), abs=40)


def test_an_item_stays_in_its_part_when_others_are_added_moved_or_numbered():
    _, before = both(items(100))
    more = [{"id": f"new-{n}", **row} for n, row in enumerate(reversed(items(300)))]
    _, after = both(more)
    asked = {more[index]["question"] for index in after}
    assert {f"What is {index}?" for index in before} == {
        question for question in asked if int(question[8:-1]) < 100
    }


def test_the_seed_decides_which_items_are_kept_and_equal_ones_stay_together():
    assert both(items(60))[1] != both(items(60), KeptApart(0.5, seed=1))[1]
    dev, test = both(items(30) * 2)
    assert {index % 30 for index in dev}.isdisjoint(index % 30 for index in test)


def test_items_that_are_too_few_are_not_divided():
    assert both(items(2 * FEWEST_ITEMS - 1)) == [None, None]
    assert both(items(1) * 20) == [None, None]
    group = {"one": items(20), "other": items(1, start=20)}
    assert divide_items(group, "dev", HALF) is None


def test_every_task_of_a_group_is_in_both_parts():
    group = {f"task {n}": items(2, start=2 * n) for n in range(20)}
    parts = [divide_items(group, split, HALF) for split in ("dev", "test")]
    for task in group:
        assert sorted([*parts[0][task], *parts[1][task]]) == [0, 1]
        assert len(parts[0][task]) == 1


def test_only_domain_tasks_without_two_parts_of_their_own_are_divided():
    assert is_divided("kinds", "domain", 0.5)
    assert not is_divided("kinds", "general", 0.5)
    assert not is_divided("nl2sql", "domain", 0.5)
    assert not is_divided("packet_filter", "domain", 0.5)
    assert not is_divided("ct_radio", "domain", 0.5)
    assert not is_divided("kinds", "domain", 0.0)


def test_a_task_file_asks_the_items_of_one_part_under_their_own_numbers(tmp_path, tiny_model):
    rows = [
        {"question": f"{n} and one is", "choices": ["two", "many"], "answer": n % 2}
        for n in range(12)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "task": "mine",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
            }
        )
    )

    def scored(split, limit=None, kept=HALF):
        request = ScoreRequest(
            tasks=((str(path), "domain"),),
            batch_tokens=512,
            precision="fp32",
            limit=limit,
            split=split,
            drift_samples={"domain": 0, "general": 0},
            kept=kept,
        )
        rows = score(tiny_model, request).rows
        return {row["item_id"]: row["value"] for row in rows if row["metric"] == "probability"}

    whole = scored("dev", kept=ALL_ITEMS)
    dev, test = scored("dev"), scored("test")
    expected = divide_items({"mine": rows}, "test", HALF)["mine"]
    assert sorted(map(int, test)) == expected
    assert len(whole) == 12
    assert {**dev, **test} == pytest.approx(whole, abs=1e-5)
    assert dev.keys().isdisjoint(test)
    assert sorted(map(int, scored("test", limit=3))) == expected[:3]


def test_whether_an_item_is_among_many_is_known_at_once():
    choice = ItemChoice(limit=50, split="dev", kept=HALF, group="domain")

    class Task:
        eval_docs = items(400)

    chosen = choice.of("mine.yaml", {"mine": Task()})["mine"]
    assert len(chosen) == 50
    assert chosen[7] in chosen
    assert [index for index in range(400) if index in chosen] == list(chosen)
