"""The sentences to replay are prose, and none of them is asked about."""

import json
from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.record.sources import Source, training_sources
from lrmc_ray.tasks.demo.english import LONGEST, SHORTEST, english_file, english_sentences

TASKS = Path(__file__).parents[3] / "lrmc_ray" / "tasks" / "data"


def test_there_are_enough_sentences_and_they_are_prose():
    sentences = english_sentences()
    assert len(sentences) == len(set(sentences)) > 200
    assert all(SHORTEST <= len(sentence) <= LONGEST for sentence in sentences)
    assert all(sentence[0].isupper() and sentence[-1] == "." for sentence in sentences)
    assert not any(mark in "".join(sentences) for mark in "*=[]{}<>")


def test_no_task_asks_about_any_of_them_nor_about_their_neighbours():
    asked = (TASKS / "plain_english.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in asked.splitlines()]
    words = {tuple(row["text"].split()[i : i + 8]) for row in rows for i in range(200)}
    own = " ".join(english_sentences()).split()
    shared = {tuple(own[i : i + 8]) for i in range(len(own))} & {w for w in words if len(w) == 8}
    # A phrase that the documentation repeats is all there may be.
    assert len(shared) < 30


def test_it_is_training_data_by_its_name_and_with_a_domain(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    path = english_file(tmp_path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == english_sentences()
    for name, domain in (("english", ""), ("replay=english", "replay")):
        settings = RunSettings.model_validate({"data": {"train": [name]}})
        assert training_sources(settings) == [Source(path, domain)]
    settings = RunSettings.model_validate({"data": {"train": ["demo"]}})
    assert [source.domain for source in training_sources(settings)] == [""]
    settings = RunSettings.model_validate({"data": {"train": ["sql=demo", "replay=english"]}})
    assert [source.domain for source in training_sources(settings)] == ["sql", "replay"]
