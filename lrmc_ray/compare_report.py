"""What a comparison says: one table, one figure, and both for people and for programs.

Reads ``compare.json`` and the items behind every score; every interval is computed here.

- Over seeds: Student's t interval of the mean over training seeds. It says how far another
  training would come out elsewhere. With one seed there is none, and that is said.
- Over items: paired bootstrap of the mean over the seeds' models, the same drawn items for every
  model. It says how far other questions would have come out elsewhere.

The general tasks have one set of items, so it is halved: items at even places of a task help to
choose the learning rate, those at odd places are reported. Domain questions have two splits.

Shape suffixes: S = seeds, B = bootstrap resamples.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lrmc_ray.artifacts import write_atomically, write_json
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.metrics_log import read_metrics
from lrmc_ray.report_html import FORGETTING_LABEL, GAIN_LABEL, number, percent, points, points_range
from lrmc_ray.run_files import METRICS
from lrmc_ray.scores import Comparison, Scores, compare
from lrmc_ray.statistics import (
    FloatArray,
    Interval,
    mean_interval,
    percentile_interval,
    rank_correlation,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table as ConsoleTable

COMPARISON_FILE = "compare.json"
TABLE_FILES = {"html": "compare.html", "markdown": "compare.md", "csv": "compare.csv"}
RESULTS_FILE = "compare_results.json"
FIGURE_FILE = "compare.png"
RESAMPLES = 2000
SPIKE_WINDOW = 10
SPIKE_FEWEST = 5
SPIKE_DEVIATIONS = 3.0
"""A step is a loss spike if its loss is above the mean of the ``SPIKE_WINDOW`` steps before it
(at least ``SPIKE_FEWEST``) by more than this many of their standard deviations."""

Half = Literal["dev", "test"]


# Scores


def general_half(scores: Scores, half: Half) -> Scores:
    """``scores`` with half of the items of every general task, and all of the domain's."""
    rows = scores.items.to_pylist()
    ids: dict[str, set[str]] = {}
    for row in rows:
        if row["group"] == "general":
            ids.setdefault(row["task"], set()).add(row["item_id"])
    first = 0 if half == "dev" else 1
    kept = {task: set(sorted(items)[first::2]) for task, items in ids.items()}
    return Scores.from_rows(
        row for row in rows if row["group"] != "general" or row["item_id"] in kept[row["task"]]
    )


def choice_score(base: Path, tuned: Path, *, forgetting_weight: float, seed: int) -> float:
    """The combined score on the items that choose: what the best learning rate has most of."""
    halves = (general_half(Scores.load(path), "dev") for path in (base, tuned))
    compared = compare(*halves, forgetting_weight=forgetting_weight, seed=seed, resamples=2)
    return compared.combined.value


def loss_spikes(losses: Sequence[float]) -> int:
    """Steps whose loss is far above that of the steps before (see ``SPIKE_DEVIATIONS``).

    The scale of a loss does not matter, so methods with different losses can be compared.
    """
    spikes = 0
    for step, loss in enumerate(losses):
        before = np.asarray(losses[max(0, step - SPIKE_WINDOW) : step])
        if len(before) < SPIKE_FEWEST:
            continue
        spikes += bool(not loss <= before.mean() + SPIKE_DEVIATIONS * before.std(ddof=1))
    return spikes


# The table


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with what is known of its uncertainty."""

    value: float
    over_seeds: Interval | None
    """None with one seed."""
    over_items: Interval | None
    """None where a value does not come from scored items."""

    @property
    def distinguishable(self) -> bool:
        """Whether no interval there is includes 0."""
        known = [i for i in (self.over_seeds, self.over_items) if i is not None]
        return bool(known) and all(interval.distinguishable for interval in known)


def estimate(values_S: Sequence[float], replicates_SB: Sequence[FloatArray] = ()) -> Estimate:
    """The mean of one value per seed; ``replicates_SB`` are each value's, over the same items."""
    mean = float(np.mean(values_S))
    over_items = None
    if len(replicates_SB):
        over_items = percentile_interval(mean, np.mean(replicates_SB, axis=0))
    return Estimate(mean, mean_interval(values_S) if len(values_S) > 1 else None, over_items)


@dataclass(frozen=True)
class Trade:
    """Domain gain, forgetting, and the one less the weighted other, as fractions."""

    domain_gain: Estimate
    forgetting: Estimate
    combined: Estimate


@dataclass(frozen=True)
class Cost:
    """Of one training run, means over seeds."""

    train_seconds: float
    cpu_seconds: float
    record_seconds: float
    """Stage 0's share by the clock: of its seconds the part of the samples that the run uses;
    0 for a method that needs no record."""
    record_core_seconds: float
    """The same in seconds of the cores that Stage 0 held: at most so many CPU seconds."""
    peak_memory_bytes: float
    processed_tokens: float
    original_tokens: float
    spikes: float


@dataclass(frozen=True)
class MethodRow:
    """One method at its chosen learning rate, on the items that are reported."""

    name: str
    title: str
    lr: float | None
    """None while it is not chosen."""
    seeds: tuple[int, ...]
    """Those that are scored."""
    trade: Trade | None
    accuracy: Estimate | None
    """Mean accuracy on the domain's tasks, as a fraction."""
    kl_domain: Estimate | None
    kl_general: Estimate | None
    """KL(base || tuned) on texts of the tasks, nats per token."""
    cost: Cost | None
    versus: Trade | None
    """This method - the reference, on the seeds that both have; None for the reference itself."""
    problems: tuple[str, ...]
    """Runs that failed or are not there yet."""


@dataclass(frozen=True)
class SearchPoint:
    """One learning rate of one method: the first seed, on the items that choose."""

    method: str
    lr: float
    domain_gain: Interval
    """Over items."""
    forgetting: Interval
    combined: Interval
    kl_domain: float | None
    kl_general: float | None
    is_chosen: bool
    excess_forgetting: float | None
    """Forgetting less that of the reference's front at the same gain; None beyond its ends."""


@dataclass(frozen=True)
class Predictor:
    """How well something known of a tuned model ranks the forgetting, over all learning rates."""

    name: str
    correlation: Interval
    """Spearman's; the interval is over methods, whose learning rates stay together."""
    points: int


@dataclass(frozen=True)
class ComparisonTable:
    """All that a comparison says."""

    name: str
    reference: str
    seeds: tuple[int, ...]
    rows: tuple[MethodRow, ...]
    """Of the methods of which something has run."""
    points: tuple[SearchPoint, ...]
    predictors: tuple[Predictor, ...]
    sentences: tuple[str, ...]
    description: Mapping[str, Any]

    def title_of(self, method: str) -> str:
        """What a method is called."""
        titles = {m["name"]: str(m["title"]) for m in self.description["methods"]}
        return titles[method]

    @property
    def not_begun(self) -> list[str]:
        """Titles of the methods of which nothing has run; they have no row."""
        begun = {row.name for row in self.rows}
        return [m["title"] for m in self.description["methods"] if m["name"] not in begun]


def load_table(directory: Path) -> ComparisonTable:
    """Read a comparison and compute all that is said of it.

    Raises:
        IncompleteArtifactError: no comparison has begun there.
        DataError: scores are missing or damaged.
    """
    try:
        description = json.loads((directory / COMPARISON_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{directory} has no {COMPARISON_FILE}: no comparison has begun there; run "
            "`python -m lrmc_ray.compare` first"
        ) from None
    except ValueError as error:
        raise DataError(f"{directory / COMPARISON_FILE} is not readable JSON ({error})") from None
    reader = _Reader(directory, description)
    points_ = _search_points(reader)
    chosen = description.get("chosen", {})
    reported = {
        method["name"]: reader.comparisons(method["name"], chosen.get(method["name"]), "test")
        for method in description["methods"]
    }
    rows = tuple(
        _method_row(reader, method, chosen.get(method["name"]), reported)
        for method in description["methods"]
        if any(entry["method"] == method["name"] for entry in description["runs"])
    )
    table = ComparisonTable(
        name=description["name"],
        reference=description["reference"],
        seeds=tuple(description["seeds"]),
        rows=rows,
        points=points_,
        predictors=forgetting_predictors(points_),
        sentences=(),
        description=description,
    )
    return ComparisonTable(**{**vars(table), "sentences": tuple(_sentences(table))})


class _Reader:
    """The runs of a comparison, and their scores against the base's."""

    def __init__(self, directory: Path, description: Mapping[str, Any]) -> None:
        self.directory = directory
        self.description = description
        self._base: dict[Half, Scores] = {}

    def entry(self, method: str, lr: float, seed: int, split: Half) -> Mapping[str, Any] | None:
        """The run, as ``compare.json`` describes it."""
        key = (method, lr, seed, split)
        for run in self.description["runs"]:
            if (run["method"], run["lr"], run["seed"], run["split"]) == key:
                found: Mapping[str, Any] = run
                return found
        return None

    def compared(self, entry: Mapping[str, Any]) -> Comparison:
        """A run's scores against the base's, on the items of its split."""
        split: Half = entry["split"]
        if split not in self._base:
            path = self.directory / self.description["base_scores"][split]
            self._base[split] = general_half(Scores.load(path), split)
        return compare(
            self._base[split],
            general_half(Scores.load(self.directory / entry["scores"]), split),
            forgetting_weight=self.description["forgetting_weight"],
            seed=self.description["bootstrap_seed"],
            resamples=RESAMPLES,
        )

    def comparisons(self, method: str, lr: float | None, split: Half) -> dict[int, Comparison]:
        """By seed, of the runs that are scored."""
        if lr is None:
            return {}
        found = {}
        for seed in self.description["seeds"]:
            entry = self.entry(method, lr, seed, split)
            if entry is not None and entry["state"] == "COMPLETE":
                found[seed] = self.compared(entry)
        return found

    def drift(self, method: str, lr: float, seed: int, group: str) -> float | None:
        """KL(base || tuned); that on general text may have been measured with the first split."""
        for split in ("test", "dev"):
            entry = self.entry(method, lr, seed, "test" if split == "test" else "dev")
            value = (entry or {}).get("results", {}).get(f"eval/kl_base_{group}")
            if value is not None:
                return float(value)
        return None

    def losses(self, entry: Mapping[str, Any]) -> list[float]:
        """Training loss of every step."""
        path = self.directory / entry["directory"] / "training" / METRICS
        return [line.metrics["train/loss"] for line in read_metrics(path)]


def _search_points(reader: _Reader) -> tuple[SearchPoint, ...]:
    description = reader.description
    seed, chosen = description["seeds"][0], description.get("chosen", {})
    found: list[tuple[str, float, Comparison]] = []
    for method in description["methods"]:
        for lr in sorted(method["learning_rates"]):
            entry = reader.entry(method["name"], lr, seed, "dev")
            if entry is not None and entry["state"] == "COMPLETE":
                found.append((method["name"], lr, reader.compared(entry)))
    reference = [
        (c.domain_gain.value, c.forgetting.value)
        for name, _, c in found
        if name == description["reference"]
    ]
    return tuple(
        SearchPoint(
            method=name,
            lr=lr,
            domain_gain=compared.domain_gain,
            forgetting=compared.forgetting,
            combined=compared.combined,
            kl_domain=_dev_drift(reader, name, lr, seed, "domain"),
            kl_general=_dev_drift(reader, name, lr, seed, "general"),
            is_chosen=chosen.get(name) == lr,
            excess_forgetting=excess_forgetting(
                compared.domain_gain.value, compared.forgetting.value, reference
            ),
        )
        for name, lr, compared in found
    )


def _dev_drift(reader: _Reader, method: str, lr: float, seed: int, group: str) -> float | None:
    entry = reader.entry(method, lr, seed, "dev")
    value = (entry or {}).get("results", {}).get(f"eval/kl_base_{group}")
    return None if value is None else float(value)


def excess_forgetting(
    gain: float, forgetting: float, reference: Sequence[tuple[float, float]]
) -> float | None:
    """``forgetting`` less what the reference forgets where it gains as much.

    Args:
        gain: of a model.
        forgetting: of the same.
        reference: gain and forgetting of the reference by rising learning rate. Between two of them
            it is a line; those above the one that gains the most only lose, and are left out.

    Returns:
        None beyond the ends, where nothing is known.
    """
    if not reference:
        return None
    most = max(range(len(reference)), key=lambda index: reference[index][0])
    known = sorted(reference[: most + 1])
    gains = [point[0] for point in known]
    if not gains[0] <= gain <= gains[-1]:
        return None
    return forgetting - float(np.interp(gain, gains, [point[1] for point in known]))


def forgetting_predictors(points_: Sequence[SearchPoint]) -> tuple[Predictor, ...]:
    """Whether drift, which needs no general task, says how much a model has forgotten.

    That KL on the new task predicts forgetting is the claim of Shenfeld et al. (2025, "RL's
    Razor"); the gain is the rival explanation: who learns more forgets more.
    """
    found = []
    values: dict[str, list[float | None]] = {
        "KL on the domain's texts": [point.kl_domain for point in points_],
        "KL on general texts": [point.kl_general for point in points_],
        "domain gain": [point.domain_gain.value for point in points_],
    }
    for name, column in values.items():
        known = [(v, point) for v, point in zip(column, points_, strict=True) if v is not None]
        correlation = rank_correlation(
            [value for value, _ in known],
            [point.forgetting.value for _, point in known],
            [point.method for _, point in known],
        )
        if correlation is not None:
            found.append(Predictor(name, correlation, len(known)))
    return tuple(found)


def _method_row(
    reader: _Reader,
    method: Mapping[str, Any],
    lr: float | None,
    reported: Mapping[str, Mapping[int, Comparison]],
) -> MethodRow:
    name = method["name"]
    own = reported[name]
    versus = None
    reference = reported.get(reader.description["reference"], {})
    both = [seed for seed in own if seed in reference]
    if name != reader.description["reference"] and both:
        versus = _trade([own[seed] for seed in both], less=[reference[seed] for seed in both])
    entries = [
        entry
        for seed in own
        if lr is not None and (entry := reader.entry(name, lr, seed, "test")) is not None
    ]
    return MethodRow(
        name=name,
        title=method["title"],
        lr=lr,
        seeds=tuple(own),
        trade=_trade(list(own.values())) if own else None,
        accuracy=_accuracy(list(own.values())),
        kl_domain=_drift(reader, name, lr, list(own), "domain"),
        kl_general=_drift(reader, name, lr, list(own), "general"),
        cost=_cost(reader, method, entries) if entries else None,
        versus=versus,
        problems=tuple(_problems(reader, method, lr)),
    )


def _trade(own: Sequence[Comparison], less: Sequence[Comparison] | None = None) -> Trade:
    """Means over seeds, each paired with the one of ``less`` at the same place."""
    weight = own[0].forgetting_weight

    def part(
        value: Callable[[Comparison], float], of: Callable[[Comparison], FloatArray]
    ) -> Estimate:
        values = [value(one) for one in own]
        replicates = [of(one) for one in own]
        if less is not None:
            values = [v - value(other) for v, other in zip(values, less, strict=True)]
            replicates = [r - of(other) for r, other in zip(replicates, less, strict=True)]
        return estimate(values, replicates)

    return Trade(
        domain_gain=part(lambda c: c.domain_gain.value, lambda c: c.domain_gain_replicates),
        forgetting=part(lambda c: c.forgetting.value, lambda c: c.forgetting_replicates),
        combined=part(
            lambda c: c.combined.value,
            lambda c: c.domain_gain_replicates - weight * c.forgetting_replicates,
        ),
    )


def _accuracy(comparisons: Sequence[Comparison]) -> Estimate | None:
    """On the domain's tasks.

    Over items: the seeds' intervals averaged, as if all seeds erred on the same items. That is at
    most too wide.
    """
    known = [one for compared in comparisons if (one := compared.accuracy("domain")) is not None]
    if not known:
        return None
    over_seeds = estimate([one.value for one in known])
    low, high = (float(np.mean([getattr(one, end) for one in known])) for end in ("low", "high"))
    return replace(over_seeds, over_items=Interval(over_seeds.value, low, high))


def _drift(
    reader: _Reader, method: str, lr: float | None, seeds: Sequence[int], group: str
) -> Estimate | None:
    if lr is None:
        return None
    values = [reader.drift(method, lr, seed, group) for seed in seeds]
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _cost(reader: _Reader, method: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Cost:
    description = reader.description
    share = 0.0
    if method["needs_record"]:
        train = entries[0]["train"]
        samples = description["record"]["summary"]["samples"]
        share = min(1.0, train["steps"] * train["batch_size"] / samples)
    seconds = description["stage_seconds"]

    def mean(key: str) -> float:
        return float(np.mean([entry["cost"][key] for entry in entries]))

    return Cost(
        train_seconds=mean("train_seconds"),
        cpu_seconds=mean("train_cpu_seconds"),
        record_seconds=share * seconds["record"],
        record_core_seconds=share * seconds["record"] * seconds["record_cores"],
        peak_memory_bytes=mean("peak_memory_bytes"),
        processed_tokens=mean("processed_tokens"),
        original_tokens=mean("original_tokens"),
        spikes=float(np.mean([loss_spikes(reader.losses(entry)) for entry in entries])),
    )


def _problems(reader: _Reader, method: Mapping[str, Any], lr: float | None) -> list[str]:
    seeds = reader.description["seeds"]
    wanted = [(rate, seeds[0], "dev") for rate in method["learning_rates"]]
    if lr is not None:
        wanted += [(lr, seed, "test") for seed in seeds]
    problems = []
    missing = 0
    for rate, seed, split in wanted:
        entry = reader.entry(method["name"], rate, seed, "dev" if split == "dev" else "test")
        if entry is None:
            missing += 1
        elif entry["state"] == "FAIL":
            problems.append(f"lr {rate:g}, seed {seed}, {split}: failed: {entry['cause']}")
    if missing:
        problems.append(f"{missing} of {len(wanted)} runs are not there yet")
    return problems


# In words


def _sentences(table: ComparisonTable) -> list[str]:
    scored = [row for row in table.rows if row.trade is not None]
    if not scored:
        return ["No method has scores on the test questions yet."]
    best = max(scored, key=lambda row: row.trade.combined.value if row.trade else -math.inf)
    assert best.trade is not None
    said = [
        f"Highest combined score: {best.title} at learning rate {best.lr:g}, "
        f"{_with_intervals(best.trade.combined)} points, from domain gain "
        f"{_with_intervals(best.trade.domain_gain)} and forgetting "
        f"{_with_intervals(best.trade.forgetting)}."
    ]
    others = [row for row in scored if row.versus is not None]
    title = table.title_of(table.reference)
    if others:
        better: list[str] = []
        worse: list[str] = []
        for row in others:
            assert row.versus is not None
            if row.versus.combined.distinguishable:
                (better if row.versus.combined.value > 0 else worse).append(row.title)
        unclear = len(others) - len(better) - len(worse)
        said.append(
            f"Against {title}, seed by seed: better {_list(better)}; worse {_list(worse)}; "
            f"{unclear} of {len(others)} not distinguishable. No correction for "
            f"{len(others)} comparisons: about one in twenty would stand out by luck."
        )
    least = min(len(row.seeds) for row in scored)
    said.append(
        "( ) is the 95 % interval over training seeds (Student's t), [ ] that over the items "
        "(paired bootstrap). Learning rates were chosen on the development questions and the "
        "general items at even places; what is reported was left out of the choice."
    )
    if least < len(table.seeds):
        said.append(f"Some methods have only {least} of {len(table.seeds)} seeds so far.")
    edge = []
    for row in scored:
        tried = sorted(point.lr for point in table.points if point.method == row.name)
        if row.lr in (tried[0], tried[-1]) and len(tried) > 1:
            edge.append(f"{row.title} ({'lowest' if row.lr == tried[0] else 'highest'})")
    if edge:
        said.append(
            f"At the edge of the learning rates tried, so a better one may lie beyond: "
            f"{_list(edge)}."
        )
    if table.predictors:
        ranked = "; ".join(f"{p.name} {p.correlation}" for p in table.predictors)
        said.append(
            f"What ranks the forgetting of {table.predictors[0].points} models, all methods and "
            f"learning rates on the first seed (Spearman, intervals over methods): {ranked}."
        )
    failed = [row for row in table.rows if any("failed" in problem for problem in row.problems)]
    if failed:
        said.append(f"Runs failed of: {_list([row.title for row in failed])}.")
    if table.not_begun:
        said.append(f"Not run yet: {'; '.join(table.not_begun)}.")
    return said


def _list(titles: Sequence[str]) -> str:
    return ", ".join(titles) if titles else "none"


def _with_intervals(value: Estimate, form: Callable[[float], str] = points) -> str:
    text = form(value.value)
    if value.over_seeds is not None:
        text += f" ({form(value.over_seeds.low)} to {form(value.over_seeds.high)})"
    else:
        text += " (one seed)"
    if value.over_items is not None:
        text += f" [{form(value.over_items.low)} to {form(value.over_items.high)}]"
    return text


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
            [_with_intervals(e) for e in (trade.domain_gain, trade.forgetting, trade.combined)]
            if trade
            else [_MISSING] * 3
        ),
        _with_intervals(row.versus.combined) if row.versus else _MISSING,
        _MISSING if row.accuracy is None else _with_intervals(row.accuracy, percent),
        *(
            _MISSING if kl is None else _with_intervals(kl, lambda value: number(value, 3))
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


def as_markdown(table: ComparisonTable) -> str:
    """The comparison as Markdown."""
    lines = [f"# {table.name}", "", *(f"{sentence}  " for sentence in table.sentences), ""]
    lines += _markdown_table(_COLUMNS, [_cells(row) for row in table.rows])
    lines += ["", _COST_NOTE, ""]
    problems = [(row.title, problem) for row in table.rows for problem in row.problems]
    lines += [f"- {title}: {problem}" for title, problem in problems]
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
        "sentences": list(table.sentences),
        "methods": [asdict(row) for row in table.rows],
        "learning_rates": [asdict(point) for point in table.points],
        "forgetting_predictors": [asdict(predictor) for predictor in table.predictors],
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


def _in_lines(cell: str) -> str:
    # Escaped, because rich takes [ ] for markup.
    return cell.replace(" (", "\n(").replace(" [", "\n\\[")


# Figure

_PALETTE = (
    "#c2410c", "#0f766e", "#4f46e5", "#b45309", "#be185d", "#0369a1", "#65a30d", "#7c3aed",
    "#475569", "#a16207", "#0891b2", "#dc2626",
)  # fmt: skip
_SHAPES = ("o", "s", "^", "D", "v", "P")


def draw(table: ComparisonTable) -> "Figure":
    """Gain against forgetting: every method over its learning rates, and at the chosen one."""
    from matplotlib.figure import Figure

    height = 6.4 + 0.25 * math.ceil(len(table.rows) / 4)
    figure = Figure(figsize=(13.5, height), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    beyond = _draw_fronts(left, table)
    _draw_chosen(right, table)
    left.plot(0, 0, "X", color="#111827", markersize=8)
    for axes in (left, right):
        axes.axvline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
        axes.set_xlabel(FORGETTING_LABEL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eef2f6", zorder=0)
    left.set_ylabel(GAIN_LABEL)
    left.set_title(f"Over learning rates: development items, seed {table.seeds[0]}", loc="left")
    right.set_title("At the learning rate chosen there: test items, mean of the seeds", loc="left")
    handles = [
        _style_handle(index, f"{index + 1}  {row.title}") for index, row in enumerate(table.rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    note = "Bars: 95 % intervals over seeds, thin ones over items where there is one seed."
    note += " Cross: the base model. Filled on the left: the chosen learning rate."
    if beyond:
        note += f" Beyond the left figure's edge: {', '.join(beyond)}."
    figure.suptitle(note, x=0.01, ha="left", fontsize=8, color="#526077")
    return figure


def _style(index: int) -> tuple[str, str]:
    return _PALETTE[index % len(_PALETTE)], _SHAPES[(index // len(_PALETTE)) % len(_SHAPES)]


def _style_handle(index: int, title: str) -> Any:
    from matplotlib.lines import Line2D

    colour, shape = _style(index)
    return Line2D([], [], color=colour, marker=shape, linewidth=1, markersize=6, label=title)


def _draw_fronts(axes: "Axes", table: ComparisonTable) -> list[str]:
    """One line per method, along its learning rates; returns what lies beyond the edge."""
    if not table.points:
        return []
    x_all = np.array([100 * point.forgetting.value for point in table.points])
    # One model that has lost everything must not squeeze all others into one spot.
    typical = float(np.quantile(x_all, 0.85))
    edge = max(2.5 * max(typical, 1.0), float(np.min(x_all)) + 1.0)
    beyond = []
    for index, row in enumerate(table.rows):
        own = [point for point in table.points if point.method == row.name]
        colour, shape = _style(index)
        x = [100 * point.forgetting.value for point in own]
        y = [100 * point.domain_gain.value for point in own]
        axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.8)
        for point, left, bottom in zip(own, x, y, strict=True):
            face = colour if point.is_chosen else "white"
            axes.plot(left, bottom, shape, color=colour, markerfacecolor=face, markersize=6)
            if left > edge:
                beyond.append(f"{row.title} at {point.lr:g}")
        if own:
            _number(axes, index, x[-1], y[-1])
    if x_all.max() > edge:
        axes.set_xlim(right=edge, left=min(0.0, float(x_all.min())) - 0.05 * edge)
    return beyond


def _draw_chosen(axes: "Axes", table: ComparisonTable) -> None:
    for index, row in enumerate(table.rows):
        if row.trade is None:
            continue
        colour, shape = _style(index)
        gain, forgetting = row.trade.domain_gain, row.trade.forgetting
        axes.errorbar(
            100 * forgetting.value,
            100 * gain.value,
            xerr=_bars(forgetting),
            yerr=_bars(gain),
            fmt=shape, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.8,
            elinewidth=1.4 if len(row.seeds) > 1 else 0.6, capsize=2.5, alpha=0.9,
        )  # fmt: skip
        _number(axes, index, 100 * forgetting.value, 100 * gain.value)


def _number(axes: "Axes", index: int, x: float, y: float) -> None:
    """The method's number in the legend, beside its point."""
    axes.annotate(
        str(index + 1),
        (x, y),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=8,
        color=_style(index)[0],
        annotation_clip=True,
    )


def _bars(value: Estimate) -> list[list[float]]:
    interval = value.over_seeds or value.over_items
    if interval is None:
        return [[0.0], [0.0]]
    return [[100 * (value.value - interval.low)], [100 * (interval.high - value.value)]]


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
img { max-width: 100%; } h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
</style></head><body>
<h1>{{ name }}: methods at equal budget</h1>
{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}
<img alt="Gain against forgetting of every method" src="data:image/png;base64,{{ figure }}">
<h2>At the chosen learning rate, test items</h2>
<div class="scroll"><table><thead><tr>
{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr{% if row.same %} class="same"{% endif %}>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
<p>Grey: not distinguishable from the reference by the combined score. {{ cost_note }}</p>
{% if problems %}<ul class="problem">
{% for title, problem in problems %}<li>{{ title }}: {{ problem }}</li>{% endfor %}</ul>{% endif %}
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


def as_html(table: ComparisonTable, png: bytes) -> str:
    """The comparison as one page that loads nothing."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        name=table.name,
        sentences=table.sentences,
        figure=base64.b64encode(png).decode(),
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
    """Write table, figure and page into a comparison's directory; returns them by kind.

    Raises:
        IncompleteArtifactError: no comparison has begun there.
        DataError: scores are missing or damaged.
    """
    table = load_table(directory)
    png = io.BytesIO()
    draw(table).savefig(png, format="png", facecolor="white")
    files = {"figure": directory / FIGURE_FILE, "json": directory / RESULTS_FILE}
    files |= {kind: directory / name for kind, name in TABLE_FILES.items()}
    write_atomically(files["figure"], png.getvalue())
    write_json(files["json"], as_json_object(table))
    write_atomically(files["html"], as_html(table, png.getvalue()).encode())
    write_atomically(files["markdown"], as_markdown(table).encode())
    write_atomically(files["csv"], as_csv(table).encode())
    return files
