"""What a record was made with, and whether it fits the settings at hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.chat.answers import RENDERING
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import (
    MANIFEST,
    content_digest,
    fingerprint,
    read_manifest,
)
from lrmc_ray.models.identity import model_fingerprint, tokenizer_fingerprint
from lrmc_ray.models.template import template_fingerprint
from lrmc_ray.record.names import MADE_BY
from lrmc_ray.record.schema import SCHEMA_VERSION
from lrmc_ray.record.sources import Source, training_sources

_IDENTITY = {
    "model": "model",
    "chat_template": "chat template",
    "tokenizer": "tokenizer",
    "data": "training data",
    "max_length": "data.max_length",
    "on_long": "data.on_long",
    "on_bad_row": "data.on_bad_row",
    "tau": "tau",
    "k_min": "k_min",
    "k_max": "k_max",
    "prompt_k_max": "prompt_k_max",
    "precision": "precision",
    "rendering": "version of the code that renders conversations",
    "schema": "schema version",
}
"""Fields of a record's identity, as messages call them. Paths, names and times are not in it."""


def identify(
    settings: RunSettings, model_directory: Path, sources: Sequence[Source]
) -> tuple[dict[str, Any], list[Source]]:
    """What makes a record the one it is, and the sources in the order of their content.

    The order is that of domains and digests, so that names and places change nothing, not even
    the order of the samples.
    """
    by_content = sorted(
        ((source.domain, content_digest(source.path), source) for source in sources),
        key=lambda item: item[:2],
    )
    identity = {
        "model": model_fingerprint(model_directory),
        "chat_template": template_fingerprint(model_directory, settings.model.template_options),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "data": fingerprint([[domain, digest] for domain, digest, _ in by_content]),
        "max_length": settings.data.max_length,
        "on_long": settings.data.on_long,
        "on_bad_row": settings.data.on_bad_row,
        "tau": settings.recorded_tau(),
        "k_min": settings.record.k_min,
        "k_max": settings.record.k_max,
        "prompt_k_max": settings.record.prompt_k_max,
        "precision": settings.record.precision,
        "rendering": RENDERING,
        "schema": SCHEMA_VERSION,
    }
    assert identity.keys() == _IDENTITY.keys()
    return identity, [source for _, _, source in by_content]


_SIZES = ("tau", "k_min", "k_max", "prompt_k_max")
"""Fields that say how much of the same thing is recorded."""

SAMPLES = "samples"
"""The field that says of which samples, in a record that is not of all; see ``record.used``."""


def why_again(final: Path, identity: Mapping[str, Any]) -> str | None:
    """Why the same data are about to be recorded once more, in one line; None if they are not.

    Args:
        final: of the new record, beside the others.
        identity: of the new record.
    """
    for path in sorted(final.parent.glob(f"*/{MANIFEST}")):
        try:
            other = read_manifest(path.parent, made_by=MADE_BY).get("identity", {})
        except DataError:
            continue  # a damaged one is named where it is used
        differ = [name for name in _IDENTITY if other.get(name) != identity.get(name)]
        if path.parent != final and not differ and other and other.get(SAMPLES) is not None:
            return (
                f"{path.parent} has the same data and model, but candidates of the samples of one "
                "search alone, so they are recorded once more: a record is not extended; "
                "`lrmc record` with the same settings records all of them once"
            )
        if path.parent != final and differ and set(differ) <= set(_SIZES):
            sizes = [f"{name} {identity[name]} (there {other.get(name)})" for name in differ]
            remedy = "record once with the largest that you need (record.tau, record.k_max) to save"
            has_all = other.get(SAMPLES) in (None, identity.get(SAMPLES))
            if has_all and all((other.get(name) or 0) > identity[name] for name in differ):
                same = " ".join(f"record.{name}={other[name]}" for name in differ)
                remedy = f"that one holds all of it: give {same} to use it and save"
            return (
                f"{path.parent} has the same data and model, but {', '.join(sizes)} is asked for "
                f"now, so they are recorded once more: a record is not extended; {remedy} the "
                "second time"
            )
    return None


def check_fits(record: Path, settings: RunSettings, model_directory: Path) -> None:
    """Refuse to train on a record that was made of something else than ``settings`` say.

    A record may hold more than training asks for: a larger tau, k_min, k_max. The training data are
    compared where they can be found: training itself reads the record alone, on any machine.

    Raises:
        DataError: a field differs; the first is named.
        IncompleteArtifactError: ``record`` is not finished.
    """
    recorded = read_manifest(record, made_by=MADE_BY).get("identity", {})
    names = ["model", "chat_template", "tokenizer", "data", "max_length", "on_long"]
    names += ["rendering", "schema"]
    sources: list[Source] = []
    try:
        sources = training_sources(settings)
    except IncompleteArtifactError:
        names.remove("data")
    wanted, _ = identify(settings, model_directory, sources)
    remedy = "record again with this one, or train with what was recorded"
    for name in names:
        if recorded.get(name) != wanted[name]:
            raise DataError(
                f"{record} was recorded with another {_IDENTITY[name]} ({recorded.get(name)}) than "
                f"the one given ({wanted[name]}); {remedy}"
            )
    for name, least in (("tau", settings.train.tau), ("k_min", settings.train.k_min)):
        if recorded[name] < least:
            raise DataError(
                f"{record} was recorded with {name} = {recorded[name]}, training asks for {least}: "
                f"a set can be cut, not extended; lower train.{name}, or record again"
            )
