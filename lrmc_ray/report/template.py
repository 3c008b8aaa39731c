"""From figures and sentences to one self-contained HTML page."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from lrmc_ray.evaluate.statistics import Interval

if TYPE_CHECKING:
    from markupsafe import Markup
    from plotly.graph_objects import Figure

from lrmc_ray.evaluate.numbers import points, points_range
from lrmc_ray.report.figures_html import COLOURS

PLOTLY = "plotly-cartesian.min.js.gz"
"""The part of plotly.js that draws the report's kinds of figures, a tenth of the whole when packed:
`plotly.js-cartesian-dist-min` of npm, in the version that plotly for Python brings, by `gzip -9n`.
The browser unpacks it, so a report needs no network."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: where it stands, and the script that draws it there."""

    place: "Markup"
    script: "Markup"


def drawing(figure: "Figure", name: str) -> Drawing:
    """A figure as HTML, under a fixed name: the same study gives the same file.

    The scripts belong at the end of the page, where the places have their final width.
    """
    from markupsafe import Markup

    height = figure.layout.height
    data = figure.to_json()  # Escapes "<", so it cannot end the script element.
    options = '{"displayModeBar": false, "responsive": true, "scrollZoom": false}'
    return Drawing(
        place=Markup(f'<div id="{name}" class="figure" style="height: {height}px"></div>'),
        script=Markup(
            f'{{const f = {data}; Plotly.newPlot("{name}", f.data, f.layout, {options});}}'
        ),
    )


def whisker(interval: Interval, low: float, high: float) -> "Markup":
    """An interval as a small drawing on the axis [low, high], with a line at 0."""
    from markupsafe import Markup

    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 4.0 + 112.0 * (value - low) / span

    kind = ("better" if interval.value > 0 else "worse") if interval.distinguishable else "unclear"
    return Markup(
        '<svg class="whisker" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<line x1="{x(0.0):.1f}" x2="{x(0.0):.1f}" y1="0" y2="16" class="zero"/>'
        f'<line x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="8" y2="8" '
        f'class="bar {kind}"/>'
        f'<circle cx="{x(interval.value):.1f}" cy="8" r="3.5" class="dot {kind}"/></svg>'
    )


def render(content: Mapping[str, Any]) -> str:
    """The whole page. Every value is escaped; figures and drawings come from this file."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(points=points, points_range=points_range)
    return environment.from_string(_read("report.html.j2")).render(
        style=Markup(_read("report.css")),
        plotly_gzip=Markup(base64.b64encode(_bytes(PLOTLY)).decode()),
        colours=COLOURS,
        **content,
    )


def _read(name: str) -> str:
    """A text file that stands beside this module."""
    return _bytes(name).decode("utf-8")


def _bytes(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()
