"""Export the model of a trial, or one between it and the base, as a directory by itself."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import LrmcError
from lrmc_ray.export.gguf import convert, find_converter
from lrmc_ray.export.new_directory import check_space, check_target, new_directory
from lrmc_ray.export.trial_model import (
    base_scores_of,
    check_base,
    finished_trial,
    study_settings,
    trial_model,
)
from lrmc_ray.export.weights import (
    Dtype,
    lost_by_rounding,
    size_of,
    size_of_directory,
    write_model,
)
from lrmc_ray.files.allowed_addresses import allow_addresses
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.origin import origin_of, write_origin
from lrmc_ray.files.study import StudyFile, read_study
from lrmc_ray.method.names import Blend
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.report.model_card import write_model_card

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for."""

    study: Path
    """The study's directory."""
    target: Path
    trial: int | None = None
    """None for the best one."""
    dtype: Dtype = "float32"
    blend: float = 1.0
    """How far from the base, 0, to the trial's model, 1."""
    form: Blend = "even"
    """How that is spread over the layers."""
    with_gguf: bool = False
    allow_network: bool = False
    """Contact the storage that the study names, should the trial have to be trained again."""
    address: str = "local"
    """Of Ray, should the trial have to be trained again."""
    verbose: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    trial: int
    size_bytes: int
    fingerprint: str
    """Of configuration and weights, see ``models.model_fingerprint``."""
    rounding: float | None
    """Of bf16, as a share of what training changed; None where it is not known."""
    gguf: Path | None


def export(request: ExportRequest) -> Exported:
    """Write the model's directory, whole or not at all.

    Raises:
        ConfigError: the trial has no scores, or the target is not free.
        IncompleteArtifactError: GGUF is wanted, and there is no converter; a file is gone.
        DataError: what was kept, or trained again, is not the model that was scored.
        DiskError: it would not fit on the disk.
    """
    study = read_study(request.study)
    entry = finished_trial(study, request.trial)
    check_target(request.target)
    converter = find_converter() if request.with_gguf else None
    settings = study_settings(request.study)
    base = None
    if request.blend != 1.0:
        base = local_directory(settings.model)
        check_base(base, base_scores_of(request.study, study))
    if request.allow_network:
        allow_addresses(settings.resources.storage)
    source = trial_model(
        request.study, study, entry, address=request.address, verbose=request.verbose
    )
    needed = size_of(source, dtype=request.dtype)
    check_space(request.target, needed * (2 if request.with_gguf else 1))
    origin = origin_of(
        settings,
        request.study.resolve().parent,
        train=entry.settings,
        study=study.id,
        trial=entry.number,
        limit=study.final_limit,
        blend=None if request.blend == 1.0 else request.blend,
        blend_form=request.form,
        dtype=request.dtype,
    )
    gguf = None
    with new_directory(request.target) as directory:
        write_model(
            source,
            directory,
            dtype=request.dtype,
            base=base,
            blend=request.blend,
            form=request.form,
        )
        passed("export.weights_written")
        write_origin(directory, origin)
        write_model_card(directory, request.study, request.target.name)
        passed("export.card_written")
        if converter is not None:
            gguf = convert(converter, directory, request.target.name, dtype=request.dtype)
    return Exported(
        directory=request.target,
        trial=entry.number,
        size_bytes=size_of_directory(request.target),
        fingerprint=model_fingerprint(request.target),
        rounding=_rounding(request, settings, source, study) if request.dtype == "bf16" else None,
        gguf=None if gguf is None else request.target / gguf.name,
    )


def _rounding(
    request: ExportRequest, settings: RunSettings, source: Path, study: StudyFile
) -> float | None:
    """What bf16 loses of the change against the base, if that can be had."""
    try:
        base = local_directory(settings.model)
        check_base(base, base_scores_of(request.study, study))
    except LrmcError as error:  # the model is written all the same
        _log.warning("what rounding to bf16 loses is not known: %s", error)
        return None
    return lost_by_rounding(source, base, blend=request.blend, form=request.form)
