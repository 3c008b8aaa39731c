"""The study's result for people: a terminal table, a figure and one self-contained HTML file.

    python -m lrmc_ray.report runs

Reads ``study.json``, which the search writes, and the items behind every score; the intervals are
computed here, so the report never shows a number that its own data does not support. A trial that
failed, or whose scores cannot be read, stays in every list with its cause.
"""

import argparse
import functools
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrmc_ray.artifacts import read_manifest, write_atomically
from lrmc_ray.console import format_seconds, run_command
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError, LrmcError
from lrmc_ray.landscape import surface
from lrmc_ray.metrics_log import StepMetrics, read_metrics
from lrmc_ray.report_html import (
    COLOURS,
    FORGETTING_LABEL,
    GAIN_LABEL,
    MARKERS,
    ROLE_NAMES,
    Curve,
    FrontPoint,
    contour_figure,
    curve_figure,
    drawing,
    flatten,
    front_figure,
    hypervolume_figure,
    importance_figure,
    number,
    percent,
    percent_range,
    points,
    points_range,
    render,
    setting,
    whisker,
)
from lrmc_ray.scores import (
    Comparison,
    Difference,
    MetricChange,
    Scores,
    TaskChange,
    compare,
    difference,
    receipt,
)
from lrmc_ray.statistics import CONFIDENCE, HYPERVOLUME_REFERENCE, Interval, Objective, choose
from lrmc_ray.trade_off import TradeOff, trade_off

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

STUDY_FILE = "study.json"
REPORT_FILE = "report.html"
FIGURE_FILE = "gain_vs_forgetting.png"
CURVES = {
    "train/loss": ("Training loss", "nats per supervised position"),
    "subset/rho": ("Outside mass (rho)", "probability"),
    "moclip/angle_deg": ("Angle of gradient and momentum", "degrees"),
}
RESAMPLES = 2000
_OBJECTIVE_NOTES: dict[Objective, str] = {
    "combined": "",
    "budget": " The search looked for the most domain gain with at most {budget} of forgetting.",
    "pareto": " The search looked for the whole front; its knee is called the best.",
}
_MAX_EXAMPLES = 6


# study.json


class _Entry(BaseModel):
    """Frozen; keys that a newer version added are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TrialEntry(_Entry):
    """One trial, as ``study.json`` tells it."""

    number: int = Field(ge=0)
    role: Literal["defaults", "yardstick", "search"]
    """``yardstick`` is plain fine-tuning."""
    state: Literal["COMPLETE", "FAIL", "RUNNING", "PRUNED"]
    cause: str | None = None
    """Why it failed or was stopped."""
    params: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    directory: str | None = None
    scores: str | None = None
    metrics_file: str | None = None
    results: dict[str, Any] = {}
    rung: dict[str, Any] | None = None
    """What it was scored on the way, and the decision: see ``early_stopping.Decision``."""
    cost: dict[str, float] = {}
    """``train_seconds``, ``evaluate_seconds``, ``processed_tokens``, ``original_tokens``."""


class StudyFile(_Entry):
    """``study.json``. Paths are relative to its directory."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    created: str
    objective: Objective = "combined"
    forgetting_weight: float = Field(ge=0, allow_inf_nan=False)
    max_forgetting: float = Field(0.01, allow_inf_nan=False)
    """What the objective ``budget`` allows, as a fraction."""
    space: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    base_scores: str | None = None
    stage_seconds: dict[str, float] = {}
    sessions: tuple[tuple[float, float], ...] = ()
    """Begin and end of every sitting, in seconds since 1970."""
    forecast: dict[str, Any] | None = None
    importance: dict[str, dict[str, float]] = {}
    """Of each parameter, for ``eval/domain_gain`` and the others: shares that add up to one."""
    record: dict[str, Any] = {}
    trials: tuple[TrialEntry, ...] = ()
    best: int | None = None
    final: dict[str, str] = {}
    """Scores of ``base``, ``best`` and ``yardstick`` on items that no choice was made on."""


# The study with its comparisons


@dataclass(frozen=True, eq=False)
class Trial:
    """One trial with what its scores say; ``comparison`` is None exactly if ``problem`` is not."""

    entry: TrialEntry
    scores: Scores | None = None
    comparison: Comparison | None = None
    problem: str | None = None
    """Why there is nothing to compare: failed, not finished, scores missing or damaged."""
    front_probability: float = 0.0
    """Share of the resamples in which the trial is on the Pareto front."""
    is_on_front: bool = False
    knee_probability: float = 0.0
    """Share of the resamples in which it is the front's knee."""
    budget_probability: float = 0.0
    """Share of the resamples in which it forgets at most ``max_forgetting``."""

    @property
    def name(self) -> str:
        """How sentences call it."""
        return f"trial {self.entry.number}"

    def accuracy(self, group: str) -> Interval | None:
        """Mean accuracy over the group's tasks that have one, as a fraction."""
        return None if self.comparison is None else self.comparison.accuracy(group)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is said about the best trial: on the final items where they are scored."""

    base: Scores
    scores: Scores
    comparison: Comparison
    plain: Comparison | None
    """Plain fine-tuning on the same items; None without, or where it is the best itself."""
    versus: Difference | None
    """The study's candidate - plain fine-tuning, paired over the items."""
    fresh_tasks: tuple[str, ...]
    """Tasks whose items the search has not seen; none where nothing but its items is scored."""


@dataclass(frozen=True, eq=False)
class Study:
    """A study with its trials compared with the base model, and with plain fine-tuning."""

    directory: Path
    file: StudyFile
    trials: tuple[Trial, ...]
    best: Trial | None
    """The study's choice, or the best by its objective where it has made none."""
    closest: Trial | None
    """Where no trial keeps the budget, so that there is no best one: the one that forgets least."""
    yardstick: Trial | None
    """Plain fine-tuning; of several learning rates the one that the objective prefers."""
    candidate: Trial | None
    """``shown``, or the best of the others where plain fine-tuning itself is the best."""
    verdict: Verdict | None
    """None until a trial has scores."""
    trade_off: TradeOff | None
    """Of ``compared``; None until a trial has scores."""
    notes: tuple[str, ...]
    """What a reader must know about damaged or missing parts."""

    @property
    def shown(self) -> Trial | None:
        """The trial that the report is about: the best, or the closest to the budget."""
        return self.best or self.closest

    @property
    def compared(self) -> tuple[Trial, ...]:
        """Trials that have scores."""
        return tuple(trial for trial in self.trials if trial.comparison is not None)

    @property
    def problems(self) -> tuple[Trial, ...]:
        """Trials that have none."""
        return tuple(trial for trial in self.trials if trial.problem is not None)


def find_study(directory: Path) -> Path:
    """The study directory in or directly below ``directory``.

    Raises:
        IncompleteArtifactError: there is none.
        ConfigError: there are several; the user must name one.
    """
    if (directory / STUDY_FILE).is_file():
        return directory
    found = sorted(path.parent for path in directory.glob(f"*/{STUDY_FILE}"))
    found += sorted(path.parent for path in directory.glob(f"*/*/{STUDY_FILE}"))
    if not found:
        raise IncompleteArtifactError(
            f"{directory} has no {STUDY_FILE}, so no search has written its results there; "
            f"run `python -m lrmc_ray.tune --output {directory}` first"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ConfigError(
            f"a report is about one study, {directory} holds several; name one: {names}"
        )
    return found[0]


def load_study(study_dir: Path, *, resamples: int = RESAMPLES) -> Study:
    """Read a study and compare every finished trial with the base model.

    All intervals use the study's own seed, so that trials share the resampled items and the
    numbers are those that the search has logged.

    Args:
        study_dir: the directory of ``study.json``.
        resamples: bootstrap resamples behind every interval.

    Raises:
        IncompleteArtifactError: no ``study.json``, or no base scores.
        DataError: ``study.json`` or the base scores are damaged. A damaged trial is no error.
    """
    file = _read_study_file(study_dir)
    if file.base_scores is None:
        raise IncompleteArtifactError(
            f"{study_dir / STUDY_FILE} names no base scores: the base model is not evaluated yet; "
            "run the same `python -m lrmc_ray.tune` command again, it goes on where it stopped"
        )
    base = Scores.load(study_dir / file.base_scores)
    compare_with = functools.partial(
        compare,
        forgetting_weight=file.forgetting_weight,
        seed=_bootstrap_seed(file),
        resamples=resamples,
    )
    trials, traded = _with_trade_off(
        [
            _load_trial(entry, study_dir, base, compare_with)
            for entry in sorted(file.trials, key=lambda entry: entry.number)
        ],
        file.max_forgetting,
    )
    notes = [
        f"{trial.name} is marked complete, but cannot be used: {trial.problem}"
        for trial in trials
        if trial.problem is not None and trial.entry.state == "COMPLETE"
    ]
    preferred, is_feasible = _preferred(file, trials)
    best, closest = (preferred, None) if is_feasible else (None, preferred)
    if file.best is not None:
        named = next((trial for trial in trials if trial.entry.number == file.best), None)
        if named is None:
            raise DataError(
                f"{study_dir / STUDY_FILE}: best must be the number of a trial, got {file.best}"
            )
        if named.comparison is None:
            notes.append(
                f"{named.name} was chosen as the best; the best of the readable trials is shown"
            )
        else:
            best, closest = named, None
    yardsticks = [trial for trial in trials if trial.entry.role == "yardstick"]
    others = [trial for trial in trials if trial.entry.role != "yardstick"]
    yardstick = _preferred(file, yardsticks)[0]
    shown = candidate = best or closest
    if shown is not None and shown.entry.role == "yardstick":
        candidate = _preferred(file, others)[0]
    verdict = _search_verdict(base, shown, candidate, yardstick)
    if verdict is not None and best is not None and file.final:
        try:
            verdict = _final_verdict(study_dir, file.final, best, verdict, compare_with)
        except LrmcError as error:
            notes.append(f"the final scores cannot be used: {error}")
    return Study(
        directory=study_dir,
        file=file,
        trials=tuple(trials),
        best=best,
        closest=closest,
        yardstick=yardstick,
        candidate=candidate,
        verdict=verdict,
        trade_off=traded,
        notes=tuple(notes),
    )


def _bootstrap_seed(file: StudyFile) -> int:
    """The search's seed, which its trials used for their own comparisons."""
    search = file.settings.get("search")
    seed = search.get("seed", 0) if isinstance(search, Mapping) else 0
    return seed if isinstance(seed, int) else 0


def _search_verdict(
    base: Scores, best: Trial | None, candidate: Trial | None, yardstick: Trial | None
) -> Verdict | None:
    """The verdict on the items that the search used."""
    if best is None or best.comparison is None or best.scores is None:
        return None
    plain = yardstick.comparison if yardstick is not None else None
    ours = candidate.comparison if candidate is not None else None
    return Verdict(
        base=base,
        scores=best.scores,
        comparison=best.comparison,
        plain=plain if yardstick is not best else None,
        versus=difference(ours, plain) if ours is not None and plain is not None else None,
        fresh_tasks=(),
    )


def _final_verdict(
    study_dir: Path,
    final: Mapping[str, str],
    best: Trial,
    searched: Verdict,
    compare_with: Callable[[Scores, Scores], Comparison],
) -> Verdict:
    """The verdict on the items kept for the end.

    Raises:
        IncompleteArtifactError: scores are missing.
        DataError: they are damaged, or those of another model than the best trial's.
    """
    if "base" not in final or "best" not in final:
        raise IncompleteArtifactError("base and best must both be scored; run the search again")
    base, scores = (Scores.load(study_dir / final[name]) for name in ("base", "best"))
    models = [
        _scored_model(study_dir / path) for path in (final["best"], best.entry.scores) if path
    ]
    if len(set(models)) > 1:
        raise DataError(f"they are not of {best.name}'s model; run the search again to score it")
    comparison = compare_with(base, scores)
    plain = versus = None
    if "yardstick" in final and best.entry.role != "yardstick":
        plain = compare_with(base, Scores.load(study_dir / final["yardstick"]))
        versus = difference(comparison, plain)
    return Verdict(
        base=base,
        scores=scores,
        comparison=comparison,
        plain=plain,
        versus=versus if plain is not None else searched.versus,
        fresh_tasks=tuple(task for task in base.tasks if _differ(base, searched.base, task)),
    )


def _scored_model(directory: Path) -> str:
    """Fingerprint of the model that was scored there."""
    manifest = read_manifest(directory, made_by="python -m lrmc_ray.evaluate")
    identity = manifest.get("identity")
    return str(identity.get("model")) if isinstance(identity, dict) else ""


def _differ(first: Scores, second: Scores, task: str) -> bool:
    """Whether two evaluations of one model were of different items.

    Ids do not tell, since each split counts from 0; but the same items get the same scores.
    """
    if task not in second.tasks:
        return True
    own, other = (scores.objective(task).values for scores in (first, second))
    # Another batch or another machine moves a score far less.
    return len(own) != len(other) or bool(np.abs(own - other).mean() > 0.005)


def _read_study_file(study_dir: Path) -> StudyFile:
    path = study_dir / STUDY_FILE
    try:
        return StudyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{study_dir} has no {STUDY_FILE}: no search has started there; "
            "run `python -m lrmc_ray.tune` first"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}; remove the file and run the same "
            "`python -m lrmc_ray.tune` command again, it writes it anew"
        ) from None


def _load_trial(
    entry: TrialEntry,
    study_dir: Path,
    base: Scores,
    compare_with: Callable[[Scores, Scores], Comparison],
) -> Trial:
    if entry.state != "COMPLETE":
        words = {"FAIL": "failed", "PRUNED": "stopped early", "RUNNING": "not finished"}
        cause = f": {entry.cause}" if entry.cause else ""
        return Trial(entry, problem=words[entry.state] + cause)
    if entry.scores is None:
        return Trial(entry, problem="failed: study.json names no scores")
    try:
        scores = Scores.load(study_dir / entry.scores)
        comparison = compare_with(base, scores)
    except LrmcError as error:
        return Trial(entry, problem=f"failed: {error}")
    return Trial(entry, scores=scores, comparison=comparison)


def _with_trade_off(
    trials: Sequence[Trial], max_forgetting: float
) -> tuple[list[Trial], TradeOff | None]:
    """The trials with their place on the Pareto front, and the front as a whole."""
    compared = [trial for trial in trials if trial.comparison is not None]
    comparisons = [trial.comparison for trial in compared if trial.comparison is not None]
    if not comparisons:
        return list(trials), None
    traded = trade_off(comparisons, max_forgetting=max_forgetting)
    placed = {
        trial.entry.number: replace(
            trial,
            is_on_front=index in traded.front,
            front_probability=traded.front_probability[index],
            knee_probability=traded.knee_probability[index],
            budget_probability=traded.budget_probability[index],
        )
        for index, trial in enumerate(compared)
    }
    return [placed.get(trial.entry.number, trial) for trial in trials], traded


def _preferred(file: StudyFile, trials: Sequence[Trial]) -> tuple[Trial | None, bool]:
    """The trial that the study's objective prefers, and whether it may be called the best."""
    compared = [trial for trial in trials if trial.comparison is not None]
    points = [
        (trial.comparison.domain_gain.value, trial.comparison.forgetting.value)
        for trial in compared
        if trial.comparison is not None
    ]
    choice = choose(
        points,
        file.objective,
        forgetting_weight=file.forgetting_weight,
        max_forgetting=file.max_forgetting,
    )
    return (compared[choice.index], choice.is_feasible) if choice else (None, False)


# In words


@dataclass(frozen=True)
class Sentence:
    """One sentence of the summary."""

    text: str
    distinguishable: bool
    """False: what it says may be luck, and is shown in grey."""


def headline(study: Study) -> tuple[Sentence, ...]:
    """What was learned, what was forgotten, and how that compares with plain fine-tuning."""
    if study.shown is None or study.verdict is None:
        count = len(study.problems)
        text = f"No trial has scores yet: {count} of {count} failed or unfinished."
        return (Sentence(text, False),)
    comparison = study.verdict.comparison
    sentences = [
        *_closest(study),
        _learned(study.shown, comparison),
        _forgotten(comparison),
        *_by_objective(study),
    ]
    versus = _against_yardstick(study, study.verdict)
    return (*sentences, versus) if versus else tuple(sentences)


def _closest(study: Study) -> list[Sentence]:
    """That no trial keeps the budget, where that is so."""
    if study.closest is None:
        return []
    return [
        Sentence(
            f"No trial stays within the budget of {points(study.file.max_forgetting)} points of "
            f"forgetting, so there is no best one; {study.closest.name} forgets least.",
            True,
        )
    ]


def _by_objective(study: Study) -> list[Sentence]:
    """How sure the choice is, in terms of the study's own objective."""
    best, traded = study.best, study.trade_off
    if best is None or traded is None:
        return []
    if study.file.objective == "budget":
        share = best.budget_probability
        return [
            Sentence(
                f"It stays within the budget of {points(study.file.max_forgetting)} points in "
                f"{percent(share)} of the resamples of the search's items.",
                share >= CONFIDENCE,
            )
        ]
    if study.file.objective == "pareto":
        share = best.knee_probability
        return [
            Sentence(
                f"It is the knee of a front of {len(traded.front)} trials, and is so in "
                f"{percent(share)} of the resamples of the search's items.",
                share >= CONFIDENCE,
            )
        ]
    return []


def _learned(best: Trial, comparison: Comparison) -> Sentence:
    facts = []
    for task in comparison.tasks:
        if task.group != "domain":
            continue
        if task.kind == "text":
            change = task.metric("cross_entropy")
            verb = "lowers" if change.delta.value < 0 else "raises"
            facts.append(
                f"{verb} the cross-entropy of {task.task} from {number(change.before.value, 3)} "
                f"to {number(change.after.value, 3)} nats per token"
            )
        else:
            change = task.metric("accuracy")
            facts.append(
                f"answers {percent(change.after.value)} of the held-out {task.task} questions "
                f"(95 % interval {percent_range(change.after)}; "
                f"base {percent(change.before.value)}, {percent_range(change.before)})"
            )
    shown = facts[:3] + ([f"and so on for {len(facts) - 3} more tasks"] if len(facts) > 3 else [])
    gain = comparison.domain_gain
    doubt = "" if gain.distinguishable else " The gain is not distinguishable from zero."
    subject = f"Trial {best.entry.number}"
    if best.entry.role == "yardstick":
        subject += ", plain fine-tuning,"
    return Sentence(f"{subject} {', '.join(shown)}.{doubt}", gain.distinguishable)


def _forgotten(comparison: Comparison) -> Sentence:
    forgetting = comparison.forgetting
    verb = "lost" if forgetting.value > 0 else "gained"
    amount = number(abs(100 * forgetting.value), 1)
    interval = forgetting if forgetting.value > 0 else -forgetting
    doubt = "" if forgetting.distinguishable else ", not distinguishable from zero"
    return Sentence(
        f"On the general tasks it {verb} {amount} points of 100 "
        f"(95 % interval {points_range(interval)}){doubt}.",
        forgetting.distinguishable,
    )


def _against_yardstick(study: Study, verdict: Verdict) -> Sentence | None:
    versus = verdict.versus
    if versus is None or study.candidate is None or study.yardstick is None:
        return None
    combined = versus.combined
    plain = f"plain fine-tuning ({study.yardstick.name})"
    start = ""
    if study.candidate is not study.shown:
        start = f"Plain fine-tuning itself scored best; the best other is {study.candidate.name}. "
    if combined.distinguishable:
        relation = f"{'better' if combined.value > 0 else 'worse'} than"
    else:
        relation = "not distinguishable from"
    return Sentence(
        f"{start}Item by item, {study.candidate.name} is {relation} {plain}: combined score "
        f"{points(combined.value)} points (95 % interval {points_range(combined)}), from domain "
        f"gain {points(versus.domain_gain.value)} ({points_range(versus.domain_gain)}) and "
        f"forgetting {points(versus.forgetting.value)} ({points_range(versus.forgetting)})."
        f"{_untuned(study)}",
        combined.distinguishable,
    )


def _untuned(study: Study) -> str:
    """That the yardstick had one try, while the candidate was chosen among several."""
    others = sum(trial.entry.role != "yardstick" for trial in study.compared)
    if len(study.compared) - others != 1 or others < 2 or study.yardstick is None:
        return ""
    rate = study.yardstick.entry.settings.get("lr")
    at = f" at the learning rate {rate:g}" if isinstance(rate, float) else ""
    return (
        f" Plain fine-tuning ran once{at}, the other is the best of {others} trials: tune both "
        "before you call one method the better."
    )


def _cautions(study: Study) -> list[str]:
    """Which items the verdict stands on, and what the intervals do not cover."""
    if study.verdict is None:
        return []
    cautions = []
    fresh = study.verdict.fresh_tasks
    others = [task for task in study.verdict.base.tasks if task not in fresh]
    if fresh:
        cautions.append(
            f"Scored on items that no choice was made on: {', '.join(fresh)}."
            + (f" On the search's own items: {', '.join(others)}." if others else "")
        )
    elif len(study.compared) > 1:
        cautions.append(
            f"The best of {len(study.compared)} trials was chosen on these same items, so its "
            "numbers lean to the lucky side: score it on fresh items before relying on them."
        )
    cautions.append(
        "The intervals cover the choice of items. Another training seed adds its own spread: "
        "repeat the best trial with other seeds to see it."
    )
    return cautions


# Terminal


def summary_table(study: Study) -> "Table":
    """All trials with their intervals, for a terminal of 80 columns or more; failed ones too."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{study.file.name}: points of 100, with 95 % intervals; grey: may be zero",
        box=box.SIMPLE_HEAD,
        show_lines=False,
    )
    table.add_column("trial")
    for column in ("domain gain", "forgetting", "combined"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial in study.trials:
        tags = _tags(study, trial)
        if trial.is_on_front:
            tags.append("on the front")
        cell = Text(f"{trial.entry.number} {', '.join(tags)}".strip(), style="bold")
        if parameters := _chosen(study, trial):
            cell.append(f"\n{_as_text(parameters)}", style="not bold")
        if trial.comparison is None:
            is_early = trial.entry.state == "PRUNED"
            cell.append(f"\n{trial.problem}", style="not bold" if is_early else "not bold red")
            table.add_row(cell, "-", "-", "-")
            continue
        accuracies = (trial.accuracy("domain"), trial.accuracy("general"), None)
        numbers = [
            Text(
                f"{points(interval.value)}\n{points_range(interval)}"
                + ("" if accuracy is None else "\n" + _accuracy_text(accuracy, separator="\n")),
                style="" if interval.distinguishable else "bright_black",
            )
            for interval, accuracy in zip(
                _headline_numbers(trial.comparison), accuracies, strict=True
            )
        ]
        table.add_row(cell, *numbers)
    return table


def _headline_numbers(comparison: Comparison) -> tuple[Interval, Interval, Interval]:
    return comparison.domain_gain, comparison.forgetting, comparison.combined


def _accuracy_text(accuracy: Interval, *, separator: str = ", ") -> str:
    return f"accuracy {percent(accuracy.value)}{separator}{percent_range(accuracy)}"


def _tags(study: Study, trial: Trial) -> list[str]:
    tags = ["best"] if trial is study.best else []
    if trial is study.closest:
        tags.append("closest to the budget")
    if trial.entry.role == "yardstick":
        tags.append("plain fine-tuning")
    elif trial.entry.role == "defaults":
        tags.append("defaults")
    return tags


def as_json(study: Study) -> dict[str, Any]:
    """The summary for other programs; fractions, with the ends of their 95 % intervals."""
    verdict = study.verdict
    versus = None
    if verdict is not None and verdict.versus is not None and study.candidate is not None:
        versus = {"trial": study.candidate.entry.number, **asdict(verdict.versus)}
    return {
        "study": study.file.name,
        "directory": str(study.directory),
        "objective": study.file.objective,
        "best": study.best.entry.number if study.best else None,
        "closest": study.closest.entry.number if study.closest else None,
        "trade_off": _trade_off_json(study),
        "best_results": verdict.comparison.metrics() if verdict else None,
        "fresh_tasks": list(verdict.fresh_tasks) if verdict else [],
        "yardstick": study.yardstick.entry.number if study.yardstick else None,
        "versus_yardstick": versus,
        "headline": [sentence.text for sentence in headline(study)],
        "notes": list(study.notes),
        "trials": [
            {
                "number": trial.entry.number,
                "role": trial.entry.role,
                "state": trial.entry.state,
                "problem": trial.problem,
                "rung": trial.entry.rung,
                "params": trial.entry.params,
                "settings": trial.entry.settings,
                "on_front": trial.is_on_front,
                "front_probability": trial.front_probability,
                "knee_probability": trial.knee_probability,
                "budget_probability": trial.budget_probability,
                "results": (
                    {**trial.entry.results, **trial.comparison.metrics()}
                    if trial.comparison
                    else None
                ),
            }
            for trial in study.trials
        ],
    }


def _trade_off_json(study: Study) -> dict[str, Any] | None:
    traded = study.trade_off
    if traded is None:
        return None
    numbers = [trial.entry.number for trial in study.compared]
    return {
        "front": [numbers[index] for index in traded.front],
        "knee": numbers[traded.knee],
        "knee_gain": asdict(traded.knee_gain),
        "knee_forgetting": asdict(traded.knee_forgetting),
        "hypervolume": asdict(traded.hypervolume[-1]),
        "hypervolume_reference": list(HYPERVOLUME_REFERENCE),
    }


# Figure


def draw_front(study: Study) -> "Figure":
    """``gain_vs_forgetting.png``: every trial with its intervals, the front, base and best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#cbd5e1", linewidth=0.8, zorder=0)
    shown = [_front_point(study, trial) for trial in study.compared]
    front = sorted((p for p in shown if p.is_on_front), key=lambda p: p.forgetting.value)
    axes.plot(
        [100 * p.forgetting.value for p in front],
        [100 * p.gain.value for p in front],
        drawstyle="steps-post",
        color=COLOURS["front"],
        linestyle=":",
        linewidth=1.5,
        label="Pareto front",
    )
    for role in ("search", "defaults", "yardstick", "best"):
        _draw_trials(axes, [p for p in shown if p.role == role], role)
    axes.plot(
        0, 0, MARKERS["base"][1], color=COLOURS["base"], markersize=9, linestyle="", label="base"
    )
    axes.set_title(f"{study.file.name}: what was learned against what was forgotten", loc="left")
    axes.set_xlabel(FORGETTING_LABEL)
    axes.set_ylabel(GAIN_LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eef2f6", zorder=0)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.text(
        0.01, -0.02, f"Bars: 95 % intervals over the items. {_not_drawn(study)}".strip(),
        fontsize=8, color="#526077",
    )  # fmt: skip
    return figure


def _draw_trials(axes: "Axes", trials: Sequence[FrontPoint], role: str) -> None:
    if not trials:
        return
    is_marked = role != "search"
    x = [100 * p.forgetting.value for p in trials]
    y = [100 * p.gain.value for p in trials]
    errors = [
        [
            [100 * (interval.value - interval.low) for interval in intervals],
            [100 * (interval.high - interval.value) for interval in intervals],
        ]
        for intervals in ([p.forgetting for p in trials], [p.gain for p in trials])
    ]
    axes.errorbar(
        x, y, xerr=errors[0], yerr=errors[1],
        fmt=MARKERS[role][1], markersize=14 if role == "best" else 7,
        color=COLOURS[role], markeredgecolor="white", markeredgewidth=0.8,
        ecolor=COLOURS[role] if is_marked else "#dbe2ea", elinewidth=1.3 if is_marked else 0.9,
        capsize=2.5 if is_marked else 0, zorder=4 if is_marked else 2, label=ROLE_NAMES[role],
    )  # fmt: skip
    for point, left, bottom in zip(trials, x, y, strict=True):
        axes.annotate(
            point.label if is_marked else point.label.removeprefix("trial "),
            (left, bottom),
            xytext=(7, 6),
            textcoords="offset points",
            fontsize=10 if is_marked else 8,
            color=COLOURS[role] if is_marked else "#64748b",
            zorder=5,
        )


def _front_point(study: Study, trial: Trial) -> FrontPoint:
    assert trial.comparison is not None  # Only compared trials are drawn.
    details = [_as_text(_chosen(study, trial))]
    accuracy = trial.accuracy("domain")
    if accuracy is not None:
        details.append(f"domain {_accuracy_text(accuracy)}")
    return FrontPoint(
        label=trial.name,
        role=_shown_role(study, trial),
        gain=trial.comparison.domain_gain,
        forgetting=trial.comparison.forgetting,
        details="\n".join(line for line in details if line),
        is_on_front=trial.is_on_front,
    )


def _shown_role(study: Study, trial: Trial) -> str:
    return "best" if trial is study.best else trial.entry.role


def _not_drawn(study: Study) -> str:
    if not study.problems:
        return ""
    numbers = ", ".join(str(trial.entry.number) for trial in study.problems)
    return f"Not drawn, because they have no scores: {numbers}."


# Page


def write_report(study_dir: Path) -> Path:
    """Write ``gain_vs_forgetting.png`` and ``report.html`` into a study's directory.

    Returns:
        The path of ``report.html``.

    Raises:
        IncompleteArtifactError: no ``study.json`` or no base scores; names the remedy.
        DataError: one of them is damaged.
    """
    return _write(load_study(study_dir))


def _write(study: Study) -> Path:
    png = io.BytesIO()
    draw_front(study).savefig(png, format="png", bbox_inches="tight", facecolor="white")
    write_atomically(study.directory / FIGURE_FILE, png.getvalue())
    path = study.directory / REPORT_FILE
    write_atomically(path, render(_page(study)).encode())
    return path


def _page(study: Study) -> dict[str, Any]:
    """Everything that the page shows, in the words of its template."""
    best, verdict = study.shown, study.verdict
    surface_names, ground = _surface(study)
    curves, curve_notes = _curves(study)
    tiles = []
    if verdict is not None:
        names = ("Domain gain", "Forgetting", "Combined")
        tiles = [
            {"name": name, "interval": interval}
            for name, interval in zip(names, _headline_numbers(verdict.comparison), strict=True)
        ]
        if verdict.versus is not None and study.candidate is not None:
            subject = "" if study.candidate is best else f"{study.candidate.name}, "
            name = f"{subject}against plain fine-tuning"
            tiles.append({"name": name[0].upper() + name[1:], "interval": verdict.versus.combined})
    weight = setting(study.file.forgetting_weight)
    roles = {_shown_role(study, trial) for trial in study.compared}
    curve_roles = {_shown_role(study, trial) for trial in study.trials if trial.entry.metrics_file}
    return {
        "name": study.file.name,
        "subtitle": f"{len(study.trials)} trials, {len(study.problems)} of them without scores. "
        f"Started {study.file.created}.",
        "headline": headline(study),
        "tiles": tiles,
        "resamples": RESAMPLES,
        "objective_text": (
            f"Combined = domain gain - {weight} x forgetting; against plain fine-tuning it is the "
            "difference of both combined scores."
            + _OBJECTIVE_NOTES[study.file.objective].format(
                budget=points(study.file.max_forgetting)
            )
        ),
        "cautions": _cautions(study),
        "notes": (*study.notes, *curve_notes),
        "parameters": _chosen(study, best) if best is not None else [],
        "front": (
            drawing(front_figure([_front_point(study, trial) for trial in study.compared]), "front")
            if study.compared
            else None
        ),
        "front_note": _not_drawn(study),
        "roles": [
            *((role, ROLE_NAMES[role]) for role in ROLE_NAMES if role in roles),
            ("base", "base model"),
        ],
        "trials": [_trial_row(study, trial) for trial in study.trials],
        "best_name": best.name if best else "",
        "has_yardstick": verdict is not None and verdict.plain is not None,
        "tasks": _task_rows(verdict) if verdict is not None else [],
        "drift": _drift(best) if best is not None else "",
        "curves": curves,
        "curve_roles": [(role, ROLE_NAMES[role]) for role in ROLE_NAMES if role in curve_roles],
        "costs": _cost_rows(study),
        "cost_sentences": _cost_sentences(study),
        "cost_note": _cost_note(study),
        "trade_off": _trade_off_section(study),
        "surface": ground,
        "surface_names": surface_names,
        "importance": _importance(study),
        "record": flatten(study.file.record),
        **_receipt(verdict),
        "tables": [
            (title, rows)
            for title, rows in (
                ("Search space", flatten(study.file.space)),
                ("Settings", flatten(study.file.settings)),
                ("Versions", flatten(study.file.versions)),
                ("Seeds", _seeds(study)),
            )
            if rows
        ],
        "footer": f"Written by lrmc_ray from {STUDY_FILE}; figures need no network.",
    }


def _trade_off_section(study: Study) -> dict[str, Any] | None:
    """The front, its knee and its hypervolume, for every objective."""
    traded = study.trade_off
    if traded is None:
        return None
    compared = study.compared
    bend = compared[traded.knee]
    area = traded.hypervolume[-1]
    gain, forgetting = (points(value) for value in HYPERVOLUME_REFERENCE)
    rows = []
    for index in traded.front:
        trial = compared[index]
        assert trial.comparison is not None  # compared
        rows.append(
            {
                "name": trial.name,
                "gain": trial.comparison.domain_gain,
                "forgetting": trial.comparison.forgetting,
                "on_front": number(trial.front_probability, 2),
                "knee": number(trial.knee_probability, 2),
                "budget": number(trial.budget_probability, 2),
            }
        )
    return {
        "sentences": [
            f"{len(traded.front)} of {len(compared)} trials are on the front. Its knee is "
            f"{bend.name}, in {percent(traded.knee_probability[traded.knee])} of the resamples; "
            f"wherever the knee falls, its gain is {points(traded.knee_gain.value)} "
            f"({points_range(traded.knee_gain)}) and its forgetting "
            f"{points(traded.knee_forgetting.value)} ({points_range(traded.knee_forgetting)})."
        ],
        "rows": rows,
        "figure": drawing(
            hypervolume_figure(traded.hypervolume, [trial.name for trial in compared]),
            "hypervolume",
        ),
        "caption": (
            f"Hypervolume: the area between the front and the point (gain {gain}, forgetting "
            f"{forgetting}), now {1e4 * area.value:.0f} points x points (95 % interval "
            f"{1e4 * area.low:.0f} to {1e4 * area.high:.0f}). It grows as the front does; the "
            "band leans upwards, since a front picks lucky trials. The three shares on the right "
            f"are of the resamples; the budget is {points(study.file.max_forgetting)} points of "
            "forgetting."
        ),
    }


def _surface(study: Study) -> tuple[tuple[str, str], Any]:
    """The combined score over the two thresholds, or over the first two numbers searched."""
    searched = [
        name
        for name, space in study.file.space.items()
        if isinstance(space, Mapping) and space.get("choices") is None
    ]
    searched.sort(key=lambda name: name not in ("tau", "delta_max"))
    if len(searched) < 2:
        return ("", ""), None
    names = (searched[0], searched[1])
    placed = [
        (
            float(trial.entry.params[names[0]]),
            float(trial.entry.params[names[1]]),
            trial.comparison.combined.value,
            trial.name,
        )
        for trial in study.compared
        if trial.comparison is not None and all(name in trial.entry.params for name in names)
    ]
    ground = surface(
        [one[0] for one in placed], [one[1] for one in placed], [one[2] for one in placed]
    )
    return names, drawing(contour_figure(ground, placed, names), "surface") if ground else None


def _importance(study: Study) -> Any:
    names = {
        "eval/domain_gain": "domain gain",
        "eval/forgetting": "forgetting",
        "eval/combined": "combined",
    }
    shares = {
        text: study.file.importance[key]
        for key, text in names.items()
        if study.file.importance.get(key)
    }
    return drawing(importance_figure(shares), "importance") if shares else None


def _trial_row(study: Study, trial: Trial) -> dict[str, Any]:
    kinds = {
        "best": "best",
        "closest to the budget": "closest",
        "plain fine-tuning": "yardstick",
        "defaults": "defaults",
    }
    tags = [{"kind": kinds[text], "text": text} for text in _tags(study, trial)]
    row: dict[str, Any] = {
        "number": trial.entry.number,
        "tags": tags,
        "parameters": _chosen(study, trial),
        "problem": trial.problem,
    }
    if trial.comparison is None:
        if trial.entry.state in ("COMPLETE", "FAIL"):
            tags.append({"kind": "fail", "text": "failed"})
        elif trial.entry.state == "PRUNED":
            tags.append({"kind": "early", "text": "stopped early"})
        return row
    accuracies = [
        "" if value is None else _accuracy_text(value)
        for value in (trial.accuracy("domain"), trial.accuracy("general"))
    ]
    row["numbers"] = list(
        zip(
            ("domain gain", "forgetting", "combined"),
            _headline_numbers(trial.comparison),
            (*accuracies, ""),
            strict=True,
        )
    )
    row["front_probability"] = number(trial.front_probability, 2)
    row["is_on_front"] = trial.is_on_front
    return row


def _chosen(study: Study, trial: Trial) -> list[tuple[str, str]]:
    """The searched parameters, and the settings in which the trial differs from the study's."""
    common = study.file.settings.get("train")
    common = common if isinstance(common, Mapping) else {}
    differing = {
        name: value
        for name, value in trial.entry.settings.items()
        if name not in common or common[name] != value
    }
    return flatten({**trial.entry.params, **differing})


def _as_text(settings: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings)


def _drift(best: Trial) -> str:
    """How far the tuned model's predictions have moved, where that was measured."""
    parts = []
    for group in ("domain", "general"):
        ends = [
            best.entry.results.get(f"eval/kl_base_{group}{end}") for end in ("", "_low", "_high")
        ]
        value, low, high = (number(end, 3) if isinstance(end, float) else None for end in ends)
        if value is not None:
            interval = f" ({low} to {high})" if low is not None and high is not None else ""
            parts.append(f"{value}{interval} on {group} texts")
    return f"KL(base || {best.name}): {', '.join(parts)}, nats per position." if parts else ""


def _task_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """The best trial's metrics, the objective's first within each task."""
    comparison, plain = verdict.comparison, verdict.plain
    rows: list[dict[str, Any]] = []
    for group, heading in (("domain", "Domain tasks"), ("general", "General tasks")):
        rows.append({"heading": heading})
        changes = [
            (task, change)
            for task in comparison.tasks
            if task.group == group
            for change in _ordered(task)
        ]
        drawn = [interval for one in changes if (interval := _better(*one))]
        low = min([0.0, *(interval.low for interval in drawn)])
        high = max([0.0, *(interval.high for interval in drawn)])
        for task, change in changes:
            is_fraction = _is_fraction(change)
            value, value_range = (percent, percent_range) if is_fraction else (_raw, _raw_range)
            delta, delta_range = (
                (points, points_range) if is_fraction else (_raw_delta, _raw_delta_range)
            )
            better = _better(task, change)
            row = {
                "heading": "",
                "task": f"{task.task} ({task.num_items} items)",
                "metric": change.metric.replace("_", " "),
                "is_objective": change.metric == task.objective_metric,
                "before": value(change.before.value),
                "before_range": value_range(change.before),
                "after": value(change.after.value),
                "after_range": value_range(change.after),
                "delta": delta(change.delta.value),
                "delta_range": delta_range(change.delta),
                "distinguishable": change.delta.distinguishable,
                "whisker": whisker(better, low, high) if better else "",
            }
            if plain is not None:
                other = plain.task(task.task).metric(change.metric).after
                row["yardstick"] = value(other.value)
                row["yardstick_range"] = value_range(other)
            rows.append(row)
    return rows


def _ordered(task: TaskChange) -> list[MetricChange]:
    """The objective's metric, then accuracy, then the others."""
    return sorted(
        task.metrics,
        key=lambda change: (change.metric != task.objective_metric, change.metric != "accuracy"),
    )


def _is_fraction(change: MetricChange) -> bool:
    values = (change.before.value, change.after.value)
    return change.metric != "cross_entropy" and all(0.0 <= value <= 1.0 for value in values)


def _better(task: TaskChange, change: MetricChange) -> Interval | None:
    """The change with the better side positive; None where the metric's direction is unknown."""
    if change.metric == task.objective_metric:
        return task.objective
    return change.delta if _is_fraction(change) else None


def _raw(value: float) -> str:
    return number(value, 3)


def _raw_range(interval: Interval) -> str:
    return f"{_raw(interval.low)} to {_raw(interval.high)}"


def _raw_delta(value: float) -> str:
    return f"+{_raw(value)}" if float(f"{value:.3f}") > 0.0 else _raw(value)


def _raw_delta_range(interval: Interval) -> str:
    return f"{_raw_delta(interval.low)} to {_raw_delta(interval.high)}"


def _curves(study: Study) -> tuple[list[tuple[str, Any]], list[str]]:
    """Figures of the training metrics, and what could not be read."""
    logs: list[tuple[Trial, list[StepMetrics]]] = []
    notes = []
    for trial in study.trials:
        if trial.entry.metrics_file is None:
            continue
        try:
            logs.append((trial, read_metrics(study.directory / trial.entry.metrics_file)))
        except DataError as error:
            notes.append(f"The training curves of {trial.name} cannot be shown: {error}")
    figures = []
    for metric, (title, unit) in CURVES.items():
        curves = [
            Curve(
                label=trial.name,
                role=_shown_role(study, trial),
                steps=[line.step for line in lines],
                values=[line.metrics[metric] for line in lines],
            )
            for trial, log in logs
            if (lines := [line for line in log if metric in line.metrics])
        ]
        if curves:
            name = metric.replace("/", "-")
            figures.append((title, drawing(curve_figure(curves, unit), name)))
    return figures, notes


def _cost_rows(study: Study) -> list[dict[str, str]]:
    rows = []
    stages = study.file.stage_seconds
    if "record" in stages:
        rows.append(_cost_row("Stage 0: record (once)", {"train_seconds": stages["record"]}))
    if "base_evaluation" in stages:
        rows.append(_cost_row("base model (once)", {"evaluate_seconds": stages["base_evaluation"]}))
    if study.shown is not None:
        how = "the best" if study.best else "closest to the budget"
        rows.append(_cost_row(f"{study.shown.name}, {how}", study.shown.entry.cost))
    if study.yardstick is not None and study.yardstick is not study.shown:
        rows.append(
            _cost_row(f"{study.yardstick.name}, plain fine-tuning", study.yardstick.entry.cost)
        )
    total: dict[str, float] = {}
    for trial in study.trials:
        cost = dict(trial.entry.cost)
        if (hours := _core_hours(cost)) is not None:
            cost["core_hours"] = hours
        for key, value in cost.items():
            total[key] = total.get(key, 0.0) + value
    rows.append(_cost_row(f"all {len(study.trials)} trials", total))
    return rows


def _core_hours(cost: Mapping[str, float]) -> float | None:
    """Cores held, times hours; None where that was not written down."""
    if "core_hours" in cost:
        return cost["core_hours"]
    if "train_cores" not in cost or "evaluate_cores" not in cost:
        return None
    seconds = sum(
        cost.get(f"{part}_seconds", 0.0) * cost[f"{part}_cores"] for part in ("train", "evaluate")
    )
    return seconds / 3600


def _cost_sentences(study: Study) -> list[str]:
    """Wall time, and the forecast beside it."""
    sessions = study.file.sessions
    taken = sum(end - start for start, end in sessions)
    if not taken:
        return []
    sentences = [
        f"The search took {format_seconds(taken)} by the clock"
        + (f" in {len(sessions)} sittings." if len(sessions) > 1 else ".")
    ]
    if study.file.forecast is not None:
        expected = study.file.forecast.get("seconds", 0.0)
        sentences.append(
            f"The forecast for {study.file.forecast.get('trials')} trials was "
            f"{format_seconds(expected)} ({study.file.forecast.get('basis')})."
        )
    return [*sentences, *_early_sentences(study)]


def _early_sentences(study: Study) -> list[str]:
    """What early stopping cost and saved, by the trials that ran to the end."""
    scored = [t.entry for t in study.trials if t.entry.rung is not None]
    if not scored:
        return []
    asked = sum(entry.rung["seconds"] for entry in scored if entry.rung is not None)
    ended = [entry for entry in scored if entry.state == "PRUNED"]
    whole = [entry for entry in scored if entry.state == "COMPLETE" and entry.cost]
    sentence = (
        f"{len(ended)} of {len(scored)} trials that were scored on the way, which took "
        f"{format_seconds(asked)} in all, stopped early"
    )
    if not ended or not whole:
        return [f"{sentence}."]
    mean = sum(e.cost["train_seconds"] + e.cost["evaluate_seconds"] for e in whole) / len(whole)
    saved = sum(mean - e.cost["train_seconds"] for e in ended if "train_seconds" in e.cost)
    return [
        f"{sentence}: about {format_seconds(max(0.0, saved))} of training and scoring less, by "
        "what the others took."
    ]


def _cost_row(part: str, cost: Mapping[str, float]) -> dict[str, str]:
    def seconds(key: str) -> str:
        return format_seconds(cost[key]) if key in cost else "-"

    tokens, share = "-", ""
    if cost.get("original_tokens"):
        processed, original = cost.get("processed_tokens", 0.0), cost["original_tokens"]
        tokens, share = f"{processed:,.0f} of {original:,.0f}", percent(processed / original)
    return {
        "part": part,
        "train": seconds("train_seconds"),
        "evaluate": seconds("evaluate_seconds"),
        "core_hours": "-" if (hours := _core_hours(cost)) is None else f"{hours:.3f}",
        "tokens": tokens,
        "tokens_share": share,
    }


def _cost_note(study: Study) -> str:
    note = (
        "Fewer tokens are processed than the data has where a sequence ends in positions, or "
        "consists of positions, that give no gradient; the gradient stays the same."
    )
    record = study.file.stage_seconds.get("record")
    best, plain = study.shown, study.yardstick
    if record is None or best is None or plain is None or best is plain:
        return note
    own, other = (trial.entry.cost.get("train_seconds") for trial in (best, plain))
    if own is None or other is None:
        return note
    return (
        f"With Stage 0 counted in full, {best.name} took {format_seconds(record + own)} to train, "
        f"plain fine-tuning {format_seconds(other)}. {note}"
    )


def _receipt(verdict: Verdict | None) -> dict[str, Any]:
    """Lost and gained items of the best trial: counts per task, and a few examples."""
    if verdict is None:
        return {"receipts": [], "examples": []}
    rows = receipt(verdict.base, verdict.scores).to_pylist()
    counts = [
        {
            "task": f"{task.task} ({task.group})",
            "num_items": task.num_items,
            "lost": _count(rows, task.task, "lost"),
            "gained": _count(rows, task.task, "gained"),
        }
        for task in verdict.comparison.tasks
        if any(change.metric == "accuracy" for change in task.metrics)
    ]
    examples = []
    for change, group in (("lost", "general"), ("gained", "domain")):
        items = [row for row in rows if row["change"] == change]
        # What the search is about comes first: forgotten general items, learned domain items.
        items.sort(key=lambda row: row["group"] != group)
        if items:
            shown = [
                {
                    "task": row["task"],
                    "item_id": row["item_id"],
                    "before": row["output_before"],
                    "after": row["output_after"],
                }
                for row in items[:_MAX_EXAMPLES]
            ]
            more = max(0, len(items) - _MAX_EXAMPLES)
            examples.append((f"{change.capitalize()}: {len(items)} items", shown, more))
    return {"receipts": counts, "examples": examples}


def _count(rows: Sequence[Mapping[str, Any]], task: str, change: str) -> int:
    return sum(row["task"] == task and row["change"] == change for row in rows)


def _seeds(study: Study) -> list[tuple[str, str]]:
    rows = [
        row for row in flatten(study.file.settings) if row[0] == "seed" or row[0].endswith(".seed")
    ]
    return [*rows, ("bootstrap", f"{_bootstrap_seed(study.file)}, {RESAMPLES} resamples")]


# Command


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.report``."""
    parser = argparse.ArgumentParser(
        prog="python -m lrmc_ray.report",
        description="Write report.html and gain_vs_forgetting.png of a finished or running search.",
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="RUNS_DIR",
        help="the search's output directory, or the study's in it (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    study = load_study(find_study(arguments.directory))
    path = _write(study)
    if arguments.json:
        paths = {"report": str(path), "figure": str(path.with_name(FIGURE_FILE))}
        print(json.dumps(as_json(study) | paths, allow_nan=False))
        return 0
    from rich.console import Console

    # Without a terminal nothing limits the width, and a wrapped table is hard to read.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(summary_table(study))
    for sentence in headline(study):
        console.print(sentence.text, markup=False)
    for note in study.notes:
        console.print(f"Note: {note}", markup=False)
    # Not through rich, which would break a long path in two.
    print(f"\nReport  {path}\nFigure  {path.with_name(FIGURE_FILE)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
