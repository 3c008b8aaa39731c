"""The system message that a model was taught with."""

import json

import pytest

from lrmc_ray.ask import command
from lrmc_ray.ask.questions import Question, question_of, with_system
from lrmc_ray.config import RunSettings
from lrmc_ray.console import run_command
from lrmc_ray.files.origin import origin_of, write_origin
from lrmc_ray.record.taught_system import taught_system
from tests.support.tiny import make_model

SYSTEM = "Answer in SQL."


def write_rows(path, systems):
    rows = []
    for number, system in enumerate(systems):
        messages = [{"role": "user", "content": f"Question {number}?"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rows.append({"messages": [*messages, {"role": "assistant", "content": "SELECT 1"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("systems", "expected"),
    [
        ([SYSTEM] * 3, SYSTEM),
        ([SYSTEM, "Answer in Prolog."], None),
        ([SYSTEM, None], None),
        ([None, None], None),
    ],
    ids=["the same", "two", "some", "none"],
)
def test_it_is_the_one_that_all_rows_have(tmp_path, systems, expected):
    name = write_rows(tmp_path / "train.jsonl", systems)
    assert taught_system([name]) == expected
    assert taught_system([f"sql={name}"]) == expected
    other = write_rows(tmp_path / "other.jsonl", ["Answer in Prolog."])
    assert taught_system([name, other]) is None


def test_data_of_another_form_and_missing_ones_have_none(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "2 + 2?", "completion": "4"}) + "\n")
    assert taught_system([str(pairs)]) is None
    assert taught_system([str(tmp_path / "gone.jsonl")]) is None


def test_data_of_the_project_have_the_message_of_their_questions(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    assert taught_system(["packet_filter"]) == "Answer with a packet filter (pcap-filter)."
    demo = taught_system(["demo"])
    assert demo is not None
    assert demo.splitlines()[:2] == [
        "Answer in SQL.",
        "country(name, capital, continent, population, area_km2, currency)",
    ]
    assert taught_system(["demo", "packet_filter"]) is None


@pytest.mark.parametrize("name", ["someone/some-data", "hf://someone/some-data", "sql=a/b:train"])
def test_the_hub_is_not_asked(monkeypatch, name):
    monkeypatch.setattr("lrmc_ray.record.sources.hub_files", lambda name: pytest.fail(name))
    assert taught_system([name]) is None


def test_a_conversation_keeps_what_it_begins_with():
    asked = with_system(Question(question_of("How many?").messages, "7"), SYSTEM)
    assert asked.messages[0] == {"role": "system", "content": SYSTEM}
    assert (asked.text, asked.expected) == ("How many?", "7")
    begun = Question(({"role": "system", "content": "Be brief."}, *question_of("Who?").messages))
    assert with_system(begun, SYSTEM) is begun
    assert with_system(begun, None) is begun
    assert with_system(begun, "") is begun


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], SYSTEM),
        (["--system", "Be brief."], "Be brief."),
        (["--system", ""], None),
        (["--as-text"], None),
    ],
)
def test_chat_asks_as_the_model_was_taught(
    tmp_path, tiny_model, monkeypatch, capsys, more, expected
):
    tuned = make_model(tmp_path / "tuned", seed=1)
    data = write_rows(tmp_path / "train.jsonl", [SYSTEM] * 3)
    settings = RunSettings.model_validate(
        {"model": {"name": str(tiny_model)}, "data": {"train": data}}
    )
    write_origin(tuned, origin_of(settings, tmp_path))
    questions = tmp_path / "questions.txt"
    questions.write_text("How many?\n")
    seen = []

    def answer(self, messages, generation, watch=None):
        seen.append(messages)
        return Written("forty")

    from lrmc_ray.ask.answering import Answerer, Written

    monkeypatch.setattr(Answerer, "answer", answer)
    argv = [str(tuned), "--questions", str(questions), "--json", *more]
    assert run_command(command.main, argv) == 0
    shown = capsys.readouterr()
    before = [{"role": "system", "content": expected}] if expected else []
    assert [list(messages) for messages in seen] == [
        [*before, {"role": "user", "content": "How many?"}]
    ] * 2
    said = json.loads(shown.out)["settings"]
    assert said.endswith(f" System message: {expected}") == bool(expected)
    assert ("Asked as it was taught" in shown.err) == (not more)


def test_mlflow_asks_as_the_model_was_taught(tmp_path, tiny_model, monkeypatch):
    from lrmc_ray.ask.answering import Answerer, Written
    from lrmc_ray.ask.mlflow_model import Answering

    tuned = make_model(tmp_path / "tuned", seed=1)
    data = write_rows(tmp_path / "train.jsonl", [SYSTEM] * 3)
    settings = RunSettings.model_validate(
        {"model": {"name": str(tiny_model)}, "data": {"train": data}}
    )
    write_origin(tuned, origin_of(settings, tmp_path))
    seen = []

    def answer(self, messages, generation, watch=None):
        seen.append((list(messages), generation.max_new_tokens, generation.temperature))
        return Written("forty")

    monkeypatch.setattr(Answerer, "answer", answer)
    answers = Answering(tuned).predict(["How many?"], params={"max_new_tokens": 7})
    assert answers == ["forty"]
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "How many?"}
    assert seen == [([system, user], 7, 0.0)]
