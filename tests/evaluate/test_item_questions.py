"""What people read of an item: its question, what is right, and what a model chose or wrote."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.questions import (
    LONGEST,
    QUESTIONS_FILE,
    Asked,
    read_questions,
    write_questions,
)
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.models.loading import load_model, load_tokenizer

CHOICE = {
    "task": "pick",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Context that is long. {{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}
WORDS = ["two", "many", "none"]
ITEMS = [
    {"id": f"n{n}", "question": f"{n} and one is", "answer": 1, "choices": WORDS[n:] + WORDS[:n]}
    for n in range(3)
]
WRITE = {
    **{key: CHOICE[key] for key in ("dataset_path", "test_split")},
    "task": "write",
    "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}
TEXTS = [{"text": "x" * n * 1500, "answer": [f"a{n}"]} for n in (1, 2)]


def write_task(folder, task, items):
    name = task["dataset_kwargs"]["data_files"]["test"]
    (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    path = folder / f"{task['task']}.yaml"
    path.write_text(json.dumps(task))
    return str(path)


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tasks")
    request = ScoreRequest(
        tasks=(
            (write_task(folder, CHOICE, ITEMS), "domain"),
            (write_task(folder, WRITE, TEXTS), "general"),
        ),
        batch_tokens=4096,
        precision="fp32",
        limit=None,
        split="dev",
        drift_samples={"domain": 0, "general": 0},
    )
    return score(tiny_model, request)


def test_questions_and_right_answers_are_kept(scored, tmp_path):
    write_questions(tmp_path, scored.questions)
    asked = read_questions(tmp_path)
    for n, right in enumerate(("many", "none", "two")):
        assert asked["pick", f"n{n}"] == Asked(f"{n} and one is", right)
    assert asked["write", "0"].question == "x" * 1500
    assert asked["write", "1"].question == "[...] " + "x" * LONGEST
    assert len(asked) == 5
    table = pq.read_table(tmp_path / QUESTIONS_FILE)
    assert table.schema.metadata == {b"lrmc.schema_version": b"1"}


def test_the_output_of_a_choice_is_the_likeliest_one(scored, tiny_model):
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    items = Scores.from_rows(scored.rows).metric("pick", "accuracy")
    chosen = []
    for item, output, value in zip(ITEMS, items.outputs, items.values, strict=True):
        likelihoods = []
        for choice in item["choices"]:
            prompt = f"Context that is long. {item['question']}"
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(f"{prompt} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
            likelihoods.append(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        best = item["choices"][max(range(3), key=likelihoods.__getitem__)]
        assert output == best
        assert value == (best == item["choices"][item["answer"]])
        chosen.append(item["choices"].index(best))
    assert len(set(chosen)) > 1


def test_older_scores_have_no_questions_and_damaged_ones_are_named(tmp_path):
    assert read_questions(tmp_path) == {}
    (tmp_path / QUESTIONS_FILE).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"questions\.parquet is damaged"):
        read_questions(tmp_path)
