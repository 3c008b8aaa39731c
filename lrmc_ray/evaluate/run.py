"""Score a model on domain and general tasks, and a tuned model against its base.

    python -m lrmc_ray.evaluate --tuned runs/.../model
    python -m lrmc_ray.evaluate --model M --base B

Scores are kept by what made them: the base is scored once, and a model, task list or batch size
that was scored before is not scored again. Beside ``items.parquet``, a tuned model's scores have
the items that it lost and gained against its base, ``receipt.parquet``.
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.chat.answers import RENDERING
from lrmc_ray.cluster.checks import check_files_shared, check_model_shared
from lrmc_ray.cluster.resources import fits_here, worker_slots
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.changes import receipt
from lrmc_ray.evaluate.drift import BaseTexts, drift_metrics, read_base_texts, write_base_texts
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.names import MADE_BY, RECEIPT, SCORING
from lrmc_ray.evaluate.processes import ScoredModel, score_here, score_in_tasks
from lrmc_ray.evaluate.questions import read_questions, write_questions
from lrmc_ray.evaluate.request import Group, KeptApart, ScoreRequest, Split
from lrmc_ray.evaluate.task_files import (
    located,
    own_files,
    task_fingerprints,
    task_label,
)
from lrmc_ray.evaluate.vocabulary import check_vocabulary, vocabulary_of
from lrmc_ray.evaluate.waiting import check_wanted
from lrmc_ray.files.artifacts import (
    PARTIAL,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_atomically,
)
from lrmc_ray.files.place import place_of
from lrmc_ray.models.identity import model_fingerprint, tokenizer_fingerprint
from lrmc_ray.tasks.registry import VERSION, expand


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
    is_wanted: Callable[[], bool] = lambda: True,
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
        is_wanted: asked again and again while Ray tasks score; when it says no they are ended.

    Raises:
        EvaluationError: scoring failed; the message has the cause.
        DataError: ``base`` has another vocabulary, or was asked other questions.
    """
    identity = _identity(settings, model_directory, split, base, general_from)
    if base is not None:
        check_vocabulary(model_directory, base)
        _check_same_questions(identity, base)
    final = _directory(output, identity)
    if is_finished(final):
        return final
    partial = final.with_name(final.name + PARTIAL)
    with lock_directory(partial):
        if not is_finished(final):
            start = time.monotonic()
            place = place_of(settings.resources.storage)
            model = ScoredModel(model_directory, place, base is None, stored_as)
            options = _Options(parallel, here, is_wanted)
            drift = _score(settings, model, partial, split, _Known(base, general_from), options)
            manifest = {
                "kind": "scores",
                "identity": identity,
                "vocabulary": vocabulary_of(model_directory),
                "drift": drift,
                "seconds": round(time.monotonic() - start, 2),
            }
            publish(partial, final, manifest)
    return final


def base_directory(
    settings: RunSettings, model_directory: Path, output: Path, *, split: Split
) -> Path:
    """Where :func:`evaluate` leaves the scores of a base model; they need not be there."""
    return _directory(output, _identity(settings, model_directory, split, None, None))


def _directory(output: Path, identity: Mapping[str, Any]) -> Path:
    return output / "scores" / fingerprint(identity)


def _identity(
    settings: RunSettings,
    model_directory: Path,
    split: Split,
    base: Path | None,
    general_from: Path | None,
) -> dict[str, Any]:
    """What makes scores the ones they are."""
    chosen = settings.evaluate
    names = [*expand(chosen.domain_tasks), *expand(chosen.general_tasks)]
    return {
        "model": model_fingerprint(model_directory),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "split": split,
        "general_from": general_from.name if general_from else None,
        "base": base.name if base else None,
        "tasks": task_fingerprints(names, split),
        **scoring_code(),
        **({"template_options": options} if (options := settings.model.template_options) else {}),
        **chosen.model_dump(mode="json"),
    }


def scoring_code() -> dict[str, Any]:
    """Versions of what turns a model's answers into scores."""
    return {
        "tasks_version": VERSION,
        "rendering": RENDERING,
        "scoring": SCORING,
        "lm_eval": importlib.metadata.version("lm-eval"),
    }


def _check_same_questions(identity: Mapping[str, Any], base: Path) -> None:
    """Refuse to compare with a base that was asked other questions, or scored by other code.

    Raises:
        DataError: names what differs.
    """
    theirs = read_manifest(base, made_by=MADE_BY)["identity"]
    for name in ("tasks", *scoring_code()):
        if theirs.get(name) != identity[name]:
            what = "the files of the tasks have" if name == "tasks" else f"{name} has"
            raise DataError(
                f"{base} must be scores on the same questions, but {what} changed since; give the "
                "same command again, which scores the base anew"
            )


@dataclass(frozen=True)
class _Known:
    """Scores that are there already."""

    base: Path | None
    """The base model's; drift and the receipt are made against them."""
    general: Path | None
    """The same model's, whose general tasks are taken over."""


@dataclass(frozen=True)
class _Options:
    """Who scores; see :func:`evaluate`."""

    parallel: int
    here: bool
    is_wanted: Callable[[], bool]


def _score(
    settings: RunSettings,
    model: ScoredModel,
    partial: Path,
    split: Split,
    known: _Known,
    options: _Options,
) -> dict[str, float]:
    """Score and write ``items.parquet``; returns the drift from the base."""
    chosen, resources = settings.evaluate, settings.resources
    tasks: list[tuple[str, Group]] = [
        (located(name), "domain") for name in expand(chosen.domain_tasks)
    ]
    if known.general is None:
        tasks += [(located(name), "general") for name in expand(chosen.general_tasks)]
    check_wanted(options.is_wanted)
    worker_slots(resources, what="evaluation task")
    model.place.either(
        lambda: check_model_shared(model.directory) if model.is_base else None,
        lambda _: check_files_shared(own_files([name for name, _ in tasks])),
    )
    before = read_base_texts(known.base) if known.base else None
    requests = _requests(settings, tasks, split, before, options.parallel)
    if options.here and fits_here(resources):
        results = score_here(model, requests, resources)
    else:
        results = score_in_tasks(model, requests, resources, partial, options.is_wanted)
    rows = [row for result in results for row in result.rows]
    order = {task_label(name): index for index, (name, _) in enumerate(tasks)}
    rows.sort(key=lambda row: order[row["task"]])
    if known.general is not None:
        taken = Scores.load(known.general).items.to_pylist()
        rows += [row for row in taken if row["group"] == "general"]
    scores = Scores.from_rows(rows)
    scores.save(partial)
    _write_questions(partial, known.general, [row for one in results for row in one.questions])
    texts = {label: part for result in results for label, part in result.texts.items()}
    logprobs = {label: part for result in results for label, part in result.logprobs.items()}
    if before is None:
        write_base_texts(partial, BaseTexts(texts, logprobs))
        return {}
    assert known.base is not None
    _write_receipt(partial / RECEIPT, receipt(Scores.load(known.base), scores))
    groups = {task_label(name): group for name, group in tasks}
    return drift_metrics(before.logprobs, logprobs, groups)


def _requests(
    settings: RunSettings,
    tasks: Sequence[tuple[str, Group]],
    split: Split,
    before: BaseTexts | None,
    parallel: int,
) -> list[ScoreRequest]:
    """The work, dealt to at most ``parallel`` hands."""
    chosen = settings.evaluate
    # Dealt to the tasks, so that the texts are the same ones however many hands there are.
    shares: dict[Group, int] = {}
    groups: tuple[Group, Group] = ("domain", "general")
    for group in groups:
        count = sum(own == group for _, own in tasks)
        shares[group] = -(-chosen.drift_samples // count) if count else 0
    return [
        ScoreRequest(
            tasks=tuple(hand),
            batch_tokens=chosen.batch_tokens,
            precision=chosen.precision,
            limit=chosen.limit,
            split=split,
            kept=KeptApart(chosen.test_share, chosen.test_seed),
            drift_samples=shares,
            drift_texts=before.texts if before else None,
            template_options=settings.model.template_options,
        )
        for hand in _divide(tasks, parallel)
    ]


def _write_questions(
    partial: Path, general_from: Path | None, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``questions.parquet``, with those of the scores that are taken over."""
    asked = {row["task"] for row in rows}
    taken = read_questions(general_from) if general_from is not None else {}
    general = [
        {"task": task, "item_id": item_id, "question": one.question, "expected": one.expected}
        for (task, item_id), one in taken.items()
        if task not in asked
    ]
    write_questions(partial, [*rows, *general])


def _write_receipt(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _divide(tasks: Sequence[tuple[str, Group]], parallel: int) -> list[list[tuple[str, Group]]]:
    """Deal the tasks to at most ``parallel`` hands."""
    hands: list[list[tuple[str, Group]]] = [[] for _ in range(max(1, min(parallel, len(tasks))))]
    for index, task in enumerate(tasks):
        hands[index % len(hands)].append(task)
    return hands
