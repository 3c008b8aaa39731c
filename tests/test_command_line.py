"""What a command says of arguments that it does not know, and what ``--help`` says of settings."""

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from lrmc_ray import cli
from lrmc_ray.command_line import CommandParser, arguments_for, nearest, parser_of, pasteable
from lrmc_ray.config import TrainSettings, load_settings
from lrmc_ray.config.arguments import add_run_arguments, add_setting_flags, flag_overrides
from lrmc_ray.errors import ConfigError
from lrmc_ray.record import command as record
from lrmc_ray.train import command as train
from lrmc_ray.tune import plan


def train_parser() -> CommandParser:
    parser = CommandParser("train")
    add_run_arguments(parser)
    add_setting_flags(parser)
    return parser


def said_by(parser: CommandParser, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        parser.parse_intermixed_args(argv)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--trian-data", "x"], "knows no --trian-data. Did you mean '--train-data'? See"),
        (["--lora-rnak=8"], "knows no --lora-rnak. Did you mean '--lora-rank'? See"),
        (["--data=x"], "knows no --data. Did you mean '--train-data'? See"),
        (["--zzz"], "knows no --zzz. See"),
        (
            ["--train"],
            "knows no --train. Did you mean '--train-data'? See",
        ),  # no abbreviations: a new flag would change them
        (["--lr"], "argument --lr: expected one argument. See"),
    ],
)
def test_an_unknown_flag_is_one_line_that_names_the_nearest(argv, said, capsys):
    line = said_by(train_parser(), argv, capsys)
    assert line.startswith("error: ")
    assert said in line
    assert line.endswith(" See `lrmc train --help`.")


def test_a_wrong_choice_names_all_and_the_nearest(capsys):
    parser = CommandParser("x")
    parser.add_argument("--split", choices=["dev", "test"])
    said = said_by(parser, ["--split", "tets"], capsys)
    rule = "--split must be one of dev, test, got tets"
    assert said == f"error: {rule}. Did you mean 'test'? See `lrmc x --help`."


def test_nearest_is_empty_where_nothing_is_near():
    assert nearest("tau", ["delta_max"]) == ""
    assert nearest("tua", ["tau"]) == ". Did you mean 'tau'?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trials=3", "unknown setting trials. Did you mean 'search.trials'?"),
        ("tau=0.9", "unknown setting tau. Did you mean 'record.tau' or 'train.tau'?"),
        ("trian.tau=0.9", "unknown setting trian. Did you mean 'train'?"),
        ("nonsense=1", "unknown setting nonsense"),
    ],
)
def test_a_setting_without_its_section_is_told_which(override, said):
    with pytest.raises(ConfigError) as error:
        load_settings(None, [override])
    assert str(error.value).endswith(said)


def test_version_names_what_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lrmc", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert shown["torch"] == importlib.metadata.version("torch")
    assert shown["lrmc-ray"] == importlib.metadata.version("lrmc-ray")


# The flags of settings


def help_of(name: str, shown: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    found = re.search(rf"^  {flag}[ ,\n](.*?)(?=^  --|\Z)", shown, re.M | re.S)
    assert found is not None, name
    return " ".join(found[1].split())


def test_every_flag_says_its_default_and_what_is_allowed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = train_parser().format_help()
    assert max(map(len, shown.splitlines())) <= 80
    for name, field in TrainSettings.model_fields.items():
        text = help_of(name, shown)
        default: Any = field.get_default(call_default_factory=True)
        if isinstance(default, bool):
            assert f"Default: {str(default).lower()}." in text
            continue
        assert "Allowed: " in text, name
        assert "VALUE" not in text, name
        if isinstance(default, (int, float)):
            assert float(re.search(r"Default: (\S+)\.$", text)[1]) == default, name
        elif isinstance(default, str):
            assert text.endswith(f'Default: "{default}".'), name
    assert '"moclip", "adamw", "adam_atan2"' in help_of("optimizer", shown)
    assert "above 0, at most 180" in help_of("delta_max", shown)


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["--no-packing"], ["train.packing=false"]),
        (["--packing"], ["train.packing=true"]),
        (["--lora-rank", "8", "--lr=1e-4"], ["train.lr=1e-4", "train.lora_rank=8"]),
        ([], []),
    ],
)
def test_a_flag_is_the_setting_of_its_name(argv, overrides):
    assert flag_overrides(train_parser().parse_args(argv)) == overrides


def test_the_next_command_takes_what_it_is_given():
    """Of ``plan`` what ``record`` knows, and of ``record`` what ``train`` does."""
    for own, other in ((plan.main, record.main), (record.main, train.main)):
        before, after = parser_of(own), parser_of(other)
        argv, kept = ["train.tau=0.9"], 0
        for action in before._actions:
            if not action.option_strings or action.dest in ("help", "version"):
                continue
            if action.nargs == 0:
                argv.append(action.option_strings[-1])
            else:
                argv += [action.option_strings[-1], "1"]
            kept += action.option_strings[-1] in after._option_string_actions
        left = arguments_for(after, argv, before)
        assert left[0] == "train.tau=0.9"
        assert sum(argument.startswith("-") for argument in left) == kept > 10
        vars(after.parse_intermixed_args(left))
    known = parser_of(record.main)._option_string_actions
    assert plan._record_parser()._option_string_actions.keys() == known.keys()


def test_a_pasted_command_is_this_environments(tmp_path, monkeypatch):
    """Whether it is on the path or not, from any folder, with spaces."""
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    (programs / "lrmc").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert pasteable("lrmc", "a", Path("b c")) == "'my env/bin/lrmc' a 'b c'"
    elsewhere = tmp_path / "else"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert shlex.split(pasteable("lrmc")) == [str(programs / "lrmc")]
    monkeypatch.setenv("PATH", str(programs))
    assert pasteable("lrmc", "a b") == "lrmc 'a b'"
    assert pasteable("no-such-program") == "no-such-program"
