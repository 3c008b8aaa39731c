"""Questions in English about network traffic, each with the packet filter that answers it.

What the test asks is new in two ways: the test alone uses two of the wordings of each kind, and no
other split asks about its hosts, networks, ports, tags, labels or numbers. The trace holds packets
for all of them, so every filter selects some.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import fingerprint, write_atomically
from lrmc_ray.tasks.demo.packet_kinds import KINDS, PacketKind
from lrmc_ray.tasks.demo.packet_values import VALUES
from lrmc_ray.tasks.demo.question_kinds import Split

SEED = 0
NUMBERS: dict[Split, int] = {"train": 600, "dev": 60, "test": 120}
SYSTEM_PROMPT = "Answer with a packet filter (pcap-filter)."

Example = dict[str, Any]


@dataclass(frozen=True)
class PacketFiles:
    """Where the questions are, as JSONL of ``messages`` and the gold ``filter``."""

    train: Path
    """What is learned."""
    dev: Path
    """For choices made during a search: new values, wordings as in training."""
    test: Path
    """New values and new wordings."""


def packet_files(cache: Path) -> PacketFiles:
    """The questions' files in ``cache``, made now unless they are there already."""
    paths = {}
    for split, number in NUMBERS.items():
        examples = make_examples(split, number, seed=SEED)
        paths[split] = cache / f"packet_filter-{split}-{fingerprint(examples)}.jsonl"
        if not paths[split].is_file():
            cache.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(example, sort_keys=True) + "\n" for example in examples]
            write_atomically(paths[split], "".join(lines).encode())
    return PacketFiles(train=paths["train"], dev=paths["dev"], test=paths["test"])


def make_examples(split: Split, number: int, *, seed: int) -> list[Example]:
    """Questions and answers, a function of the arguments alone.

    As many are of one kind as of another, as far as there are enough.

    Returns:
        Examples with the keys ``id``, ``kind``, ``question``, ``filter`` and ``messages`` (the
        system's, a user's and an assistant's turn).

    Raises:
        ConfigError: There are fewer different ones.
    """
    kinds = list(KINDS)
    random.Random(f"{seed} kinds {split}").shuffle(kinds)
    streams = [_questions_of_kind(kind, split, seed) for kind in kinds]
    examples: list[Example] = []
    while streams and len(examples) < number:
        for stream in list(streams):
            example = next(stream, None)
            if example is None:
                streams.remove(stream)
            elif len(examples) < number:
                examples.append({"id": f"{split}-{len(examples):04d}", **example})
    if len(examples) < number:
        raise ConfigError(f"number must be at most {len(examples)} for {split}, got {number}")
    random.Random(f"{seed} order {split}").shuffle(examples)
    return examples


def _questions_of_kind(kind: PacketKind, split: Split, seed: int) -> Iterator[Example]:
    """All questions of one kind in random order, every filling once before any comes again."""
    wordings = kind.unseen_wordings if split == "test" else kind.wordings
    fillings = list(kind.slots(VALUES[split]))
    random.Random(f"{seed} {split} {kind.name}").shuffle(fillings)
    for shift in range(len(wordings)):
        for place, slots in enumerate(fillings):
            question = wordings[(place + shift) % len(wordings)].format_map(slots)
            text = kind.filter.format_map(slots)
            yield {
                "kind": kind.name,
                "question": question,
                "filter": text,
                "messages": [
                    {"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": text},
                ],
            }
