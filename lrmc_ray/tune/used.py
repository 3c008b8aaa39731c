"""Which samples the trials of a search read: where that is not all, only those are recorded.

All trials take the same samples in the same order, unless a setting is searched that decides it.
"""

from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.record.sources import training_files
from lrmc_ray.record.used import UsedSamples
from lrmc_ray.train.used import ORDER, used_samples
from lrmc_ray.tune.row_counts import count_tokens

LARGEST_SHARE = 0.75
"""Of the rows. Beyond it all are recorded: other searches, and training alone, can use that."""


def samples_of_search(settings: RunSettings) -> UsedSamples | None:
    """The samples that trials read; None for all."""
    rows, _ = count_tokens(training_files(settings), settings.data.max_length)
    places = _places(settings, rows)
    return None if places is None else used_samples(settings.train, places)


def recorded_samples(settings: RunSettings, rows: int) -> float:
    """How many of so many samples are recorded."""
    places = _places(settings, rows)
    return rows if places is None else places + _held_out(settings, rows)


def _places(settings: RunSettings, rows: int) -> int | None:
    """Places of the order of samples that trials come to; None where all samples are needed."""
    train, searched = settings.train, settings.parameters
    if train.epochs is not None or searched.keys() & {"epochs", *ORDER}:
        return None
    if any(one.range == "auto" for one in searched.values()):
        return None  # found by the candidates of all
    if train.flow_temperature is None and "flow" in _values(settings, "loss"):
        return None  # it is the median over all
    places = int(max(_values(settings, "steps"))) * int(max(_values(settings, "batch_size")))
    return places if places + _held_out(settings, rows) <= LARGEST_SHARE * rows else None


def _held_out(settings: RunSettings, rows: int) -> float:
    return settings.train.holdout_share * rows if settings.train.evaluate_every else 0.0


def _values(settings: RunSettings, name: str) -> list[Any]:
    """What a setting of ``train`` can be in a trial: its choices, or its bounds."""
    values: list[Any] = [getattr(settings.train, name)]
    if (searched := settings.parameters.get(name)) is not None:
        values += searched.choices or (searched.low, searched.high)
    return values
