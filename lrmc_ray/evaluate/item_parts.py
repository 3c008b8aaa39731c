"""Which items of a domain task a search chooses by, and which are kept for the end.

Some of our tasks come in two parts. Every other one is divided here, by what its items say: an
item stays in its part when others are added, and the same item in another file is in the same part.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrmc_ray.evaluate.request import Group, KeptApart, Split

IN_TWO_PARTS = ("nl2sql", "packet_filter", "ct_radio")
"""Our tasks whose files are two already, see ``task_files.task_data``."""

FEWEST_ITEMS = 4
"""Items that each part has at least; a task with fewer than twice as many is not divided."""

LEAST_OF_WANTED = 0.8
"""Of the items that a part should have, those that it has at least: with few items, chance might
give it less. Only then may an item change its part when others are added."""


def is_divided(name: str, group: Group, share: float) -> bool:
    """Whether the items of a task are to be divided, if there are enough of them."""
    return group == "domain" and name not in IN_TWO_PARTS and share > 0.0


def divide_items(
    items: Mapping[str, Iterable[Mapping[str, Any]]], split: Split, kept: KeptApart
) -> "dict[str, Indices] | None":
    """Indices of the items of one part, ascending, by the name of the task.

    Args:
        items: of every task that belongs together, for example of lm-eval's groups.
        split: ``dev`` for the items that a search chooses by, ``test`` for the others.
        kept: how many are kept for the end, and which.

    Returns:
        None where the items are too few: fewer than two different ones in a task, or fewer than
        ``2 * FEWEST_ITEMS`` in all.
    """
    places = {task: [_place(item, kept.seed) for item in rows] for task, rows in items.items()}
    different = sorted({place for found in places.values() for place in found})
    if len(different) < 2 * FEWEST_ITEMS or any(len(set(p)) < 2 for p in places.values()):
        return None
    wanted = (kept.share * len(different), (1.0 - kept.share) * len(different))
    most = len(different) - FEWEST_ITEMS
    fewest = [
        min(max(FEWEST_ITEMS, math.floor(LEAST_OF_WANTED * number)), most) for number in wanted
    ]
    border = _border(different, kept.share, fewest[0], fewest[1])
    parts: dict[str, Indices] = {}
    for task, found in places.items():
        own = _border(sorted(set(found)), border, 1, 1)
        parts[task] = Indices(
            index for index, place in enumerate(found) if (place < own) == (split == "test")
        )
    return parts


class Indices(list[int]):
    """Indices that are looked up at once: lm-eval asks for each item whether it is among them."""

    @functools.cached_property
    def _all(self) -> frozenset[int]:
        return frozenset(self)

    def __contains__(self, index: object) -> bool:
        return index in self._all


def _place(item: Mapping[str, Any], seed: int) -> float:
    """A number from 0 to 1 that is drawn by the content of an item, whatever its ``id`` is."""
    content = {name: value for name, value in item.items() if name != "id"}
    text = json.dumps([seed, content], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2.0**48


def _border(places: Sequence[float], wanted: float, fewest: int, fewest_above: int) -> float:
    """Below it are the items that are kept: ``wanted``, moved until each side has enough."""
    below = sum(place < wanted for place in places)
    number = min(max(below, fewest), len(places) - fewest_above)
    return wanted if number == below else places[number]
