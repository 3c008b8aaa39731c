"""What a comparison has measured, as numbers: methods, learning rates, parts, with intervals.

Reads ``compare.json`` and the items behind every score; every interval is computed here.

- Over seeds: Student's t interval of the mean over training seeds. It says how far another
  training would come out elsewhere. With one seed there is none, and that is said.
- Over items: paired bootstrap of the mean over the seeds' models, the same drawn items for every
  model. It says how far other questions would have come out elsewhere.

The general tasks have one set of items, so it is halved: items at even places of a task help to
choose the learning rate, those at odd places are reported. The items of a domain task are in two
parts, unless they are too few: then all of them do both, and that is said.

Shape suffixes: those of :mod:`lrmc_ray.method`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrmc_ray.compare.curves import CurveRow, curve_rows
from lrmc_ray.compare.measure import (
    Cost,
    Estimate,
    Trade,
    estimate,
    excess_forgetting,
    loss_spikes,
    trade_of,
)
from lrmc_ray.compare.reader import ComparisonReader
from lrmc_ray.evaluate.changes import Comparison
from lrmc_ray.evaluate.statistics import (
    Interval,
    rank_correlation,
)


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
class Effect:
    """What one part of the methods changes: the mean difference of pairs that differ in it alone.

    Each with its learning rate, seed by seed and item by item.
    """

    title: str
    pairs: tuple[tuple[str, str], ...]
    """Those that are reported: with the part, without it."""
    seeds: tuple[int, ...]
    """Those that all of them have."""
    trade: Trade
    kl_general_ratio: float | None
    """KL(base || tuned) on general text with the part over that without, geometric mean of the
    pairs' means over seeds; None where it was not measured."""


@dataclass(frozen=True)
class SearchPoint:
    """One learning rate of one method: the first seed, on the items that choose."""

    method: str
    lr: float
    domain_gain: Interval
    """Over items."""
    forgetting: Interval
    combined: Interval
    forgetting_of_all: float
    """On all general items, those that are reported as well."""
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
    effects: tuple[Effect, ...]
    """Of the parts of which a pair is reported."""
    curves: tuple[CurveRow, ...]
    """Models between the base and the reported ones, where they are scored."""
    undivided_tasks: tuple[str, ...]
    """Domain tasks of which the items that are reported chose the learning rates, too."""
    description: Mapping[str, Any]

    @property
    def items(self) -> str:
        """What the reported items are called: test items, if no choice rests on them."""
        return "reported items" if self.undivided_tasks else "test items"

    def title_of(self, method: str) -> str:
        """What a method is called."""
        titles = {m["name"]: str(m["title"]) for m in self.description["methods"]}
        return titles[method]

    def advantage(self, row: MethodRow) -> float:
        """By how much the combined score of a scored method is above the reference's.

        On the seeds that both have: a method with other seeds has had other luck. Where the
        reference is not scored, the combined score itself.
        """
        assert row.trade is not None
        if all(r.trade is None for r in self.rows if r.name == self.reference):
            return row.trade.combined.value
        if row.versus is not None:
            return row.versus.combined.value
        return 0.0 if row.name == self.reference else -math.inf

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
    reader = ComparisonReader(directory)
    description = reader.description
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
    return ComparisonTable(
        name=description["name"],
        reference=description["reference"],
        seeds=tuple(description["seeds"]),
        rows=rows,
        points=points_,
        predictors=forgetting_predictors(points_),
        effects=tuple(
            effect
            for asked in description.get("effects", ())
            if (effect := _effect(reader, asked, chosen, reported)) is not None
        ),
        curves=curve_rows(reader, chosen, reported),
        undivided_tasks=reader.undivided_tasks(),
        description=description,
    )


def _search_points(reader: ComparisonReader) -> tuple[SearchPoint, ...]:
    description = reader.description
    seed, chosen = description["seeds"][0], description.get("chosen", {})
    found: list[tuple[str, float, Comparison, float]] = []
    for method in description["methods"]:
        for lr in sorted(method["learning_rates"]):
            entry = reader.entry(method["name"], lr, seed, "dev")
            if entry is not None and entry["state"] == "COMPLETE":
                compared = reader.compared(entry)
                found.append((method["name"], lr, compared, reader.forgetting(entry)))
    reference = [
        (c.domain_gain.value, c.forgetting.value)
        for name, _, c, _ in found
        if name == description["reference"]
    ]
    return tuple(
        SearchPoint(
            method=name,
            lr=lr,
            domain_gain=compared.domain_gain,
            forgetting=compared.forgetting,
            combined=compared.combined,
            forgetting_of_all=of_all,
            kl_domain=_dev_drift(reader, name, lr, seed, "domain"),
            kl_general=_dev_drift(reader, name, lr, seed, "general"),
            is_chosen=chosen.get(name) == lr,
            excess_forgetting=excess_forgetting(
                compared.domain_gain.value, compared.forgetting.value, reference
            ),
        )
        for name, lr, compared, of_all in found
    )


def _dev_drift(
    reader: ComparisonReader, method: str, lr: float, seed: int, group: str
) -> float | None:
    entry = reader.entry(method, lr, seed, "dev")
    value = (entry or {}).get("results", {}).get(f"eval/kl_base_{group}")
    return None if value is None else float(value)


def forgetting_predictors(points_: Sequence[SearchPoint]) -> tuple[Predictor, ...]:
    """Whether drift, which needs no general task, says how much a model has forgotten.

    That KL on the new task predicts forgetting is the claim of Shenfeld et al. (2025, "RL's
    Razor"); the gain is the rival explanation: who learns more forgets more. The forgetting is that
    on all general items: no choice rests on it, and half of them are too few to rank it by.
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
            [point.forgetting_of_all for _, point in known],
            [point.method for _, point in known],
        )
        if correlation is not None:
            found.append(Predictor(name, correlation, len(known)))
    return tuple(found)


def _method_row(
    reader: ComparisonReader,
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
        versus = trade_of([[own[seed]] for seed in both], less=[[reference[seed]] for seed in both])
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
        trade=trade_of([[one] for one in own.values()]) if own else None,
        accuracy=_accuracy(list(own.values())),
        kl_domain=_drift(reader, name, lr, list(own), "domain"),
        kl_general=_drift(reader, name, lr, list(own), "general"),
        cost=_cost(reader, method, entries) if entries else None,
        versus=versus,
        problems=tuple(_problems(reader, method, lr)),
    )


def _effect(
    reader: ComparisonReader,
    asked: Mapping[str, Any],
    chosen: Mapping[str, float | None],
    reported: Mapping[str, Mapping[int, Comparison]],
) -> Effect | None:
    """None while no pair has a seed in common."""
    pairs = [(with_, without) for with_, without in asked["pairs"]]
    pairs = [pair for pair in pairs if reported[pair[0]].keys() & reported[pair[1]].keys()]
    seeds = [
        seed
        for seed in reader.description["seeds"]
        if all(seed in reported[name] for pair in pairs for name in pair)
    ]
    if not pairs or not seeds:
        return None
    trades = trade_of(
        [[reported[with_][seed] for with_, _ in pairs] for seed in seeds],
        less=[[reported[without][seed] for _, without in pairs] for seed in seeds],
    )
    logs = []
    for pair in pairs:
        with_, without = (_drift(reader, name, chosen[name], seeds, "general") for name in pair)
        if with_ is not None and without is not None and without.value > 0 < with_.value:
            logs.append(np.log(with_.value / without.value))
    ratio = float(np.exp(np.mean(logs))) if len(logs) == len(pairs) else None
    return Effect(asked["title"], tuple(pairs), tuple(seeds), trades, ratio)


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
    reader: ComparisonReader, method: str, lr: float | None, seeds: Sequence[int], group: str
) -> Estimate | None:
    if lr is None:
        return None
    values = [reader.drift(method, lr, seed, group) for seed in seeds]
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _cost(
    reader: ComparisonReader, method: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> Cost:
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


def _problems(reader: ComparisonReader, method: Mapping[str, Any], lr: float | None) -> list[str]:
    seeds = method.get("seeds") or reader.description["seeds"]
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
