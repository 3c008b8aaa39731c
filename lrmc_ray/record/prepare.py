"""From training files to tokenized shards, before a model is loaded."""

import contextlib
import dataclasses
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.console import progress
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import (
    PARTIAL,
    file_digest,
    fingerprint,
    is_finished,
    lock_directory,
    read_manifest,
    write_json,
)
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.storage import open_storage
from lrmc_ray.record.identity import MADE_BY, identify
from lrmc_ray.record.sources import Source, training_sources
from lrmc_ray.record.stored import EXAMPLES, StoredRecord

_log = logging.getLogger(__name__)

SORT_WINDOW = 4096
"""Examples that are sorted by length together, one row group; bounds the driver's memory."""


SMALLEST_SHARD_TOKENS = 4096


LARGEST_SHARD_TOKENS = 16_384
"""Bounds the memory of an actor, which holds a shard's candidates: 6 bytes each, 100 MB at most."""


SHARDS = 64
"""Shards between these bounds; a small data set has fewer, a large one more."""


PLAN = "plan.json"


INDEX = "index.parquet"
"""Name and domain of every sample of a record, in its order."""


REJECTS = "rejects.jsonl"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A record that is about to be made, or that is there."""

    settings: RunSettings
    identity: Mapping[str, Any]
    model_directory: Path
    sources: Sequence[Source]
    final: Path

    @property
    def partial(self) -> Path:
        """Where the record is made."""
        return self.final.with_name(self.final.name + PARTIAL)

    @property
    def stored(self) -> StoredRecord | None:
        """The record in the storage; None where there is none and all nodes share the disk."""
        storage = open_storage(self.settings.resources.storage)
        return None if storage is None else StoredRecord(storage, self.final.name)

    @property
    def provenance(self) -> dict[str, str]:
        """What every file of the record says of itself."""
        return {
            **{f"lrmc.{name}": str(self.identity[name]) for name in ("model", "tokenizer", "data")},
            "lrmc.record": self.final.name,
            "lrmc.tau": repr(self.identity["tau"]),
        }


def prepare(settings: RunSettings, output: Path) -> Preparation:
    """Read, check and tokenize the training data, unless that has been done; needs no Ray.

    Raises:
        DataError: training data that cannot be used.
        IncompleteArtifactError: the model or the training data do not exist.
    """
    from lrmc_ray.models import local_directory

    sources = training_sources(settings)
    model_directory = local_directory(settings.model)
    identity, sources = identify(settings, model_directory, sources)
    prepared = Preparation(
        settings, identity, model_directory, sources, output / "records" / fingerprint(identity)
    )
    stored = prepared.stored
    if not is_finished(prepared.final) and stored is not None and stored.is_finished():
        stored.view(prepared.final)
    if is_finished(prepared.final):
        _check_rejected(
            read_manifest(prepared.final, made_by=MADE_BY)["rejects"], settings, prepared.final
        )
        return prepared
    with lock_directory(prepared.partial):
        if not is_finished(prepared.final):
            shard_plan(prepared)
    return prepared


def shard_plan(prepared: Preparation) -> dict[str, Any]:
    """The tokenized examples and the shards that they are cut into; made if they are not there."""
    partial = prepared.partial
    path = partial / PLAN
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_text())
        examples = partial / EXAMPLES
        if examples.is_file() and file_digest(examples) == plan["examples_sha256"]:
            _check_rejected(plan["rejects"], prepared.settings, partial)
            return plan
        _log.warning("%s is not what was written there; tokenizing again", examples)
        path.unlink()
    plan = _tokenize(prepared)
    write_json(path, plan)
    passed("record.planned")
    return plan


def _check_rejected(rejects: Mapping[str, int], settings: RunSettings, directory: Path) -> None:
    """An earlier command may have allowed more rows to be left out."""
    limit = settings.data.max_rejected_share
    if rejects["count"] > limit * rejects["rows"]:
        raise DataError(
            f"at most {limit:.2%} of the rows may be skipped (data.max_rejected_share), "
            f"{rejects['count']} of {rejects['rows']} were; {directory / REJECTS} lists them: mend "
            "or remove them, or raise it"
        )


def _tokenize(prepared: Preparation) -> dict[str, Any]:
    """Tokenize every example, sorted by length within windows, and cut them into shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrmc_ray.models import load_tokenizer, vocabulary_size
    from lrmc_ray.record.encode import EncodingSummary, Example, encode_rows
    from lrmc_ray.record.rows import Rejects, read_rows

    data = prepared.settings.data
    tokenizer = load_tokenizer(prepared.model_directory)
    num_logits = vocabulary_size(prepared.model_directory)
    if len(tokenizer) > num_logits:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's head only {num_logits}; "
            "use the tokenizer that belongs to the model"
        )
    schema = pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("domain", pa.string(), nullable=False),
            pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("is_target", pa.list_(pa.bool_()), nullable=False),
        ]
    )
    summary = EncodingSummary()
    lengths = array("I")  # all that is kept of a sample, 4 bytes
    window: list[Example] = []
    path = prepared.partial / EXAMPLES
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
        )
        rejects = Rejects()
        if data.on_bad_row == "skip":
            file = stack.enter_context((prepared.partial / REJECTS).open("w", encoding="utf-8"))
            rejects = Rejects(file, max_share=data.max_rejected_share)
        bar = stack.enter_context(progress("Tokenizing", unit="samples"))

        def flush() -> None:
            window.sort(key=lambda example: (len(example.input_ids), example.sample_id))
            lengths.extend(len(example.input_ids) for example in window)
            columns = {
                name: [getattr(example, name) for example in window] for name in schema.names
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=SORT_WINDOW)
            window.clear()

        for example in encode_rows(
            read_rows(prepared.sources, rejects),
            tokenizer,
            max_length=data.max_length,
            on_long=data.on_long,
            vocabulary_size=num_logits,
            summary=summary,
            rejects=rejects,
        ):
            bar.advance()
            window.append(example)
            if len(window) == SORT_WINDOW:
                flush()
        flush()
    if rejects.count:
        _log.warning(
            "%d of %d rows cannot be used and were left out; %s lists them",
            *(rejects.count, rejects.rows, prepared.final / REJECTS),
        )
    if summary.endless_answers:
        _log.warning(
            "%d of %d answers do not end with a special token, so their end is not learned",
            *(summary.endless_answers, summary.answers),
        )
    return {
        **{
            name: getattr(summary, name)
            for name in ("samples", "tokens", "supervised_tokens", "dropped", "truncated")
        },
        "endless_answers": summary.endless_answers,
        "rejected": rejects.count,
        "rejects": {"rows": rejects.rows, "count": rejects.count},
        "vocabulary_size": num_logits,
        "tokenizer_size": len(tokenizer),
        "examples_sha256": file_digest(path),
        "shards": cut_into_shards(lengths),
    }


def cut_into_shards(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Consecutive ranges of samples that have about equally many tokens."""
    target = max(SMALLEST_SHARD_TOKENS, min(sum(lengths) // SHARDS, LARGEST_SHARD_TOKENS))
    shards: list[dict[str, Any]] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens >= target or index == len(lengths) - 1:
            name = f"part-{len(shards):05d}.parquet"
            shards.append({"name": name, "start": start, "stop": index + 1})
            start, tokens = index + 1, 0
    return shards
