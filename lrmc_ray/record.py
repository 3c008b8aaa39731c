"""Stage 0: record the candidate tokens of every position of the training data.

    python -m lrmc_ray.record --output runs

One teacher-forced forward pass of the base model, in an actor pool of Ray Data. The examples are
tokenized once and cut into shards of similar length; an actor writes each shard as one Parquet
file, under a name that the shard alone decides. So a shard that is done twice, because an actor
or a node died, replaces itself, and a command that was killed goes on with the missing shards.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import (
    PARTIAL,
    file_digest,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_json,
    write_manifest,
)
from lrmc_ray.config import CT, DEMO, ENGLISH, RunSettings
from lrmc_ray.console import progress, run_command, setup_logging
from lrmc_ray.data.sources import Source, find_sources, split_domain
from lrmc_ray.errors import DataError, DiskError, IncompleteArtifactError
from lrmc_ray.fault_points import passed
from lrmc_ray.ray_session import RAY_LOG, check_model_shared, ray_session, worker_slots
from lrmc_ray.storage import Storage, check_storage, open_storage, publish_model
from lrmc_ray.stored_record import EXAMPLES, VIEW, StoredRecord

_log = logging.getLogger(__name__)

SORT_WINDOW = 4096
"""Examples that are sorted by length together, one row group; bounds the driver's memory."""
SMALLEST_SHARD_TOKENS = 4096
LARGEST_SHARD_TOKENS = 16_384
"""Bounds the memory of an actor, which holds a shard's candidates: 6 bytes each, 100 MB at most."""
SHARDS = 64
"""Shards between these bounds; a small data set has fewer, a large one more."""
MOST_BLOCKS = 2048
"""Parts of the work that Ray Data keeps account of; with more shards, a part has several."""
PLAN = "plan.json"
INDEX = "index.parquet"
"""Name and domain of every sample of a record, in its order."""
REJECTS = "rejects.jsonl"
MADE_BY = "python -m lrmc_ray.record"

_IDENTITY = {
    "model": "model",
    "chat_template": "chat template",
    "tokenizer": "tokenizer",
    "data": "training data",
    "max_length": "data.max_length",
    "on_long": "data.on_long",
    "on_bad_row": "data.on_bad_row",
    "tau": "tau",
    "k_min": "k_min",
    "k_max": "k_max",
    "prompt_k_max": "prompt_k_max",
    "schema": "schema version",
}
"""Fields of a record's identity, as messages call them. Paths, names and times are not in it."""


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
            _plan(prepared)
    return prepared


def identify(
    settings: RunSettings, model_directory: Path, sources: Sequence[Source]
) -> tuple[dict[str, Any], list[Source]]:
    """What makes a record the one it is, and the sources in the order of their content.

    The order is that of domains and digests, so that names and places change nothing, not even
    the order of the samples.
    """
    from lrmc_ray.data.records import SCHEMA_VERSION
    from lrmc_ray.models import model_fingerprint, template_fingerprint, tokenizer_fingerprint

    by_content = sorted(
        ((source.domain, file_digest(source.path), source) for source in sources),
        key=lambda item: item[:2],
    )
    identity = {
        "model": model_fingerprint(model_directory),
        "chat_template": template_fingerprint(model_directory),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "data": fingerprint([[domain, digest] for domain, digest, _ in by_content]),
        "max_length": settings.data.max_length,
        "on_long": settings.data.on_long,
        "on_bad_row": settings.data.on_bad_row,
        "tau": settings.recorded_tau(),
        "k_min": settings.record.k_min,
        "k_max": settings.record.k_max,
        "prompt_k_max": settings.record.prompt_k_max,
        "schema": SCHEMA_VERSION,
    }
    assert identity.keys() == _IDENTITY.keys()
    return identity, [source for _, _, source in by_content]


def check_fits(record: Path, settings: RunSettings, model_directory: Path) -> None:
    """Refuse to train on a record that was made of something else than ``settings`` say.

    A record may hold more than training asks for: a larger tau, k_min, k_max. The training data are
    compared where they can be found: training itself reads the record alone, on any machine.

    Raises:
        DataError: a field differs; the first is named.
        IncompleteArtifactError: ``record`` is not finished.
    """
    recorded = read_manifest(record, made_by=MADE_BY).get("identity", {})
    names = ["model", "chat_template", "tokenizer", "data", "max_length", "on_long", "schema"]
    sources: list[Source] = []
    try:
        sources = training_sources(settings)
    except IncompleteArtifactError:
        names.remove("data")
    wanted, _ = identify(settings, model_directory, sources)
    remedy = "record again with this one, or train with what was recorded"
    for name in names:
        if recorded.get(name) != wanted[name]:
            raise DataError(
                f"{record} was recorded with another {_IDENTITY[name]} ({recorded.get(name)}) than "
                f"the one given ({wanted[name]}); {remedy}"
            )
    for name, least in (("tau", settings.train.tau), ("k_min", settings.train.k_min)):
        if recorded[name] < least:
            raise DataError(
                f"{record} was recorded with {name} = {recorded[name]}, training asks for {least}: "
                f"a set can be cut, not extended; lower train.{name}, or record again"
            )


def training_sources(settings: RunSettings) -> list[Source]:
    """The files that ``data.train`` names, the demo's made where they are asked for.

    Raises:
        IncompleteArtifactError: a name stands for no file.
        ConfigError: a file is named under two domains.
    """
    names = []
    for labelled in settings.data.train:
        domain, name = split_domain(labelled)
        if name == DEMO:
            from lrmc_ray.demo.files import demo_files
            from lrmc_ray.models import cache_directory

            name = str(demo_files(cache_directory()).train)
        elif name == CT and not Path(CT).exists():
            from lrmc_ray.models import cache_directory
            from lrmc_ray.tasks.built import ct_files

            name = str(ct_files(cache_directory()).train)
        elif name == ENGLISH and not Path(ENGLISH).exists():
            from lrmc_ray.demo.english import english_file
            from lrmc_ray.models import cache_directory

            name = str(english_file(cache_directory()))
        names.append(f"{domain}={name}" if domain else name)
    return find_sources(names)


def training_files(settings: RunSettings) -> list[Path]:
    """The paths of :func:`training_sources`."""
    return [source.path for source in training_sources(settings)]


def _plan(prepared: Preparation) -> dict[str, Any]:
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

    from lrmc_ray.data.examples import EncodingSummary, Example, Rejects, encode_rows, read_rows
    from lrmc_ray.models import load_tokenizer, vocabulary_size

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


def _record(prepared: Preparation) -> None:
    """Record the shards that are missing, write the manifest, and give the directory its name."""
    from lrmc_ray.recording import describe, summarize

    start = time.monotonic()
    partial, stored = prepared.partial, prepared.stored
    plan = _plan(prepared)
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
        for part in _run_actors(prepared, missing, plan["tokenizer_size"]):
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
    from lrmc_ray.data.records import read_part
    from lrmc_ray.recording import describe

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
    from lrmc_ray.data.records import Records

    records = Records(final)
    with progress("Uploading the record", total=len(records.parts), unit="files") as bar:
        for number, part in enumerate(records.parts):
            stored.put(records.part_path(number), part.sha256)
            bar.advance()
    if (index := records.index_path()) is not None:
        stored.put(index, records.manifest["index"]["sha256"])
    stored.commit(records.manifest)


class PartTotals:
    """What the files of a record hold together; the driver keeps no more of each than its name."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._domains: dict[str, list[int]] = {}

    def add(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Count what :func:`lrmc_ray.recording.describe` says; returns what the manifest keeps."""
        for key, value in part.items():
            if isinstance(value, int):
                self._sums[key] += value
        self._sizes.update(dict(zip(part["k_values"], part["k_counts"], strict=True)))
        for name, counts in part["domains"].items():
            domain = self._domains.setdefault(name, [0, 0])
            domain[:] = [old + new for old, new in zip(domain, counts, strict=True)]
        return {key: part[key] for key in ("name", "rows", "sha256")}

    @property
    def sums(self) -> dict[str, Any]:
        """All files as if they were one."""
        return {
            **self._sums,
            "k_values": list(self._sizes),
            "k_counts": list(self._sizes.values()),
            "domains": self._domains,
        }


def _run_actors(
    prepared: Preparation, shards: Sequence[Mapping[str, Any]], tokenizer_size: int
) -> Iterator[dict[str, Any]]:
    """Record ``shards`` in an actor pool; yields what each finished file holds."""
    if not shards:
        return
    import ray

    settings = prepared.settings
    resources = settings.resources
    least, most = _actor_range(settings, len(shards))
    if prepared.stored is None:
        check_model_shared(prepared.model_directory)
    placement: dict[str, Any] = {}
    if resources.custom:
        placement["resources"] = dict(resources.custom)
    if resources.labels:
        placement["label_selector"] = dict(resources.labels)
    num_blocks = min(len(shards), MOST_BLOCKS)
    dataset = ray.data.from_items(list(shards), override_num_blocks=num_blocks).map_batches(
        Recorder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
        fn_constructor_kwargs=recorder_options(prepared, tokenizer_size),
        **placement,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["part"])


def recorder_options(prepared: Preparation, tokenizer_size: int) -> dict[str, Any]:
    """The arguments of a :class:`Recorder`; with a storage, the model is brought there."""
    settings = prepared.settings
    stored = None
    if (storage := open_storage(settings.resources.storage)) is not None:
        plan = json.loads((prepared.partial / PLAN).read_text(encoding="utf-8"))
        stored = {
            "uri": storage.uri,
            "model": publish_model(storage, prepared.model_directory),
            "record": prepared.final.name,
            "examples_sha256": plan["examples_sha256"],
        }
    return {
        "stored": stored,
        "model_directory": str(prepared.model_directory),
        "partial": str(prepared.partial.resolve()),
        "provenance": prepared.provenance,
        "tokenizer_size": tokenizer_size,
        "tau": settings.recorded_tau(),
        "k_min": settings.record.k_min,
        "k_max": settings.record.k_max,
        "prompt_k_max": settings.record.prompt_k_max,
        "threads": settings.resources.cpus_per_worker,
    }


def _actor_range(settings: RunSettings, num_shards: int) -> tuple[int, int]:
    """Fewest and most actors.

    Raises:
        ResourceError: fewer fit into the cluster than are asked for.
    """
    # Ray Data adds actors as far as the cluster's resources go, also on nodes that join later.
    least, most = settings.resources.actors or (1, num_shards)
    worker_slots(settings.resources, least=least, what="recording actor")
    return least, max(least, most)


class Recorder:
    """An actor of the pool: holds the base model and writes one file per shard."""

    def __init__(
        self,
        *,
        stored: Mapping[str, str] | None,
        model_directory: str,
        partial: str,
        provenance: dict[str, str],
        tokenizer_size: int,
        tau: float,
        k_min: int,
        k_max: int,
        prompt_k_max: int,
        threads: int,
    ) -> None:
        from lrmc_ray.recording import CandidateRecorder

        self._partial = Path(partial)
        self._stored: StoredRecord | None = None
        local = Path(model_directory)
        if stored is not None:
            storage = Storage(stored["uri"])
            self._stored = StoredRecord(storage, stored["record"])
            self._examples_sha256 = stored["examples_sha256"]
            self._partial = storage.cache / "recording"
            self._partial.mkdir(parents=True, exist_ok=True)
            local = storage.fetch(stored["model"], storage.cache / stored["model"])
        self._recorder = CandidateRecorder(
            local,
            tau=tau,
            k_min=k_min,
            k_max=k_max,
            prompt_k_max=prompt_k_max,
            threads=threads,
        )
        self._provenance = provenance
        self._tokenizer_size = tokenizer_size

    def __call__(self, batch: Any) -> Any:
        """Record the shards of ``batch`` and describe the files that hold them."""
        import pyarrow as pa

        described = [self.record(shard) for shard in batch.to_pylist()]
        return pa.table({"part": [json.dumps(part) for part in described]})

    def record(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file of ``shard`` and describe it."""
        from lrmc_ray.data.records import write_part
        from lrmc_ray.recording import describe

        passed("record.shard_started", shard["name"])
        start, stop = shard["start"], shard["stop"]
        if self._stored is None:
            rows = read_examples(self._partial / EXAMPLES, start, stop)
            path = self._partial / str(shard["name"])
            write_part(path, self._recorder.record(rows), self._provenance)
            return describe(path, tokenizer_size=self._tokenizer_size)
        with self._stored.open(EXAMPLES, self._examples_sha256) as examples:
            rows = read_examples(examples, start, stop)
        with tempfile.TemporaryDirectory(dir=self._partial) as directory:
            path = Path(directory) / str(shard["name"])
            write_part(path, self._recorder.record(rows), self._provenance)
            described = describe(path, tokenizer_size=self._tokenizer_size)
            self._stored.put_part(path, described)
        return described


def read_examples(source: Any, start: int, stop: int) -> list[dict[str, Any]]:
    """The tokenized examples [start, stop) of a plan, from a path or an open file."""
    import pyarrow.parquet as pq

    groups = range(start // SORT_WINDOW, (stop - 1) // SORT_WINDOW + 1)
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        table = file.read_row_groups(groups)
    rows: list[dict[str, Any]] = table.slice(
        start - groups[0] * SORT_WINDOW, stop - start
    ).to_pylist()
    return rows


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Short names of the settings that matter here most."""
    for option, metavar, text in (
        ("--max-length", "TOKENS", "data.max_length: most tokens of a sample"),
        ("--on-long", "POLICY", "data.on_long: error, drop or truncate a longer one"),
        ("--on-bad-row", "POLICY", "data.on_bad_row: error, or skip and list in rejects.jsonl"),
        ("--k-max", "K", "record.k_max: most candidates of a supervised position"),
        ("--prompt-k-max", "K", "record.prompt_k_max: most of a prompt position; 0 records none"),
        ("--actors", "MIN,MAX", "resources.actors: fewest and most actors"),
        ("--num-gpus-per-actor", "N", "resources.gpus_per_worker: GPUs of an actor"),
    ):
        parser.add_argument(option, metavar=metavar, help=text)


_ALIASES = {
    "max_length": "data.max_length",
    "on_long": "data.on_long",
    "on_bad_row": "data.on_bad_row",
    "k_max": "record.k_max",
    "prompt_k_max": "record.prompt_k_max",
    "actors": "resources.actors",
    "num_gpus_per_actor": "resources.gpus_per_worker",
}


def without_aliases(argv: Sequence[str]) -> list[str]:
    """``argv`` with the short names written as the settings that they stand for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_record_arguments(parser)
    named, rest = parser.parse_known_args(argv)
    overrides = []
    for name, setting in _ALIASES.items():
        if (value := getattr(named, name)) is not None:
            overrides.append(f"{setting}={f'[{value}]' if name == 'actors' else value}")
    return rest + overrides


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.record``."""
    from lrmc_ray.cli import add_run_arguments, settings_from

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Stage 0: record the candidate tokens of every position of the training data.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    add_record_arguments(parser)
    argv = without_aliases(argv)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    settings = settings_from(arguments)
    storage = settings.resources.storage
    if storage is not None:
        check_storage(storage)
    # Bad rows are found before Ray starts.
    directory = prepare(settings, arguments.output).final
    if not is_finished(directory):
        log = arguments.output / RAY_LOG
        with ray_session(arguments.address, log=log, verbose=arguments.verbose, storage=storage):
            record(settings, arguments.output)
    elif storage is not None:
        record(settings, arguments.output)  # which may not be in the storage yet
    manifest = read_manifest(directory, made_by=MADE_BY)
    if arguments.json:
        print(json.dumps({"directory": str(directory), **manifest["summary"]}))
    else:
        print_summary(manifest["summary"])
        where = f", its files in {storage}" if storage is not None else ""
        print(f"The record is in {directory}{where}. Look into it: lrmc inspect {directory}")
        print(f"Next: {shlex.join(['python', '-m', 'lrmc_ray.train', *argv])}")
    return 0


def print_summary(summary: Mapping[str, Any]) -> None:
    """The record in numbers, on stdout."""
    for name, value in summary.items():
        if not isinstance(value, Mapping):
            print(f"{name:>30}  {value}")
    for domain, counts in summary["domains"].items():
        print(
            f"{'domain ' + (domain or '(none)'):>30}  "
            + ", ".join(f"{count} {unit.replace('_', ' ')}" for unit, count in counts.items())
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
