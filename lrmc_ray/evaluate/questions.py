"""``questions.parquet`` beside a model's scores: what every item asked, and what is right.

Items are kept by their ids; this is what people read beside them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.item_rows import items_of
from lrmc_ray.files.artifacts import write_atomically

QUESTIONS_FILE = "questions.parquet"

LONGEST = 2000
"""Characters of a question, or an answer, that are kept: the last ones, where the question is."""

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("expected", pa.string()),
    ],
    metadata={"lrmc.schema_version": "1"},
)


@dataclass(frozen=True)
class Asked:
    """An item as a person reads it."""

    question: str
    expected: str | None


def describe_item(task: Any, sample: dict[str, Any]) -> None:
    """Note in lm-eval's ``sample`` what it asked, in which choices, and what is right.

    Args:
        task: lm-eval's.
        sample: one of its items; ``right`` is there where it has choices.
    """
    doc = sample["doc"]
    text, target = task.doc_to_text(doc), sample["target"]
    right = sample.get("right")
    if right is not None:
        sample["choices"] = [str(choice) for choice in task.doc_to_choice(doc)]
        if isinstance(text, int):  # the choices are contexts, and all end alike
            text = target
        known = [sample["choices"][i] for i in right if 0 <= i < len(sample["choices"])]
        target = list(dict.fromkeys(known))
    short = doc.get("question") if isinstance(doc, Mapping) else None
    sample["question"] = short if isinstance(short, str) and short in str(text) else str(text)
    answers = target if isinstance(target, list) else [target]
    sample["expected"] = " / ".join(str(answer).strip() for answer in answers) or None


def question_rows(
    name: str, samples: Mapping[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Rows of the items of one requested task, texts without a question left out."""
    for _, items, prefix in items_of(samples):
        for item in items:
            if item["output_type"] != "loglikelihood_rolling" and "question" in item:
                yield {
                    "task": name,
                    "item_id": f"{prefix}{item['doc'].get('id', item['doc_id'])}",
                    "question": _ending(item["question"]),
                    "expected": None if item["expected"] is None else _ending(item["expected"]),
                }


def _ending(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"[...] {text[-LONGEST:]}"


def write_questions(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file, whole or not at all."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    pq.write_table(table, sink, write_page_checksum=True, compression="zstd")
    write_atomically(directory / QUESTIONS_FILE, sink.getvalue().to_pybytes())


def read_questions(directory: Path) -> dict[tuple[str, str], Asked]:
    """Every item by task and id; nothing where an older version scored.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / QUESTIONS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        source = pa.BufferReader(content)
        rows = pq.ParquetFile(source, page_checksum_verification=True).read().to_pylist()
        return {(r["task"], r["item_id"]): Asked(r["question"], r["expected"]) for r in rows}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove it, reports go without questions then"
        ) from None
