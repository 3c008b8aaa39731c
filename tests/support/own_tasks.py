"""Task files of one's own, and their data."""

import json
from pathlib import Path
from typing import Any

MINIMAL: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}
GENERATED: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
}
"""What makes another kind of task of it."""


def write(folder: Path, items, *, data="items.jsonl", **changes) -> Path:
    """A task file, ``None`` for a key that it is not to have, and its data."""
    folder.mkdir(exist_ok=True)
    (folder / data).write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(json.dumps(task))
    return path
