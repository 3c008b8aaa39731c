"""What a comparison says: one table, one figure, and both for people and for programs."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.compare.curves import CurveRow
from lrmc_ray.compare.figure import draw_effects, draw_methods, draw_scatter
from lrmc_ray.compare.measure import SPIKE_DEVIATIONS, SPIKE_WINDOW, Cost, Estimate
from lrmc_ray.compare.table import ComparisonTable, Effect, MethodRow, SearchPoint, load_table
from lrmc_ray.compare.words import sentences, with_intervals
from lrmc_ray.evaluate.numbers import number, percent, points, points_range
from lrmc_ray.files.artifacts import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table as ConsoleTable

TABLE_FILES = {"html": "compare.html", "markdown": "compare.md", "csv": "compare.csv"}
RESULTS_FILE = "compare_results.json"
FIGURE_FILES = {
    "figure": "compare.png",
    "methods": "compare_methods.png",
    "effects": "compare_effects.png",
}


# As tables

_MISSING = "-"
_COLUMNS = (
    "method", "lr", "seeds", "domain gain", "forgetting", "combined", "combined - reference",
    "accuracy", "KL domain", "KL general", "spikes", "wall s", "CPU s", "peak GB", "tokens",
)  # fmt: skip


def _cells(row: MethodRow) -> list[str]:
    """One row of the table, as text."""
    trade, cost = row.trade, row.cost
    return [
        row.title,
        _MISSING if row.lr is None else f"{row.lr:g}",
        str(len(row.seeds)),
        *(
            [with_intervals(e) for e in (trade.domain_gain, trade.forgetting, trade.combined)]
            if trade
            else [_MISSING] * 3
        ),
        with_intervals(row.versus.combined) if row.versus else _MISSING,
        _MISSING if row.accuracy is None else with_intervals(row.accuracy, percent),
        *(
            _MISSING if kl is None else with_intervals(kl, lambda value: number(value, 3))
            for kl in (row.kl_domain, row.kl_general)
        ),
        *(_cost_cells(cost) if cost else [_MISSING] * 5),
    ]


def _cost_cells(cost: Cost) -> list[str]:
    return [
        number(cost.spikes, 1),
        f"{cost.train_seconds:.0f} + {cost.record_seconds:.0f}",
        f"{cost.cpu_seconds:.0f} + {cost.record_core_seconds:.0f}",
        f"{cost.peak_memory_bytes / 1e9:.2f}",
        f"{cost.processed_tokens:.0f} / {cost.original_tokens:.0f}",
    ]


_COST_NOTE = (
    "wall s and CPU s: training + Stage 0's share (its seconds times the part of the recorded "
    "samples that the run uses, none for methods that need no record; CPU s of Stage 0 is cores "
    "held times seconds). Spikes: steps per run whose loss is more than "
    f"{SPIKE_DEVIATIONS:g} standard deviations above the {SPIKE_WINDOW} before. Tokens: processed "
    "/ original. KL: KL(base || tuned), nats per token."
)
_POINT_COLUMNS = (
    "method", "lr", "chosen", "domain gain", "forgetting", "combined",
    "forgetting - reference's at equal gain", "KL domain", "KL general",
)  # fmt: skip


def _point_cells(table: ComparisonTable, point: SearchPoint) -> list[str]:
    excess = point.excess_forgetting
    return [
        table.title_of(point.method),
        f"{point.lr:g}",
        "yes" if point.is_chosen else "",
        *(
            f"{points(interval.value)} [{points_range(interval)}]"
            for interval in (point.domain_gain, point.forgetting, point.combined)
        ),
        _MISSING if excess is None else points(excess),
        *(_MISSING if kl is None else number(kl, 3) for kl in (point.kl_domain, point.kl_general)),
    ]


def _points_title(table: ComparisonTable) -> str:
    return f"Learning rates: development items, seed {table.seeds[0]} alone"


_EFFECT_COLUMNS = (
    "part", "pairs", "seeds", "domain gain", "forgetting", "combined", "KL general, ratio",
)  # fmt: skip


def _effects_title(table: ComparisonTable) -> str:
    return f"Which part does it: with it less without it, {table.items}"


def _effect_cells(table: ComparisonTable, effect: Effect) -> list[str]:
    ratio = effect.kl_general_ratio
    return [
        effect.title,
        "; ".join(f"{table.title_of(a)} - {table.title_of(b)}" for a, b in effect.pairs),
        str(len(effect.seeds)),
        *(
            with_intervals(part)
            for part in (effect.trade.domain_gain, effect.trade.forgetting, effect.trade.combined)
        ),
        _MISSING if ratio is None else number(ratio, 2),
    ]


_CURVE_COLUMNS = (
    "method", "weight", "seeds", "domain gain", "forgetting", "combined",
    "gain - that of the reference's curve at no more forgetting",
)  # fmt: skip


def _curves_title(table: ComparisonTable) -> str:
    return f"From the base, 0, to the tuned model, 1, {table.items}"


def _curve_cells(table: ComparisonTable, row: CurveRow) -> list[str]:
    trade = row.trade
    return [
        table.title_of(row.method),
        row.place.name,
        str(len(row.seeds)),
        *(with_intervals(part) for part in (trade.domain_gain, trade.forgetting, trade.combined)),
        _MISSING if row.beyond is None else with_intervals(row.beyond),
    ]


def as_markdown(table: ComparisonTable) -> str:
    """The comparison as Markdown."""
    lines = [f"# {table.name}", "", *(f"{sentence}  " for sentence in sentences(table)), ""]
    lines += _markdown_table(_COLUMNS, [_cells(row) for row in table.rows])
    lines += ["", _COST_NOTE, ""]
    problems = [(row.title, problem) for row in table.rows for problem in row.problems]
    lines += [f"- {title}: {problem}" for title, problem in problems]
    if table.effects:
        lines += ["", f"## {_effects_title(table)}", ""]
        lines += _markdown_table(
            _EFFECT_COLUMNS, [_effect_cells(table, effect) for effect in table.effects]
        )
    if table.curves:
        lines += ["", f"## {_curves_title(table)}", ""]
        lines += _markdown_table(_CURVE_COLUMNS, [_curve_cells(table, row) for row in table.curves])
    lines += ["", f"## {_points_title(table)}", ""]
    lines += _markdown_table(_POINT_COLUMNS, [_point_cells(table, p) for p in table.points])
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in escaped),
    ]


def flat_row(row: MethodRow) -> dict[str, Any]:
    """One row as numbers under plain names, for CSV."""
    flat: dict[str, Any] = {
        "method": row.name,
        "title": row.title,
        "lr": row.lr,
        "seeds": len(row.seeds),
    }
    for prefix, trade in (("", row.trade), ("minus_reference_", row.versus)):
        for name in ("domain_gain", "forgetting", "combined"):
            flat |= _flat_estimate(f"{prefix}{name}", getattr(trade, name) if trade else None)
    flat |= _flat_estimate("accuracy", row.accuracy)
    flat |= _flat_estimate("kl_domain", row.kl_domain)
    flat |= _flat_estimate("kl_general", row.kl_general)
    costs = asdict(row.cost) if row.cost else dict.fromkeys(Cost.__dataclass_fields__)
    return {**flat, **costs, "problems": "; ".join(row.problems)}


def _flat_estimate(name: str, value: Estimate | None) -> dict[str, float | None]:
    seeds = value.over_seeds if value else None
    items = value.over_items if value else None
    return {
        name: value.value if value else None,
        f"{name}_seeds_low": seeds.low if seeds else None,
        f"{name}_seeds_high": seeds.high if seeds else None,
        f"{name}_items_low": items.low if items else None,
        f"{name}_items_high": items.high if items else None,
    }


def as_csv(table: ComparisonTable) -> str:
    """The rows as CSV; an empty cell is what there is not."""
    text = io.StringIO()
    rows = [flat_row(row) for row in table.rows]
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def as_json_object(table: ComparisonTable) -> dict[str, Any]:
    """The comparison for other programs; fractions, with the ends of their 95 % intervals."""
    return {
        "name": table.name,
        "reference": table.reference,
        "seeds": list(table.seeds),
        "sentences": sentences(table),
        "methods": [asdict(row) for row in table.rows],
        "learning_rates": [asdict(point) for point in table.points],
        "forgetting_predictors": [asdict(predictor) for predictor in table.predictors],
        "effects": [asdict(effect) for effect in table.effects],
        "curves": [asdict(row) for row in table.curves],
        "stage_seconds": table.description["stage_seconds"],
        "versions": table.description["versions"],
        "settings": table.description["settings"],
    }


def console_table(table: ComparisonTable) -> "ConsoleTable":
    """The main numbers for a terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(
        title=f"{table.name}: points of 100; ( ) over seeds, [ ] over items; grey: not "
        "distinguishable from the reference",
        box=box.SIMPLE_HEAD,
    )
    for column in ("method", "domain gain", "forgetting", "combined", "combined - reference"):
        shown.add_column(column)
    for row in table.rows:
        cells = _cells(row)
        name = f"{cells[0]}\nlr {cells[1]}, {cells[2]} seeds"
        same = row.versus is not None and not row.versus.combined.distinguishable
        texts = [_in_lines(cell) for cell in cells[3:7]]
        shown.add_row(name, *texts, style="bright_black" if same else None)
        for problem in row.problems:
            shown.add_row(f"  {problem}", style="red" if "failed" in problem else None)
    return shown


def console_effects(table: ComparisonTable) -> "ConsoleTable":
    """Which part does it, for a terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(title=_effects_title(table), box=box.SIMPLE_HEAD)
    for column in _EFFECT_COLUMNS[:1] + _EFFECT_COLUMNS[3:]:
        shown.add_column(column)
    for effect in table.effects:
        cells = _effect_cells(table, effect)
        name = f"{effect.title}\n{len(effect.pairs)} pairs, {len(effect.seeds)} seeds"
        known = (effect.trade.domain_gain, effect.trade.forgetting, effect.trade.combined)
        same = not any(part.distinguishable for part in known)
        style = "bright_black" if same else None
        shown.add_row(name, *(_in_lines(cell) for cell in cells[3:]), style=style)
    return shown


def _in_lines(cell: str) -> str:
    return cell.replace(" (", "\n(").replace(" [", "\n[")


# Files

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'">
<title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; margin: 2rem auto; max-width: 90rem;
 padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
 border-bottom: 1px solid #e2e8f0; }
.scroll { overflow-x: auto; } .same { color: #64748b; } .problem { color: #b91c1c; }
img { max-width: min(100%, 44rem); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
</style></head><body>
<h1>{{ name }}: methods at equal budget</h1>
{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}
<img alt="Gain against forgetting of every method" src="data:image/png;base64,{{ figures.figure }}">
<h2>At the chosen learning rate, {{ items }}</h2>
<img alt="Every method with its intervals" src="data:image/png;base64,{{ figures.methods }}">
<div class="scroll"><table><thead><tr>
{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr{% if row.same %} class="same"{% endif %}>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
<p>Grey: not distinguishable from the reference by the combined score. {{ cost_note }}</p>
{% if problems %}<ul class="problem">
{% for title, problem in problems %}<li>{{ title }}: {{ problem }}</li>{% endfor %}</ul>{% endif %}
{% if effects %}<h2>{{ effects_title }}</h2>
<img alt="What every part changes" src="data:image/png;base64,{{ figures.effects }}">
<div class="scroll"><table><thead><tr>
{% for c in effect_columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for cells in effects %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if curves %}<h2>{{ curves_title }}</h2>
<div class="scroll"><table><thead><tr>
{% for c in curve_columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for cells in curves %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
<h2>{{ points_title }}</h2>
<div class="scroll"><table><thead><tr>
{% for c in point_columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for cells in points %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<h2>Methods</h2><table><tbody>
{% for title, train in methods %}<tr><td>{{ title }}</td><td>{{ train }}</td></tr>{% endfor %}
</tbody></table>
<h2>Settings and versions</h2><pre>{{ settings }}</pre>
</body></html>
"""


def as_html(table: ComparisonTable, figures: Mapping[str, bytes]) -> str:
    """The comparison as one page that loads nothing; ``figures`` are PNGs by ``FIGURE_FILES``."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        name=table.name,
        sentences=sentences(table),
        items=table.items,
        figures={kind: base64.b64encode(png).decode() for kind, png in figures.items()},
        columns=_COLUMNS,
        rows=[
            {
                "cells": _cells(row),
                "same": row.versus is not None and not row.versus.combined.distinguishable,
            }
            for row in table.rows
        ],
        cost_note=_COST_NOTE,
        problems=[(row.title, problem) for row in table.rows for problem in row.problems],
        effects_title=_effects_title(table),
        effect_columns=_EFFECT_COLUMNS,
        effects=[_effect_cells(table, effect) for effect in table.effects],
        curves_title=_curves_title(table),
        curve_columns=_CURVE_COLUMNS,
        curves=[_curve_cells(table, row) for row in table.curves],
        points_title=_points_title(table),
        point_columns=_POINT_COLUMNS,
        points=[_point_cells(table, point) for point in table.points],
        methods=[
            (m["title"], ", ".join(f"{key} = {value}" for key, value in m["train"].items()))
            for m in table.description["methods"]
        ],
        settings=json.dumps(
            {key: table.description[key] for key in ("settings", "versions", "record")}, indent=1
        ),
    )


def write_report(directory: Path) -> dict[str, Path]:
    """Write tables, figures and page into a comparison's directory; returns them by kind.

    Raises:
        IncompleteArtifactError: no comparison has begun there.
        DataError: scores are missing or damaged.
    """
    table = load_table(directory)
    figures = {"figure": _png(draw_scatter(table)), "methods": _png(draw_methods(table))}
    if table.effects:
        figures["effects"] = _png(draw_effects(table))
    files = {kind: directory / FIGURE_FILES[kind] for kind in figures}
    files |= {"json": directory / RESULTS_FILE}
    files |= {kind: directory / name for kind, name in TABLE_FILES.items()}
    for kind, png in figures.items():
        write_atomically(files[kind], png)
    write_json(files["json"], as_json_object(table))
    write_atomically(files["html"], as_html(table, figures).encode())
    write_atomically(files["markdown"], as_markdown(table).encode())
    write_atomically(files["csv"], as_csv(table).encode())
    return files


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
