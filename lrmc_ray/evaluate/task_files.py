"""Which files a task is made of: ours, written where lm-eval finds them, and the user's own."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.errors import ConfigError
from lrmc_ray.evaluate.request import Split
from lrmc_ray.files.artifacts import cache_directory, file_digest
from lrmc_ray.tasks.built import built_spider_file, ct_files
from lrmc_ray.tasks.demo.files import demo_files
from lrmc_ray.tasks.registry import GROUPS, OURS, materialize


def task_label(name: str) -> str:
    """How scores call the task: a file by its name without folder and suffix."""
    return Path(name).stem if Path(name).is_file() else name


def task_manager(names: Sequence[str], scratch: Path, split: Split) -> Any:
    """lm-eval's task manager with our tasks; its own are indexed only where they are asked for.

    Raises:
        ConfigError: a name is neither ours nor lm-eval's; the nearest names are given.
    """
    from lm_eval.tasks import TaskManager

    ours = {*OURS, *(part for parts in OURS.values() for part in parts)}
    materialize(scratch, **task_data(names, split))
    foreign = [name for name in names if name not in ours]
    # Reading the names of lm-eval's 15,000 tasks takes some 10 seconds.
    manager = TaskManager(
        include_path=str(scratch), include_defaults=any(map(_may_need_others, foreign))
    )
    for name in foreign:
        if name not in manager.all_tasks and not Path(name).is_file():
            known = [*OURS, *GROUPS, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"task {name} is neither one of ours ({', '.join(OURS)}) nor one of lm-eval's{hint}"
            )
    return manager


def _may_need_others(name: str) -> bool:
    """Whether a task is one of lm-eval's, or a file of a group that may name some of them."""
    return not Path(name).is_file() or "group:" in Path(name).read_text("utf-8", "replace")


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
    if wanted("ct"):
        ct = ct_files(cache)
        paths["ct_test_path"] = ct.dev if split == "dev" else ct.test
    if wanted("nl2sql_spider"):
        paths["spider_test_path"] = built_spider_file(cache)
    return paths


def task_fingerprints(names: Sequence[str], split: Split) -> dict[str, str]:
    """Digests of the local files that decide what is asked: built data, task files of one's own."""
    files = {str(key): path for key, path in task_data(names, split).items()} | own_files(names)
    return {name: file_digest(path) for name, path in files.items() if path.is_file()}


def own_files(names: Sequence[str]) -> dict[str, Path]:
    """Task files of one's own among ``names``, and the data that they name."""
    files: dict[str, Path] = {}
    for name in names:
        if Path(name).is_file():
            files |= {name: Path(name)}
            files |= {f"{name}: {path}": path for path in _data_files(Path(name))}
    return files


def _data_files(task_file: Path) -> list[Path]:
    """The local files that a task file names under ``data_files``."""
    text = task_file.read_text(encoding="utf-8", errors="replace")
    words = re.findall(r"""["']?(/[^"'\s,}\]]+)["']?""", text)
    return [Path(word) for word in words if Path(word).is_file()]
