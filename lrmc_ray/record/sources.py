"""Which files a list of names stands for: files, folders, glob patterns, each with its domain."""

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.config import CT_RADIO, DEMO, ENGLISH, PACKET_FILTER, RunSettings
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.record.hub import HUB, hub_files, is_hub_name
from lrmc_ray.tasks.built import ct_radio_files
from lrmc_ray.tasks.demo.english import english_file
from lrmc_ray.tasks.demo.files import demo_files
from lrmc_ray.tasks.demo.packet_questions import packet_files

KINDS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""What is read of a folder, and how; text files also packed, as .gz or .zst."""

PACKED = (".gz", ".zst")

_LABELLED = re.compile(r"(?P<domain>[\w.+-]{1,64})=(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One file of examples."""

    path: Path
    domain: str = ""
    """Domain of the rows that do not name their own."""


def suffix_of(path: Path) -> str:
    """What the file is by its name; "" if that is unknown."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if KINDS.get(suffix) not in ("parquet", "arrow") else ""
    return suffix if suffix in KINDS else ""


def kind_of(path: Path) -> str:
    """How the file is read; one of an unknown name has JSON lines."""
    return KINDS.get(suffix_of(path), "json lines")


def split_domain(name: str) -> tuple[str, str]:
    """``sql=train.jsonl`` as domain and name; a name without a label has the domain ``""``."""
    match = _LABELLED.fullmatch(name)
    if match is None or Path(name).exists():
        return "", name
    return match["domain"], match["name"]


def find_sources(names: Iterable[str]) -> list[Source]:
    """The files that ``names`` stand for, each once, in the order of the names.

    A name is a file, a folder (its files of a known kind, those of subfolders included, hidden ones
    left out), a glob pattern (``**`` for any depth) or a data set of the Hub; ``DOMAIN=`` before it
    labels the rows.

    Raises:
        IncompleteArtifactError: a name stands for no file.
        ConfigError: a file is named under two domains.
    """
    found: dict[Path, Source] = {}
    for labelled in names:
        domain, name = split_domain(labelled)
        for path in _files_of(name):
            source = Source(path, domain)
            earlier = found.setdefault(path.resolve(), source)
            if earlier.domain != domain:
                raise ConfigError(
                    f"data.train must give a file one domain, {path} has {earlier.domain!r} and "
                    f"{domain!r}; name it once"
                )
    return list(found.values())


def _files_of(name: str) -> list[Path]:
    if not name:
        raise IncompleteArtifactError("training data '' is no name; give a file, folder or pattern")
    if name.startswith(HUB):
        return _hub_files(name)
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files, _ = files_of_folder(path)
        if not files:
            raise IncompleteArtifactError(
                f"training data {name} is a folder without {', '.join(KINDS)} files; give one "
                "that has some"
            )
        return files
    if not Path(path.parts[0]).exists() and is_hub_name(name) and not suffix_of(path):
        return _hub_files(name)
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        is_pattern = glob.has_magic(name)
        raise IncompleteArtifactError(
            f"training data {name} "
            + ("matches no file" if is_pattern else "does not exist")
            + "; give existing files, folders or patterns, or a data set of the Hub"
        )
    return files


def files_of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are read, and those that are not; hidden ones are in neither.

    Of what ``datasets`` saved with ``save_to_disk`` the Arrow files are read, of several splits
    those of ``train``.

    Raises:
        IncompleteArtifactError: several splits were saved, and none is called ``train``.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        wanted = names[0] if len(names) == 1 else "train"
        if wanted not in names:
            raise IncompleteArtifactError(
                f"training data {folder} holds the splits {', '.join(names)}; give the folder of "
                f"one, such as {folder / (names or ['train'])[0]}"
            )
        files, unread = files_of_folder(folder / wanted)
        return files, [*unread, *(folder / name for name in names if name != wanted)]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / part["filename"] for part in state.get("_data_files", [])], []
    files, unread = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            own, others = files_of_folder(path)
            files += own
            unread += others
        elif path.is_file():
            (files if suffix_of(path) in KINDS else unread).append(path)
    return sorted(files), unread


def unread_files(names: Iterable[str]) -> list[Path]:
    """What lies in the folders among ``names`` and is not read."""
    folders = (Path(split_domain(labelled)[1]) for labelled in names)
    return [path for folder in folders if folder.is_dir() for path in files_of_folder(folder)[1]]


def _hub_files(name: str) -> list[Path]:
    """The files of a data set on the Hub.

    Raises:
        IncompleteArtifactError: it cannot be had, or a file of it is of no known kind.
    """
    files = list(hub_files(name))
    if wrong := [file.name for file in files if not suffix_of(file)]:
        raise IncompleteArtifactError(
            f"training data {name} must consist of {', '.join(KINDS)} files, {wrong[0]} is none; "
            "choose another data set, or give a file"
        )
    return files


def training_sources(settings: RunSettings) -> list[Source]:
    """The files that ``data.train`` names; as :func:`named_sources`."""
    return named_sources(settings.data.train)


def named_sources(data: Iterable[str]) -> list[Source]:
    """The files that names of training data stand for, the demo's made where they are asked for.

    Args:
        data: as ``data.train``: what :func:`find_sources` knows, and names of data of the project.

    Raises:
        IncompleteArtifactError: a name stands for no file.
        ConfigError: a file is named under two domains.
    """
    names = []
    for labelled in data:
        domain, name = split_domain(labelled)
        if name == DEMO:
            name = str(demo_files(cache_directory()).train)
        elif name == PACKET_FILTER and not Path(PACKET_FILTER).exists():
            name = str(packet_files(cache_directory()).train)
        elif name == CT_RADIO and not Path(CT_RADIO).exists():
            name = str(ct_radio_files(cache_directory()).train)
        elif name == ENGLISH and not Path(ENGLISH).exists():
            name = str(english_file(cache_directory()))
        names.append(f"{domain}={name}" if domain else name)
    return find_sources(names)


def training_files(settings: RunSettings) -> list[Path]:
    """The paths of :func:`training_sources`."""
    return [source.path for source in training_sources(settings)]
