"""Our lm-eval tasks: their names, and their files in a form that lm-eval reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from string import Template

from lrmc_ray.errors import ConfigError, IncompleteArtifactError

OURS: dict[str, tuple[str, ...]] = {
    "nl2sql": ("lrmc_nl2sql", "lrmc_nl2sql_gold"),
    "wordnet": ("lrmc_wordnet",),
    "antonyms": ("lrmc_antonyms",),
    "kinds": ("lrmc_kinds",),
    "capitals": ("lrmc_capitals",),
    "plain_english": ("lrmc_plain_english",),
    "ct_radio": ("lrmc_ct_radio", "lrmc_ct_radio_letter"),
    "packet_filter": ("lrmc_packet_filter", "lrmc_packet_filter_gold"),
    "nl2sql_spider": ("lrmc_nl2sql_spider", "lrmc_nl2sql_spider_gold"),
}
"""The lm-eval tasks behind each name that settings use."""

GROUPS: dict[str, tuple[str, ...]] = {
    "general_offline": ("wordnet", "antonyms", "kinds", "capitals", "plain_english"),
    "paper": ("mmlu", "bbh", "gpqa_main_zeroshot", "minerva_math"),
}
"""Names for several tasks at once: what needs no download, and the paper's four benchmarks."""


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """``names`` with every group replaced by its tasks, each task once."""
    return tuple(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


_HERE = Path(__file__).parent
_SCORE_MODULE = '''\
"""Written by lrmc_ray.tasks.registry.materialize."""

from lrmc_ray.tasks import nl2sql


def process_results(doc, results):
    return nl2sql.score(doc, results, database={database!r})
'''


def _version() -> str:
    """A digest of everything that decides the scores of our tasks."""
    digest = hashlib.sha256()
    for path in sorted([*_HERE.glob("*.py"), *_HERE.glob("yaml/*"), *_HERE.glob("data/*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


VERSION = _version()
"""Changes whenever a task, its data or its scoring does."""


def materialize(
    directory: str | os.PathLike[str],
    *,
    nl2sql_test_path: str | os.PathLike[str] | None = None,
    database_path: str | os.PathLike[str] | None = None,
    packet_filter_test_path: str | os.PathLike[str] | None = None,
    ct_radio_test_path: str | os.PathLike[str] | None = None,
    spider_test_path: str | os.PathLike[str] | None = None,
) -> Path:
    """Write our task files into ``directory``, for ``TaskManager(include_path=directory)``.

    The task files name their data by absolute path, so they are made where they are used and are
    not to be copied to another machine. The NL2SQL tasks are written if their data are given.

    Args:
        directory: Created if need be. Files of the same names are replaced.
        nl2sql_test_path: JSONL. Each line has ``messages``, a conversation that ends with the
            user's prompt and the assistant's answer, and ``sql``, the gold query.
        database_path: The SQLite database that the queries are about. Never written to.
        packet_filter_test_path: JSONL. Each line has ``messages`` as above, and ``filter``, the
            gold filter, which is run on the trace that the package ships.
        ct_radio_test_path: JSONL of radio exam questions. Each line has ``id``, ``question``, four
            ``choices`` and ``answer``, the index of the right one.
        spider_test_path: JSONL of Spider questions. Each line has ``id``, ``question`` with the
            schema, and ``sql``, the gold query.

    Returns:
        ``directory``.

    Raises:
        ConfigError: Only one of the two NL2SQL paths is given.
        IncompleteArtifactError: A file that is named does not exist.
    """
    if (nl2sql_test_path is None) != (database_path is None):
        raise ConfigError(
            "nl2sql_test_path and database_path must be given together, got "
            f"{nl2sql_test_path} and {database_path}; the questions are about the database"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    built = {"nl2sql", "packet_filter", "ct_radio", "nl2sql_spider"}
    paths = {name: _HERE / "data" / f"{name}.jsonl" for name in OURS.keys() - built}
    names = [part for name, parts in OURS.items() if name not in built for part in parts]
    if packet_filter_test_path is not None:
        names.extend(OURS["packet_filter"])
        paths["packet_filter_test"] = _existing(packet_filter_test_path, "packet_filter")
    if ct_radio_test_path is not None:
        names.extend(OURS["ct_radio"])
        paths["ct_radio_test"] = _existing(ct_radio_test_path, "ct_radio")
    if spider_test_path is not None:
        names.extend(OURS["nl2sql_spider"])
        paths["spider_test"] = _existing(spider_test_path, "nl2sql_spider")
    if nl2sql_test_path is not None and database_path is not None:
        names.extend(OURS["nl2sql"])
        paths["nl2sql_test"] = _existing(nl2sql_test_path, "nl2sql")
        database = _existing(database_path, "nl2sql")
        (directory / "nl2sql_score.py").write_text(
            _SCORE_MODULE.format(database=str(database)), encoding="utf-8"
        )
    # A JSON string is a YAML string too, whatever characters the path has.
    quoted = {name: json.dumps(str(path)) for name, path in paths.items()}
    for name in names:
        template = Template((_HERE / "yaml" / f"{name}.yaml").read_text(encoding="utf-8"))
        (directory / f"{name}.yaml").write_text(template.safe_substitute(quoted), encoding="utf-8")
    return directory


def _existing(path: str | os.PathLike[str], task: str) -> Path:
    resolved = Path(path).resolve()
    if not resolved.is_file():
        raise IncompleteArtifactError(
            f"the task {task} needs {resolved}, which does not exist. "
            "Run the stage that prepares the data, or correct the path."
        )
    return resolved
