"""The system message that a model was taught with, where all of its data begin with the same."""

import itertools
from collections.abc import Sequence

from lrmc_ray.errors import LrmcError
from lrmc_ray.record.hub import HUB, is_hub_name
from lrmc_ray.record.rows import Rejects, Row, read_rows
from lrmc_ray.record.sources import named_sources, split_domain

ROWS = 256
"""Rows of each file that are looked at, the first ones."""


def taught_system(data: Sequence[str]) -> str | None:
    """The first message of all rows that are looked at, if it is the same system message.

    Args:
        data: names of the training data. Those of the Hub are not asked for.

    Returns:
        None where rows differ, have none, or cannot be read here.
    """
    names = [split_domain(name)[1] for name in data]
    if any(name.startswith(HUB) or is_hub_name(name) for name in names):
        return None
    try:
        found = {
            _system_of(row)
            for source in named_sources(data)
            for row in itertools.islice(read_rows([source], Rejects(max_share=1.0)), ROWS)
        }
    except (LrmcError, OSError):
        return None
    return found.pop() if len(found) == 1 else None


def _system_of(row: Row) -> str | None:
    messages = row.content.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    first = messages[0]
    content = first.get("content")
    return content if first.get("role") == "system" and isinstance(content, str) else None
