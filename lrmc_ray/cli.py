"""The command ``lrmc``: every stage as a subcommand."""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

import shtab

from lrmc_ray.command_line import CommandParser, parser_of
from lrmc_ray.console import run_command

STAGES = {
    "record": "Stage 0: record the candidate tokens of the training data",
    "plan": "what recording, training or a search on a cluster would take",
    "inspect": "look into a record, or verify every file of it",
    "train": "Stage 1: fine-tune on the recorded candidates with MoClip",
    "evaluate": "score a model: domain gain and forgetting against its base",
    "tune": "search tau, delta_max and more; does all of the above",
    "compare": "methods against each other at equal budget, with intervals over seeds",
    "suggest": "ranges of tau and delta_max worth searching",
    "report": "table, figure and report.html of a finished or running search",
    "export": "write the model of any trial, or a blend with its base, to a directory",
    "blend": "score models between the base and a trial, to pick from the trade-off",
    "chat": "ask a tuned model and its base the same questions, side by side",
    "ls": "what lies in an output directory, and how large it is",
    "prune": "remove what no report needs; asks first",
    "doctor": "is everything in place, and what to do where it is not",
    "mlflow-sync": "bring MLflow up to date with the files of a search",
    "completion": "print a script that completes commands and flags in bash, zsh or fish",
}

_MODULES = {
    "plan": "tune.plan",
    "inspect": "record.inspect_command",
    "suggest": "tune.suggest",
    "blend": "export.blend_command",
    "chat": "ask.command",
    "ls": "outputs.ls_command",
    "prune": "outputs.prune_command",
    "doctor": "cluster.doctor",
    "mlflow-sync": "report.mlflow_command",
}
"""Where the commands are whose room does not have their name; the others are in `command`."""


PACKAGES = ("lrmc-ray", "ray", "torch", "transformers", "optuna", "mlflow", "lm-eval")
"""Whose versions matter when something goes wrong."""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name in PACKAGES:
            print(f"{name} {importlib.metadata.version(name)}")
        parser.exit()


def main() -> int:
    """Run ``lrmc STAGE ...``; heavy imports wait until the stage is known."""
    parser = CommandParser(
        "",
        description="Teach a language model a new domain without losing what it knows.",
        epilog="`lrmc STAGE --help` explains a stage; `python -m lrmc_ray.STAGE` is the same.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions that matter")
    stages = parser.add_subparsers(
        dest="stage", metavar="STAGE", required=True, parser_class=argparse.ArgumentParser
    )
    for name, text in STAGES.items():
        stages.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(sys.argv[1:2])
    return run_command(main_of(arguments.stage), sys.argv[2:] + rest)


def main_of(stage: str) -> Callable[[Sequence[str]], int]:
    """What runs a stage."""
    if stage == "completion":
        return _complete
    module = importlib.import_module(f"lrmc_ray.{_MODULES.get(stage, f'{stage}.command')}")
    found: Callable[[Sequence[str]], int] = module.main
    return found


SHELLS = ("bash", "zsh", "fish")
_FILES = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
"""What a flag takes that is completed, by the last word of how its help calls it."""


def _complete(argv: Sequence[str]) -> int:
    """The command ``lrmc completion``."""
    parser = CommandParser(
        "completion",
        description="Print a script that completes commands, flags and files. For bash: "
        'eval "$(lrmc completion bash)", in ~/.bashrc to have it always; for zsh the same in '
        "~/.zshrc behind compinit; for fish: lrmc completion fish | source.",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    shell = parser.parse_args(argv).shell
    print(shtab.complete(_whole_parser(), shell=shell))
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands and their flags."""
    whole = argparse.ArgumentParser(prog="lrmc")
    stages = whole.add_subparsers()
    for name, text in STAGES.items():
        found = parser_of(main_of(name))
        stage = stages.add_parser(name, help=text, parents=[found], add_help=False)
        for action in stage._actions:  # argparse has no other way to them
            kind = str(action.metavar).split(" ")[-1].rpartition("]")[2].split("_")[-1]
            if kind in _FILES:
                action.complete = _FILES[kind]  # type: ignore[attr-defined]
    return whole
