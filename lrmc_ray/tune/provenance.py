"""What a result rests on, as ``study.json`` and ``compare.json`` tell it."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.run import scoring_code
from lrmc_ray.evaluate.task_files import task_fingerprints
from lrmc_ray.files.artifacts import content_digest, fingerprint
from lrmc_ray.files.study import TrainingFile
from lrmc_ray.models.directory import local_directory
from lrmc_ray.record.identity import identify
from lrmc_ray.record.sources import training_files, training_sources
from lrmc_ray.tasks.registry import expand

PACKAGES = ("lrmc-ray", "ray", "torch", "transformers", "optuna", "mlflow", "lm-eval", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def datasets(settings: RunSettings) -> list[TrainingFile]:
    """Every file of training data."""
    return [_described(path) for path in training_files(settings)]


def _described(path: Path) -> TrainingFile:
    return TrainingFile(name=path.stem, digest=content_digest(path)[:32], source=str(path))


def contents(settings: RunSettings) -> dict[str, str]:
    """Digests of what every run is trained and scored on, by the names that messages use.

    Settings name files and models; these say what is in them.

    Raises:
        LrmcError: the model, the data or a task cannot be used.
    """
    directory = local_directory(settings.model)
    made_of, _ = identify(settings, directory, training_sources(settings))
    names = expand([*settings.evaluate.domain_tasks, *settings.evaluate.general_tasks])
    return {
        "training data": made_of["data"],
        "model": made_of["model"],
        "tokenizer": made_of["tokenizer"],
        "chat template": made_of["chat_template"],
        "tasks": fingerprint({split: task_fingerprints(names, split) for split in get_args(Split)}),
        "scoring": fingerprint(scoring_code()),
    }


def check_unchanged(before: Mapping[str, str], settings: RunSettings) -> None:
    """Refuse to go on with other contents than those that a study began with.

    Raises:
        DataError: names what has changed.
    """
    if changed := _differing(before, contents(settings)):
        raise DataError(
            f"the {' and the '.join(changed)} must not change while a study runs, and did; give "
            "the same command again: it begins a new study of what is there now"
        )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in now if before.get(name) != now[name]]


@dataclass(frozen=True, order=True)
class EarlierStudy:
    """A study with the same settings and other contents."""

    created: str
    directory: Path
    contents: Mapping[str, str] = field(compare=False)
    """Empty where an older version began it, which did not say."""


def newest_earlier(
    directory: Path, file_name: str, asked: Mapping[str, object]
) -> EarlierStudy | None:
    """The newest study with the same settings beside ``directory``; None if there is none.

    Args:
        directory: of the study that is asked for.
        file_name: of the file that describes a study.
        asked: its settings, what two studies of the same command share.
    """
    name = directory.name.rpartition("-")[0]
    found = []
    for path in directory.parent.glob(f"{name}-*/{file_name}"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # a damaged one is named where it is read
        # A version that did not note what was asked may have had other settings besides.
        is_same = (
            values["asked"] == fingerprint(asked)
            if "asked" in values
            else path.parent.name == f"{name}-{fingerprint(asked)}"
            or _agree(values.get("settings"), asked)
        )
        if path.parent != directory and is_same:
            created = values.get("created", "")
            found.append(EarlierStudy(created, path.parent, values.get("contents") or {}))
    return max(found, default=None)


def _agree(first: object, second: object) -> bool:
    """Whether two values are the same, as far as both have the same settings."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return all(_agree(first[key], second[key]) for key in first.keys() & second.keys())
    return first == second


def why_new(
    directory: Path, file_name: str, asked: Mapping[str, object], now: Mapping[str, str]
) -> str | None:
    """Why a study that is about to begin in ``directory`` is not an earlier one that goes on.

    Args:
        directory: of the new study.
        file_name: of the file that describes a study.
        asked: its settings, what two studies of the same command share.
        now: its contents.

    Returns:
        One line for the user; None where no study with the same settings is there.
    """
    earlier = newest_earlier(directory, file_name, asked)
    if earlier is None:
        return None
    other = earlier.directory.name
    if earlier.contents:
        why = f"the {' and the '.join(_differing(earlier.contents, now))} changed since {other}"
    else:
        why = f"{other} does not say what it was trained and scored on"
    return f"{why}: {directory.name} begins anew, and {other} stays as it is"
