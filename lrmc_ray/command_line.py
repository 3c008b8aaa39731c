"""The command line: a parser whose errors are one line, and commands that a person may paste."""

import argparse
import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

_UNRECOGNIZED = "unrecognized arguments: "
_INVALID_CHOICE = re.compile(r"(?s)argument (?P<argument>.*?): invalid choice: '(?P<value>.*?)'")


class ParserFound(Exception):  # noqa: N818  # no error: it ends a command that is only looked at
    """Carries the parser of a command out of it, see :func:`parser_of`."""

    def __init__(self, parser: "CommandParser") -> None:
        self.parser = parser


class CommandParser(argparse.ArgumentParser):
    """Of ``lrmc NAME``."""

    only_looked_at: ClassVar[bool] = False
    """Whether commands are run for their parsers alone."""

    settings: Sequence[str] = ()
    """Settings that the command takes as ``section.key=value``, for hints."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """As of argparse; where the parser alone is wanted, it is carried out of the command."""
        if CommandParser.only_looked_at:
            raise ParserFound(self)
        return super().parse_known_args(*arguments, **named)

    def __init__(self, name: str, **options: Any) -> None:
        """As of argparse, but for the program's name.

        Args:
            name: of the command; empty for ``lrmc`` itself.
            **options: of ``argparse.ArgumentParser``.
        """
        super().__init__(prog=f"lrmc {name}".strip(), allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line: the rule, the value, and what to do."""
        text = self._in_words(message)
        stop = "" if text.endswith("?") else "."
        self.exit(2, f"error: {text}{stop} See `{self.prog} --help`.\n")

    def _in_words(self, message: str) -> str:
        if message.startswith(_UNRECOGNIZED):
            unknown = message.removeprefix(_UNRECOGNIZED).split()
            name = unknown[0].partition("=")[0]
            flags = list(self._option_string_actions)
            longer = [flag for flag in flags if flag.startswith(name)]
            parts = [flag for flag in flags if name.lstrip("-") in flag.split("-")]
            hint = nearest(name, longer) or self._setting_like(name)
            hint = hint or nearest(name, parts) or nearest(name, flags)
            return f"{self.prog} knows no {name}{hint}"
        if found := _INVALID_CHOICE.match(message):
            for action in self._actions:
                if action.choices and found["argument"] in (action.metavar, *action.option_strings):
                    known = ", ".join(map(str, action.choices))
                    hint = nearest(found["value"], map(str, action.choices))
                    return f"{found['argument']} must be one of {known}, got {found['value']}{hint}"
        return message

    def _setting_like(self, flag: str) -> str:
        """A question after the setting that a flag that is none may stand for; else empty."""
        key = flag.lstrip("-").replace("-", "_")
        found = [f"'{name}=VALUE'" for name in self.settings if key in (name, name.split(".")[-1])]
        return f". Did you mean {' or '.join(found)}?" if found else ""


def parser_of(main: Callable[[Sequence[str]], int]) -> CommandParser:
    """The parser of a command, which is not run.

    Raises:
        ValueError: the command has none.
    """
    CommandParser.only_looked_at = True
    try:
        main([])
    except ParserFound as found:
        return found.parser
    finally:
        CommandParser.only_looked_at = False
    raise ValueError(f"{main.__module__} parses no arguments")


def arguments_for(parser: CommandParser, argv: Sequence[str], own: CommandParser) -> list[str]:
    """``argv`` of another command without the flags that ``parser`` does not know.

    Args:
        parser: of the command that is to come next.
        argv: of the command that runs.
        own: its parser.
    """
    known = set(parser._option_string_actions)
    foreign = CommandParser("", add_help=False)
    for action in own._actions:
        if action.option_strings and not known.issuperset(action.option_strings):
            foreign._add_action(action)
    return list(foreign.parse_known_args(argv)[1])


def nearest(name: str, known: Iterable[str], *, above: str = "") -> str:
    """``. Did you mean 'NAME'?`` for the nearest of ``known``; empty where none is near.

    Args:
        name: what was typed.
        known: what there is.
        above: stands before the name in the question, as ``train.`` before a setting.
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean '{above}{found[0]}'?" if found else ""


def pasteable(program: str, *arguments: object) -> str:
    """A command that works when it is pasted into the terminal where this one was typed.

    Args:
        program: of this environment, ``lrmc`` or ``mlflow``.
        *arguments: Its arguments, as they are.
    """
    own = Path(sys.executable).parent / program
    if own.exists() and os.path.realpath(shutil.which(program) or "") != os.path.realpath(own):
        relative = os.path.relpath(own)
        program = str(own) if relative.startswith("..") else relative
    return shlex.join([program, *map(str, arguments)])
