"""What lies in an output directory: searches, comparisons, and what they were made from.

Only small files are read: descriptions and manifests. Sizes are those on the disk; a file with two
names counts once, where it is seen first.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrmc_ray.compare.description import COMPARISON_FILE, RUNS
from lrmc_ray.errors import IncompleteArtifactError, LrmcError
from lrmc_ray.evaluate.numbers import points
from lrmc_ray.files.artifacts import MANIFEST, PARTIAL
from lrmc_ray.files.names import MODEL
from lrmc_ray.files.study import STUDY_FILE, TRIALS, StudyFile, read_outline

Kind = Literal["search", "comparison", "record", "scores", "training", "unfinished"]
State = Literal["finished", "running", "unfinished", "damaged"]

IDENTITY = "identity.json"
"""What a training run was started with, from its first moment on."""


STAGES: dict[str, Kind] = {"records": "record", "scores": "scores", "training": "training"}
"""Folders of an output directory, and what lies in them."""


@dataclass(frozen=True)
class Entry:
    """One thing in an output directory."""

    kind: Kind
    path: Path
    state: State
    about: str
    """What it is, in a few words."""
    records: frozenset[str] = frozenset()
    """Records that it was made from, or will go on from, by their names."""
    scores: frozenset[Path] = frozenset()
    """Directories of scores that its report reads."""
    models: tuple[Path, ...] = ()
    """Models that its report does not read, the chosen one left out."""

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name


@dataclass
class Sizes:
    """Bytes on the disk, each file once."""

    _seen: set[tuple[int, int]] = field(default_factory=set)

    def of(self, path: Path) -> int:
        """Of a file, or of all files below a directory, that were not counted before."""
        total = 0
        for file in _files(path):
            status = file.lstat()
            key = status.st_dev, status.st_ino
            if status.st_nlink > 1 and key in self._seen:
                continue
            self._seen.add(key)
            total += status.st_blocks * 512
        return total


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for directory, _, names in os.walk(path):
            for name in names:
                yield Path(directory) / name
    elif path.exists():
        yield path


def inventory(output: Path) -> list[Entry]:
    """Everything in ``output`` that a command of this package has made, by kind and name.

    Raises:
        IncompleteArtifactError: there is no such directory.
    """
    if not output.is_dir():
        raise IncompleteArtifactError(
            f"{output} is no directory; name the --output of a command that has run"
        )
    entries = []
    for path in sorted(output.iterdir()):
        if (path / STUDY_FILE).is_file():
            entries.append(_search(path))
        elif (path / COMPARISON_FILE).is_file():
            entries.append(_comparison(path))
        elif path.name in STAGES and path.is_dir():
            entries += [_stage(child) for child in sorted(path.iterdir()) if child.is_dir()]
    order: list[Kind] = ["search", "comparison", "training", "record", "scores", "unfinished"]
    return sorted(entries, key=lambda entry: order.index(entry.kind))


def _search(path: Path) -> Entry:
    try:
        study = read_outline(path)
    except LrmcError as error:
        return Entry("search", path, "damaged", str(error).split(";", maxsplit=1)[0])
    done = sum(trial.state != "RUNNING" for trial in study.trials)
    about = [f"{done} trials", *_names(study)]
    if study.best is not None and (best := study.trial(study.best)) is not None:
        about.append(f"best is trial {study.best}{_scores_text(best.results)}")
    scores = [study.base_scores, *study.final.values()]
    scores += [trial.scores for trial in study.trials]
    trainings = [path / TRIALS / f"{trial.number:04d}" / "training" for trial in study.trials]
    is_finished = study.state == "FINISHED"
    return Entry(
        "search",
        path,
        "finished" if is_finished else "running",
        ", ".join(about),
        records=frozenset(filter(None, map(_record_of, trainings))),
        scores=_resolved(path, scores),
        models=tuple(_spare_models(study, trainings)) if is_finished else (),
    )


def _names(study: StudyFile) -> list[str]:
    """What it was taught, as the command named it."""
    data = study.settings.get("data")
    typed = data.get("train", ()) if isinstance(data, Mapping) else ()
    names = [Path(str(name)).name for name in typed] or sorted({f.name for f in study.datasets})
    return [f"on {', '.join(names[:2])}{' and more' if len(names) > 2 else ''}"] if names else []


def _scores_text(results: Mapping[str, Any]) -> str:
    if not {"eval/domain_gain", "eval/forgetting"} <= results.keys():
        return ""
    gain, lost = (results[f"eval/{name}"] for name in ("domain_gain", "forgetting"))
    return f"\n    gain {points(gain)}, forgetting {points(lost)} points on search items"


def _spare_models(study: StudyFile, trainings: list[Path]) -> Iterator[Path]:
    """Models of trials that are not the best one's."""
    for trial, training in zip(study.trials, trainings, strict=True):
        if trial.number != study.best and (training / MODEL).is_dir():
            yield training / MODEL


def _comparison(path: Path) -> Entry:
    try:
        values = json.loads((path / COMPARISON_FILE).read_text(encoding="utf-8"))
        runs = values["runs"]
        states = [run["state"] for run in runs]
        scores = [*values["base_scores"].values(), *(run.get("scores") for run in runs)]
        about = f"{len(values['methods'])} methods, {states.count('COMPLETE')} of {len(runs)} runs"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Entry("comparison", path, "damaged", f"{COMPARISON_FILE} is not readable: {error}")
    trainings = [run / "training" for run in sorted((path / RUNS).glob("*"))]
    is_finished = bool(states) and all(state in ("COMPLETE", "FAIL") for state in states)
    return Entry(
        "comparison",
        path,
        "finished" if is_finished else "running",
        about,
        records=frozenset(filter(None, map(_record_of, trainings))),
        scores=_resolved(path, scores),
        models=tuple(t / MODEL for t in trainings if is_finished and (t / MODEL).is_dir()),
    )


def _stage(path: Path) -> Entry:
    """A record, scores, or a training of its own."""
    kind = STAGES[path.parent.name]
    record = _record_of(path)
    records = frozenset() if record is None else frozenset([record])
    if path.name.endswith(PARTIAL) or not (path / MANIFEST).is_file():
        name = path.name.removeprefix(".").removesuffix(PARTIAL)
        about = f"{kind} {name}, goes on with the command that began it"
        return Entry("unfinished", path, "unfinished", about, records=records)
    manifest = _json(path / MANIFEST)
    if manifest is None:
        return Entry(kind, path, "damaged", f"{MANIFEST} is not readable")
    scores: list[str] = []
    if kind == "record":
        summary, identity = manifest.get("summary", {}), manifest.get("identity", {})
        about = f"{summary.get('samples', '?')} samples, tau {identity.get('tau', '?')}"
        about += f", {Path(str(manifest.get('model', '?'))).name}"
    elif kind == "training":
        identity = manifest.get("identity", {})
        about = (
            f"{identity.get('optimizer')}, {identity.get('loss')}, {manifest.get('steps')} steps"
        )
    else:
        identity = manifest.get("identity", {})
        tasks = [*identity.get("domain_tasks", []), *identity.get("general_tasks", [])]
        limit = identity.get("limit")
        about = "the base model" if identity.get("base") is None else "a tuned model"
        if identity.get("split") == "dev":
            about += ", search items"
        elif identity.get("test_share"):
            about += ", test items"
        about += f", at most {limit} a task" if limit else ""
        about += f"\n    {', '.join(map(str, tasks))}"
        scores = [str(identity[name]) for name in ("base", "general_from") if identity.get(name)]
    return Entry(
        kind,
        path,
        "finished",
        about,
        records=records,
        scores=frozenset((path.parent / name).resolve() for name in scores),
    )


def _record_of(training: Path) -> str | None:
    """The record that a training run was started with; None if it used none."""
    identity = _json(training / IDENTITY)
    record = None if identity is None else identity.get("record")
    return record if isinstance(record, str) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _resolved(path: Path, names: list[str | None]) -> frozenset[Path]:
    return frozenset((path / name).resolve() for name in names if name)
