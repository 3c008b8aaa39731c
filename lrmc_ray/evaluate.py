"""Score a model on domain and general tasks, and a tuned model against its base.

    python -m lrmc_ray.evaluate --tuned runs/.../model

Scores are kept by what made them: the base is scored once, and a model, task list or batch size
that was scored before is not scored again.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrmc_ray.artifacts import (
    PARTIAL,
    fingerprint,
    is_finished,
    lock_directory,
    publish,
    read_manifest,
    write_json,
)
from lrmc_ray.config import ModelSettings, RunSettings
from lrmc_ray.console import progress, run_command, setup_logging
from lrmc_ray.errors import IncompleteArtifactError, LrmcError
from lrmc_ray.ray_session import RAY_LOG, ray_session

if TYPE_CHECKING:
    from lrmc_ray.harness import ScoreResult

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.evaluate"
DRIFT_TEXTS = "drift_texts.json"
DRIFT_LOGPROBS = "drift_logprobs.npz"

Split = Literal["dev", "test"]


class EvaluationError(LrmcError):
    """A model could not be scored; the message says why."""


def evaluate(
    settings: RunSettings,
    model_directory: Path,
    output: Path,
    *,
    split: Split,
    base: Path | None = None,
    general_from: Path | None = None,
    parallel: int = 1,
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

    Raises:
        EvaluationError: scoring failed; the message has the cause.
    """
    from lrmc_ray.models import model_fingerprint, tokenizer_fingerprint

    identity = {
        "model": model_fingerprint(model_directory),
        "tokenizer": tokenizer_fingerprint(model_directory),
        "split": split,
        "general_from": general_from.name if general_from else None,
        "base": base.name if base else None,
        "tasks_version": _tasks_version(),
        **settings.evaluate.model_dump(mode="json"),
    }
    final = output / "scores" / fingerprint(identity)
    if is_finished(final):
        return final
    partial = final.with_name(final.name + PARTIAL)
    with lock_directory(partial):
        if not is_finished(final):
            start = time.monotonic()
            drift = _score(settings, model_directory, partial, split, base, general_from, parallel)
            manifest = {
                "kind": "scores",
                "identity": identity,
                "drift": drift,
                "seconds": round(time.monotonic() - start, 2),
            }
            publish(partial, final, manifest)
    return final


def _tasks_version() -> str:
    from lrmc_ray.tasks.registry import VERSION

    return str(VERSION)


def _score(
    settings: RunSettings,
    model_directory: Path,
    partial: Path,
    split: Split,
    base: Path | None,
    general_from: Path | None,
    parallel: int,
) -> dict[str, float]:
    """Score in Ray tasks and write ``items.parquet``; returns the drift from ``base``."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from lrmc_ray.harness import ScoreRequest, ScoreResult, mean_kl
    from lrmc_ray.scores import Scores

    chosen = settings.evaluate
    tasks: list[tuple[str, Any]] = [(name, "domain") for name in chosen.domain_tasks]
    if general_from is None:
        tasks += [(name, "general") for name in chosen.general_tasks]
    resources = settings.resources
    remote = ray.remote(_score_part).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=2,
        # A trial's own placement group has no CPUs to give.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )
    hands = _divide(tasks, parallel)
    before = _read_drift(base) if base else None
    pending = [
        remote.remote(
            str(model_directory),
            ScoreRequest(
                tasks=tuple(hand),
                batch_tokens=chosen.batch_tokens,
                precision=chosen.precision,
                limit=chosen.limit,
                split=split,
                drift_samples=chosen.drift_samples // len(hands),
                # The first hand measures all of it: the order must be the base model's.
                drift_texts=None if before is None else (before.texts if index == 0 else {}),
            ),
            resources.cpus_per_worker,
        )
        for index, hand in enumerate(hands)
    ]
    try:
        results: list[ScoreResult] = ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LrmcError):
            raise error.cause from None
        raise EvaluationError(f"scoring {model_directory} failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise EvaluationError(f"scoring {model_directory} failed: {error}") from error
    rows = [row for result in results for row in result.rows]
    order = {name: index for index, (name, _) in enumerate(tasks)}
    rows.sort(key=lambda row: order[row["task"]])
    if general_from is not None:
        known = Scores.load(general_from).items.to_pylist()
        rows += [row for row in known if row["group"] == "general"]
    Scores.from_rows(rows).save(partial)
    if before is None:
        _write_drift(partial, results)
        return {}
    drift = {
        f"eval/kl_base_{group}": mean_kl(before.logprobs[group], logprobs)
        for group, logprobs in results[0].logprobs.items()
    }
    return {name: value for name, value in drift.items() if value is not None}


def _write_drift(directory: Path, results: "Sequence[ScoreResult]") -> None:
    """Keep the base model's texts and its log-probabilities there."""
    import numpy as np

    texts: dict[str, list[list[int]]] = {}
    logprobs: dict[str, Any] = {}
    for group in results[0].texts:
        texts[group] = [ids for result in results for ids in result.texts[group]]
        logprobs[group] = np.concatenate([result.logprobs[group] for result in results])
    write_json(directory / DRIFT_TEXTS, texts)
    # numpy's annotation takes every keyword for allow_pickle's type.
    np.savez(directory / DRIFT_LOGPROBS, **logprobs)


def _read_drift(base: Path) -> "ScoreResult":
    import numpy as np

    from lrmc_ray.harness import ScoreResult

    texts = json.loads((base / DRIFT_TEXTS).read_text(encoding="utf-8"))
    with np.load(base / DRIFT_LOGPROBS, allow_pickle=False) as logprobs:
        return ScoreResult([], texts, {group: logprobs[group] for group in texts})


def _divide(tasks: Sequence[Any], parallel: int) -> list[list[Any]]:
    """Deal the tasks to at most ``parallel`` hands."""
    hands: list[list[Any]] = [[] for _ in range(max(1, min(parallel, len(tasks))))]
    for index, task in enumerate(tasks):
        hands[index % len(hands)].append(task)
    return hands


def _score_part(model_directory: str, request: Any, threads: int) -> Any:
    """Runs in a Ray task."""
    import torch

    from lrmc_ray.harness import score

    torch.set_num_threads(threads)
    return score(Path(model_directory), request)


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.evaluate``."""
    from rich.console import Console
    from rich.table import Table

    from lrmc_ray.cli import add_run_arguments, settings_from
    from lrmc_ray.models import local_directory
    from lrmc_ray.ray_session import local_cpus
    from lrmc_ray.scores import Scores, compare

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Score the base model and, with --tuned, a tuned one against it.",
    )
    add_run_arguments(parser)
    parser.add_argument("--tuned", metavar="DIR", help="the tuned model's directory")
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    settings = settings_from(arguments)
    if arguments.tuned and not Path(arguments.tuned).is_dir():
        raise IncompleteArtifactError(
            f"{arguments.tuned} does not exist; give the directory of a tuned model"
        )
    models = [local_directory(settings.model)]
    if arguments.tuned:
        models.append(local_directory(ModelSettings(name=arguments.tuned)))
    scored: list[Path] = []
    with (
        ray_session(arguments.address, log=arguments.output / RAY_LOG, verbose=arguments.verbose),
        progress("Evaluating", total=len(models), unit="models") as bar,
    ):
        for model in models:
            scored.append(
                evaluate(
                    settings,
                    model,
                    arguments.output,
                    split="test",
                    base=scored[0] if scored else None,
                    parallel=local_cpus() if arguments.address == "local" else 4,
                )
            )
            bar.advance(1)
    base = Scores.load(scored[0])
    table = Table(title="95 % intervals in brackets")
    for column in ("task", "metric", "base"):
        table.add_column(column)
    if not arguments.tuned:
        if arguments.json:
            values = {
                f"{task}/{metric}": items.value.value
                for (task, metric), items in base.metrics.items()
            }
            print(json.dumps({"scores": str(scored[0]), **values}))
            return 0
        for (task, metric), items in base.metrics.items():
            table.add_row(task, metric, str(items.value))
        Console().print(table)
        print(f"The scores are in {scored[0]}. Next: {MADE_BY} --tuned DIR")
        return 0
    search = settings.search
    compared = compare(
        base,
        Scores.load(scored[1]),
        forgetting_weight=search.forgetting_weight,
        seed=search.seed,
    )
    drift = read_manifest(scored[1], made_by=MADE_BY)["drift"]
    if arguments.json:
        paths = [str(path) for path in scored]
        print(json.dumps({"scores": paths, **compared.metrics(), **drift}))
        return 0
    table.add_column("tuned")
    table.add_column("change")
    for task_change in compared.tasks:
        for change in task_change.metrics:
            cells = [str(change.before), str(change.after), str(change.delta)]
            table.add_row(task_change.task, change.metric, *cells)
    Console().print(table)
    print(f"domain gain {compared.domain_gain}, forgetting {compared.forgetting}")
    for name, value in drift.items():
        print(f"{name} {value:.4f} nats per position")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
