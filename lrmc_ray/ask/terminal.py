"""Answers side by side in a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lrmc_ray.ask.table import Row
from lrmc_ray.console import harmless

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_NARROWEST = 60
"""Columns of a terminal below which answers stand one above the other."""


def show_question(console: "Console", text: str) -> None:
    """A question as if it had been typed."""
    console.print(_plain(f"> {text}", "bold"))


def show(console: "Console", row: Row, models: Sequence[str]) -> None:
    """The expected answer, and a column for each model's.

    Args:
        console: of rich; it says how wide the terminal is.
        row: the question and the answers.
        models: headings of the columns.
    """
    if row.expected is not None:
        console.print(_plain(f"expected: {row.expected}", "bright_black"))
    console.print(_side_by_side(console, models, row.answers))
    console.print()


@contextmanager
def growing(
    console: "Console", models: Sequence[str]
) -> Iterator[Sequence[Callable[[str], None] | None]]:
    """Show answers while they are written, and take them away at the end.

    Args:
        console: of rich; where it is no terminal, nothing is shown.
        models: headings of the columns.

    Yields:
        For each model what takes its answer so far; None where nothing is shown.
    """
    from rich.live import Live

    answers = [""] * len(models)

    def take(place: int, text: str) -> None:
        answers[place] = text
        live.update(_side_by_side(console, models, answers))

    if not console.is_terminal:
        yield [None] * len(models)
        return
    shown = _side_by_side(console, models, answers)
    with Live(shown, console=console, transient=True, refresh_per_second=8) as live:
        yield [partial(take, place) for place in range(len(models))]


def _side_by_side(
    console: "Console", models: Sequence[str], answers: Sequence[str]
) -> "RenderableType":
    from rich import box
    from rich.console import Group
    from rich.table import Table

    if console.width < _NARROWEST or len(models) == 1:
        pairs = zip(models, answers, strict=True)
        return Group(
            *(part for name, text in pairs for part in (_plain(name, "bright_black"), _plain(text)))
        )
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    for name in models:
        table.add_column(_plain(name), ratio=1, overflow="fold", header_style="bright_black")
    table.add_row(*map(_plain, answers))
    return table


def _plain(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(harmless(text), style=style)
