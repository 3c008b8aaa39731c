"""Which files a task is made of: ours, written where lm-eval finds them, and the user's own."""

import dataclasses
import difflib
import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.command_line import nearest
from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.evaluate.fewshot import drawn_split, never_its_own_example, tested_split
from lrmc_ray.evaluate.hub_data import check_reachable
from lrmc_ray.evaluate.json_items import JsonItem, is_json, read_dataset, read_items
from lrmc_ray.evaluate.no_code import keep_code_out
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.task_checks import check_config, check_items, check_supported
from lrmc_ray.evaluate.task_sources import (
    data_files,
    is_of_hub,
    read_task_file,
    sections,
    task_sources,
)
from lrmc_ray.files.artifacts import cache_directory, content_digest
from lrmc_ray.files.hub_calls import limit_hub_calls
from lrmc_ray.tasks.built import built_spider_file, ct_radio_files
from lrmc_ray.tasks.demo.files import demo_files
from lrmc_ray.tasks.demo.packet_questions import packet_files
from lrmc_ray.tasks.registry import GROUPS, OURS, materialize

TASK_SUFFIXES = (".yaml", ".yml")


def quieten() -> None:
    """Before the first task: no progress bars, and only errors of what lm-eval uses."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "evaluate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def task_label(name: str) -> str:
    """How scores call the task: a file by its name without folder and suffix."""
    return Path(name).stem if Path(name).is_file() else name


def task_manager(names: Sequence[str], scratch: Path, split: Split) -> Any:
    """lm-eval's task manager with our tasks; its own are indexed only where they are asked for.

    Raises:
        ConfigError: a name is neither ours nor lm-eval's; the nearest names are given.
    """
    from lm_eval.tasks import TaskManager

    keep_code_out()
    _let_datasets_write(scratch)
    ours = {*OURS, *(part for parts in OURS.values() for part in parts)}
    _check_files(names)
    materialize(scratch, **task_data(names, split))
    foreign = [name for name in names if name not in ours]
    if foreign:
        limit_hub_calls()
    # Reading the names of lm-eval's 15,000 tasks takes some 10 seconds.
    manager = TaskManager(
        include_path=str(scratch), include_defaults=any(map(_may_need_others, foreign))
    )
    for name in foreign:
        if name not in manager.all_tasks and not Path(name).is_file():
            known = [*OURS, *GROUPS, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            remedy = f"did you mean {' or '.join(close)}?" if close else "correct the name."
            raise ConfigError(
                f"task {name} is neither one of ours ({', '.join(OURS)}) nor one of lm-eval's; "
                f"{remedy} A task of your own is named by its file, mine.yaml"
            )
        if Path(name).is_file():
            _enter(manager, name)
    return manager


@functools.cache
def _cache_of_datasets() -> Path:
    """Where `datasets` keeps, as Arrow, what it has read, unless told otherwise here."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def _let_datasets_write(scratch: Path) -> None:
    """Let `datasets` write into ``scratch`` where it cannot write into its own place."""
    import datasets

    own = _cache_of_datasets()
    try:
        own.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(own, os.W_OK)
    except OSError:
        is_writable = False
    datasets.config.HF_DATASETS_CACHE = own if is_writable else scratch / "datasets"


def _check_files(names: Sequence[str]) -> None:
    """Refuse names of task files where there is no such file, before 15,000 names are read.

    Raises:
        ConfigError: names those that are nearest.
    """
    for name in names:
        path = Path(name)
        if path.suffix in TASK_SUFFIXES and not path.is_file():
            beside = [str(file) for end in TASK_SUFFIXES for file in path.parent.glob(f"*{end}")]
            hint = nearest(name, beside) or "; correct its name"
            raise ConfigError(f"the task file {name} does not exist{hint}")


def _enter(manager: Any, name: str) -> None:
    """Make a task file known to the manager, its data those that its fingerprint is of.

    Raises:
        ConfigError: the file is refused.
    """
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name)
    try:
        config = load_yaml(path)
        entry = TaskIndex.entry_from_config(config)
    except Exception as error:  # whatever YAML and a task's Python may raise
        raise _refused(name, error) from error
    if entry is None:
        raise _refused(name, "it names neither a task nor a group")
    for section in sections(config):
        own = section.get("task")
        check_supported(own if isinstance(own, str) else name, section)
        _place_data(section, path.parent)
    manager.task_index[name] = entry


def _place_data(config: Any, folder: Path) -> None:
    """Name the data of one task by their places; local JSON is read here, see ``json_items``."""
    files = data_files(config, folder)
    if not files:
        return
    if is_json(files, config):
        _check_is_not_empty(config, files)
    options = dict(config.get("dataset_kwargs") or {})
    whole = folder / str(config.get("dataset_path"))
    # A folder that describes itself may give its files other meanings.
    if is_json(files, config) and not (whole / "README.md").is_file():
        config["custom_dataset"] = functools.partial(read_dataset, files, options.get("field"))
        config["dataset_kwargs"] = {}
        return
    named = {split: [str(file) for file in part] for split, part in files.items()}
    config["dataset_kwargs"] = {**options, "data_files": named}
    if whole.is_dir():
        config["dataset_path"] = str(whole.resolve())


def _check_is_not_empty(config: Any, files: Mapping[str, Sequence[Path | str]]) -> None:
    split = config.get("test_split") or config.get("validation_split")
    asked = [Path(file) for file in files.get(split, ())]
    field = (config.get("dataset_kwargs") or {}).get("field")
    if asked and not read_items(asked, field):
        raise DataError(
            f"the task {config.get('task')} must have items, but there are none in "
            f"{', '.join(map(str, asked))}; write some, one a line"
        )


def _fields(name: str) -> list[str]:
    """The fields that the items of a task file have; empty where they cannot be told."""
    config, _ = read_task_file(Path(name))
    files = data_files(config, Path(name).parent)
    if not is_json(files, config):
        return []
    items = read_items([Path(file) for part in files.values() for file in part])
    return list(dict.fromkeys(field for item in items for field in item.row))


def _refused(name: str, why: Exception | str) -> ConfigError:
    told, hint = why if isinstance(why, str) else error_text(why), ""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", told):
        from lm_eval.config.task import TaskConfig

        known = [field.name for field in dataclasses.fields(TaskConfig)]
        told, hint = f"it has no field {unknown[1]}", nearest(unknown[1], known)
    elif (unknown := re.search(r"'(\w+)' is undefined", told)) and Path(name).is_file():
        fields = _fields(name)
        known_text = f" (they have {', '.join(fields)})" if fields else ""
        told = f"its items have no field {unknown[1]}{known_text}"
        hint = nearest(unknown[1], fields)
    return ConfigError(
        f"lm-eval refuses the task {name}: {told}; correct the task file (its data must be where "
        f"`data_files` says), or choose another task{hint}"
    )


def error_text(error: Exception) -> str:
    """An error in one line, with its innermost cause."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__


def load_task(manager: Any, part: str) -> dict[str, Any]:
    """One task, or one of lm-eval's groups, with its items, checked.

    Raises:
        ConfigError: lm-eval refuses it, or it would be scored in part.
        DataError: it has no items, or one that would be scored wrongly.
    """
    try:
        loaded: dict[str, Any] = manager.load([part])
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever YAML, datasets and lm-eval may raise
        if isinstance(error.__cause__, ConfigError | DataError):
            raise error.__cause__ from error
        raise _refused(part, error) from error
    if not loaded["tasks"]:
        raise ConfigError(f"the task {part} has no tasks in it; correct its file")
    is_own = Path(part).is_file()
    for task_name, task in loaded["tasks"].items():
        if not len(task.eval_docs):
            raise DataError(f"task {task_name} has no items; check its data files")
        if not hasattr(task.config, "metric_list"):
            continue  # a class of its own, with a configuration of its own
        check_config(task_name, _values(task.config))
        if is_own:
            _check_own(task, task_name)
        never_its_own_example(task)
    return loaded


def _check_own(task: Any, name: str) -> None:
    """Look at the items of a task file, and at those that are examples."""
    check_items(task, list(task.eval_docs), _places(task, name, tested_split(task)))
    if task.config.num_fewshot:
        examples = _places(task, f"{name}, examples", drawn_split(task))
        check_items(task, list(task.sampler.df), examples)


def _values(config: Any) -> Mapping[str, Any]:
    return {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}


def _places(task: Any, name: str, split: str | None) -> Callable[[int], str]:
    """Where the item of an index stands, as messages say it."""
    items = _json_items(task, split)

    def place(index: int) -> str:
        return items[index].place if items else f"{name}, item {index}"

    return place


def _json_items(task: Any, split: str | None) -> list[JsonItem]:
    """The items of a task as its own files have them; none where it makes others of them."""
    dataset = task.config.custom_dataset
    is_ours = isinstance(dataset, functools.partial) and dataset.func is read_dataset
    if not is_ours or split is None or task.config.process_docs is not None:
        return []
    files, field = dataset.args
    return read_items(files[split], field)


def check_tasks(names: Sequence[str], split: Split) -> None:
    """Refuse tasks that would be scored wrongly or in part, before a model is loaded.

    Of lm-eval's own tasks the definitions are looked at, and whether the Hub gives the items.

    Raises:
        ConfigError: a task does not exist, is refused by lm-eval, or has what is not scored.
        DataError: an item of a task file would be scored wrongly.
        IncompleteArtifactError: data of one of ours are not built, or the Hub does not give those
            of another one.
    """
    ours = {*OURS, *(part for parts in OURS.values() for part in parts)}
    foreign = [name for name in names if name not in ours]
    if not foreign:
        task_data(names, split)
        return
    quieten()
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager(names, Path(scratch), split)
        on_hub: dict[str, str] = {}
        for name in foreign:
            if Path(name).is_file():
                on_hub |= _hub_data_of(name)
                continue
            for task_name, config in _definitions(manager, name):
                check_config(task_name, config)
                if is_of_hub(config, Path()):
                    on_hub[task_name] = config["dataset_path"]
        check_reachable(on_hub)
        for name in foreign:
            if Path(name).is_file():
                load_task(manager, name)


def _hub_data_of(name: str) -> dict[str, str]:
    """The data on the Hub that a task file names, by its name."""
    config, _ = read_task_file(Path(name))
    folder = Path(name).parent
    found = [part["dataset_path"] for part in sections(config) if is_of_hub(part, folder)]
    return {f"{name}{f' ({path})' if len(found) > 1 else ''}": path for path in found}


def _definitions(manager: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks that a name of lm-eval's stands for, by their files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None:
        return
    if not entry.yaml_path:  # a tag
        for member in sorted(entry.tags):
            yield from _definitions(manager, member)
        return
    config = load_yaml(entry.yaml_path, resolve_func=False)
    members = config.get("task")
    if not isinstance(members, list):
        yield name, config
        return
    for member in members:
        inner = member if isinstance(member, str) else member.get("task", member.get("group"))
        if isinstance(inner, str) and inner != name:
            yield from _definitions(manager, inner)


def _may_need_others(name: str) -> bool:
    """Whether a task is one of lm-eval's, or a file of a group that names some of them."""
    if not Path(name).is_file():
        return True
    config, _ = read_task_file(Path(name))
    members = config.get("task")
    return isinstance(members, list) and not all(
        isinstance(member, Mapping) and "dataset_path" in member for member in members
    )


def task_data(names: Sequence[str], split: Split) -> dict[str, Path]:
    """The data files of our tasks that are not shipped, as ``materialize`` takes them.

    Raises:
        IncompleteArtifactError: one has to be built first; the message says how.
    """

    def wanted(task: str) -> bool:
        return bool({task, *OURS[task]} & set(names))

    paths: dict[str, Path] = {}
    cache = cache_directory()
    if wanted("nl2sql"):
        demo = demo_files(cache)
        paths["nl2sql_test_path"] = demo.dev if split == "dev" else demo.test
        paths["database_path"] = demo.database
    if wanted("packet_filter"):
        packets = packet_files(cache)
        paths["packet_filter_test_path"] = packets.dev if split == "dev" else packets.test
    if wanted("ct_radio"):
        ct_radio = ct_radio_files(cache)
        paths["ct_radio_test_path"] = ct_radio.dev if split == "dev" else ct_radio.test
    if wanted("nl2sql_spider"):
        paths["spider_test_path"] = built_spider_file(cache)
    return paths


def task_fingerprints(names: Sequence[str], split: Split) -> dict[str, str]:
    """Digests of the local files that decide what is asked: built data, task files of one's own."""
    files = {str(key): path for key, path in task_data(names, split).items()} | own_files(names)
    return {name: content_digest(path) for name, path in files.items() if path.is_file()}


def own_files(names: Sequence[str]) -> dict[str, Path]:
    """Task files of one's own among ``names``, and all files that they rest on."""
    files: dict[str, Path] = {}
    for name in names:
        if Path(name).is_file():
            files |= {f"{name}: {what}": path for what, path in task_sources(Path(name)).items()}
    return files


def located(name: str) -> str:
    """A task's name for a process that may work in another folder: a file by its full path."""
    return str(Path(name).resolve()) if Path(name).is_file() else name
