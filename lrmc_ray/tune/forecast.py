"""What a search will cost, before it is started.

From the measured costs of earlier searches in the output directory where there are any with the
same model, data and tasks; else a rough estimate from the model's size, the tokens and the cores.
Neither needs Ray or a download.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.beforehand import model_here
from lrmc_ray.config import ResourceSettings, RunSettings
from lrmc_ray.errors import DataError, ResourceError
from lrmc_ray.files.artifacts import fingerprint, is_finished
from lrmc_ray.files.study import STUDY_FILE, StudyFile, read_study
from lrmc_ray.record.identity import identify
from lrmc_ray.record.sources import training_files, training_sources
from lrmc_ray.train.driver import with_steps
from lrmc_ray.tune.row_counts import count_tokens
from lrmc_ray.tune.used import recorded_samples

CORE_FLOPS = 7e10
"""Of float32 per second and core: SmolLM2-135M in the demo on an AMD EPYC core with AVX2."""

STEP_SECONDS = 8.4e-9
"""Of MoClip per parameter and step on such a core, which memory limits."""

ITEMS_PER_TASK = 200
"""Of a task without ``evaluate.limit``; real tasks have between tens and thousands."""

TOKENS_PER_ITEM = 54
"""Computed to score one item; counted on the demo's tasks, what items share once."""

START_SECONDS = 5.0
"""Of one trial, beside training and scoring; 4 to 8 were measured, see benchmarks/README.md."""


@dataclass(frozen=True)
class Forecast:
    """What a search takes. Core seconds are cores that are held, times seconds."""

    trials: int
    concurrent: int
    """Trials side by side."""
    workers: int
    """Training workers of each."""
    record_seconds: float
    """Stage 0, once."""
    base_seconds: float
    """Scoring the base model, once."""
    train_seconds: float
    """Training of one trial."""
    step_seconds: float
    """One step of it."""
    evaluate_seconds: float
    """Scoring of one trial."""
    seconds: float
    """The whole search by the clock."""
    core_seconds: float
    early_seconds: float
    """Scoring of one trial on the way, for early stopping; 0 without."""
    saved_seconds: float
    """Of ``seconds``, what early stopping saves if half of the trials end that may."""
    basis: str
    """What it rests on, in words."""
    is_measured: bool


def divide(slots: int, resources: ResourceSettings, trials: int) -> tuple[int, tuple[int, int]]:
    """Trials side by side, and the fewest and most workers of each, where ``slots`` workers fit.

    Raises:
        ResourceError: not one trial fits.
    """
    wanted = resources.max_concurrent or max(2, trials // 4)
    concurrent = min(wanted, slots // (resources.workers[0] if resources.workers else 1))
    if concurrent < 1:
        fewest = resources.workers[0] if resources.workers else 1
        raise ResourceError(f"a trial needs {fewest} workers, {slots} fit; lower resources.workers")
    most = slots // concurrent
    if resources.workers:
        return concurrent, (resources.workers[0], min(resources.workers[1], most))
    return concurrent, (1, most)


def forecast(
    settings: RunSettings, output: Path, *, slots: int, gpu_flops: float | None = None
) -> Forecast | None:
    """What a search costs on a machine that holds ``slots`` workers at once.

    Args:
        settings: of the search.
        output: where earlier searches are looked for.
        slots: workers that fit side by side.
        gpu_flops: floating-point operations per second that one GPU sustains, where it is known.

    Returns:
        None where nothing is known: an unseen model that is not on this machine, or GPUs of
        unknown speed.
    """
    settings = with_expected_steps(settings, output)
    parts = _measured(settings, output) or _estimated(settings, slots, gpu_flops)
    if parts is None:
        return None
    trials = settings.search.trials
    concurrent, (_, most) = divide(slots, settings.resources, trials)
    workers = max(1, min(most, settings.train.micro_batches))
    cores = settings.resources.cpus_per_worker
    # Every worker takes the whole step of the optimizer.
    train = parts.train_core_seconds / (workers * cores) + parts.optimizer_seconds
    early = _early_seconds(settings, parts.evaluate_seconds)
    each = train + parts.evaluate_seconds + START_SECONDS + early
    left = (1 - settings.search.early_stopping_after) * train + parts.evaluate_seconds
    search = settings.search
    # The first two are not searched, and as many as are compared with come before.
    may_end = max(0, trials - max(2, search.early_stopping_trials)) if search.stops_early else 0
    # At the end base, best and yardstick answer fresh domain questions: about half of the items.
    final = parts.base_seconds / 2 + parts.evaluate_seconds / 2
    once = parts.record_seconds + parts.base_seconds + final
    return Forecast(
        trials=trials,
        concurrent=concurrent,
        workers=workers,
        record_seconds=parts.record_seconds,
        base_seconds=parts.base_seconds,
        train_seconds=train,
        step_seconds=train / settings.train.steps,
        evaluate_seconds=parts.evaluate_seconds,
        seconds=once + math.ceil(trials / concurrent) * each,
        core_seconds=cores
        * (once * slots + trials * ((train + early) * workers + each - train - early)),
        early_seconds=early,
        saved_seconds=may_end / 2 * left / concurrent,
        basis=parts.basis,
        is_measured=parts.is_measured,
    )


def with_expected_steps(settings: RunSettings, output: Path) -> RunSettings:
    """``settings`` with ``train.epochs``, if they are set, turned into ``train.steps``.

    By the record where it has been made, else by the rows of the training data.
    """
    train = settings.train
    if train.epochs is None:
        return settings
    directory = model_here(settings.model)
    if directory is not None:
        identity, _ = identify(settings, directory, training_sources(settings))
        recorded = output / "records" / fingerprint(identity)
        if is_finished(recorded):
            return with_steps(settings, recorded)
    samples, _ = count_tokens(training_files(settings), settings.data.max_length)
    steps = max(1, math.ceil(round(train.epochs * samples, 6) / train.batch_size))
    update = {"steps": steps, "epochs": None}
    return settings.model_copy(update={"train": train.model_copy(update=update)})


def _early_seconds(settings: RunSettings, evaluate_seconds: float) -> float:
    """Scoring on the way: the share of the items that it takes, and nothing is generated."""
    if not settings.search.stops_early:
        return 0.0
    items = settings.evaluate.limit or ITEMS_PER_TASK
    return evaluate_seconds * min(1.0, settings.search.early_stopping_items / items)


@dataclass(frozen=True)
class _Parts:
    """What a search is made of, measured or estimated."""

    train_core_seconds: float
    """Of one trial."""
    optimizer_seconds: float
    """Of one trial; every worker takes them."""
    evaluate_seconds: float
    record_seconds: float
    base_seconds: float
    basis: str
    is_measured: bool


def _studies(output: Path) -> Iterator[StudyFile]:
    for path in sorted(output.glob(f"*/{STUDY_FILE}")):
        try:
            yield read_study(path.parent)
        except DataError:
            continue  # The report says what is wrong with it.


def _measured(settings: RunSettings, output: Path) -> _Parts | None:
    """Medians over finished trials with the same model, data and tasks."""
    wanted = settings.model_dump(mode="json")
    train_per_sample: list[float] = []
    evaluate: list[float] = []
    record: list[float] = []
    base: list[float] = []
    for study in _studies(output):
        used, stages = study.settings, study.stage_seconds
        if any(used.get(part) != wanted[part] for part in ("model", "data", "evaluate")):
            continue
        record += [stages["record"]] if "record" in stages else []
        base += [stages["base_evaluation"]] if "base_evaluation" in stages else []
        for trial in study.trials:
            if trial.state == "PRUNED":
                continue  # did not take all of its steps
            cost = trial.cost
            if "train_seconds" in cost and "evaluate_seconds" in cost:
                samples = trial.settings["steps"] * trial.settings["batch_size"]
                cores = cost.get("train_cores", 1)
                train_per_sample.append(cost["train_seconds"] * cores / samples)
                evaluate.append(cost["evaluate_seconds"])
    if not train_per_sample:
        return None
    samples = settings.train.steps * settings.train.batch_size
    scored = statistics.median(evaluate)
    return _Parts(
        train_core_seconds=statistics.median(train_per_sample) * samples,
        optimizer_seconds=0.0,  # in what was measured
        evaluate_seconds=scored,
        record_seconds=statistics.median(record) if record else 0.0,
        base_seconds=statistics.median(base) if base else scored,
        basis=f"measured: median of {len(train_per_sample)} finished trials in {output}",
        is_measured=True,
    )


def _estimated(settings: RunSettings, slots: int, gpu_flops: float | None) -> _Parts | None:
    """From floating-point operations: 2 per parameter and token forward, 6 with the gradient."""
    # With it comes torch, which ``--help`` and measured forecasts do without.
    from lrmc_ray.tune.token_counts import TokenCounts, count_sample_tokens

    directory = model_here(settings.model)
    gpus = settings.resources.gpus_per_worker
    if directory is None or (gpus and gpu_flops is None):
        return None
    parameters = count_parameters(directory)
    train = settings.train
    sources = training_sources(settings)
    samples, tokens = count_tokens([source.path for source in sources], settings.data.max_length)
    try:
        counts = count_sample_tokens(
            sources,
            directory,
            train,
            max_length=settings.data.max_length,
            on_gpu=bool(gpus),
            template_options=settings.model.template_options,
        )
    except DataError:  # no tokenizer to count with, or rows that recording will name
        counts = TokenCounts(tokens / samples, tokens / samples)
    cores = settings.resources.cpus_per_worker
    trained = train.steps * train.batch_size * counts.computed
    tasks = len(settings.evaluate.domain_tasks) + len(settings.evaluate.general_tasks)
    scored = tasks * (settings.evaluate.limit or ITEMS_PER_TASK) * TOKENS_PER_ITEM
    per_second = gpu_flops * gpus if gpus and gpu_flops else CORE_FLOPS * cores
    speed = f"{per_second / 1e9:.0f} GFLOP/s per worker"
    evaluate = 2.0 * parameters * scored / per_second
    return _Parts(
        train_core_seconds=6.0 * parameters * trained / per_second * cores,
        optimizer_seconds=0.0 if gpus else train.steps * parameters * STEP_SECONDS / cores,
        evaluate_seconds=evaluate,
        record_seconds=2.0
        * parameters
        * recorded_samples(settings, samples)
        * counts.alone
        / (per_second * slots),
        base_seconds=evaluate / min(slots, tasks),
        basis=(
            f"rough estimate: {parameters / 1e6:.0f}M parameters, about {counts.alone:.0f} "
            f"tokens per sample, {counts.computed:.0f} of them computed in training, {speed}; it "
            "can be off by a factor of three"
        ),
        is_measured=False,
    )


def count_parameters(directory: Path) -> int:
    """Parameters of a saved model, from the headers of its safetensors files.

    Raises:
        DataError: a file is damaged.
    """
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                size = int.from_bytes(file.read(8), "little")
                header: Mapping[str, Any] = json.loads(file.read(min(size, 2**27)))
                total += sum(
                    math.prod(tensor["shape"])
                    for name, tensor in header.items()
                    if name != "__metadata__"
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} has no safetensors header ({error}); save the model again"
                ) from None
    return total
