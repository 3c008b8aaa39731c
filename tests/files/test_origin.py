"""What a tuned model's directory says of how it was made, and how it is scored again."""

import json
from pathlib import Path

import pytest

from lrmc_ray.config import RunSettings, load_settings
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate import command
from lrmc_ray.files.origin import ORIGIN_FILE, origin_of, read_origin, write_origin


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """As of a command in ``tmp_path`` with relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in ("my tasks.yaml", "train.jsonl", "nl2sql"):
        (tmp_path / name).write_text("")
    return load_settings(
        None,
        [
            *('model.name="./base"', 'data.train=["en=train.jsonl", "demo"]'),
            *('evaluate.domain_tasks=["my tasks.yaml", "nl2sql"]', "search.forgetting_weight=2.0"),
            *("model.template_options={enable_thinking = false}", "evaluate.limit=7"),
        ],
    )


def test_paths_are_those_from_everywhere_and_names_stay(settings, tmp_path):
    origin = origin_of(settings, Path("runs"), train={"lr": 0.1}, study="s-1", trial=3, limit=9)
    write_origin(tmp_path / "base", origin)
    read = read_origin(tmp_path / "base")
    assert read == origin
    assert read.evaluate["domain_tasks"] == [str(tmp_path / "my tasks.yaml"), "nl2sql"]
    assert read.data == [f"en={tmp_path / 'train.jsonl'}", "demo"]
    assert read.output == str(tmp_path / "runs")
    assert (read.study, read.trial, read.train, read.evaluate["limit"]) == (
        "s-1",
        3,
        {"lr": 0.1},
        9,
    )
    assert read.settings["model"]["name"] == str(tmp_path / "base")
    assert read.settings["model"]["template_options"] == {"enable_thinking": False}
    assert read.settings["search"] == {"forgetting_weight": 2.0}
    alone = origin_of(settings, Path("runs"))
    assert (alone.study, alone.evaluate["limit"]) == (None, 7)
    assert alone.train["lr"] == settings.train.lr


def test_a_model_of_another_kind_says_nothing(tmp_path):
    assert read_origin(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 2}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / ORIGIN_FILE).write_text(content)
    with pytest.raises(DataError, match=rf"{ORIGIN_FILE}: .*; remove the file"):
        read_origin(tmp_path)


class FoundError(Exception):
    """Ends a command whose settings are known."""


def asked(argv: list[str], monkeypatch) -> tuple[RunSettings, Path | None]:
    """Settings and output that ``lrmc evaluate`` comes to, before it looks for the models."""
    settings: list[RunSettings] = []
    outputs: list[Path] = []

    def settings_from(arguments, defaults):
        settings.append(original(arguments, defaults))
        return settings[0]

    def output(origin):
        outputs.append(original_output(origin))
        return outputs[0]

    def stop(storage):
        raise FoundError

    original, original_output = command.settings_from, command.scores_directory
    monkeypatch.setattr(command, "settings_from", settings_from)
    monkeypatch.setattr(command, "scores_directory", output)
    monkeypatch.setattr(command, "place_of", stop)
    with pytest.raises(FoundError):
        command.main(argv)
    for name, function in (("settings_from", original), ("scores_directory", original_output)):
        monkeypatch.setattr(command, name, function)
    return settings[0], outputs[0] if outputs else None


def test_evaluate_takes_what_is_not_said_from_the_model(settings, tmp_path, monkeypatch):
    tuned = tmp_path / "elsewhere" / "model"
    tuned.mkdir(parents=True)
    (tuned / "config.json").write_text("{}")
    write_origin(tuned, origin_of(settings, Path("runs")))
    monkeypatch.chdir(tuned)
    taken, output = asked(["--tuned", str(tuned)], monkeypatch)
    assert taken.evaluate.domain_tasks == (str(tmp_path / "my tasks.yaml"), "nl2sql")
    assert (taken.model.name, taken.evaluate.limit) == (str(tmp_path / "base"), 7)
    assert taken.search.forgetting_weight == 2.0
    assert output == Path("runs")  # that of the model is not on this machine
    (tmp_path / "runs" / "scores").mkdir(parents=True)
    argv = ["--tuned", str(tuned), "--domain-tasks", "kinds", "evaluate.limit=3"]
    taken, output = asked(argv, monkeypatch)
    assert (taken.evaluate.domain_tasks, taken.evaluate.limit) == (("kinds",), 3)
    assert taken.model.name == str(tmp_path / "base")
    assert output == tmp_path / "runs"
    taken, output = asked([*argv, "--output", "here"], monkeypatch)
    assert output is None
    # A settings file is a choice of its own.
    taken, _ = asked(["--tuned", str(tuned), "--space", "smoke"], monkeypatch)
    assert taken.model.name != str(tmp_path / "base")
    (tuned / ORIGIN_FILE).unlink()
    taken, output = asked(["--tuned", str(tuned)], monkeypatch)
    assert (taken.evaluate.domain_tasks, output) == (("nl2sql",), Path("runs"))


def test_what_is_kept_is_plain_json(settings, tmp_path):
    write_origin(tmp_path, origin_of(settings, Path("runs")))
    assert json.loads((tmp_path / ORIGIN_FILE).read_text())["schema"] == 1
