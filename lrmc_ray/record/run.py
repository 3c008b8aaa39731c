"""Stage 0: record the candidate tokens of every position of the training data.

    python -m lrmc_ray.record --output runs

One teacher-forced forward pass of the base model, in an actor pool of Ray Data. The examples are
tokenized once and cut into shards of similar length; an actor writes each shard as one Parquet
file, under a name that the shard alone decides. So a shard that is done twice, because an actor
or a node died, replaces itself, and a command that was killed goes on with the missing shards.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.console import progress
from lrmc_ray.errors import DataError, DiskError
from lrmc_ray.files.artifacts import (
    file_digest,
    is_finished,
    lock_directory,
    publish,
    write_manifest,
)
from lrmc_ray.files.fault_points import passed
from lrmc_ray.record.actors import PartTotals, run_actors
from lrmc_ray.record.prepare import INDEX, REJECTS, Preparation, prepare, shard_plan
from lrmc_ray.record.stored import EXAMPLES, VIEW, StoredRecord

_log = logging.getLogger(__name__)


def record(settings: RunSettings, output: Path) -> Path:
    """The finished record of ``settings``, made now unless it is there already.

    Needs a running Ray session. Calls with the same model, data and record settings find the same
    directory; a call that was interrupted goes on with the shards that are missing.

    Raises:
        DataError: training data that cannot be used.
        IncompleteArtifactError: the model or the training data do not exist.
        ResourceError: not one actor fits into the cluster.
    """
    prepared = prepare(settings, output)
    final = prepared.final
    if is_finished(final):
        _log.info("the record %s is there already", final)
        if prepared.stored is not None and not prepared.stored.is_finished():
            _bring(final, prepared.stored)
        return final
    with lock_directory(prepared.partial):
        if not is_finished(final):
            try:
                _record(prepared)
            except DiskError:
                raise
            except Exception:
                # A command that finishes the same record removes the examples from the storage.
                if prepared.stored is None or not prepared.stored.is_finished():
                    raise
                _take_finished(prepared, prepared.stored)
    return final


def _record(prepared: Preparation) -> None:
    """Record the shards that are missing, write the manifest, and give the directory its name."""
    from lrmc_ray.record.describe import describe, summarize

    start = time.monotonic()
    partial, stored = prepared.partial, prepared.stored
    plan = shard_plan(prepared)
    shards = plan["shards"]
    if stored is None:
        done = _finished_parts(prepared, plan)
    else:
        done = _stored_parts(stored, plan)
        stored.put(partial / EXAMPLES, plan["examples_sha256"])
    missing = [shard for shard in shards if shard["name"] not in done]
    rows_done = sum(shard["stop"] - shard["start"] for shard in shards if shard["name"] in done)
    totals = PartTotals()
    for name, part in done.items():
        done[name] = totals.add(part)
    with progress("Recording", total=plan["samples"], unit="samples", completed=rows_done) as bar:
        for part in run_actors(prepared, missing, plan["tokenizer_size"]):
            if part["name"] not in done:
                done[part["name"]] = totals.add(part)
            passed("record.part_counted", part["name"])
            bar.advance(part["rows"])
    files = [done[shard["name"]] for shard in shards]
    if stored is None and any(
        file_digest(partial / file["name"]) != file["sha256"] for file in files
    ):
        # An actor that was thought dead has replaced a file: by the same content, but another
        # kind of processor rounds otherwise. Everything is counted again.
        totals = PartTotals()
        files = [
            totals.add(describe(partial / file["name"], tokenizer_size=plan["tokenizer_size"]))
            for file in files
        ]
    passed("record.parts_complete")
    index = _write_index(partial)
    manifest = {
        "kind": "records",
        "identity": dict(prepared.identity),
        "provenance": prepared.provenance,
        "model": prepared.settings.model.name,
        "vocabulary_size": plan["vocabulary_size"],
        "files": files,
        "index": index,
        "rejects": plan["rejects"],
        "summary": summarize(plan, [totals.sums]),
        "seconds": round(time.monotonic() - start, 2),
    }
    kept = {".lock", *done, INDEX, *([REJECTS] if plan["rejected"] else [])}
    if stored is not None:
        stored.put(partial / INDEX, index["sha256"])
        if not stored.commit(manifest):
            _take_finished(prepared, stored)
            return
        stored.mark(partial)
        kept.add(VIEW)
    for name in os.listdir(partial):
        if name not in kept:
            (partial / name).unlink()
    write_manifest(partial, manifest)
    passed("record.manifest_written")
    publish(partial, prepared.final, manifest)
    passed("record.published")


def _take_finished(prepared: Preparation, stored: StoredRecord) -> None:
    """Use the record that another command has finished in the storage meanwhile.

    On another kind of processor its numbers may be rounded otherwise; there is one record, not two.
    """
    _log.info("another command has finished the record %s; using that one", prepared.final.name)
    stored.tidy()
    stored.view(prepared.final)
    shutil.rmtree(prepared.partial)


def _finished_parts(prepared: Preparation, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an interrupted run left behind, verified; whatever is damaged is made again."""
    from lrmc_ray.record.describe import describe
    from lrmc_ray.record.parts import read_part

    done: dict[str, dict[str, Any]] = {}
    for shard in plan["shards"]:
        path = prepared.partial / str(shard["name"])
        if not path.is_file():
            continue
        try:
            table = read_part(path, prepared.provenance)
        except DataError as error:
            _log.warning("%s; recording that part again", error)
            path.unlink()
            continue
        if table.num_rows == shard["stop"] - shard["start"]:
            done[path.name] = describe(path, tokenizer_size=plan["tokenizer_size"])
    return done


def _stored_parts(stored: StoredRecord, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an interrupted run left in the storage, whole or not listed there."""
    rows = {shard["name"]: shard["stop"] - shard["start"] for shard in plan["shards"]}
    return {
        name: part for name, part in stored.described().items() if part["rows"] == rows.get(name)
    }


def _write_index(partial: Path) -> dict[str, str]:
    """One small file that says what training must know of every sample; its entry in the manifest.

    The examples have the order of the record; they are read a window at a time.
    """
    import pyarrow.parquet as pq

    path = partial / INDEX
    with pq.ParquetFile(partial / EXAMPLES, page_checksum_verification=True) as examples:
        names = ["sample_id", "domain"]
        schema = examples.schema_arrow
        for name in set(schema.names) - set(names):
            schema = schema.remove(schema.get_field_index(name))
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in range(examples.num_row_groups):
                writer.write_table(examples.read_row_group(group, columns=names))
    return {"name": INDEX, "sha256": file_digest(path)}


def _bring(final: Path, stored: StoredRecord) -> None:
    """Write a record that is on this disk, or in another storage, to the storage."""
    from lrmc_ray.record.parts import Records

    records = Records(final)
    with progress("Uploading the record", total=len(records.parts), unit="files") as bar:
        for number, part in enumerate(records.parts):
            stored.put(records.part_path(number), part.sha256)
            bar.advance()
    if (index := records.index_path()) is not None:
        stored.put(index, records.manifest["index"]["sha256"])
    stored.commit(records.manifest)
