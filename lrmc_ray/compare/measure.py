"""What a comparison measures of one run: halves, loss spikes, estimates, costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrmc_ray.evaluate.changes import Comparison, compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.statistics import (
    FloatArray,
    Interval,
    mean_interval,
    percentile_interval,
)

SPIKE_WINDOW = 10

SPIKE_FEWEST = 5

SPIKE_DEVIATIONS = 3.0
"""A step is a loss spike if its loss is above the mean of the ``SPIKE_WINDOW`` steps before it
(at least ``SPIKE_FEWEST``) by more than this many of their standard deviations."""

# Scores


def general_half(scores: Scores, half: Split) -> Scores:
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


def estimate(values_S: Sequence[float], replicates_SZ: Sequence[FloatArray] = ()) -> Estimate:
    """The mean of one value per seed; ``replicates_SZ`` are each value's, over the same items."""
    mean = float(np.mean(values_S))
    over_items = None
    if len(replicates_SZ):
        over_items = percentile_interval(mean, np.mean(replicates_SZ, axis=0))
    return Estimate(mean, mean_interval(values_S) if len(values_S) > 1 else None, over_items)


@dataclass(frozen=True)
class Trade:
    """Domain gain, forgetting, and the one less the weighted other, as fractions."""

    domain_gain: Estimate
    forgetting: Estimate
    combined: Estimate


def trade_of(
    own: Sequence[Sequence[Comparison]], less: Sequence[Sequence[Comparison]] | None = None
) -> Trade:
    """Means over seeds of the mean of each seed's models, less that of ``less``."""
    weight = own[0][0].forgetting_weight

    def part(
        value: Callable[[Comparison], float], of: Callable[[Comparison], FloatArray]
    ) -> Estimate:
        values = [float(np.mean([value(one) for one in models])) for models in own]
        replicates = [np.mean([of(one) for one in models], axis=0) for models in own]
        if less is not None:
            for seed, models in enumerate(less):
                values[seed] -= float(np.mean([value(one) for one in models]))
                replicates[seed] = replicates[seed] - np.mean([of(one) for one in models], axis=0)
        return estimate(values, replicates)

    return Trade(
        domain_gain=part(lambda c: c.domain_gain.value, lambda c: c.domain_gain_replicates),
        forgetting=part(lambda c: c.forgetting.value, lambda c: c.forgetting_replicates),
        combined=part(
            lambda c: c.combined.value,
            lambda c: c.domain_gain_replicates - weight * c.forgetting_replicates,
        ),
    )


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


def most_gain(gains_P: FloatArray, forgettings_P: FloatArray, forgetting: FloatArray) -> FloatArray:
    """The most that a curve gains where it forgets at most ``forgetting``.

    Args:
        gains_P: of P points of the curve, in its order; between two of them it is a line. More
            axes, of replicates, may follow.
        forgettings_P: of the same.
        forgetting: what may be forgotten. Where the curve cannot forget so little, it is held to
            the least that it forgets.
    """
    allowed = np.maximum(forgetting, forgettings_P.min(axis=0))
    best = np.where(forgettings_P <= allowed, gains_P, -np.inf).max(axis=0)
    for start in range(len(gains_P) - 1):
        low, high = forgettings_P[start], forgettings_P[start + 1]
        crosses = (low - allowed) * (high - allowed) < 0
        share = np.where(crosses, (allowed - low) / np.where(crosses, high - low, 1.0), 0.0)
        between = gains_P[start] + share * (gains_P[start + 1] - gains_P[start])
        best = np.where(crosses, np.maximum(best, between), best)
    return np.asarray(best)


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
