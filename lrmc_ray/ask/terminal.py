"""Answers side by side in a terminal."""

from typing import TYPE_CHECKING

from lrmc_ray.ask.table import Row
from lrmc_ray.console import harmless

if TYPE_CHECKING:
    from rich.console import Console

_NARROWEST = 60
"""Columns of a terminal below which answers stand one above the other."""


def show(console: "Console", row: Row, models: tuple[str, ...], *, is_typed: bool = False) -> None:
    """One question with its answers, a column for each model.

    Args:
        console: of rich; it says how wide the terminal is.
        row: the question and the answers.
        models: headings of the columns.
        is_typed: whether the question stands in the terminal already.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def plain(text: str, style: str = "") -> Text:
        return Text(harmless(text), style=style)

    if not is_typed:
        console.print(plain(f"> {row.question}", "bold"))
    if row.expected is not None:
        console.print(plain(f"expected: {row.expected}", "bright_black"))
    if console.width < _NARROWEST or len(models) == 1:
        for name, answer in zip(models, row.answers, strict=True):
            console.print(plain(name, "bright_black"))
            console.print(plain(answer))
        console.print()
        return
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    for name in models:
        table.add_column(plain(name), ratio=1, overflow="fold", header_style="bright_black")
    table.add_row(*map(plain, row.answers))
    console.print(table)
    console.print()
