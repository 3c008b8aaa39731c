"""Stop a hopeless trial on the way, from its score on a few items.

After a share of its steps a trial scores its model, in memory, on the first items of every task:
smooth scores only, nothing is generated where a task has its gold answers' probability. It ends if
that is worse than the median of the other trials that have come as far: the median rule, at one
rung. Every trial that has come there counts, those that ended there included, so about half of the
later ones end.

The training loop stops itself. Rank 0 compares and writes ``rung.json`` with the score, those that
it was compared with and the decision, before anybody acts on it; the other workers are told. A
trial that was killed and comes there again reads its decision and scores nothing.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.harness import slice_rows
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.objective import combined_objective
from lrmc_ray.evaluate.request import ALL_ITEMS, KeptApart
from lrmc_ray.evaluate.task_files import located
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.files.names import RUNG
from lrmc_ray.files.place import Place
from lrmc_ray.models.loading import load_tokenizer
from lrmc_ray.tasks.registry import expand
from lrmc_ray.train.run_files import RunFiles

if TYPE_CHECKING:
    from lrmc_ray.method.workers import WorkerGroup


Group = Literal["domain", "general"]

MAY_STOP = ("search",)
"""Roles of trials that may be stopped: the defaults and plain fine-tuning are what all is seen
against."""


INTERVAL = 1.96
"""Standard errors on either side of a score: 95 %."""


@dataclass(frozen=True)
class Rung:
    """Where a trial is scored on the way, on what, and what its score is compared with."""

    step: int
    """Steps done."""
    tasks: tuple[tuple[str, Group], ...]
    items: int
    """Of each task, the first ones."""
    batch_tokens: int
    base_scores: str
    """Directory of the base model's scores, which has these items; its name in the storage where
    there is one."""
    trials: str
    """Directory of all trials of the study; its name in the storage where there is one."""
    number: int
    """Of this trial."""
    may_stop: bool
    least: int
    """Other trials that must have been scored here."""
    objective: Literal["combined", "budget"]
    forgetting_weight: float
    max_forgetting: float
    kept: KeptApart = ALL_ITEMS
    """Which items of the domain tasks are kept for the end."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages."""


def rung_of(
    settings: RunSettings, *, number: int, role: str, trials: str, base_scores: str
) -> Rung | None:
    """The rung of trial ``number``; None where nothing is stopped early.

    Args:
        settings: of the trial, ``train.epochs`` already turned into ``train.steps``.
        number: of the trial in the study.
        role: ``defaults``, ``yardstick`` or ``search``.
        trials: directory of all trials of the study, or its name in the storage.
        base_scores: directory of the base model's scores, or its name in the storage.
    """
    search, scored = settings.search, settings.evaluate
    if not search.stops_early or search.objective == "pareto":
        return None
    step = math.ceil(round(search.early_stopping_after * settings.train.steps, 6))
    if step >= settings.train.steps:
        return None
    groups: tuple[tuple[Group, tuple[str, ...]], ...] = (
        ("domain", scored.domain_tasks),
        ("general", scored.general_tasks),
    )
    return Rung(
        step=step,
        tasks=tuple((located(name), group) for group, names in groups for name in expand(names)),
        items=min(search.early_stopping_items, scored.limit or search.early_stopping_items),
        batch_tokens=scored.batch_tokens,
        base_scores=base_scores,
        trials=trials,
        number=number,
        may_stop=role in MAY_STOP,
        least=search.early_stopping_trials,
        objective=search.objective,
        forgetting_weight=search.forgetting_weight,
        max_forgetting=search.max_forgetting,
        kept=KeptApart(scored.test_share, scored.test_seed),
        template_options=settings.model.template_options,
    )


@dataclass(frozen=True)
class SliceChange:
    """A model against its base on the items of a slice, as fractions."""

    domain_gain: float
    forgetting: float
    forgetting_error: float
    """Standard error of ``forgetting`` over the items."""
    combined: float


@dataclass(frozen=True)
class Decision:
    """What a trial scored on the way, and what followed."""

    number: int
    """Of the trial."""
    step: int
    """Steps done."""
    value: float
    """What trials are compared by; see :func:`comparable`."""
    domain_gain: float
    forgetting: float
    combined: float
    others: dict[str, float]
    """Values of the trials that it was compared with, by their numbers."""
    median: float | None
    """Of ``others``; None without."""
    stop: bool
    seconds: float
    """That scoring took."""

    @property
    def metrics(self) -> dict[str, float]:
        """Under their names in ``metrics.jsonl`` and MLflow."""
        return {
            "slice/domain_gain": self.domain_gain,
            "slice/forgetting": self.forgetting,
            "slice/combined": self.combined,
            "slice/seconds": self.seconds,
        }

    def reason(self, steps: int) -> str:
        """Why it was stopped after so many of its ``steps``, in words."""
        assert self.median is not None
        return (
            f"after {self.step} of {steps} steps its combined score on a few items was "
            f"{self.combined:+.3f} (gain {self.domain_gain:+.3f}, forgetting "
            f"{self.forgetting:+.3f}), worse than the median of {len(self.others)} other trials"
        )


def read_decision(training: Path) -> Decision | None:
    """The decision in a training run's directory; None if it has not come so far.

    Raises:
        DataError: the file is damaged.
    """
    path = training / RUNG
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return _decision_in(content, str(path))


def _decision_in(content: bytes, place: str) -> Decision:
    try:
        return Decision(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{place} is damaged ({error}); remove it, and the trial is scored there again"
        ) from None


def slice_change(
    base: Scores, rows: Iterable[Mapping[str, Any]], *, forgetting_weight: float
) -> SliceChange:
    """Compare the slice's ``rows`` with the base model's scores of the same items.

    Choices and answers count by the mean change of their probability, texts by the relative change
    of their cross-entropy, as in :func:`lrmc_ray.evaluate.changes.compare`.

    Raises:
        DataError: the base model has not been scored on these items, or a value is not finite.
    """
    wanted: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        wanted.setdefault(row["task"], {}).setdefault(row["metric"], []).append(row)
    gains: dict[str, list[tuple[float, float]]] = {"domain": [], "general": []}
    for task, metrics in sorted(wanted.items()):
        # Of generated answers without a gold probability only whether they are right.
        names = ("probability", "cross_entropy", "gold_probability", "accuracy")
        metric = next(name for name in names if name in metrics)
        own = metrics[metric]
        items = base.metric(task, metric)
        known = dict(zip(items.item_ids, items.values, strict=True))
        if missing := [row["item_id"] for row in own if row["item_id"] not in known]:
            raise DataError(
                f"{task}: item {missing[0]!r} of the slice is not in the base model's scores; "
                "evaluate the base again with the same task files"
            )
        before_I = np.array([known[row["item_id"]] for row in own])
        after_I = np.array([row["value"] for row in own])
        change_I = after_I - before_I
        if metric == "cross_entropy":
            weights_I = np.array([row["weight"] for row in own])
            change_I = -change_I * weights_I / np.mean(weights_I * before_I)
        if not np.isfinite(change_I).all():
            raise DataError(
                f"{task}: {metric} must be finite on the way, too; the tuned model is broken, "
                "lower train.lr"
            )
        error = float(np.std(change_I, ddof=1)) / math.sqrt(len(own)) if len(own) > 1 else math.inf
        gains[own[0]["group"]].append((float(np.mean(change_I)), error))
    domain_gain = statistics.fmean(gain for gain, _ in gains["domain"])
    forgetting = -statistics.fmean(gain for gain, _ in gains["general"])
    return SliceChange(
        domain_gain=domain_gain,
        forgetting=forgetting,
        forgetting_error=math.hypot(*(e for _, e in gains["general"])) / len(gains["general"]),
        combined=combined_objective(domain_gain, forgetting, forgetting_weight=forgetting_weight),
    )


def comparable(change: SliceChange, rung: Rung) -> float:
    """What trials are compared by at a rung; more is better.

    ``combined`` is itself. With a budget of forgetting, any trial that may be within it is better
    than any that is not (Deb 2000): the gain of the one, the excess of the other below -1. A trial
    is beyond the budget if the 95 % interval of its forgetting is.
    """
    if rung.objective == "combined":
        return change.combined
    excess = change.forgetting - INTERVAL * change.forgetting_error - rung.max_forgetting
    return change.domain_gain if excess <= 0 else -1.0 - excess


def decide(
    change: SliceChange, others: Mapping[int, float], rung: Rung, *, seconds: float
) -> Decision:
    """The median rule."""
    value = comparable(change, rung)
    median = statistics.median(others.values()) if others else None
    stop = rung.may_stop and len(others) >= rung.least and median is not None and value < median
    return Decision(
        number=rung.number,
        step=rung.step,
        value=value,
        domain_gain=change.domain_gain,
        forgetting=change.forgetting,
        combined=change.combined,
        others={str(number): other for number, other in sorted(others.items())},
        median=median,
        stop=stop,
        seconds=round(seconds, 2),
    )


def values_of_others(rung: Rung, place: Place) -> dict[int, float]:
    """What the other trials of the study have scored here so far, by their numbers.

    Args:
        rung: says where the trials are.
        place: where this node finds what ``rung`` names.

    Raises:
        DataError: a decision is damaged.
    """
    decisions = []
    for trial in place.children(rung.trials):
        name = f"{rung.trials}/{trial}/training/{RUNG}"
        if (content := place.read(name)) is not None:
            decisions.append(_decision_in(content, place.where(name)))
    return {d.number: d.value for d in decisions if d.number != rung.number}


class EarlyStopping:
    """One worker's part in the decision about its trial."""

    def __init__(
        self, rung: Rung, *, files: RunFiles, model_directory: Path, group: "WorkerGroup"
    ) -> None:
        """Decide about a trial together with the other workers of ``group``.

        Args:
            rung: where the trial is scored, and on what.
            files: of the trial's training run.
            model_directory: the base model, whose tokenizer is used.
            group: this worker and the others.
        """
        self.rung = rung
        self._files = files
        self._model_directory = model_directory
        self._group = group

    def decide(self, model: Any) -> Decision:
        """The decision about ``model``, made now unless it was made before; leaves training mode.

        Every worker calls it at the rung's step, and all return the same.
        """
        is_writer = self._group.rank == 0
        # One file that all see, but not at the same moment: the first rank says what is in it.
        known = self._group.gather(read_decision(self._files.directory) if is_writer else None)[0]
        if known is not None:
            return _as_decision(known)
        start = time.monotonic()
        rows = [row for share in self._group.gather(self.own_rows(model)) for row in share]
        made = None
        if is_writer:
            rung, place = self.rung, self._files.place
            base = Scores.load(place.here(rung.base_scores))
            change = slice_change(base, rows, forgetting_weight=rung.forgetting_weight)
            others = values_of_others(rung, place)
            made = decide(change, others, rung, seconds=time.monotonic() - start)
            write_json(self._files.directory / RUNG, dataclasses.asdict(made))
            self._files.push_decision()
        return _as_decision(self._group.gather(made)[0])

    def own_rows(self, model: Any) -> list[dict[str, Any]]:
        """This worker's share of the slice: whole tasks, so that the scores do not depend on W."""
        tasks: Sequence[tuple[str, Group]] = self.rung.tasks[
            self._group.rank :: self._group.world_size
        ]
        if not tasks:
            return []
        return slice_rows(
            model,
            load_tokenizer(self._model_directory),
            tasks,
            items=self.rung.items,
            batch_tokens=self.rung.batch_tokens,
            split="dev",
            kept=self.rung.kept,
            template_options=self.rung.template_options,
        )


def _as_decision(value: Any) -> Decision:
    assert isinstance(value, Decision)
    return value
