"""Our tasks in lm-eval's own runner, its numbers against ones worked out here."""

import json
import math
import re
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.tasks import registry
from lrmc_ray.tasks.demo import packet_questions
from lrmc_ray.tasks.demo.countries import build_database
from lrmc_ray.tasks.demo.questions import make_examples
from lrmc_ray.tasks.registry import OURS, materialize

GENERAL = {*("lrmc_wordnet", "lrmc_antonyms", "lrmc_kinds", "lrmc_capitals", "lrmc_plain_english")}
LIMIT = 10


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def nl2sql_files(tmp_path_factory):
    # A folder name that YAML, Python and URIs would each trip over.
    folder = tmp_path_factory.mktemp('it\'s "odd": é # %20')
    database, test = folder / "countries.sqlite", folder / "test.jsonl"
    build_database(database)
    rows = make_examples(database, seed=0, num_train=1, num_dev=1, num_test=31)["test"]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return database, test, rows


@pytest.fixture(scope="module")
def manager(nl2sql_files):
    database, test, _ = nl2sql_files
    ct_radio = test.parent / "ct_radio.jsonl"
    ct_radio.write_text(
        json.dumps({"id": "1", "question": "?", "choices": list("wxyz"), "answer": 2})
    )
    packets = test.parent / "packets.jsonl"
    packets.write_text(json.dumps(packet_questions.make_examples("test", 1, seed=0)[0]))
    folder = materialize(
        test.parent / "tasks",
        nl2sql_test_path=test,
        database_path=database,
        packet_filter_test_path=packets,
        ct_radio_test_path=ct_radio,
        spider_test_path=test,
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


def evaluate(lm, manager, task, *, limit=LIMIT, chat=False):
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    scores = {key: value for key, value in results["results"][task].items() if ",none" in key}
    return scores, results["samples"][task]


def loglikelihood(model, context_ids, ids):
    """Sum of log p(token | everything before), one unbatched pass, float64."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*context_ids, *ids]])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(context_ids) - 1 : -1]
    return sum(float(logprobs[i, token]) for i, token in enumerate(ids))


def shipped(name):
    path = Path(registry.__file__).parent / "data" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["wordnet", "capitals"])
def test_choice_tasks(lm, manager, model, tokenizer, name):
    scores, samples = evaluate(lm, manager, f"lrmc_{name}")
    accuracy, probability = [], []
    for item, sample in zip(shipped(name)[:LIMIT], samples, strict=True):
        context = tokenizer(item["question"])["input_ids"]
        by_hand = torch.tensor(
            [loglikelihood(model, context, tokenizer(f" {choice}")["input_ids"])
             for choice in item["choices"]]
        )  # fmt: skip
        theirs = torch.tensor([answer[0] for answer in sample["filtered_resps"]])
        torch.testing.assert_close(theirs, by_hand, rtol=1e-4, atol=1e-4)
        accuracy.append(float(by_hand.argmax() == item["answer"]))
        probability.append(float(by_hand.softmax(-1)[item["answer"]]))
        assert sample["target"] in (item["answer"], str(item["answer"]))
    assert scores["acc,none"] == sum(accuracy) / LIMIT
    assert scores["choice_probability,none"] == pytest.approx(sum(probability) / LIMIT, rel=1e-4)


def test_plain_english(lm, manager, model, tokenizer):
    scores, samples = evaluate(lm, manager, "lrmc_plain_english", limit=4)
    total = num_bytes = num_words = 0
    for item, sample in zip(shipped("plain_english")[:4], samples, strict=True):
        ids = tokenizer(item["text"])["input_ids"]
        by_hand = loglikelihood(model, [lm.prefix_token_id], ids)
        assert sample["filtered_resps"][0] == pytest.approx(by_hand, rel=1e-5)
        total += by_hand
        num_bytes += len(item["text"].encode())
        num_words += len(item["text"].split())
    assert scores["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)


def test_probability_of_the_gold_query(lm, manager, model, tokenizer, nl2sql_files):
    scores, samples = evaluate(lm, manager, "lrmc_nl2sql_gold", limit=4, chat=True)
    by_hand = []
    for row, sample in zip(nl2sql_files[2][:4], samples, strict=True):
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        # lm-eval counts the line break that ends the prompt as the answer's first token.
        context = tokenizer(prompt.rstrip())["input_ids"]
        answer = tokenizer(f"\n{row['sql']}")["input_ids"]
        by_hand.append(loglikelihood(model, context, answer))
        assert sample["arguments"][0] == (prompt, row["sql"])
        assert sample["filtered_resps"][0][0] == pytest.approx(by_hand[-1], rel=1e-5)
    assert scores["loglikelihood,none"] == pytest.approx(sum(by_hand) / 4, rel=1e-5)
    assert scores["acc,none"] == 0.0


def test_generation_is_greedy_and_stops(lm, manager, model, tokenizer, nl2sql_files):
    _, samples = evaluate(lm, manager, "lrmc_nl2sql", limit=3, chat=True)
    for row, sample in zip(nl2sql_files[2][:3], samples, strict=True):
        ids = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        new = []
        with torch.inference_mode():
            for _ in range(64):
                new.append(int(model(ids).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
                if new[-1] == tokenizer.eos_token_id:
                    break
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert sample["filtered_resps"][0] == re.split(r";|\n\n", text)[0]


class ScriptedLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers from a table; sees the messages as JSON in place of a chat template."""

    tokenizer_name = "scripted"

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.kwargs = []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps([chat_history, add_generation_prompt])

    def chat_template(self, chat_template=False):
        return ""

    def generate_until(self, requests, disable_tqdm=False):
        self.kwargs.extend(request.args[1] for request in requests)
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError("not asked for")

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize(
    ("answer", "execution", "exact", "valid"),
    [
        (lambda row: row["sql"], 1.0, 1.0, 1.0),
        (lambda row: f"```sql\n{row['sql'].replace(' FROM ', '  from   ')}\n```", 1.0, 1.0, 1.0),
        (lambda row: f"SELECT * FROM ({row['sql'].rstrip(';')})", 1.0, 0.0, 1.0),
        (lambda row: "SELECT 'wrong'", 0.0, 0.0, 1.0),
        (lambda row: "I do not know", 0.0, 0.0, 0.0),
        (lambda row: f"ATTACH '/tmp/stolen.db' AS x; {row['sql']}", 1.0, 1.0, 1.0),
        (lambda row: row["sql"].replace("SELECT ", "SELECT 1, ", 1), 0.0, 0.0, 1.0),
    ],
    ids=["gold", "fenced", "rephrased", "wrong", "prose", "second statement", "column too many"],
)
def test_execution_accuracy_of_known_answers(
    manager, nl2sql_files, answer, execution, exact, valid
):
    rows = [row for row in nl2sql_files[2] if "ORDER BY" not in row["sql"]]
    prompts = {json.dumps([row["messages"][:-1], True]): answer(row) for row in nl2sql_files[2]}
    lm = ScriptedLM(prompts)
    _, samples = evaluate(lm, manager, "lrmc_nl2sql", limit=None, chat=True)
    of_row = {sample["doc"]["id"]: sample for sample in samples}
    assert len(of_row) == 31
    for row in rows:
        sample = of_row[row["id"]]
        got = sample["execution_accuracy"], sample["exact_match"], sample["valid_sql"]
        assert got == (execution, exact, valid), row["sql"]
    assert lm.kwargs[0] == {"until": [";", "\n\n"], "max_gen_toks": 64, "do_sample": False}


def test_accuracy_is_the_share_of_right_answers(manager, nl2sql_files):
    rows = nl2sql_files[2]
    prompts = {
        json.dumps([row["messages"][:-1], True]): row["sql"] if number % 4 else "SELECT 'wrong'"
        for number, row in enumerate(rows)
    }
    scores, _ = evaluate(ScriptedLM(prompts), manager, "lrmc_nl2sql", limit=None, chat=True)
    assert scores["execution_accuracy,none"] == 23 / 31
    assert scores["exact_match,none"] == 23 / 31


# --- task files -------------------------------------------------------------------------------


def test_every_task_says_its_kind_and_prompt(manager):
    names = {name for parts in OURS.values() for name in parts}
    assert set(manager.all_tasks) == names
    kinds = {}
    for name in sorted(names):
        task = manager.load([name])["tasks"][name]
        metadata = task.config.metadata
        assert metadata["version"] >= 1.0
        kinds[name] = metadata["kind"], metadata["chat_template"]
    assert kinds == {
        "lrmc_antonyms": ("choice", False),
        "lrmc_kinds": ("choice", False),
        "lrmc_capitals": ("choice", False),
        "lrmc_ct_radio": ("choice", True),
        "lrmc_ct_radio_letter": ("letter", True),
        "lrmc_nl2sql": ("generation", True),
        "lrmc_nl2sql_gold": ("gold", True),
        "lrmc_nl2sql_spider": ("generation", True),
        "lrmc_nl2sql_spider_gold": ("gold", True),
        "lrmc_packet_filter": ("generation", True),
        "lrmc_packet_filter_gold": ("gold", True),
        "lrmc_plain_english": ("text", False),
        "lrmc_wordnet": ("choice", False),
    }


def test_without_nl2sql_data_the_general_tasks_are_there(tmp_path):
    folder = materialize(tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    found = TaskManager(include_path=str(folder), include_defaults=False).all_tasks
    assert set(found) == GENERAL


def test_materializing_again_replaces_the_paths(tmp_path, nl2sql_files):
    database, test, rows = nl2sql_files
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n")
    materialize(tmp_path / "tasks", nl2sql_test_path=test, database_path=database)
    materialize(tmp_path / "tasks", nl2sql_test_path=other, database_path=database)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    task = manager.load(["lrmc_nl2sql"])["tasks"]["lrmc_nl2sql"]
    assert [doc["id"] for doc in task.test_docs()] == [rows[0]["id"]]


def test_wrong_paths_are_refused(tmp_path, nl2sql_files):
    database, test, _ = nl2sql_files
    with pytest.raises(ConfigError, match="must be given together, got None and"):
        materialize(tmp_path, database_path=database)
    with pytest.raises(IncompleteArtifactError, match=r"needs .*nowhere\.jsonl, which does not"):
        materialize(tmp_path, database_path=database, nl2sql_test_path=tmp_path / "nowhere.jsonl")
    with pytest.raises(IncompleteArtifactError, match=r"needs .*nowhere\.sqlite"):
        materialize(tmp_path, database_path=tmp_path / "nowhere.sqlite", nl2sql_test_path=test)


def test_the_readmes_example_task_works(tmp_path, lm, model, tokenizer):
    readme = (Path(registry.__file__).parent / "README.md").read_text("utf-8")
    task, item = (re.search(rf"```{kind}\n(.+?)```", readme, re.S)[1] for kind in ("yaml", "json"))
    (tmp_path / "radio.yaml").write_text(task.replace("/data/my_tasks", str(tmp_path)))
    (tmp_path / "radio.jsonl").write_text(item)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    scores, samples = evaluate(lm, manager, "radio")
    context = tokenizer(json.loads(item)["question"])["input_ids"]
    ohm, volt = (
        loglikelihood(model, context, tokenizer(w)["input_ids"]) for w in (" ohm", " volt")
    )
    assert [answer[0] for answer in samples[0]["filtered_resps"]] == pytest.approx(
        [ohm, volt], rel=1e-4
    )
    assert scores["acc,none"] == float(ohm > volt)


def test_the_readme_lists_the_tasks_as_they_are():
    readme = (Path(registry.__file__).parent / "README.md").read_text("utf-8")
    table = dict(re.findall(r"`(lrmc_\w+)` \| (\d+)?", readme))
    assert set(table) == {name for parts in OURS.values() for name in parts}
    for name in ("wordnet", "capitals", "plain_english"):
        assert int(table[f"lrmc_{name}"]) == len(shipped(name))
    for name in table:
        text = (Path(registry.__file__).parent / "yaml" / f"{name}.yaml").read_text("utf-8")
        metrics = re.findall(r"metric: (\w+)", text)
        row = next(line for line in readme.splitlines() if f"`{name}`" in line)
        assert all(f"`{metric}`" in row for metric in metrics), name


def test_the_version_follows_every_file_that_decides_a_score(tmp_path, monkeypatch):
    versions = {registry.VERSION}
    source = Path(registry.__file__).parent
    for changed in ("data/wordnet.jsonl", "yaml/lrmc_nl2sql.yaml", "nl2sql.py", "sql_child.py"):
        copy = tmp_path / changed.replace("/", "_")
        for path in [*source.glob("*.py"), *source.glob("yaml/*"), *source.glob("data/*")]:
            target = copy / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        monkeypatch.setattr(registry, "_HERE", copy)
        assert registry._version() == registry.VERSION
        with (copy / changed).open("a") as file:
            file.write("\n")
        versions.add(registry._version())
    assert len(versions) == 5


def test_yaml_files_are_valid_before_they_are_filled_in():
    for path in (Path(registry.__file__).parent / "yaml").iterdir():
        text = re.sub(r"!function ", "", path.read_text("utf-8"))
        assert yaml.safe_load(text)["task"] == path.stem
