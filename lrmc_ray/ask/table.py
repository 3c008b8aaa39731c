"""Questions and both answers as a table, in Markdown or HTML. Everything is escaped."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.errors import ConfigError

SUFFIXES = (".md", ".html")

_NOTE = "[...] marks an answer that was cut at --max-new-tokens."

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
  color: #1e293b; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border-bottom: 1px solid #cbd5e1; padding: .5rem; text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere; }
th { white-space: normal; }
.note { color: #64748b; }
@media (max-width: 640px) {
  thead { display: none; }
  tr { display: block; border-bottom: 2px solid #94a3b8; }
  td { display: block; border: 0; }
  td::before { content: attr(data-label); display: block; color: #64748b; font-size: 12px; }
}
"""


@dataclass(frozen=True)
class Row:
    """One question with its answers."""

    question: str
    expected: str | None
    answers: tuple[str, ...]
    """One of each model, as ``Table.models`` names them."""


@dataclass(frozen=True)
class Table:
    """All of them."""

    models: tuple[str, ...]
    """Headings of the columns of answers."""
    settings: str
    """How the answers were written, in words."""
    rows: Sequence[Row]

    @property
    def columns(self) -> list[str]:
        """All headings; that of expected answers only where there is one."""
        expected = ["expected"] if self._has_expected else []
        return ["question", *expected, *self.models]

    @property
    def cells(self) -> list[list[str]]:
        """All rows, in the order of ``columns``."""
        return [
            [row.question, *([row.expected or ""] if self._has_expected else []), *row.answers]
            for row in self.rows
        ]

    @property
    def _has_expected(self) -> bool:
        return any(row.expected is not None for row in self.rows)


def check_suffix(path: Path) -> None:
    """Refuse a file of another kind, before anything is asked.

    Raises:
        ConfigError: names the kinds.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--to must end in {' or '.join(SUFFIXES)}, got {path}; rename it")


def table_text(table: Table, path: Path) -> str:
    """The table in the form that the suffix of ``path`` says."""
    return as_markdown(table) if path.suffix == ".md" else as_html(table)


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, one question a row."""
    lines = [f"{_markdown(table.settings)} {_markdown(_NOTE)}", ""]
    lines.append(f"| {' | '.join(map(_markdown, table.columns))} |")
    lines.append("|---" * len(table.columns) + "|")
    lines += [f"| {' | '.join(map(_markdown, cells))} |" for cells in table.cells]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """``text`` as it is: neither Markdown nor HTML in it acts."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(escaped.splitlines())


def as_html(table: Table) -> str:
    """A page by itself, without scripts."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{html.escape(name)}">{html.escape(cell)}</td>'
            for name, cell in zip(table.columns, cells, strict=True)
        )
        + "</tr>"
        for cells in table.cells
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>Before and after</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Before and after</h1>
<p class="note">{html.escape(table.settings)} {html.escape(_NOTE)}</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</body>
</html>
"""
