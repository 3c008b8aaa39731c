"""Which samples a run reads, known before anything is recorded; see :mod:`lrmc_ray.record.used`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.record.identity import SAMPLES
from lrmc_ray.record.names import MADE_BY
from lrmc_ray.record.used import UsedSamples
from lrmc_ray.train.sample_order import divide_samples

PLACES = "places"
"""Of the order of samples, those from its beginning on that are used."""

ORDER = ("seed", "domain_weights", "replay_share", "evaluate_every", "holdout_share")
"""Settings of ``train`` that decide the order of samples and which are held out."""


def used_samples(settings: TrainSettings, places: int) -> UsedSamples:
    """Those of the first ``places`` places of the order, and those that are held out."""

    def choose(domains: Sequence[str]) -> set[int]:
        order, held_out = divide_samples(domains, settings, "the training data")
        return {*order.of_step(0, batch_size=places), *held_out}

    return UsedSamples(_recipe(settings, places), choose)


def _recipe(settings: TrainSettings, places: int) -> dict[str, Any]:
    values = settings.model_dump(mode="json", include=set(ORDER))
    if not settings.evaluate_every:
        del values["holdout_share"]
    # How often the held-out samples are scored does not matter.
    values["evaluate_every"] = bool(settings.evaluate_every)
    return {**values, PLACES: places}


def check_used(record: Path, settings: TrainSettings) -> None:
    """Refuse a record of some samples alone, where training reads others.

    Args:
        record: the finished record.
        settings: of the run, ``epochs`` already turned into ``steps``.

    Raises:
        DataError: it is of other samples; the first setting that differs is named.
    """
    recorded = read_manifest(record, made_by=MADE_BY).get("identity", {}).get(SAMPLES)
    if recorded is None:
        return
    wanted = _recipe(settings, settings.steps * settings.batch_size)
    differs = [name for name in wanted if name != PLACES and recorded.get(name) != wanted[name]]
    if recorded[PLACES] < wanted[PLACES]:
        differs.append(PLACES)
    if settings.loss == "flow" and settings.flow_temperature is None:
        raise DataError(
            f"the loss flow needs train.flow_temperature with {record}, which holds the "
            f"samples of one search alone; set it, or record all with `{MADE_BY}`"
        )
    if differs:
        name = differs[0]
        raise DataError(
            f"{record} must hold the samples that training reads, it holds those of one "
            f"search alone ({name} is {recorded.get(name)} there, {wanted[name]} here); record all "
            f"with `{MADE_BY}`"
        )
