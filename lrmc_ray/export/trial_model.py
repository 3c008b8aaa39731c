"""The model of a finished trial: kept, or trained again to the same bits."""

import json
import logging
import shutil
from pathlib import Path

from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.config import RunSettings, TrainSettings, validate
from lrmc_ray.console import format_seconds
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError
from lrmc_ray.files.allowed_addresses import check_addresses
from lrmc_ray.files.artifacts import lock_directory, read_manifest
from lrmc_ray.files.names import BEST_MODEL, MODEL, SETTINGS_FILE
from lrmc_ray.files.study import StudyFile, TrialEntry, trial_directory
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.record.prepare import record_name
from lrmc_ray.record.run import record
from lrmc_ray.train.driver import MADE_BY as TRAIN
from lrmc_ray.train.driver import check_converged, train
from lrmc_ray.tune.choice import model_of
from lrmc_ray.tune.used import samples_of_search

_log = logging.getLogger(__name__)

AGAIN = "again"
"""The folder, in a trial's directory, in which it is trained again."""


def finished_trial(study: StudyFile, number: int | None) -> TrialEntry:
    """The trial of that number; by default the best one.

    Raises:
        ConfigError: there is no such trial, or it has no scores.
    """
    finished = [trial.number for trial in study.trials if trial.state == "COMPLETE"]
    known = ", ".join(map(str, finished)) or "none"
    if number is None and study.best is None:
        raise ConfigError(
            f"{study.id} has no best trial, so --trial must name one of its finished trials "
            f"({known}); add it"
        )
    wanted = study.best if number is None else number
    entry = study.trial(wanted) if wanted is not None else None
    if entry is None or entry.state != "COMPLETE" or entry.scores is None:
        state = "is not there" if entry is None else f"is {entry.state}"
        cause = f" ({entry.cause})" if entry is not None and entry.cause else ""
        raise ConfigError(
            f"--trial must be a finished trial of {study.id}, trial {wanted} {state}{cause}; the "
            f"finished ones are {known}"
        )
    return entry


def study_settings(directory: Path) -> RunSettings:
    """The settings that a search was asked for.

    Raises:
        IncompleteArtifactError: its file is gone.
        DataError: its file is damaged.
    """
    path = directory / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{directory} has no {SETTINGS_FILE}; run the same `lrmc tune` command again"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}); run the same `lrmc tune` command again"
        ) from None
    return validate(RunSettings, values, str(path))


def scored_fingerprint(directory: Path, entry: TrialEntry) -> str:
    """Fingerprint of the model whose scores a trial has.

    Raises:
        IncompleteArtifactError: the scores are gone.
    """
    assert entry.scores is not None, "a finished trial has them"
    manifest = read_manifest(directory / entry.scores, made_by="lrmc tune")
    return str(manifest["identity"]["model"])


def kept_model(directory: Path, study: StudyFile, entry: TrialEntry) -> Path | None:
    """The trial's model where it was kept; None where it was not.

    Raises:
        DataError: what was kept is not the model that was scored.
    """
    places = [model_of(directory, entry.number)]
    if entry.number == study.best:
        places.append(directory / BEST_MODEL)
    for place in places:
        if (place / "config.json").is_file():
            if model_fingerprint(place) != scored_fingerprint(directory, entry):
                raise DataError(
                    f"{place} must be the model that trial {entry.number} was scored with, its "
                    "weights are others; remove that directory, and it is trained again"
                )
            return place
    return None


def trial_model(
    directory: Path, study: StudyFile, entry: TrialEntry, *, address: str, verbose: bool
) -> Path:
    """The directory of a trial's model, which is trained again if it was not kept.

    Args:
        directory: of the study.
        study: what ``study.json`` says.
        entry: of a finished trial.
        address: of Ray, see ``ray_session``.
        verbose: show the workers' output.

    Raises:
        ConfigError: the study names a storage that no command of this user has named.
        DataError: training again gave other weights than those that were scored.
        DirectoryInUseError: the search is running.
    """
    kept = kept_model(directory, study, entry)
    if kept is not None:
        return kept
    settings = study_settings(directory)
    storage = settings.resources.storage
    check_addresses(storage, named_by=directory / SETTINGS_FILE, remedy="add --allow-network")
    seconds = float(entry.cost.get("train_seconds", 0.0))
    _log.info(
        "the model of trial %d was not kept; training it again, which took %s",
        entry.number,
        format_seconds(seconds),
    )
    with (
        lock_directory(directory),
        ray_session(address, log=directory / RAY_LOG, verbose=verbose, storage=storage),
    ):
        return train_again(directory, entry, settings)


def train_again(directory: Path, entry: TrialEntry, settings: RunSettings) -> Path:
    """Train a trial as the search did, and leave the model where the search would have kept it.

    Needs a running Ray session. A call that was interrupted goes on from its newest checkpoint.

    Args:
        directory: of the study.
        entry: of the trial.
        settings: of the search.

    Raises:
        DataError: the record, or the weights, are others than the trial's.
    """
    own = trial_directory(directory, entry.number)
    check_within(own, directory)
    trained = read_manifest(own / "training", made_by="lrmc tune")
    used = samples_of_search(settings)
    resources = settings.resources
    if entry.settings.get("reduction") == "fast":  # only then their number matters
        workers = (trained["world_size"], trained["world_size"])
        resources = resources.model_copy(update={"workers": workers})
    settings = settings.model_copy(
        update={
            "train": validate(TrainSettings, entry.settings, f"trial {entry.number}"),
            "resources": resources,
        }
    )
    if used is not None and record_name(settings) == trained["identity"]["record"]:
        used = None  # there was a record of all samples
    recorded = record(settings, directory.parent, used)
    if recorded.name != trained["identity"]["record"]:
        raise DataError(
            f"trial {entry.number} was trained on the record {trained['identity']['record']}, data "
            f"and settings now give {recorded.name}; put the data back as they were"
        )
    again = train(settings, recorded, own / AGAIN)
    check_converged(read_manifest(again, made_by=TRAIN))
    if model_fingerprint(again / MODEL) != scored_fingerprint(directory, entry):
        raise DataError(
            f"trial {entry.number} must be trained again to the weights that were scored, these "
            f"are others: {again / MODEL}; use the versions that study.json names, on the same "
            "kind of machine"
        )
    final = model_of(directory, entry.number)
    shutil.rmtree(final, ignore_errors=True)
    (again / MODEL).rename(final)
    shutil.rmtree(again)
    return final


def check_within(path: Path, directory: Path) -> None:
    """Refuse to write where a link in a study leads out of it.

    Raises:
        DataError: names the link's end.
    """
    if not path.resolve().is_relative_to(directory.resolve()):
        raise DataError(
            f"{path} must lie in {directory}, a link leads to {path.resolve()}; move that "
            "directory to its place"
        )


def base_scores_of(directory: Path, study: StudyFile) -> Path:
    """The base's scores that the trials were compared with.

    Raises:
        IncompleteArtifactError: the search has none yet.
    """
    if study.base_scores is None:
        raise IncompleteArtifactError(
            f"{directory} has no scores of the base; run the same `lrmc tune` command again"
        )
    return (directory / study.base_scores).resolve()


def check_base(base: Path, scores: Path) -> None:
    """Refuse a base that is not the one that the search began with.

    Raises:
        DataError: it is another one.
    """
    known = read_manifest(scores, made_by="lrmc tune")["identity"]["model"]
    if model_fingerprint(base) != known:
        raise DataError(
            f"a blend begins at the base of the search, {base} has other weights; put that model "
            "back, or name its directory as the search did"
        )
