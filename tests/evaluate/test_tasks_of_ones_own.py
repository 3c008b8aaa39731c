"""Task files of one's own: scored as lm-eval scores them, by what their files say, or refused."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import ConfigError, DataError, LrmcError
from lrmc_ray.evaluate.harness import ItemChoice, run_task, score
from lrmc_ray.evaluate.item_rows import task_rows
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.json_items import read_dataset, read_items
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.evaluate.run import evaluate, scoring_code
from lrmc_ray.evaluate.task_checks import SCORED
from lrmc_ray.evaluate.task_files import check_tasks, own_files, task_fingerprints, task_manager
from lrmc_ray.evaluate.vocabulary import vocabulary_of
from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.models.loading import load_model, load_tokenizer
from tests.support.own_tasks import GENERATED, write

CHOICES = {"metric_list": [{"metric": name} for name in SCORED["multiple_choice"]]}
ITEMS = [
    {"question": f"{n} and one is", "choices": ["two", "many more", "none"], "answer": n % 3}
    for n in range(7)
]
TEXTS = [{"question": f"Say {n}:", "answer": f" word {n}"} for n in range(5)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def rows_of(path: Path, model: Path):
    request = ScoreRequest(
        tasks=((str(path), "domain"),),
        batch_tokens=512,
        precision="fp32",
        limit=None,
        split="dev",
        drift_samples={"domain": 0, "general": 0},
    )
    return score(model, request).rows


def scores_of(path: Path, model: Path):
    return Scores.from_rows(rows_of(path, model))


# Equal to lm-eval


@pytest.fixture(scope="module")
def reference(tiny_model):
    """What lm-eval's own ``simple_evaluate`` says of a task file, with its own model class."""
    lm = HFLM(
        pretrained=load_model(tiny_model),
        tokenizer=load_tokenizer(tiny_model),
        batch_size=4,
        device="cpu",
    )

    def reference_of(path):
        manager = TaskManager(include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[str(path)], task_manager=manager, bootstrap_iters=0
        )
        (values,) = found["results"].values()
        named = {name.partition(",")[0]: value for name, value in values.items() if "," in name}
        return {name: value for name, value in named.items() if not name.endswith("_stderr")}

    return reference_of


OTHER_INPUTS = {
    "doc_to_text": "{{answer}}",
    "doc_to_choice": "{{[question + ' yes', question + ' no', question]}}",
    "doc_to_target": "and that is all",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.mark.parametrize(
    ("changes", "items"),
    [
        (CHOICES, ITEMS),
        ({}, ITEMS),
        (CHOICES, [{**item, "answer": item["choices"][item["answer"]]} for item in ITEMS]),
        ({"doc_to_target": "{{answer}}", **CHOICES}, ITEMS),
        ({"metric_list": [{"metric": "acc"}, {"metric": "exact_match"}]},
         [{**item, "answer": [0, item["answer"]]} for item in ITEMS]),
        (OTHER_INPUTS, ITEMS),
    ],
    ids=["all metrics", "default metrics", "texts", "template", "several right", "several inputs"],
)  # fmt: skip
def test_choices_have_lm_evals_values(changes, items, reference, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, items, **changes)
    expected = reference(path)
    scores = scores_of(path, tiny_model)
    found = {metric: items.value.value for (_, metric), items in scores.metrics.items()}
    found["acc"] = found.pop("accuracy")
    assert 0 < found.pop("probability") < 1
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


def test_the_share_of_the_right_choice_is_among_the_choices_alone(tmp_path, monkeypatch):
    """Also where lm-eval asks for every choice once more, without its question."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, ITEMS[:2], **CHOICES)
    chances = {" two": 0.5, " many more": 0.2, " none": 0.1}

    def loglikelihood(requests, **_):
        return [(float(np.log(chances[request.args[1]])), False) for request in requests]

    lm = answering(str)
    lm.loglikelihood = loglikelihood
    rows = generated(path, lm, tmp_path)
    shares = [row["value"] for row in rows if row["metric"] == "probability"]
    assert shares == pytest.approx([0.5 / 0.8, 0.2 / 0.8])


def test_probabilities_of_texts_have_lm_evals_values(reference, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = {"doc_to_choice": None, "doc_to_target": "{{answer}}"}
    path = write(tmp_path, TEXTS, output_type="loglikelihood", **choice)
    expected, scores = reference(path), scores_of(path, tiny_model)
    assert scores.metric("mine", "accuracy").value.value == expected["acc"]
    mean = scores.metric("mine", "loglikelihood").values.mean()
    assert np.exp(-mean) == pytest.approx(expected["perplexity"], rel=1e-5)

    path = write(tmp_path, TEXTS, output_type="loglikelihood_rolling", **choice, doc_to_text="")
    expected, items = reference(path), scores_of(path, tiny_model).metric("mine", "cross_entropy")
    nats = float((items.values * items.weights).sum())
    size = sum(len(item["answer"].encode()) for item in TEXTS)
    words = sum(len(item["answer"].split(" ")) for item in TEXTS)
    assert nats / size / np.log(2) == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert np.exp(nats / size) == pytest.approx(expected["byte_perplexity"], rel=1e-5)
    assert np.exp(nats / words) == pytest.approx(expected["word_perplexity"], rel=1e-4)


def answering(answers):
    """A model that writes what ``answers`` says of its prompt."""
    from lm_eval.api.model import LM

    class Answering(LM):  # type: ignore[misc]  # lm-eval ships no types
        def generate_until(self, requests, disable_tqdm=False):
            return [answers(request.args[0]) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Answering()


def generated(path: Path, lm, tmp_path: Path):
    manager = task_manager([str(path)], tmp_path / "scratch", "dev")
    return list(task_rows("mine", "domain", run_task(lm, manager, str(path), ItemChoice()), None))


def accuracy(rows):
    return [row["value"] for row in rows if row["metric"] == "accuracy"]


def test_generated_answers_have_lm_evals_values(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [{"question": f"{n}?", "answer": ["Yes", "no"][n % 2]} for n in range(5)]
    metric = {"metric": "exact_match", "ignore_case": True, "aggregation": "mean"}
    path = write(tmp_path, items, **GENERATED, metric_list=[metric])
    lm = answering(lambda _: "yes")
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[str(path)], task_manager=TaskManager(include_defaults=False)
    )
    values = accuracy(generated(path, lm, tmp_path))
    assert np.mean(values) == found["results"]["mine"]["exact_match,none"] == 0.6
    several = [{**item, "answer": ["maybe", item["answer"]]} for item in items]
    path = write(tmp_path, several, **GENERATED, metric_list=[metric])
    assert accuracy(generated(path, lm, tmp_path)) == [1, 0, 1, 0, 1]


def test_every_filter_is_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [{"question": f"{n}?", "answer": str(n)} for n in range(4)]
    filters = [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "loose", "filter": [
            {"function": "regex", "regex_pattern": "([0-9])"}, {"function": "take_first"}]},
    ]  # fmt: skip
    path = write(tmp_path, items, **GENERATED, filter_list=filters)
    rows = generated(path, answering(lambda prompt: f"It is {prompt[0]}."), tmp_path)
    assert accuracy(rows) == [0, 0, 0, 0]
    loose = [row["value"] for row in rows if row["metric"] == "exact_match:loose"]
    assert loose == [1, 1, 1, 1]
    assert {row["task"] for row in rows} == {"mine"}


@pytest.mark.parametrize(
    ("output_type", "metric"),
    [
        *(("multiple_choice", name) for name in ("f1", "mcc", "likelihood", "bypass")),
        *(("generate_until", name) for name in ("bleu", "chrf", "chrf++", "ter", "acc", "bypass")),
        *(("loglikelihood", name) for name in ("acc_all", "acc_norm")),
    ],
)
def test_a_metric_that_is_not_scored_is_refused_by_name(output_type, metric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = [{"metric": "acc"}, {"metric": metric}]
    path = write(tmp_path, ITEMS, output_type=output_type, metric_list=metrics[-1:])
    with pytest.raises(ConfigError, match=rf"task mine: the metric {metric.replace('+', '.')} is"):
        check_tasks([str(path)], "dev")


def test_every_metric_of_lm_eval_is_scored_or_refused():
    """A new version with other metrics makes this fail: each is to be looked at."""
    import lm_eval.api.metrics  # noqa: F401  (registers them)
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, METRIC_REGISTRY
    from lm_eval.api.task import ALL_OUTPUT_TYPES

    refused = {"f1", "mcc", "likelihood", "bypass", "bleu", "chrf", "chrf++", "ter", "acc_all"}
    assert set(METRIC_REGISTRY) == refused | {name for names in SCORED.values() for name in names}
    assert set(ALL_OUTPUT_TYPES) == set(SCORED)
    for output_type, names in DEFAULT_METRIC_REGISTRY.items():
        assert set(names) <= set(SCORED[output_type])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_image": "picture"}, "needs pictures"),
        ({"unsafe_code": True}, "needs running code"),
        ({"use_prompt": "prompts.yaml:mine"}, r"task mine needs a prompt of another file"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "aggregation of acc must"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_tasks([str(write(tmp_path, ITEMS, **changes))], "dev")


# The fingerprint and the nodes


FORMS = {
    "relative": {"data_files": {"test": "data/a.jsonl"}},
    "text": {"data_files": "data/a.jsonl"},
    "list": {"data_files": ["data/a.jsonl", "data/b.jsonl"]},
    "glob": {"data_files": {"test": "data/*.jsonl"}},
    "splits": {"data_files": {"train": "data/b.jsonl", "test": ["data/a.jsonl"]}},
    "listed splits": {"data_files": [{"split": "test", "path": "data/a.jsonl"}]},
    "data_dir": {"data_dir": "data", "data_files": {"test": "a.jsonl"}},
    "data_dir alone": {"data_dir": "data"},
    "folder": {"data_files": {"test": "a.jsonl"}},
    "folder alone": {},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_data_of_a_task_file_are_in_its_fingerprint(form, elsewhere, tmp_path, monkeypatch):
    home = tmp_path / "home"
    path = write(home, [], dataset_kwargs=FORMS[form] or None)
    if form.startswith("folder"):
        path.write_text(path.read_text().replace('"json"', '"data"'))
    (home / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (home / "data" / name).write_text(json.dumps(ITEMS[0]) + "\n")
    monkeypatch.chdir(tmp_path if elsewhere else home)
    name = os.path.relpath(path)
    before = task_fingerprints([name], "dev")
    data = home / "data" / "a.jsonl"
    assert data.resolve() in {file.resolve() for file in own_files([name]).values()}
    data.write_text(json.dumps(ITEMS[1]) + "\n")
    after = task_fingerprints([name], "dev")
    assert before.keys() == after.keys()
    assert before != after
    if form in ("splits", "list", "glob"):
        (home / "data" / "b.jsonl").write_text("\n")
        assert task_fingerprints([name], "dev") != after


def test_includes_python_and_what_it_names_are_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ITEMS)
    (tmp_path / "mine.yaml").rename(tmp_path / "base.yaml")
    path = tmp_path / "top.yaml"
    path.write_text("include: base.yaml\nprocess_results: !function utils.check\n")
    (tmp_path / "utils.py").write_text(
        "import helper\nfrom package import part\nKEYS = open('keys.txt').read()\n"
        "def check(doc, results):\n    return {'acc': 1.0}\n"
    )
    (tmp_path / "package").mkdir()
    others = ["helper.py", "keys.txt", "package/part.py", "package/__init__.py", "third.py"]
    for other in others:
        (tmp_path / other).write_text("")
    (tmp_path / "helper.py").write_text("import third\n")
    found = {p.resolve().relative_to(tmp_path).as_posix() for p in own_files([str(path)]).values()}
    assert found == {"top.yaml", "base.yaml", "items.jsonl", "utils.py", *others}


def test_two_files_of_one_relative_name_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "home", ITEMS)
    write(tmp_path / "other", ITEMS[:2])
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"items\.jsonl must mean one file"):
        task_fingerprints([str(path)], "dev")


def test_data_that_do_not_exist_are_named(tmp_path):
    path = write(tmp_path, ITEMS, dataset_kwargs={"data_files": {"test": "no.jsonl"}})
    with pytest.raises(ConfigError, match=r"its data no\.jsonl are not in"):
        task_fingerprints([str(path)], "dev")


# Examples in the prompt


@pytest.mark.parametrize(
    ("changes", "num_others"),
    [
        ({}, 11),
        ({"test_split": None, "validation_split": "test"}, 11),
        ({"test_split": None, "validation_split": "test", "fewshot_split": "test"}, 11),
        ({"training_split": "test"}, 11),
        ({"fewshot_config": {"sampler": "first_n"}}, 11),
        ({"training_split": "train", "dataset_kwargs": {
            "data_files": {"train": "items.jsonl", "test": "items.jsonl"}}}, 11),
    ],
)  # fmt: skip
def test_no_prompt_shows_the_tested_item_with_its_answer(
    changes, num_others, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    items = [{"question": f"Q{n:02}?", "answer": f"A{n:02}"} for n in range(12)]
    path = write(tmp_path, items, **GENERATED, num_fewshot=5, **changes)

    def copy(prompt):
        *examples, asked = [part.strip() for part in prompt.split("\n\n")]
        assert len(examples) == 5
        known = dict(example.split(" ") for example in examples)
        return known.get(asked, "")

    rows = generated(path, answering(copy), tmp_path)
    assert accuracy(rows) == [0] * len(items)


# The answer that the file names


@pytest.mark.parametrize(
    ("target", "item"),
    [
        ("a", {"choices": ["2", "3", "1"], "a": "1"}),
        ("a", {"choices": ["red", "green", "blue"], "a": "blue"}),
        ("{{a}}", {"choices": ["red", "green", "blue"], "a": "blue"}),
        ("{{a}}", {"choices": ["2", "3", "7"], "a": 2}),
        ("a", {"choices": ["2", "3", "1"], "a": 2}),
    ],
)
def test_the_right_choice_is_the_one_that_the_file_names(target, item, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, [{"question": "?", **item}] * 2, doc_to_target=target)
    wanted = " " + item["choices"][2]

    right = answering(str)
    right.loglikelihood = lambda requests, **_: [
        (0.0 if request.args[1] == wanted else -9.0, True) for request in requests
    ]
    assert accuracy(generated(path, right, tmp_path)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "item", "message"),
    [
        ({"doc_to_target": "{{a}}"}, {"choices": ["2", "3", "1"], "a": "1"},
         r"items\.jsonl:2: lm-eval takes the answer 1 for an index, the choice '3'"),
        ({"doc_to_target": "a"}, {"choices": ["x", "y"], "a": "z"}, r":2: the right choice must"),
        ({"doc_to_target": "a"}, {"choices": ["x", "y"], "a": "-1"}, r":2: the right choice must"),
        ({"doc_to_target": "{{a}}"}, {"choices": ["x", "y"], "a": 2}, r":2: the right choice must"),
        ({"doc_to_target": "a"}, {"choices": ["x", "y"], "a": True}, r":2: .* got True"),
        ({"doc_to_target": "a"}, {"choices": ["x", "y"]}, r":2 has no a, which doc_to_target"),
        ({"doc_to_target": "a"}, {"choices": ["x", "y"], "a": None}, r":2 has no a, which"),
        ({"doc_to_text": "questoin"}, {}, r"doc_to_text must be .* Did you mean 'question'"),
        ({"doc_to_target": "answr"}, {}, r"doc_to_target must be .* Did you mean 'answer'"),
        ({"doc_to_text": "{{question}} {{hint}}"}, {}, r":1 has no hint, which doc_to_text shows"),
        ({"doc_to_text": "{{question}} {{choices[2]}}"}, {}, r":2: .*no element 2"),
        ({"doc_to_text": "{{question ~ hint}}"}, {}, r":1 has no hint"),
        ({"doc_to_text": "{{other}}"}, {}, "lm-eval refuses.*mine.yaml.*other"),
        ({"doc_to_text": "{{n}}"}, {"question": "?", "n": "7"}, r":1 has no n"),
    ],
)  # fmt: skip
def test_an_item_that_would_be_scored_wrongly_is_refused(
    changes, item, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    hinted = {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": {"a": "h"}, **item}
    first = {**ITEMS[0], "hint": None}
    if changes.get("doc_to_target") in ("a", "{{a}}"):
        first["a"] = "two"
    with pytest.raises(LrmcError, match=message):
        check_tasks([str(write(tmp_path, [first, hinted], **changes))], "dev")


def test_examples_are_looked_at_as_items_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"data_files": {"train": "train.jsonl", "test": "items.jsonl"}}
    path = write(tmp_path, ITEMS, dataset_kwargs=files, training_split="train", num_fewshot=2)
    examples = [{**ITEMS[0], "question": "x"}, {"choices": ["a", "b"], "answer": 0}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    with pytest.raises(DataError, match=r"train\.jsonl:2 has no question, which doc_to_text"):
        check_tasks([str(path)], "dev")


def test_what_an_item_lacks_may_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "{% if hint %}{{hint}} {% endif %}{{question}}{{ note if note is not none else '' }}"
        "{{ note or '' }}{{ hint | default('', true) }}"
    )
    items = [*ITEMS[:2], {**ITEMS[2], "hint": "h", "note": "n"}]
    check_tasks([str(write(tmp_path, items, doc_to_text=text))], "dev")


@pytest.mark.parametrize(
    ("answer", "target", "said"),
    [
        ("2024-01-01", "answer", "2024-01-01"),
        ("2024-01-01", "{{answer}}", "2024-01-01"),
        (7, "answer", "7"),
        (7, "{{answer}}", "7"),
        ("[1, 2]", "answer", "[1, 2]"),
        ("007", "answer", "007"),
        ("1e5", "{{answer}}", "1e5"),
        (["a", "b"], "answer", "b"),
        (["a", "b"], "{{answer}}", "b"),
    ],
)
def test_the_answer_is_what_the_file_says(answer, target, said, tmp_path, monkeypatch):
    """Beside it stands one that makes `datasets` take the column for another type."""
    monkeypatch.chdir(tmp_path)
    beside = {"2024-01-01": "2024-01-02", 7: 7.5, "[1, 2]": "[3]"}
    other = answer if isinstance(answer, list) else beside.get(answer, answer)
    items = [{"question": "a", "answer": answer}, {"question": "b", "answer": other}]
    path = write(tmp_path, items, **GENERATED, doc_to_target=target)
    rows = generated(path, answering(lambda prompt: said if prompt[0] == "a" else "?"), tmp_path)
    assert accuracy(rows) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "target", "message"),
    [
        (["x", "[1, 2]"], "{{answer}}", r":2: .* must give a list for every item or for none"),
        (["[1]", "[1, 2]"], "{{answer}}", r":1: lm-eval takes the answer \[1\] for a list"),
        (["x", True], "answer", r":2: the answer must be a text or a number, got True"),
        ([["x"], [1]], "answer", r":2: a list of right answers must hold texts"),
        (["x", None], "answer", r":2 has no answer"),
    ],
)
def test_an_answer_that_is_not_compared_as_it_stands_is_refused(
    answers, target, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    items = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
    path = write(tmp_path, items, **GENERATED, doc_to_target=target)
    with pytest.raises(DataError, match=message):
        check_tasks([str(path)], "dev")


# The reading of JSON


def test_json_is_kept_as_it_is(tmp_path):
    rows = [
        {"a": "2024-01-01", "b": 7, "c": [1, 2.5], "d": {"x": 1}, "e": None, "f": True},
        {"a": "x", "b": 7.5, "c": [1], "d": {"y": "ü"}, "g": "é😀"},
        {"b": "w", "c": [], "d": {}, "f": False, "b2": 0.1 + 0.2},
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(["", *map(json.dumps, rows), ""]))
    array, within, packed = (tmp_path / name for name in ("b.json", "c.json", "d.jsonl.gz"))
    array.write_text(json.dumps(rows, indent=1))
    within.write_text(json.dumps({"data": rows}))
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for file, field in ((lines, None), (array, None), (within, "data"), (packed, None)):
        assert [item.row for item in read_items([file], field)] == rows
        (found,) = read_dataset({"test": [file]}, field, files=1, field=2).values()
        names = {name for row in rows for name in row}
        expected = [{name: row.get(name) for name in names} for row in rows]
        assert json.dumps(list(found), sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert [item.place for item in read_items([lines])] == [f"{lines}:{n}" for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"a\.jsonl:2 is not JSON"),
        (b'{"a": 1}\n7\n', r"a\.jsonl:2 must be an object"),
        (b'["x"]', r"item 1 must be an object"),
        (b'{"a": "\xff"}', "must be JSON in UTF-8"),
    ],
)
def test_json_that_is_none_is_refused(content, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_items([file])


def test_a_group_file_with_tasks_inside(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = json.loads(write(tmp_path, ITEMS).read_text())
    path = tmp_path / "group.yaml"
    path.write_text(yaml.safe_dump({"group": "both", "task": [inner, {**inner, "task": "again"}]}))
    assert tmp_path / "items.jsonl" in own_files([str(path)]).values()
    rows = rows_of(path, tiny_model)
    assert len([row for row in rows if row["metric"] == "accuracy"]) == 2 * len(ITEMS)


# Scores of a base that was asked something else


def test_a_base_that_was_asked_other_questions_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path, ITEMS).name
    settings = RunSettings.model_validate(
        {"evaluate": {"domain_tasks": [name], "general_tasks": ["wordnet"]}}
    )
    base = tmp_path / "scores" / "base"
    base.mkdir(parents=True)
    known = {
        "vocabulary": vocabulary_of(tiny_model),
        "identity": {"tasks": task_fingerprints([name, "wordnet"], "dev"), **scoring_code()},
    }
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEMS[0]) + "\n")
    write_manifest(base, known)
    with pytest.raises(DataError, match="but the files of the tasks have changed since"):
        evaluate(settings, tiny_model, tmp_path, split="dev", base=base)
    known["identity"] |= {"tasks": task_fingerprints([name, "wordnet"], "dev"), "scoring": 1}
    write_manifest(base, known)
    with pytest.raises(DataError, match="but scoring has changed since"):
        evaluate(settings, tiny_model, tmp_path, split="dev", base=base)


# Where nothing can be kept

WITHOUT_A_HOME = """
import sys, tempfile
from pathlib import Path
from lrmc_ray.evaluate.task_files import load_task, quieten, task_manager

quieten()
for _ in range(2):  # the second process-wide choice does not remember the first scratch
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager(["capitals"], Path(scratch), "dev")
        (task,) = load_task(manager, "lrmc_capitals")["tasks"].values()
        print(len(task.eval_docs), Path(scratch, "datasets").is_dir())
    assert not Path(scratch).exists()
"""


@pytest.mark.parametrize("can_write", [False, True])
def test_a_task_is_read_where_the_home_cannot_be_written(can_write, tmp_path):
    home = tmp_path if can_write else "/dev/null/huggingface"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_HOME],
        env={**os.environ, "HF_HOME": str(home)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    is_elsewhere = f" {not can_write}"
    assert all(line.endswith(is_elsewhere) and not line.startswith("0 ") for line in lines)
