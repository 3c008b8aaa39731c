"""Which trial is the best of a search so far, and which tuned models are still needed."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from lrmc_ray.config import SearchSettings
from lrmc_ray.evaluate.front import choose, pareto_front
from lrmc_ray.files.names import MODEL
from lrmc_ray.files.study import StudyFile, TrialEntry, trial_directory
from lrmc_ray.tune.result import FORGETTING, GAIN


def choose_best(study: StudyFile, search: SearchSettings) -> None:
    """Name the best trial; or, where none keeps the budget, the one that comes closest.

    Final scores of another trial are void.
    """
    finished = [trial for trial in study.trials if trial.results]
    choice = choose(
        _points(finished),
        search.objective,
        forgetting_weight=search.forgetting_weight,
        max_forgetting=search.max_forgetting,
    )
    number = finished[choice.index].number if choice else None
    best, closest = (number, None) if choice and choice.is_feasible else (None, number)
    if best != study.best:
        study.final = {}
    study.best, study.closest = best, closest


def needed_models(study: StudyFile, search: SearchSettings) -> set[int]:
    """Trials whose models the end of the search may still ask for."""
    needed = {
        trial.number
        for trial in study.trials
        if trial.state == "RUNNING" or trial.role == "yardstick"
    }
    if search.objective == "pareto":
        # The knee may move back to an older trial of the front.
        finished = [trial for trial in study.trials if trial.results]
        needed |= {finished[index].number for index in pareto_front(_points(finished))}
    return needed | {number for number in (study.best, study.closest) if number is not None}


def remove_models(
    directory: Path,
    study: StudyFile,
    search: SearchSettings,
    *,
    removed: Collection[int] = frozenset(),
) -> set[int]:
    """Remove the models that nothing will ask for again.

    Args:
        directory: of the study.
        study: as it is now.
        search: says which models are kept.
        removed: trials whose models are gone already.

    Returns:
        The trials whose models are gone now.
    """
    if search.keep_models == "all":
        return set()
    gone = {trial.number for trial in study.trials} - needed_models(study, search) - set(removed)
    for number in gone:
        shutil.rmtree(model_of(directory, number), ignore_errors=True)
    return gone


def model_of(directory: Path, number: int) -> Path:
    """Where the tuned model of a trial is."""
    return trial_directory(directory, number) / "training" / MODEL


def _points(trials: Sequence[TrialEntry]) -> list[tuple[float, float]]:
    """(gain, forgetting) of finished trials."""
    return [(trial.results[GAIN], trial.results[FORGETTING]) for trial in trials]
