import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from lrmc_ray import cli as cli_module
from lrmc_ray.command_line import CommandParser, parser_of
from lrmc_ray.config.arguments import add_run_arguments, settings_from
from lrmc_ray.errors import ConfigError, DirectoryInUseError, IncompleteArtifactError
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.report import mlflow_command as mlflow_command_module
from lrmc_ray.report import mlflow_sync as tracking
from tests.support.tiny import make_data


def parse(*argv: str, default_space: str | None = None):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, default_space=default_space)
    return settings_from(parser.parse_args(argv))


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(
        '[model]\nname = "file-model"\nrevision = "v1"\n'
        '[data]\ntrain = ["file.jsonl"]\n'
        "[train]\nlr = 1e-3\nsteps = 7\n"
        '[evaluate]\ndomain_tasks = ["file-task"]\nlimit = 5\n'
    )
    return str(path)


# Which of file, override and named argument wins


def test_without_arguments_it_is_the_embedded_demo():
    made = parse()
    assert (made.model.name, made.data.train) == ("demo", ("demo",))
    assert (made.train.tau, made.train.delta_max, made.train.tail_samples) == (0.99, 90.0, 1024)
    assert made.parameters == {}


def test_the_file_wins_over_the_defaults(space):
    made = parse("--space", space)
    assert (made.model.name, made.model.revision) == ("file-model", "v1")
    assert (made.train.lr, made.train.steps, made.train.tau) == (1e-3, 7, 0.99)


def test_overrides_win_over_the_file(space):
    made = parse("--space", space, "train.lr=1e-5", "model.name=other", "evaluate.limit=9")
    assert (made.train.lr, made.train.steps) == (1e-5, 7)
    assert (made.model.name, made.model.revision) == ("other", "v1")
    assert made.evaluate.limit == 9


def test_named_arguments_win_over_file_and_overrides(space):
    made = parse(
        *("--space", space, "--model", "named", "--train-data", "a.jsonl", "--train-data", "b"),
        *("--domain-tasks", "mmlu", "--general-tasks", "bbh, gpqa ,", "model.name=overridden"),
    )
    assert made.model.name == "named"
    assert made.model.revision == "v1"
    assert made.data.train == ("a.jsonl", "b")
    assert made.evaluate.domain_tasks == ("mmlu",)
    assert made.evaluate.general_tasks == ("bbh", "gpqa")
    assert (made.evaluate.limit, made.train.steps) == (5, 7)


def test_a_default_space_is_used_unless_another_is_named(space):
    assert parse(default_space="demo").study_name() == "demo"
    assert parse(default_space="demo").search.final_limit == 60
    assert parse("--space", space, default_space="demo").search.final_limit is None


@pytest.mark.parametrize(
    ("data", "name", "called"),
    [
        (["demo"], None, "demo"),
        (["demo"], "smoke", "smoke"),
        (["my.jsonl"], None, "my"),
        (["sql=data/my files.v2.jsonl.gz"], None, "my-files"),
        (["data/cooking/**/*.parquet"], None, "cooking"),
        (["org/name@main:train"], "budget", "name-budget"),
        (["hf://org/Name"], None, "Name"),
        (["a.jsonl", "b.jsonl", "replay=english"], None, "a-and-2-more"),
        (["a.jsonl", "english"], None, "a"),
        (["../.."], None, "data"),
    ],
)
def test_a_study_is_called_by_its_data(data, name, called):
    arguments = [part for source in data for part in ("--train-data", source)]
    assert parse(*arguments, *([f"search.name={name}"] if name else [])).study_name() == called


def test_arguments_of_the_run_have_their_defaults():
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    arguments = parser.parse_args([])
    assert (str(arguments.output), arguments.address) == ("runs", "local")
    assert (arguments.json, arguments.verbose, arguments.overrides) == (False, False, [])


def test_overrides_may_follow_the_named_arguments(space):
    assert parse("--space", space, "--json", "train.steps=3", "train.lr=0.5").train.lr == 0.5


# Errors


def test_an_unknown_space_names_those_that_are_shipped():
    with pytest.raises(IncompleteArtifactError, match=r"space file smoek .*smoke\.toml"):
        parse("--space", "smoek")


def test_errors_name_what_is_to_blame(tmp_path):
    """The file, the command line, or each for its own."""
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[train]\nwarmup_steps = 5\nsteps = 30\n")
    bad.write_text("[train]\ntau = 3\nlr = 1e-5\n")
    for argv, said in (
        (["--space", good, "train.tua=1"], "command line: unknown setting train.tua. Did you"),
        (["train.tua=1"], "command line: unknown setting train.tua"),
        (["--space", good, "train.steps=x"], "command line: train.steps must"),
        # A rule about two settings, of which one is in the file.
        (["--space", good, "train.steps=3"], "command line: train: warmup_steps must not exceed"),
        (["--space", bad], f"{bad}: train.tau must be less than or equal to 1, got 3"),
        (["--space", bad, "train.tau=2"], "command line: train.tau must be less than or equal to"),
        (["--space", bad, "--model", "x"], f"{bad}: train.tau must be less"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}") as caught:
            parse(*map(str, argv))
        assert str(caught.value).count("command line") == said.startswith("command line")
    with pytest.raises(ConfigError) as caught:
        parse("--space", str(bad), "train.lr=7")
    file, _, line = str(caught.value).partition("; command line: ")
    assert file.startswith(f"{bad}: train.tau must be less than or equal to 1, got 3")
    assert line.startswith("train.lr must be less than 1, got 7")


@pytest.mark.parametrize(
    ("option", "section"),
    [("--model", "model"), ("--train-data", "data"), ("--domain-tasks", "evaluate")],
)
def test_a_value_in_place_of_a_section_is_a_config_error(tmp_path, option, section):
    path = tmp_path / "space.toml"
    path.write_text(f'{section} = "demo"\n')
    with pytest.raises(ConfigError, match=f"{section} must be a section of settings, got 'demo'"):
        parse("--space", str(path), option, "x")


@pytest.mark.parametrize("option", ["--domain-tasks", "--general-tasks"])
def test_an_empty_list_of_tasks_is_a_config_error(option):
    with pytest.raises(ConfigError, match=f"{option[2:].replace('-', '_')} must not be empty"):
        parse(option, " , ")


# Commands: exit codes, and what stands on stderr


def command(*argv: object, directory, env=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=directory,
        env=env,
        timeout=120,
    )


@pytest.mark.parametrize("stage", ["record", "train", "tune"])
@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--train-data", "missing.jsonl"], 3, "error: training data missing.jsonl does not exist"),
        (["train.tua=0.9"], 2, "unknown setting train.tua. Did you mean 'train.tau'?"),
        (["train.tau=2"], 2, "train.tau must be less than or equal to 1, got 2"),
        (["--space", "smoek"], 3, "error: space file smoek does not exist"),
    ],
)
def test_bad_settings_end_a_command_with_their_code_and_one_line(tmp_path, stage, argv, code, said):
    result = command(f"lrmc_ray.{stage}", *argv, directory=tmp_path)
    assert result.returncode == code
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not any(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("stage", ["train", "tune"])
def test_bad_data_are_found_before_ray_starts_and_a_study_is_begun(tmp_path, tiny_model, stage):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "2?", "completion": "two"}\n{"prompt": "3?"}\n')
    argv = [f"lrmc_ray.{stage}", "--model", tiny_model, "--train-data", data]
    result = command(*argv, directory=tmp_path)
    assert result.returncode == 4, result.stderr
    assert f"{data}:2" in result.stderr
    assert "Traceback" not in result.stderr
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    # What could be tokenized; no study, no database of MLflow, no log of Ray.
    assert {path.parent.parent.name for path in left} <= {"records"}


@pytest.mark.parametrize(
    ("task", "code", "said"),
    [
        ("ct_radio", 3, "python scripts/build_ct_radio.py"),
        ("nl2sql_spider", 3, "scripts/build_spider.py"),
    ],
)
def test_tasks_that_have_to_be_built_are_named_before_anything_starts(
    tmp_path, tiny_model, task, code, said
):
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "2?", "completion": "two"}\n')
    argv = ["lrmc_ray.tune", "--model", tiny_model, "--train-data", data, "--domain-tasks", task]
    environment = {**os.environ, "LRMC_CACHE": str(tmp_path / "cache")}
    result = command(*argv, directory=tmp_path, env=environment)
    assert result.returncode == code
    assert said in result.stderr
    assert not (tmp_path / "runs").exists()


def test_lrmc_gives_its_arguments_to_the_stage(tmp_path):
    result = command("lrmc_ray", "record", "train.tua=0.9", directory=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'train.tau'?" in result.stderr
    result = command("lrmc_ray", "recrod", directory=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: STAGE must be one of record, plan, ")
    assert result.stderr.endswith(", got recrod. Did you mean 'record'? See `lrmc --help`.\n")
    result = command("lrmc_ray", directory=tmp_path)
    assert result.returncode == 2
    assert "STAGE" in result.stderr


@pytest.mark.parametrize("stage", cli_module.STAGES)
def test_every_stage_of_lrmc_has_a_command(stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lrmc", stage, "--help"])
    assert cli_module.main() == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert shown.split()[1:3] == ["lrmc", stage]


def test_mlflow_sync_forwards_the_search_while_no_other_command_works_there(
    tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "runs" / "study-1"
    directory.mkdir(parents=True)
    asked = []

    def sync(study_dir, tracking_uri):
        with pytest.raises(DirectoryInUseError), lock_directory(study_dir):
            pytest.fail("the search was not held")
        asked.append((study_dir, tracking_uri))
        return tracking.Forwarded(runs=3, points=70, trade_off_path="/#/experiments/1")

    monkeypatch.setattr(mlflow_command_module, "sync", sync)
    with pytest.raises(IncompleteArtifactError, match=r"has no study\.json"):
        mlflow_command_module.main([str(directory)])
    assert not any(directory.iterdir())
    study = {"schema": 1, "id": "1", "name": "study", "created": "now", "state": "RUNNING"}
    (directory / "study.json").write_text(json.dumps({**study, "forgetting_weight": 1.0}))
    assert mlflow_command_module.main([str(directory)]) == 0
    database = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert f"3 runs and 70 metric values were added to {database}" in capsys.readouterr().out
    assert mlflow_command_module.main([str(directory), "--tracking-uri", "http://there:5000"]) == 0
    assert asked == [(directory, database), (directory, "http://there:5000")]


WITHOUT_RAY = """
import contextlib, sys
from lrmc_ray.console import run_command
from lrmc_ray.record import command

# Rows are read before an actor starts.
command.ray_session = lambda *arguments, **options: contextlib.nullcontext()
sys.exit(run_command(command.main))
"""


def test_a_broken_row_ends_record_with_code_4_and_its_place(tmp_path, tiny_model):
    data = make_data(tmp_path / "train.jsonl", num_rows=5)
    lines = data.read_text().splitlines()
    lines[2] = lines[2][:-5]
    data.write_text("\n".join(lines) + "\n")
    result = subprocess.run(
        [
            *(sys.executable, "-c", WITHOUT_RAY, "--model", tiny_model, "--train-data", data),
            *("--output", tmp_path / "runs"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 4
    assert "Traceback" not in result.stderr
    said = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert said[0] == "error: 1 unusable row(s); mend or remove them:"
    assert said[1].startswith(f"  {data}:3: not valid JSON")
    assert len(said) == 2
    assert result.stdout == ""
    assert not list((tmp_path / "runs").rglob("manifest.json"))


# Completion


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lrmc_ray", "completion", "bash"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("completion") / "lrmc.bash"
    path.write_text(done.stdout)
    return str(path)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lrmc", "tu"], {"tune"}),
        (["lrmc", "e"], {"evaluate", "export"}),
        (["lrmc", "tune", "--domain"], {"--domain-tasks"}),
        (["lrmc", "record", "--k"], {"--k-max"}),
        (["lrmc", "train", "--lora-r"], {"--lora-rank"}),
        (["lrmc", "completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes_commands_flags_and_choices(completion, words, expected):
    quoted = " ".join(words)
    asked = (
        f"source {completion}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        '_shtab_lrmc lrmc "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
    assert {word.strip() for word in done.stdout.split()} == expected


@pytest.mark.parametrize("name", cli_module.STAGES)
def test_a_command_is_looked_at_without_being_run(name):
    parser = parser_of(cli_module.main_of(name))
    assert parser.prog == f"lrmc {name}"
    assert CommandParser.only_looked_at is False
    with pytest.raises(SystemExit):  # it parses again
        parser.parse_args(["--no-such-flag"])
