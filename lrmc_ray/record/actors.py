"""The Ray Data actors that run the base model and write the record's parts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lrmc_ray.cluster.resources import ACTOR, worker_slots
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.place import Place
from lrmc_ray.models.directory import send_model
from lrmc_ray.record.describe import describe
from lrmc_ray.record.examples import read_examples
from lrmc_ray.record.names import PLAN
from lrmc_ray.record.prepare import Preparation
from lrmc_ray.record.recording import Part, recording_of
from lrmc_ray.record.schema import write_part

MOST_BLOCKS = 2048
"""Parts of the work that Ray Data keeps account of; with more shards, a part has several."""

REFUSAL = "refusal"
"""In place of what a file holds: why the model is refused."""


def run_actors(
    prepared: Preparation, shards: Sequence[Mapping[str, Any]], tokenizer_size: int
) -> Iterator[dict[str, Any]]:
    """Record ``shards`` in an actor pool; yields what each finished file holds.

    Raises:
        DataError: the model cannot be loaded, or is not one that can be recorded.
    """
    if not shards:
        return
    import ray

    settings = prepared.settings
    resources = settings.resources
    least, most = _actor_range(settings, len(shards))
    prepared.recording.check_model(prepared.model_directory)
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
        num_gpus=resources.of_actors().gpus_per_worker or None,
        fn_constructor_kwargs=recorder_options(prepared, tokenizer_size),
        **placement,
    )
    for row in dataset.iter_rows():
        yield part_of(row["part"])


def part_of(text: str) -> Part:
    """What a finished file holds, as an actor said it.

    Raises:
        DataError: the actor has refused the model.
    """
    part: Part = json.loads(text)
    if REFUSAL in part:
        raise DataError(part[REFUSAL])
    return part


def recorder_options(prepared: Preparation, tokenizer_size: int) -> dict[str, Any]:
    """The arguments of a :class:`Recorder`; the model is brought to where all nodes see it."""
    settings = prepared.settings
    plan = json.loads((prepared.partial / PLAN).read_text(encoding="utf-8"))
    return {
        "place": prepared.place,
        "record": prepared.final.name,
        "model": send_model(prepared.place, prepared.model_directory),
        "examples_sha256": plan["examples_sha256"],
        "partial": str(prepared.partial.resolve()),
        "provenance": prepared.provenance,
        "tokenizer_size": tokenizer_size,
        "tau": settings.recorded_tau(),
        "k_min": settings.record.k_min,
        "k_max": settings.record.k_max,
        "prompt_k_max": settings.record.prompt_k_max,
        "precision": settings.record.precision,
        "num_gpus": settings.resources.whole_gpus_of_actor(),
        "threads": settings.resources.cpus_per_worker,
    }


def _actor_range(settings: RunSettings, num_shards: int) -> tuple[int, int]:
    """Fewest and most actors.

    Raises:
        ResourceError: fewer fit into the cluster than are asked for.
    """
    # Ray Data adds actors as far as the cluster's resources go, also on nodes that join later.
    least, most = settings.resources.actors or (1, num_shards)
    worker_slots(settings.resources.of_actors(), least=least, what=ACTOR)
    return least, max(least, most)


class Recorder:
    """An actor of the pool: holds the base model and writes one file per shard."""

    def __init__(
        self,
        *,
        place: Place,
        record: str,
        model: str,
        examples_sha256: str,
        partial: str,
        provenance: dict[str, str],
        tokenizer_size: int,
        tau: float,
        k_min: int,
        k_max: int,
        prompt_k_max: int,
        precision: Literal["fp32", "bf16"],
        num_gpus: int,
        threads: int,
    ) -> None:
        # The driver needs this class by its name alone, and no torch.
        from lrmc_ray.record.candidates import CandidateRecorder, own_devices

        self._recording = recording_of(place, Path(partial), provenance, record)
        self._refusal: str | None = None
        try:
            self._recorder = CandidateRecorder(
                place.here(model),
                tau=tau,
                k_min=k_min,
                k_max=k_max,
                prompt_k_max=prompt_k_max,
                precision=precision,
                devices=own_devices(num_gpus),
                threads=threads,
            )
        except DataError as error:
            # Ray would start the actor again and again, and wrap what it says.
            self._refusal = str(error)
        self._examples_sha256 = examples_sha256
        self._provenance = provenance
        self._tokenizer_size = tokenizer_size

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Record the shards of ``batch`` and describe the files that hold them."""
        if self._refusal is not None:
            return pa.table({"part": [json.dumps({REFUSAL: self._refusal})]})
        described = [self.record(shard) for shard in batch.to_pylist()]
        return pa.table({"part": [json.dumps(part) for part in described]})

    def record(self, shard: Mapping[str, Any]) -> Part:
        """Write the file of ``shard`` and describe it."""
        passed("record.shard_started", shard["name"])
        with self._recording.examples(self._examples_sha256) as examples:
            rows = read_examples(examples, shard["start"], shard["stop"])
        samples = self._recorder.record(rows, shard.get("only"))
        with self._recording.new_part(str(shard["name"])) as path:
            write_part(path, samples, self._provenance)
            part = describe(path, tokenizer_size=self._tokenizer_size)
            self._recording.keep_part(path, part)
        return part
