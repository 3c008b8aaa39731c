"""From figures and sentences to one self-contained HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrmc_ray.evaluate.statistics import Interval

if TYPE_CHECKING:
    from markupsafe import Markup
    from plotly.graph_objects import Figure

from lrmc_ray.report.figures_html import COLOURS
from lrmc_ray.report.numbers import points, points_range


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


# The page

_STYLE = """
:root {
  color-scheme: light;
  --ink: #1e293b; --soft: #526077; --line: #e2e8f0; --paper: #ffffff; --ground: #f6f7f9;
  --best: #0f766e; --yardstick: #c2410c; --fail: #b91c1c;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
header p { margin: 0; color: var(--soft); }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
h3 { font-size: 0.95rem; margin: 20px 0 8px; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px;
}
p { margin: 0 0 10px; }
.lead { font-size: 1.22rem; line-height: 1.5; }
.unclear-text { color: var(--soft); }
.caption, .note { color: var(--soft); font-size: 0.875rem; margin: 8px 0 0; }
.warning { border-left: 3px solid var(--fail); padding-left: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin-top: 16px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile .name { color: var(--soft); font-size: 0.875rem; }
.tile .value { font-size: 1.6rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile .range { color: var(--soft); font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.tile.unclear .value { color: #64748b; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; padding: 0; margin: 0; list-style: none; }
.chips li { border: 1px solid var(--line); border-radius: 999px; padding: 2px 12px;
  font-size: 0.9rem; }
.chips b { font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 0.8rem;
  vertical-align: bottom; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; font-variant-numeric: tabular-nums; }
tr:last-child td { border-bottom: 0; }
td small, .small { display: block; color: var(--soft); font-size: 0.8rem; }
td.num, th.num { text-align: right; white-space: nowrap; }
td.wide { overflow-wrap: anywhere; }
td.unclear { color: #64748b; }
tr.group td { color: var(--soft); font-size: 0.8rem; font-weight: 600; padding-top: 16px; }
.parameter { white-space: nowrap; margin-right: 8px; }
.parameter b { font-weight: 600; }
pre i { font-style: normal; color: var(--soft); }
.figure { width: 100%; }
.tag { display: inline-block; border-radius: 4px; padding: 0 6px; font-size: 0.75rem;
  line-height: 1.5; color: white; background: #64748b; white-space: nowrap; }
.tag.best { background: var(--best); } .tag.yardstick { background: var(--yardstick); }
.tag.defaults { background: #4f46e5; } .tag.fail { background: var(--fail); }
.tag.early { background: #64748b; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; }
.curves > div { min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.875rem; margin: 4px 0 0; }
.key, .mark { display: inline-block; height: 3px; width: 16px; border-radius: 2px;
  vertical-align: middle; margin: 0 5px 0 0; }
.mark { height: 10px; width: 10px; border-radius: 50%; }
.whisker .zero { stroke: #94a3b8; stroke-width: 1; }
.whisker .bar { stroke-width: 2; } .whisker .better { stroke: var(--best); fill: var(--best); }
.whisker .worse { stroke: var(--yardstick); fill: var(--yardstick); }
.whisker .unclear { stroke: #94a3b8; fill: #94a3b8; }
pre { margin: 2px 0 6px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem;
  background: var(--ground); border-radius: 6px; padding: 6px 8px; max-height: 9em;
  overflow-y: auto; }
.item { margin: 0 0 6px; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; font-size: 0.95rem; }
details > table { margin-top: 8px; }
footer { color: var(--soft); font-size: 0.875rem; margin-top: 24px; }
@media (max-width: 640px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px 14px; }
  .lead { font-size: 1.08rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px; } .tile .value { font-size: 1.3rem; }
  /* A row becomes a card: what it is about on top, its numbers in columns below. */
  .cards thead { display: none; }
  .cards, .cards tbody { display: block; }
  .cards tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px 10px;
    border-bottom: 1px solid var(--line); padding: 10px 0; }
  .cards tr:last-child { border-bottom: 0; }
  .cards td { display: block; border: 0; padding: 0; text-align: left; white-space: normal; }
  .cards td[data-label]::before { content: attr(data-label); display: block;
    color: var(--soft); font-size: 0.72rem; }
  .cards td.wide { grid-column: 1 / -1; }
  .cards td.inline { grid-column: 1 / -1; }
  .cards td.inline::before { display: inline; margin-right: 8px; }
  .cards td.inline small { display: inline; margin-left: 6px; }
  .cards td:empty { display: none; }
  .cards tr.group { padding: 12px 0 2px; }
}
@media print { body { background: white; } section { break-inside: avoid; } }
"""

_TEMPLATE = """{% macro chosen(rows) %}
{% for name, value in rows %}<span class="parameter">{{ name }} <b>{{ value }}</b></span> {% endfor %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<title>{{ name }}: gain against forgetting</title>
<style>{{ style }}</style>
<script>{{ plotly_js }}</script>
</head>
<body>
<main>
<header>
<h1>{{ name }}</h1>
<p>{{ subtitle }}</p>
</header>

<section>
{% for sentence in headline %}
<p class="{{ 'lead' if loop.first else '' }}{{ '' if sentence.distinguishable else ' unclear-text' }}">{{ sentence.text }}</p>
{% endfor %}
{% if tiles %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile{{ '' if tile.interval.distinguishable else ' unclear' }}">
<div class="name">{{ tile.name }}</div>
<div class="value">{{ tile.interval.value | points }}</div>
<div class="range">{{ tile.interval | points_range }}{{ '' if tile.interval.distinguishable else ', not distinguishable from 0' }}</div>
</div>
{% endfor %}
</div>
<p class="caption">Points of 100 of the objective scores, with 95 % intervals (paired bootstrap over the items, {{ resamples }} resamples). {{ objective_text }}</p>
{% endif %}
{% for caution in cautions %}<p class="note">{{ caution }}</p>{% endfor %}
{% for note in notes %}<p class="note warning">{{ note }}</p>{% endfor %}
</section>

{% if parameters %}
<section>
<h2>Parameters of {{ best_name }}</h2>
<ul class="chips">{% for name, value in parameters %}<li>{{ name }} <b>{{ value }}</b></li>{% endfor %}</ul>
</section>
{% endif %}

{% if front %}
<section>
<h2>What was learned against what was forgotten</h2>
{{ front.place }}
<p class="legend">{% for role, text in roles %}<span><i class="mark" style="background: {{ colours[role] }}"></i>{{ text }}</span> {% endfor %}<span><i class="key" style="background: {{ colours.front }}"></i>Pareto front</span></p>
<p class="caption">Every point is a trial; touch one for its parameters. Right: the general tasks got worse; left of 0 they improved. Up: the domain tasks got better. Bars are 95 % intervals. The dotted line is the Pareto front: trials that no other trial beats in both. All on the items that the search used. {{ front_note }}</p>
</section>
{% endif %}

{% if trade_off %}
<section>
<h2>The front as a whole</h2>
{% for sentence in trade_off.sentences %}<p>{{ sentence }}</p>{% endfor %}
<table class="cards">
<thead><tr><th>trial</th><th class="num">domain gain</th><th class="num">forgetting</th><th class="num">on the front</th><th class="num">is the knee</th><th class="num">keeps the budget</th></tr></thead>
<tbody>{% for row in trade_off.rows %}<tr><td class="wide"><b>{{ row.name }}</b></td>
<td class="num" data-label="domain gain">{{ row.gain.value | points }}<small>{{ row.gain | points_range }}</small></td>
<td class="num" data-label="forgetting">{{ row.forgetting.value | points }}<small>{{ row.forgetting | points_range }}</small></td>
<td class="num" data-label="on the front">{{ row.on_front }}</td><td class="num" data-label="is the knee">{{ row.knee }}</td><td class="num" data-label="keeps budget">{{ row.budget }}</td></tr>{% endfor %}</tbody>
</table>
<h3>Hypervolume over the trials</h3>
{{ trade_off.figure.place }}
<p class="caption">{{ trade_off.caption }}</p>
</section>
{% endif %}

{% if surface or importance %}
<section>
<h2>What the parameters do</h2>
<div class="curves">
{% if surface %}<div><h3>Combined score over {{ surface_names[0] }} and {{ surface_names[1] }}</h3>{{ surface.place }}</div>{% endif %}

{% if importance %}<div><h3>Importance of the parameters</h3>{{ importance.place }}</div>{% endif %}

</div>
<p class="caption">{% if surface %}The surface is a smooth fit between the trials (dots); the other parameters differ from trial to trial, so it shows a tendency. {% endif %}{% if importance %}Importance is Optuna's PED-ANOVA over the completed trials: how much a parameter tells the best quarter from the others. With few trials it is rough.{% endif %}</p>
</section>
{% endif %}

<section>
<h2>All trials</h2>
<table class="cards">
<thead><tr><th>trial</th><th>parameters</th><th class="num">domain gain</th><th class="num">forgetting</th><th class="num">combined</th><th class="num">on the front</th></tr></thead>
<tbody>
{% for trial in trials %}
<tr>
<td class="wide"><b>{{ trial.number }}</b> {% for tag in trial.tags %}<span class="tag {{ tag.kind }}">{{ tag.text }}</span> {% endfor %}</td>
{% if trial.problem %}
<td class="wide" colspan="5">{{ chosen(trial.parameters) }}<small>{{ trial.problem }}</small></td>
{% else %}
<td class="wide">{{ chosen(trial.parameters) }}</td>
{% for name, interval, extra in trial.numbers %}
<td class="num{{ '' if interval.distinguishable else ' unclear' }}" data-label="{{ name }}">{{ interval.value | points }}<small>{{ interval | points_range }}</small>{% if extra %}<small>{{ extra }}</small>{% endif %}</td>
{% endfor %}
<td class="num inline" data-label="on the front">{{ trial.front_probability }}{% if trial.is_on_front %}<small>is on it</small>{% endif %}</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
<p class="caption">Grey: the interval includes 0. "On the front": share of the resamples in which no other trial beats this one in both gain and forgetting. Accuracies are means over the group's tasks. All on the items that the search used.</p>
</section>

{% if tasks %}
<section>
<h2>Before and after, task by task</h2>
<table class="cards">
<thead><tr><th>task and metric</th><th class="num">base</th>{% if has_yardstick %}<th class="num">plain fine-tuning</th>{% endif %}<th class="num">{{ best_name }}</th><th class="num">change</th><th></th></tr></thead>
<tbody>
{% for row in tasks %}
{% if row.heading %}
<tr class="group"><td class="wide" colspan="6">{{ row.heading }}</td></tr>
{% else %}
<tr>
<td class="wide">{{ row.task }} <small>{{ row.metric }}{% if row.is_objective %}, counts in the objective{% endif %}</small></td>
<td class="num" data-label="base">{{ row.before }}<small>{{ row.before_range }}</small></td>
{% if has_yardstick %}<td class="num" data-label="plain">{{ row.yardstick }}<small>{{ row.yardstick_range }}</small></td>{% endif %}
<td class="num" data-label="{{ best_name }}">{{ row.after }}<small>{{ row.after_range }}</small></td>
<td class="num{{ '' if row.distinguishable else ' unclear' }}" data-label="change">{{ row.delta }}<small>{{ row.delta_range }}</small></td>
<td class="num">{{ row.whisker }}</td>
</tr>
{% endif %}
{% endfor %}
</tbody>
</table>
<p class="caption">Fractions are shown in percent, changes in points. Cross-entropy is in nats per token: lower is better; what counts in the objective is its relative change. Small numbers are 95 % intervals; the drawing shows the change with the better side on the right.{% if drift %} {{ drift }}{% endif %}</p>
</section>
{% endif %}

{% if curves %}
<section>
<h2>Training</h2>
<div class="curves">
{% for title, figure in curves %}<div><h3>{{ title }}</h3>{{ figure.place }}</div>{% endfor %}
</div>
<p class="legend">{% for role, text in curve_roles %}<span><i class="key" style="background: {{ colours[role] }}"></i>{{ text }}</span> {% endfor %}</p>
<p class="caption">Losses of different kinds (restricted, full) cannot be compared with each other. rho is the probability outside the recorded candidates under the model of that step; the angle is the one between gradient and momentum.</p>
</section>
{% endif %}

<section>
<h2>Cost</h2>
<table class="cards">
<thead><tr><th>part</th><th class="num">training</th><th class="num">evaluation</th><th class="num">core hours</th><th class="num">tokens processed of original</th></tr></thead>
<tbody>{% for row in costs %}<tr><td class="wide">{{ row.part }}</td><td class="num" data-label="training">{{ row.train }}</td><td class="num" data-label="evaluation">{{ row.evaluate }}</td><td class="num" data-label="core hours">{{ row.core_hours }}</td><td class="num" data-label="tokens">{{ row.tokens }}{% if row.tokens_share %}<small>{{ row.tokens_share }}</small>{% endif %}</td></tr>{% endfor %}</tbody>
</table>
{% for sentence in cost_sentences %}<p class="note">{{ sentence }}</p>{% endfor %}
<p class="caption">{{ cost_note }}</p>
{% if record %}
<h3>The record (Stage 0)</h3>
<ul class="chips">{% for name, value in record %}<li>{{ name }} <b>{{ value }}</b></li>{% endfor %}</ul>
{% endif %}
</section>

{% if receipts %}
<section>
<h2>Forgetting receipt</h2>
<p class="note">Items that the base model answered right and {{ best_name }} does not (lost), and the reverse (gained).</p>
<table class="cards">
<thead><tr><th>task</th><th class="num">items</th><th class="num">lost</th><th class="num">gained</th></tr></thead>
<tbody>{% for row in receipts %}<tr><td class="wide">{{ row.task }}</td><td class="num" data-label="items">{{ row.num_items }}</td><td class="num" data-label="lost">{{ row.lost }}</td><td class="num" data-label="gained">{{ row.gained }}</td></tr>{% endfor %}</tbody>
</table>
{% for title, items, more in examples %}
<h3>{{ title }}</h3>
{% for item in items %}
<div class="item">
<span class="small"><b>{{ item.task }}</b> {{ item.item_id }}</span>
{% if item.before is not none or item.after is not none %}
<pre><i>before</i> {{ item.before if item.before is not none else '(no text)' }}
<i>after</i>  {{ item.after if item.after is not none else '(no text)' }}</pre>
{% endif %}
</div>
{% endfor %}
{% if more %}<p class="note">and {{ more }} more</p>{% endif %}
{% endfor %}
</section>
{% endif %}

<section>
<h2>How it was made</h2>
{% for title, rows in tables %}
<details{{ ' open' if loop.first else '' }}><summary>{{ title }}</summary>
<table><tbody>{% for name, value in rows %}<tr><td class="wide">{{ name }}</td><td class="wide">{{ value }}</td></tr>{% endfor %}</tbody></table>
</details>
{% endfor %}
</section>
<footer>{{ footer }}</footer>
</main>
<script>
{% if front %}{{ front.script }}{% endif %}

{% if trade_off %}{{ trade_off.figure.script }}{% endif %}

{% if surface %}{{ surface.script }}{% endif %}

{% if importance %}{{ importance.script }}{% endif %}

{% for _, figure in curves %}{{ figure.script }}
{% endfor %}
</script>
</body>
</html>
"""  # noqa: E501


def render(content: Mapping[str, Any]) -> str:
    """The whole page. Every value is escaped; figures and drawings come from this file."""
    import jinja2
    import plotly.offline
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(points=points, points_range=points_range)
    return environment.from_string(_TEMPLATE).render(
        style=Markup(_STYLE),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
        colours=COLOURS,
        **content,
    )
