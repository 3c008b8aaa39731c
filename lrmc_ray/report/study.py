"""A study with its scores read and every trial compared with the base model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrmc_ray.errors import DataError, IncompleteArtifactError, LrmcError
from lrmc_ray.evaluate.changes import (
    Comparison,
    Difference,
    compare,
    difference,
)
from lrmc_ray.evaluate.front import choose
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.study import STUDY_FILE, StudyFile, TrialEntry, read_study
from lrmc_ray.report.trade_off import TradeOff, trade_off

RESAMPLES = 2000


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
    file = read_study(study_dir)
    if file.base_scores is None:
        raise IncompleteArtifactError(
            f"{study_dir / STUDY_FILE} names no base scores: the base model is not evaluated yet; "
            "run the same `python -m lrmc_ray.tune` command again, it goes on where it stopped"
        )
    base = Scores.load(study_dir / file.base_scores)
    compare_with = functools.partial(
        compare,
        forgetting_weight=file.forgetting_weight,
        seed=bootstrap_seed(file),
        resamples=resamples,
    )
    loaded = [
        _load_trial(entry, study_dir, base, compare_with)
        for entry in sorted(file.trials, key=lambda entry: entry.number)
    ]
    trials, traded = _with_trade_off(loaded, file.max_forgetting)
    notes = [
        f"{trial.name} is marked complete, but cannot be used: {trial.problem}"
        for trial in trials
        if trial.problem is not None and trial.entry.state == "COMPLETE"
    ]
    best, closest = _chosen(study_dir, file, trials, notes)
    yardstick, _ = _preferred(file, [t for t in trials if t.entry.role == "yardstick"])
    shown = candidate = best or closest
    if shown is not None and shown.entry.role == "yardstick":
        candidate, _ = _preferred(file, [t for t in trials if t.entry.role != "yardstick"])
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


def _chosen(
    study_dir: Path, file: StudyFile, trials: Sequence[Trial], notes: list[str]
) -> tuple[Trial | None, Trial | None]:
    """The best trial, or where there is none the closest; a doubtful choice is added to ``notes``.

    Raises:
        DataError: the study chose a trial that it does not have.
    """
    preferred, is_feasible = _preferred(file, trials)
    best, closest = (preferred, None) if is_feasible else (None, preferred)
    if file.best is None:
        return best, closest
    named = next((trial for trial in trials if trial.entry.number == file.best), None)
    if named is None:
        raise DataError(
            f"{study_dir / STUDY_FILE}: best must be the number of a trial, got {file.best}"
        )
    if named.comparison is None:
        notes.append(
            f"{named.name} was chosen as the best; the best of the readable trials is shown"
        )
        return best, closest
    return named, None


def bootstrap_seed(file: StudyFile) -> int:
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
        fresh_tasks=tuple(task for task in base.tasks if base.asks_others(searched.base, task)),
    )


def _scored_model(directory: Path) -> str:
    """Fingerprint of the model that was scored there."""
    manifest = read_manifest(directory, made_by="python -m lrmc_ray.evaluate")
    identity = manifest.get("identity")
    return str(identity.get("model")) if isinstance(identity, dict) else ""


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
