"""The way from the base to every reported model, and what each gains beyond the reference's way.

"Reference + lambda" costs nothing to train: it is the yardstick that any claim about the trade-off
has to beat. So of every model the gain is set against that of the reference's curve of the same
seed where that forgets no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrmc_ray.compare.blends import BlendPlace
from lrmc_ray.compare.measure import Estimate, Trade, estimate, most_gain, trade_of
from lrmc_ray.compare.reader import ComparisonReader
from lrmc_ray.evaluate.changes import Comparison
from lrmc_ray.evaluate.statistics import FloatArray

WHOLE = BlendPlace("even", 1.0)
"""The tuned model itself."""

Curve = dict[BlendPlace, Comparison]
"""The models between the base and a run's, that one included, against the base."""


@dataclass(frozen=True)
class CurveRow:
    """One place on the way from the base to a method's models."""

    method: str
    place: BlendPlace
    seeds: tuple[int, ...]
    trade: Trade
    beyond: Estimate | None
    """Gain less the most that the reference's curve gains where it forgets no more, on the seeds
    that both have; None for the reference's curve itself, or where it has none."""


def curve_rows(
    reader: ComparisonReader,
    chosen: Mapping[str, float | None],
    reported: Mapping[str, Mapping[int, Comparison]],
) -> tuple[CurveRow, ...]:
    """Of all methods; nothing where no model between was scored."""
    curves = {
        name: {
            seed: _curve(reader, name, chosen.get(name), seed, own) for seed, own in runs.items()
        }
        for name, runs in reported.items()
    }
    if not any(len(curve) > 1 for by_seed in curves.values() for curve in by_seed.values()):
        return ()
    reference = {
        seed: _even(curve)
        for seed, curve in curves.get(reader.description["reference"], {}).items()
        if len(curve) > 1
    }
    rows = []
    for name, by_seed in curves.items():
        places = dict.fromkeys(place for curve in by_seed.values() for place in curve)
        for place in sorted(places, key=lambda place: place == WHOLE):
            own = {seed: curve[place] for seed, curve in by_seed.items() if place in curve}
            is_on_it = name == reader.description["reference"] and place.form == "even"
            rows.append(
                CurveRow(
                    method=name,
                    place=place,
                    seeds=tuple(own),
                    trade=trade_of([[one] for one in own.values()]),
                    beyond=None if is_on_it else _beyond(own, reference),
                )
            )
    return tuple(rows)


def _curve(
    reader: ComparisonReader, method: str, lr: float | None, seed: int, whole: Comparison
) -> Curve:
    entry: Mapping[str, Any] = {}
    if lr is not None:
        entry = reader.entry(method, lr, seed, "test") or {}
    curve = {
        BlendPlace(one["form"], one["weight"]): reader.compared(entry, one["scores"])
        for one in entry.get("blends", ())
    }
    return {**curve, WHOLE: whole}


def _even(curve: Curve) -> tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]:
    """Gain and forgetting along the even curve, from the base on; values, and replicates."""
    along = sorted((place.weight, one) for place, one in curve.items() if place.form == "even")
    compared = [one for _, one in along]
    replicates = [
        np.array([np.zeros_like(parts[0]), *parts])
        for parts in (
            [one.domain_gain_replicates for one in compared],
            [one.forgetting_replicates for one in compared],
        )
    ]
    values = (
        np.array([0.0, *(one.domain_gain.value for one in compared)]),
        np.array([0.0, *(one.forgetting.value for one in compared)]),
    )
    return values, (replicates[0], replicates[1])


def _beyond(
    own: Mapping[int, Comparison],
    reference: Mapping[int, tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]],
) -> Estimate | None:
    values, replicates = [], []
    for seed in own.keys() & reference.keys():
        (gains_P, forgettings_P), (gains_PZ, forgettings_PZ) = reference[seed]
        one = own[seed]
        most = most_gain(gains_P, forgettings_P, np.asarray(one.forgetting.value))
        values.append(one.domain_gain.value - float(most))
        most_Z = most_gain(gains_PZ, forgettings_PZ, one.forgetting_replicates)
        replicates.append(one.domain_gain_replicates - most_Z)
    return estimate(values, replicates) if values else None
