"""Which files a task file rests on: what it includes, its data, its Python, what that names.

Relative names of data are looked for beside the task file, and then in the current folder, where
lm-eval looks. So a node that has the task file finds the same data, whatever folder it works in.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.errors import ConfigError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PACKED = ("", ".gz", ".bz2", ".xz")

_LOADERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")
"""Names that `datasets` gives to kinds of files; other names of data are folders or of the Hub."""

_REMOTE = re.compile(r"\w+://|.*::")
_LONGEST_NAME = 300


class _Function(str):
    """What stands behind ``!function`` in a task file."""


def read_task_file(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A task file with what it includes, and all files that were read.

    Raises:
        ConfigError: one is no YAML, no mapping, or does not exist.
    """
    own, _ = _parsed(path)
    included = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        other = path.parent / name
        if other.resolve() in {known.resolve() for known in files}:
            raise ConfigError(f"lm-eval refuses the task {path}: it includes {other} in a circle")
        values, read = read_task_file(other)
        values.pop("task_list", None)
        merged |= values
        files += read
    return {**merged, **own}, files


def named_functions(path: Path) -> list[str]:
    """What stands behind ``!function`` in a task file and in what it includes, overridden or not.

    Raises:
        ConfigError: a file is no YAML, no mapping, or does not exist.
    """
    _, files = read_task_file(path)
    return [function for file in files for function in _parsed(file)[1]]


def _parsed(path: Path) -> tuple[dict[str, Any], list[_Function]]:
    """One file as it stands, and what stands behind each ``!function`` of it.

    Raises:
        ConfigError: it is no YAML, no mapping, or does not exist.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    functions: list[_Function] = []

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Function:
        functions.append(_Function(loader.construct_scalar(node)))
        return functions[-1]

    Loader.add_constructor("!function", function)
    try:
        own = Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConfigError(f"lm-eval refuses the task {path}: {told}; correct the file") from error
    if not isinstance(own, dict):
        raise ConfigError(
            f"lm-eval refuses the task {path}: it is no mapping; correct the task file"
        )
    return own, functions


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The mapping of a task file, and those of tasks and groups that are written inside it."""
    yield config
    members = config.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, Mapping):
            yield from sections(member)


def data_files(config: Mapping[str, Any], folder: Path) -> dict[str, list[Path | str]]:
    """The data of one task by split, as `datasets` finds them; what is not local as it is written.

    Args:
        config: of the task.
        folder: of the task file.

    Raises:
        ConfigError: a name stands for no file, or for different ones in two places.
    """
    from datasets.data_files import get_data_patterns, sanitize_patterns

    options = config.get("dataset_kwargs") or {}
    named, inside = options.get("data_files"), options.get("data_dir")
    path = config.get("dataset_path")
    parts = [path] if path and path not in _LOADERS and _place(path, folder) is not None else []
    if path and path not in _LOADERS and not parts:
        return {}  # of the Hub
    parts += [inside] if inside else []
    if named is None:
        if not parts:
            return {}
        base = _place(str(Path(*parts)), folder)
        if base is None:
            raise ConfigError(_missing(config, str(Path(*parts)), folder))
        patterns = get_data_patterns(base.as_posix())
        return {str(split): _resolved(found, base.as_posix()) for split, found in patterns.items()}
    try:
        wanted = sanitize_patterns(named)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data_files of the task are not understood: {error}") from error
    return {
        split: [file for pattern in patterns for file in _files_of(config, pattern, parts, folder)]
        for split, patterns in wanted.items()
    }


def remote_data(names: Iterable[str]) -> list[str]:
    """What the task files among ``names`` have their data from beyond this machine and the Hub.

    Raises:
        ConfigError: a task file cannot be read, or data do not exist.
    """
    return [
        file
        for name in names
        if Path(name).is_file()
        for section in sections(read_task_file(Path(name))[0])
        for files in data_files(section, Path(name).parent).values()
        for file in files
        if isinstance(file, str)
    ]


def is_of_hub(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the data of one task are a data set of the Hub, and no files of this machine."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or path in _LOADERS or callable(config.get("custom_dataset")):
        return False
    return _place(path, folder) is None and not path.endswith(".py")


def _files_of(
    config: Mapping[str, Any], pattern: str, parts: list[str], folder: Path
) -> list[Path | str]:
    """The files that a pattern stands for, beside the task file or in the current folder."""
    if _REMOTE.match(pattern):
        return [pattern]
    name = str(Path(*parts, pattern))
    found = [_resolved([name], base.as_posix()) for base in _bases(name, folder)]
    found = [files for files in found if files]
    if not found:
        raise ConfigError(_missing(config, name, folder))
    if any(files != found[0] for files in found):
        raise ConfigError(
            f"{name} must mean one file, but there is one in {Path.cwd()} and another in {folder}; "
            "name it by its absolute path"
        )
    return found[0]


def _resolved(patterns: list[str], base: str) -> list[Path | str]:
    from datasets.data_files import resolve_pattern

    files: list[Path | str] = []
    for pattern in patterns:
        try:
            files += [Path(name).resolve() for name in resolve_pattern(str(pattern), base)]
        except FileNotFoundError:
            continue
    return files


def _bases(name: str, folder: Path) -> list[Path]:
    if Path(name).is_absolute():
        return [Path("/")]
    return list(dict.fromkeys([folder.resolve(), Path.cwd().resolve()]))


def _place(name: str, folder: Path) -> Path | None:
    """The folder of this name; None if there is none."""
    return next((b / name for b in _bases(name, folder) if (b / name).is_dir()), None)


def _missing(config: Mapping[str, Any], name: str, folder: Path) -> str:
    return (
        f"lm-eval refuses the task {config.get('task')}: its data {name} are not in "
        f"{' nor in '.join(map(str, _bases(name, folder)))}; correct `data_files` in the task file"
    )


def task_sources(task_file: Path) -> dict[str, Path]:
    """Every local file that decides what a task asks and how it is scored, by what it is for.

    Found are the task file and what it includes, its data of all splits, files that it names
    elsewhere, its Python, and the modules and files that the Python names by constant texts. What
    a program puts together from parts is not found.

    Raises:
        ConfigError: the task file cannot be read, or data do not exist.
    """
    config, read = read_task_file(task_file)
    folder = task_file.parent
    found = {f"file {index}": path for index, path in enumerate(read)}
    for number, section in enumerate(sections(config)):
        for split, files in data_files(section, folder).items():
            local = [file for file in files if isinstance(file, Path)]
            for index, file in enumerate(local):
                found[f"data {number} {split} {index}"] = file
        path = section.get("dataset_path")
        place = _place(path, folder) if path and path not in _LOADERS else None
        for index, file in enumerate(_all_files(place) if place else ()):
            found[f"folder {number} {index}"] = file
    named = [*_named(config, folder), *(file for path in read for file in _python_of(path))]
    known = {path.resolve() for path in found.values()}
    for path in dict.fromkeys(path.resolve() for path in named):
        if path not in known:
            found[f"named {_from(folder, path)}"] = path
    return found


def _from(folder: Path, path: Path) -> str:
    folder = folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _named(value: Any, folder: Path) -> Iterator[Path]:
    """Files that texts within ``value`` name."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _named(part, folder)
    elif isinstance(value, str) and not isinstance(value, _Function):
        yield from _existing(value, folder)


def _existing(name: str, folder: Path) -> Iterator[Path]:
    if not 0 < len(name) < _LONGEST_NAME or not {".", "/"} & set(name) or set("\n\0") & set(name):
        return
    for base in _bases(name, folder):
        try:
            if (base / name).is_file():
                yield base / name
        except OSError:  # no name that a file can have
            continue


def _python_of(task_file: Path) -> Iterator[Path]:
    """The Python files behind ``!function``, and what they name, to any depth."""
    modules = (spec.rpartition(".")[0] for spec in _parsed(task_file)[1])
    waiting = [task_file.parent / f"{module.replace('.', '/')}.py" for module in modules]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        if path.suffix != ".py":
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue  # lm-eval will say so
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                waiting += _existing(node.value, path.parent)
            elif isinstance(node, ast.Import):
                waiting += _modules([alias.name for alias in node.names], path.parent)
            elif isinstance(node, ast.ImportFrom):
                base = f"{node.module}." if node.module else ""
                names = [node.module or "", *(base + alias.name for alias in node.names)]
                waiting += _modules(names, path.parent)


def _modules(names: list[str], folder: Path) -> Iterator[Path]:
    for name in names:
        if name:
            path = folder / name.replace(".", "/")
            yield from (path.with_suffix(".py"), path / "__init__.py")
