"""Score a model on domain and general tasks, and a tuned model against its base.

    python -m lrmc_ray.evaluate --tuned runs/.../model
    python -m lrmc_ray.evaluate --model M --base B

Scores are kept by what made them: the base is scored once, and a model, task list or batch size
that was scored before is not scored again. Beside ``items.parquet``, a tuned model's scores have
the items that it lost and gained against its base, ``receipt.parquet``.
"""

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrmc_ray.cluster.checks import check_files_shared, check_model_shared
from lrmc_ray.cluster.resources import can_hold_cores, held_cores, worker_slots
from lrmc_ray.config import ResourceSettings, RunSettings
from lrmc_ray.errors import DataError, LrmcError
from lrmc_ray.files.artifacts import (
    PARTIAL,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_atomically,
    write_json,
)
from lrmc_ray.files.storage import Storage, files_below, open_storage
from lrmc_ray.models import publish_model, tokenizer_fingerprint

if TYPE_CHECKING:
    from lrmc_ray.evaluate.request import ScoreRequest, ScoreResult

from lrmc_ray.errors import EvaluationError
from lrmc_ray.evaluate.drift import (
    DRIFT_LOGPROBS,
    DRIFT_TEXTS,
    drift_scores,
    read_drift,
    write_arrays,
)

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.evaluate"


RECEIPT = "receipt.parquet"

Split = Literal["dev", "test"]


def evaluate(
    settings: RunSettings,
    model_directory: Path,
    output: Path,
    *,
    split: Split,
    base: Path | None = None,
    general_from: Path | None = None,
    parallel: int = 1,
    here: bool = False,
    stored_as: str | None = None,
) -> Path:
    """The finished scores of a model under ``output / "scores"``, made now unless they are there.

    Needs a running Ray session.

    Args:
        settings: ``settings.evaluate`` says which tasks.
        model_directory: the model.
        output: where scores are kept.
        split: which questions the demo's domain task asks.
        base: the base model's scores; drift is measured against them.
        general_from: scores of the same model whose general tasks are taken over, not run again.
        parallel: Ray tasks that share the work.
        here: score in this process, which has imported half of what it takes, where the resources
            are cores of a single machine and Ray can hold them for it. If it dies, so does the
            caller; a Ray task would be started again. The scores are the same.
        stored_as: name of the model in the storage. One that is not there is brought there, if
            Ray tasks on nodes without a shared disk are to score it.

    Raises:
        EvaluationError: scoring failed; the message has the cause.
    """
    from lrmc_ray.evaluate.harness import task_fingerprints
    from lrmc_ray.models import model_fingerprint
    from lrmc_ray.tasks.registry import expand

    chosen = settings.evaluate
    names = [*expand(chosen.domain_tasks), *expand(chosen.general_tasks)]
    if base is not None:
        _check_vocabulary(model_directory, base)
    identity = {
        "model": model_fingerprint(model_directory),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "split": split,
        "general_from": general_from.name if general_from else None,
        "base": base.name if base else None,
        "tasks_version": _tasks_version(),
        "tasks": task_fingerprints(names, split),
        **settings.evaluate.model_dump(mode="json"),
    }
    final = output / "scores" / fingerprint(identity)
    if is_finished(final):
        return final
    partial = final.with_name(final.name + PARTIAL)
    with lock_directory(partial):
        if not is_finished(final):
            start = time.monotonic()
            scoring = _Scoring(settings, model_directory, stored_as, is_base=base is None)
            drift = _score(scoring, partial, split, base, general_from, parallel, here=here)
            manifest = {
                "kind": "scores",
                "identity": identity,
                "vocabulary": _vocabulary(model_directory),
                "drift": drift,
                "seconds": round(time.monotonic() - start, 2),
            }
            publish(partial, final, manifest)
    return final


def _tasks_version() -> str:
    from lrmc_ray.tasks.registry import VERSION

    return str(VERSION)


def _vocabulary(model_directory: Path) -> dict[str, Any]:
    """What two models must share for their log-probabilities to be comparable.

    Read from the files: transformers would cost the caller seconds and memory.
    """
    config = json.loads((model_directory / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    path = model_directory / "tokenizer.json"
    if not path.is_file():
        return {"size": size, "tokens": tokenizer_fingerprint(model_directory)}
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"].get("vocab")
    added = [[token["content"], token["id"]] for token in tokenizer.get("added_tokens") or []]
    return {"size": size, "tokens": fingerprint([vocabulary, added])}


def _check_vocabulary(model_directory: Path, base: Path) -> None:
    """Refuse a model that cannot be compared with ``base``, before it is scored."""
    theirs = read_manifest(base, made_by=MADE_BY)["vocabulary"]
    own = _vocabulary(model_directory)
    if own != theirs:
        differ = (
            f"{own['size']} tokens against {theirs['size']}"
            if own["size"] != theirs["size"]
            else "other tokens"
        )
        raise DataError(
            f"{model_directory} must have its base's vocabulary, but has {differ}: neither its "
            "cross-entropy per token nor its drift means anything beside the base's; give the base "
            "that it was made from"
        )


@dataclass(frozen=True)
class _Scoring:
    """The model that is scored, and where processes that score it find it."""

    settings: RunSettings
    directory: Path
    stored_as: str | None
    is_base: bool

    @contextmanager
    def in_storage(self) -> Iterator[dict[str, str] | None]:
        """The model in the storage, for as long as it is scored; None without one."""
        storage = open_storage(self.settings.resources.storage)
        if storage is None:
            yield None
            return
        if self.is_base:
            yield {"uri": storage.uri, "base": publish_model(storage, self.directory)}
            return
        if self.stored_as is not None and storage.committed(self.stored_as) is not None:
            yield {"uri": storage.uri, "tuned": self.stored_as}
            return
        name = f"scoring/{uuid.uuid4().hex}"
        try:
            storage.publish(name, files_below(self.directory))
            yield {"uri": storage.uri, "tuned": name}
        finally:
            storage.delete_all(name)


def _score(
    scoring: _Scoring,
    partial: Path,
    split: Split,
    base: Path | None,
    general_from: Path | None,
    parallel: int,
    *,
    here: bool,
) -> dict[str, float]:
    """Score and write ``items.parquet``; returns the drift from ``base``."""
    from lrmc_ray.evaluate.changes import receipt
    from lrmc_ray.evaluate.harness import own_files, task_label
    from lrmc_ray.evaluate.items import Scores
    from lrmc_ray.evaluate.request import ScoreRequest
    from lrmc_ray.tasks.registry import expand

    chosen, resources = scoring.settings.evaluate, scoring.settings.resources
    tasks: list[tuple[str, Any]] = [(name, "domain") for name in expand(chosen.domain_tasks)]
    if general_from is None:
        tasks += [(name, "general") for name in expand(chosen.general_tasks)]
    worker_slots(resources, what="evaluation task")
    if resources.storage is not None:
        check_files_shared(own_files([name for name, _ in tasks]))
    elif base is None:
        check_model_shared(scoring.directory)
    before = read_drift(base) if base else None
    # Dealt to the tasks, so that the texts are the same ones however many hands there are.
    shares: dict[Any, int] = {}
    for group in ("domain", "general"):
        count = sum(own == group for _, own in tasks)
        shares[group] = -(-chosen.drift_samples // count) if count else 0
    requests = [
        ScoreRequest(
            tasks=tuple(hand),
            batch_tokens=chosen.batch_tokens,
            precision=chosen.precision,
            limit=chosen.limit,
            split=split,
            drift_samples=shares,
            drift_texts=before.texts if before else None,
        )
        for hand in _divide(tasks, parallel)
    ]
    run = _run_here if here and _fits_here(resources) else _run_in_tasks
    results = run(scoring, requests)
    rows = [row for result in results for row in result.rows]
    order = {task_label(name): index for index, (name, _) in enumerate(tasks)}
    rows.sort(key=lambda row: order[row["task"]])
    if general_from is not None:
        known = Scores.load(general_from).items.to_pylist()
        rows += [row for row in known if row["group"] == "general"]
    scores = Scores.from_rows(rows)
    scores.save(partial)
    texts = {label: part for result in results for label, part in result.texts.items()}
    logprobs = {label: part for result in results for label, part in result.logprobs.items()}
    if before is None:
        write_json(partial / DRIFT_TEXTS, texts)
        write_arrays(partial / DRIFT_LOGPROBS, logprobs)
        return {}
    assert base is not None
    _write_receipt(partial / RECEIPT, receipt(Scores.load(base), scores))
    groups = {task_label(name): group for name, group in tasks}
    return drift_scores(before.logprobs, logprobs, groups)


def _fits_here(resources: ResourceSettings) -> bool:
    """Whether this process can score in place of a Ray task: cores are all that it takes."""
    needs = (resources.gpus_per_worker, resources.custom, resources.labels)
    return not any(needs) and can_hold_cores(resources.cpus_per_worker)


def _run_here(scoring: _Scoring, requests: "Sequence[ScoreRequest]") -> "list[ScoreResult]":
    """Score in this process, while Ray gives its cores to nobody else."""
    cores = scoring.settings.resources.cpus_per_worker
    with held_cores(cores):
        try:
            return [_score_part(str(scoring.directory), request, cores) for request in requests]
        except LrmcError:
            raise
        except Exception as error:
            raise EvaluationError(f"scoring {scoring.directory} failed: {error!r}") from error


def _run_in_tasks(scoring: _Scoring, requests: "Sequence[ScoreRequest]") -> "list[ScoreResult]":
    """Score in Ray tasks side by side; one whose process or node is lost is started again."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources, model_directory = scoring.settings.resources, str(scoring.directory)
    remote = ray.remote(_score_part).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        resources=dict(resources.custom),
        label_selector=dict(resources.labels) or None,
        max_retries=2,
        # A trial's own placement group has no CPUs to give.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )
    try:
        with scoring.in_storage() as stored:
            results: list[ScoreResult] = ray.get(
                [
                    remote.remote(model_directory, request, resources.cpus_per_worker, stored)
                    for request in requests
                ]
            )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LrmcError):
            raise error.cause from None
        raise EvaluationError(f"scoring {model_directory} failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise EvaluationError(f"scoring {model_directory} failed: {error}") from error
    return results


def _write_receipt(path: Path, table: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _divide(tasks: Sequence[Any], parallel: int) -> list[list[Any]]:
    """Deal the tasks to at most ``parallel`` hands."""
    hands: list[list[Any]] = [[] for _ in range(max(1, min(parallel, len(tasks))))]
    for index, task in enumerate(tasks):
        hands[index % len(hands)].append(task)
    return hands


def _score_part(
    model_directory: str,
    request: "ScoreRequest",
    threads: int,
    stored: Mapping[str, str] | None = None,
) -> "ScoreResult":
    """Runs in a Ray task, or in the process of a trial.

    A base model in a storage stays on the node, as those of recording do; a tuned one does not.
    """
    import torch

    from lrmc_ray.evaluate.harness import score

    torch.set_num_threads(threads)
    if stored is None:
        return score(Path(model_directory), request)
    storage = Storage(stored["uri"])
    if "base" in stored:
        return score(storage.fetch(stored["base"], storage.cache / stored["base"]), request)
    storage.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scoring-", dir=storage.cache) as scratch:
        return score(storage.fetch(stored["tuned"], Path(scratch) / "model"), request)
