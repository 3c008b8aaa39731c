"""Stage 0: record the candidate tokens of every position of the training data.

    python -m lrmc_ray.record --output runs

One teacher-forced forward pass of the base model, in an actor pool of Ray Data. The examples are
tokenized once and cut into shards of similar length; an actor writes each shard as one Parquet
file, under a name that the shard alone decides. So a shard that is done twice, because an actor
or a node died, replaces itself, and a command that was killed goes on with the missing shards.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.console import progress
from lrmc_ray.errors import DiskError
from lrmc_ray.files.artifacts import (
    file_digest,
    is_finished,
    lock_directory,
)
from lrmc_ray.files.fault_points import passed
from lrmc_ray.record.actors import run_actors
from lrmc_ray.record.commit import commit
from lrmc_ray.record.describe import PartTotals, describe, summarize
from lrmc_ray.record.examples import write_index
from lrmc_ray.record.names import EXAMPLES, INDEX
from lrmc_ray.record.prepare import Preparation, prepare, read_or_make_plan
from lrmc_ray.record.recording import Part, Recording
from lrmc_ray.record.used import UsedSamples

_log = logging.getLogger(__name__)


def record(settings: RunSettings, output: Path, used: UsedSamples | None = None) -> Path:
    """The finished record of ``settings``, made now unless it is there already.

    Needs a running Ray session. Calls with the same model, data and record settings find the same
    directory; a call that was interrupted goes on with the shards that are missing.

    Args:
        settings: of the run.
        output: holds the records.
        used: the samples that are enough, see :func:`lrmc_ray.record.prepare.prepare`.

    Raises:
        DataError: training data that cannot be used.
        IncompleteArtifactError: the model or the training data do not exist.
        ResourceError: not one actor fits into the cluster.
    """
    prepared = prepare(settings, output, used)
    final = prepared.final
    if is_finished(final):
        _log.info("the record %s is there already", final)
        prepared.recording.bring(final)
        return final
    with lock_directory(prepared.partial):
        if not is_finished(final):
            recording = prepared.recording
            try:
                _record(prepared, recording)
            except DiskError:
                raise
            except Exception:
                # A command that finishes the same record removes the examples from the storage.
                if not recording.taken_over(final):
                    raise
    return final


def _record(prepared: Preparation, recording: Recording) -> None:
    """Record the shards that are missing, and commit the record with its manifest."""
    start = time.monotonic()
    partial = prepared.partial
    plan = read_or_make_plan(prepared)
    parts, totals = _record_shards(prepared, recording, plan)
    if recording.replaced(parts):
        totals = PartTotals()
        parts = [
            totals.add(describe(partial / part["name"], tokenizer_size=plan["tokenizer_size"]))
            for part in parts
        ]
    passed("record.parts_complete")
    write_index(partial / EXAMPLES, partial / INDEX)
    manifest = {
        "kind": "records",
        "identity": dict(prepared.identity),
        "provenance": prepared.provenance,
        "model": prepared.settings.model.name,
        "vocabulary_size": plan["vocabulary_size"],
        "files": parts,
        "index": {"name": INDEX, "sha256": file_digest(partial / INDEX)},
        "rejects": plan["rejects"],
        "summary": summarize(plan, [totals.sums]),
        "seconds": round(time.monotonic() - start, 2),
    }
    commit(manifest, partial, prepared.final, recording, {part["name"] for part in parts})


def _record_shards(
    prepared: Preparation, recording: Recording, plan: Mapping[str, Any]
) -> tuple[list[Part], PartTotals]:
    """Record the shards that are missing; returns the manifest's list of files, and their totals.

    Of a shard that is told twice, the first file counts.
    """
    shards: Sequence[Mapping[str, Any]] = plan["shards"]
    done = recording.begin(plan)
    missing = [shard for shard in shards if shard["name"] not in done]
    seen_of = {shard["name"]: _num_seen(shard) for shard in shards}
    seen = sum(number for name, number in seen_of.items() if name in done)
    totals = PartTotals()
    for name, part in done.items():
        done[name] = totals.add(part)
    with progress("Recording", total=sum(seen_of.values()), unit="samples", completed=seen) as bar:
        for part in run_actors(prepared, missing, plan["tokenizer_size"]):
            if part["name"] not in done:
                done[part["name"]] = totals.add(part)
            passed("record.part_counted", part["name"])
            bar.advance(seen_of[part["name"]])
    return [done[shard["name"]] for shard in shards], totals


def _num_seen(shard: Mapping[str, Any]) -> int:
    """Samples of a shard that the model sees."""
    only = shard.get("only")
    return int(shard["stop"] - shard["start"] if only is None else len(only))
