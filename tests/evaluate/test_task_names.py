"""Two tasks never share a name in the scores, where the items of one would count as the other's."""

import json
from typing import Any

import pytest
import yaml

from lrmc_ray.compare.command import main as compare
from lrmc_ray.config import EvaluateSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError
from lrmc_ray.evaluate.command import main as evaluate
from lrmc_ray.evaluate.task_names import asked_tasks
from lrmc_ray.train.command import main as train
from lrmc_ray.tune.command import main as tune


def asked(domain, general):
    return asked_tasks(EvaluateSettings(domain_tasks=domain, general_tasks=general))


@pytest.fixture
def files(tmp_path):
    """Two task files of one name, in folders of their own."""
    found = []
    for folder in ("one", "two"):
        path = tmp_path / folder / "task.yaml"
        path.parent.mkdir()
        (path.parent / "items.jsonl").write_text(json.dumps({"q": folder, "a": "x"}) + "\n")
        values: dict[str, Any] = {"task": folder, "dataset_path": "json", "test_split": "test"}
        values |= {"dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}
        values |= {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "a"}
        path.write_text(yaml.safe_dump(values))
        found.append(str(path))
    return found


def test_groups_become_their_tasks_each_once(files):
    one = files[0]
    assert asked(["nl2sql", "nl2sql", one], ["wordnet"]) == ("nl2sql", one, "wordnet")


@pytest.mark.parametrize("groups", [(0, 1), (0, 0)])
def test_two_files_of_one_name_are_refused(files, groups):
    tasks = [["nl2sql"], ["wordnet"]]
    for file, group in zip(files, groups, strict=True):
        tasks[group].append(file)
    with pytest.raises(ConfigError, match=r"one/task\.yaml and .*two/task\.yaml are both task; re"):
        asked(*tasks)


def test_a_file_with_the_name_of_one_of_ours_is_refused(files, tmp_path):
    path = tmp_path / "one" / "task.yaml"
    path = path.rename(path.with_name("wordnet.yaml"))
    with pytest.raises(ConfigError, match=r"one/wordnet\.yaml and wordnet are both wordnet"):
        asked([str(path)], ["wordnet"])


def test_a_task_of_both_kinds_is_refused(files):
    for name in ("wordnet", files[0]):
        with pytest.raises(ConfigError, match=f"{name} is both; take it out of evaluate.general"):
            asked(["nl2sql", name], [name])


@pytest.mark.parametrize("command", [evaluate, tune, train, compare])
def test_every_command_refuses_before_anything_is_written(
    command, files, tmp_path, tiny_model, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    options = ["--model", str(tiny_model), "--output", "out", "--domain-tasks", ",".join(files)]
    if command is not evaluate:
        options += ["--train-data", "train.jsonl"]
    assert run_command(command, [*options, "--general-tasks", "wordnet"]) == 2
    assert "are both task; rename one of them" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
