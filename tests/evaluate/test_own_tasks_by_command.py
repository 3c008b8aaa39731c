"""Task files of one's own through `lrmc evaluate`, as a user sees them; values are lm-eval's."""

import contextlib
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lrmc_ray.console import run_command
from lrmc_ray.evaluate.command import main as evaluate
from lrmc_ray.evaluate.questions import read_questions
from lrmc_ray.models.loading import load_model, load_tokenizer
from tests.support.own_tasks import GENERATED, write

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

WORDS = [
    {"question": f"{n} and one is", "choices": ["two", "many more", "none"], "a": n % 3}
    for n in range(7)
]
WORTHS: dict[str, list[Any]] = {"texts": ["2024-01-01", "[1, 2]", "007"], "numbers": [7, 7.5]}


@pytest.fixture
def run(tiny_model, tmp_path, capsys, monkeypatch):
    """The command in an own folder: its exit code, and its results or its error."""
    monkeypatch.chdir(tmp_path)

    def run(*tasks: Path):
        names = ",".join(str(task) for task in tasks)
        options = ["--model", str(tiny_model), "--output", "out", "--domain-tasks", names]
        options += ["--general-tasks", "plain_english", "evaluate.limit=8", "--json"]
        code = run_command(evaluate, [*options, "evaluate.drift_samples=0", "--actors", "1"])
        shown = capsys.readouterr()
        if code:
            return code, " ".join(shown.err.split())
        return code, json.loads(shown.out.splitlines()[-1])

    return run


@pytest.fixture
def true_accuracy(tiny_model):
    """What lm-eval says of a task file, with its own model class."""

    def of(path: Path) -> float:
        model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
        with contextlib.chdir(path.parent):  # lm-eval takes data from where it is started
            found = lm_eval.simple_evaluate(
                model=lm, tasks=[str(path)], task_manager=TaskManager(include_defaults=False)
            )
        (values,) = found["results"].values()
        return float(values["acc,none"])

    return of


def renamed(path: Path, task: str) -> Path:
    """The file under another name of its task."""
    values = json.loads(path.read_text())
    new = path.with_name(f"{task}.yaml")
    new.write_text(json.dumps({**values, "task": task}))
    path.unlink()
    return new


def test_other_answers_in_the_file_are_other_scores(run, true_accuracy, tmp_path):
    named = "{{a}}"
    path = write(tmp_path / "mine", WORDS, doc_to_target=named)
    before = true_accuracy(path)
    code, shown = run(path)
    assert (code, shown["mine/accuracy"]) == (0, pytest.approx(before))
    kept = set((tmp_path / "out" / "scores").iterdir())
    # The likeliest choice of each item is the right one now, so every answer is right.
    answers = {item["question"]: item for item in WORDS}
    for row in _outputs(kept.pop()):
        answers[row["question"]]["a"] = answers[row["question"]]["choices"].index(row["output"])
    write(tmp_path / "mine", list(answers.values()), doc_to_target=named)
    code, shown = run(path)
    assert (code, shown["mine/accuracy"]) == (0, 1.0) != (0, before)
    folders = set((tmp_path / "out" / "scores").iterdir())
    assert run(path) == (code, shown)
    assert set((tmp_path / "out" / "scores").iterdir()) == folders


def test_every_way_to_name_the_right_choice_has_lm_evals_value(run, true_accuracy, tmp_path):
    by_place = write(tmp_path / "one", WORDS, doc_to_target="a")
    texts = [{**item, "a": item["choices"][item["a"]]} for item in WORDS]
    by_text = renamed(write(tmp_path / "two", texts, doc_to_target="{{a}}"), "texts")
    by_field = renamed(write(tmp_path / "three", texts, doc_to_target="a"), "fields")
    code, shown = run(by_place, by_text, by_field)
    assert code == 0
    values = [shown[f"{name}/accuracy"] for name in ("mine", "texts", "fields")]
    assert values == pytest.approx([true_accuracy(by_place)] * 3)


def test_an_answer_is_what_the_file_says(run, tmp_path):
    tasks = []
    for name, answers in WORTHS.items():
        items = [{"question": f"{n}:", "answer": answer} for n, answer in enumerate(answers)]
        tasks.append(renamed(write(tmp_path / name, items, **GENERATED), name))
    code, shown = run(*tasks)
    assert code == 0, shown
    found = set()
    for folder in (tmp_path / "out" / "scores").iterdir():
        asked = read_questions(folder)
        found |= {(task, value.expected) for (task, _), value in asked.items() if task in WORTHS}
    assert found == {(name, str(one)) for name, answers in WORTHS.items() for one in answers}


@pytest.mark.parametrize(
    ("changes", "item", "code", "message"),
    [
        ({"doc_to_target": "{{a}}"}, {"choices": ["2", "3", "1"], "a": "1"}, 4,
         r"items.jsonl:2: lm-eval takes the answer 1 for an index, the choice '3'"),
        ({"doc_to_text": "questoin", "doc_to_target": "a"}, {}, 2, "Did you mean 'question'"),
        ({"doc_to_target": "a"}, {"a": True}, 4, "got True"),
        ({"doc_to_text": "{{question}} {{hint}}", "doc_to_target": "a"}, {"hint": "h"}, 4,
         ":1 has no hint"),
        ({"doc_to_target": "a", "metric_list": [{"metric": "mcc"}]}, {}, 2, "mcc"),
    ],
)  # fmt: skip
def test_what_would_be_scored_wrongly_is_refused_before_anything_runs(
    changes, item, code, message, run, tmp_path
):
    path = write(tmp_path / "mine", [{**WORDS[0], "a": "two"}, {**WORDS[1], **item}], **changes)
    found, error = run(path)
    assert found == code
    assert message in error
    assert not list((tmp_path / "out").rglob("items.parquet"))


def _outputs(folder: Path) -> list[dict[str, Any]]:
    """Question and likeliest choice of each item of the task."""
    from lrmc_ray.evaluate.items import Scores

    items = Scores.load(folder).metric("mine", "accuracy")
    asked = read_questions(folder)
    return [
        {"question": asked["mine", item].question, "output": output}
        for item, output in zip(items.item_ids, items.outputs, strict=True)
    ]
