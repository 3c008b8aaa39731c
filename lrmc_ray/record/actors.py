"""The Ray Data actors that run the base model and write the record's parts."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.checks import check_model_shared
from lrmc_ray.cluster.resources import worker_slots
from lrmc_ray.config import RunSettings
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.storage import Storage, open_storage
from lrmc_ray.models import publish_model
from lrmc_ray.record.prepare import PLAN, SORT_WINDOW, Preparation
from lrmc_ray.record.stored import EXAMPLES, StoredRecord

MOST_BLOCKS = 2048
"""Parts of the work that Ray Data keeps account of; with more shards, a part has several."""


class PartTotals:
    """What the files of a record hold together; the driver keeps no more of each than its name."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._domains: dict[str, list[int]] = {}

    def add(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Count what :func:`.describe` says; returns what the manifest keeps."""
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


def run_actors(
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
        from lrmc_ray.record.candidates import CandidateRecorder

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
        from lrmc_ray.record.describe import describe
        from lrmc_ray.record.parts import write_part

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
