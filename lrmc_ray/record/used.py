"""A record of the samples that a search can use, where that is not all of them.

It has a row for every sample of the training data, so the order of a run, which depends on their
number and domains, is that of a record of all. Rows that no run of the search reads have tokens and
no positions: the base model never sees them.
"""

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UsedSamples:
    """Which samples are recorded."""

    recipe: Mapping[str, Any]
    """What decides it, apart from the data; a part of the record's identity."""
    choose: Callable[[Sequence[str]], Collection[int]]
    """Gives their indices for the domains of all samples, in the order of the record."""


def shards_with(
    shards: Sequence[Mapping[str, Any]], indices: Collection[int]
) -> list[dict[str, Any]]:
    """``shards``, each with the places in it of the samples that are recorded, as ``only``."""
    chosen = sorted(indices)

    def within(start: int, stop: int) -> list[int]:
        first, last = bisect.bisect_left(chosen, start), bisect.bisect_left(chosen, stop)
        return [index - start for index in chosen[first:last]]

    return [{**shard, "only": within(shard["start"], shard["stop"])} for shard in shards]
