"""The command ``lrmc chat``."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from lrmc_ray.ask.questions import Question, question_of, read_questions, with_system
from lrmc_ray.ask.table import Row, Table, check_suffix, table_text
from lrmc_ray.command_line import CommandParser
from lrmc_ray.config import ModelSettings
from lrmc_ray.console import plain_console, progress, setup_logging
from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.origin import Origin, check_tuned, read_origin
from lrmc_ray.record.taught_system import taught_system

if TYPE_CHECKING:
    from lrmc_ray.ask.answering import Answerer, Generation


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc chat``."""
    arguments = _parser().parse_args(argv)
    setup_logging()
    directory: Path = arguments.model
    check_tuned(directory)
    _check_ranges(arguments)
    questions = read_questions(arguments.questions) if arguments.questions else None
    if arguments.to is not None:
        if questions is None:
            raise ConfigError(f"--to {arguments.to} needs --questions FILE; name the file")
        check_suffix(arguments.to)
    origin = read_origin(directory)
    compared = _base(arguments.compare, origin)
    if compared is None:
        print(f"{directory} names no base; --compare BASE asks one beside it.", file=sys.stderr)

    system = _system(arguments, origin)

    from lrmc_ray.ask.answering import Answerer, Generation
    from lrmc_ray.models.directory import local_directory

    generation = Generation(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    places = [local_directory(model) for model in (compared, ModelSettings(name=str(directory)))
              if model is not None]  # fmt: skip
    with progress("Loading", total=len(places), unit="models") as bar:
        answerers = []
        for place in places:
            answerers.append(
                Answerer(
                    place,
                    template_options=None if origin is None else origin.template_options,
                    dtype=arguments.dtype,
                    as_text=arguments.as_text,
                )
            )
            bar.advance(1)
    names: tuple[str, ...] = (f"tuned: {directory}",)
    if compared is not None:
        names = (f"base: {compared.name}", *names)
    return _run(arguments, answerers, names, generation, questions, system)


def _run(
    arguments: argparse.Namespace,
    answerers: "Sequence[Answerer]",
    names: tuple[str, ...],
    generation: "Generation",
    questions: Sequence[Question] | None,
    system: str | None,
) -> int:
    """Ask and show, or write."""

    def ask(question: Question, watches: Sequence[Callable[[str], None] | None] = ()) -> Row:
        messages = with_system(question, system).messages
        answers = [
            one.answer(messages, generation, watch).shown()
            for one, watch in zip_longest(answerers, watches)
        ]
        return Row(question.text, question.expected, tuple(answers))

    if questions is not None and (arguments.to or arguments.json):
        rows = []
        with progress("Answering", total=len(questions), unit="questions") as bar:
            for question in questions:
                rows.append(ask(question))
                bar.advance(1)
        table = Table(names, _in_words(generation, system), rows)
        passed("chat.answered")
        if arguments.to:
            write_atomically(arguments.to, table_text(table, arguments.to).encode())
        if arguments.json:
            _print_json(table)
        else:
            print(f"{len(rows)} questions and their answers are in {arguments.to}")
        return 0
    if arguments.json:
        _print_json(Table(names, _in_words(generation, system), [ask(q) for q in _typed()]))
        return 0
    from lrmc_ray.ask.terminal import growing, show, show_question

    console = plain_console()
    is_typed = questions is None and sys.stdin.isatty()
    if is_typed:
        print("Every question is asked by itself. Ctrl-D ends.", file=sys.stderr)
    short = tuple(_short(name) for name in names)
    for question in questions if questions is not None else _typed():
        if not is_typed:
            show_question(console, question.text)
        with growing(console, short) as watches:
            row = ask(question, watches)
        show(console, row, short)
    return 0


def _short(name: str) -> str:
    """A column's heading that stays on one line: of a path its last part."""
    role, _, path = name.partition(": ")
    return f"{role}: {Path(path).name}"


def _typed() -> Iterator[Question]:
    """The lines of stdin, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            try:
                line = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        if line.strip():
            yield question_of(line.strip())


def _print_json(table: Table) -> None:
    rows = [
        {"question": row.question, "expected": row.expected, "answers": list(row.answers)}
        for row in table.rows
    ]
    print(json.dumps({"models": list(table.models), "settings": table.settings, "rows": rows}))


def _in_words(generation: "Generation", system: str | None) -> str:
    asked = f" System message: {' '.join(system.split())}" if system else ""
    if generation.temperature == 0.0:
        return f"Greedy answers of at most {generation.max_new_tokens} tokens.{asked}"
    return (
        f"Answers of at most {generation.max_new_tokens} tokens, drawn at temperature "
        f"{generation.temperature:g}, top-p {generation.top_p:g}, seed {generation.seed}.{asked}"
    )


def _system(arguments: argparse.Namespace, origin: Origin | None) -> str | None:
    """The message before every question: what was asked for, or what the model was taught with."""
    if arguments.as_text:
        return None
    if arguments.system is not None or origin is None:
        return str(arguments.system or "") or None
    system = taught_system(origin.data)
    if system:
        shown = textwrap.shorten(system, 40, placeholder=" ...")
        print(
            f"Asked as it was taught, with the system message of all its data: {shown!r}. "
            "--system '' leaves it out.",
            file=sys.stderr,
        )
    return system


def _base(named: str | None, origin: Origin | None) -> ModelSettings | None:
    """The model that is asked beside the tuned one."""
    if named is not None:
        return ModelSettings(name=named)
    return None if origin is None else ModelSettings.model_validate(origin.model)


def _check_ranges(arguments: argparse.Namespace) -> None:
    for name, value, rule, is_right in (
        ("--max-new-tokens", arguments.max_new_tokens, "at least 1", arguments.max_new_tokens >= 1),
        ("--temperature", arguments.temperature, "from 0 to 5", 0 <= arguments.temperature <= 5),
        ("--top-p", arguments.top_p, "above 0 and at most 1", 0 < arguments.top_p <= 1),
        ("--seed", arguments.seed, "from 0 to 2^32 - 1", 0 <= arguments.seed < 2**32),
    ):
        if not is_right:
            raise ConfigError(f"{name} must be {rule}, got {value}; give such a number")


def _parser() -> CommandParser:
    parser = CommandParser(
        "chat",
        description="Ask a tuned model and its base the same questions, side by side: typed, from "
        "stdin, or from a file.",
        epilog="Every question is asked by itself, in the form of the model's chat template.",
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="the tuned model's directory")
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="directory or Hugging Face id of the model beside it (default: the base that the "
        "model's lrmc.json names)",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="plain text with one question a line, or .jsonl with messages, prompt and completion, "
        "or question and answer",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message before every question that has no conversation before it; '' for "
        "none (default: that of the training data, if all rows have the same)",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="write a table there: FILE.md or FILE.html"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="most tokens of an answer (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the most probable token, above 0 it is drawn (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="probability of the tokens that are drawn from (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16"),
        default="float32",
        help="in which the models compute (default: float32)",
    )
    parser.add_argument(
        "--as-text",
        action="store_true",
        help="give the question as it is, without chat template: for models taught on plain text",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser
