"""Score models between the base and a trial's: the curve from which a person picks a point."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.console import progress
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.export.trial_model import (
    base_scores_of,
    check_base,
    check_within,
    finished_trial,
    kept_model,
    scored_fingerprint,
    study_settings,
    train_again,
)
from lrmc_ray.export.weights import write_model
from lrmc_ray.files.artifacts import PARTIAL, is_finished, relative_path
from lrmc_ray.files.blend import BLENDS, BlendPoint, read_blend, write_blend
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.study import StudyFile, TrialEntry
from lrmc_ray.method.names import Blend
from lrmc_ray.models.directory import local_directory


def curve_trials(study: StudyFile, numbers: Sequence[int] | None) -> list[TrialEntry]:
    """The trials whose curves are wanted; by default the best one and plain fine-tuning.

    Raises:
        ConfigError: one of them has no scores.
    """
    if not numbers:
        plain = [t.number for t in study.trials if t.role == "yardstick" and t.state == "COMPLETE"]
        return [finished_trial(study, n) for n in dict.fromkeys([study.best, *plain])]
    return [finished_trial(study, number) for number in dict.fromkeys(numbers)]


def measure_curves(
    directory: Path,
    study: StudyFile,
    trials: Sequence[TrialEntry],
    weights: Sequence[float],
    form: Blend = "even",
) -> None:
    """Score every trial's blends on the search's items, and write ``blend.json``.

    Needs a running Ray session, and that the study's directory is held. What was scored before is
    not scored again.

    Args:
        directory: of the study.
        study: what ``study.json`` says.
        trials: whose curves are wanted.
        weights: where they are measured, each between 0 and 1.
        form: how a weight is spread over the layers.

    Raises:
        DataError: the base, or a trial's model, is not the one that the search scored; a link leads
            out of the study.
        EvaluationError: scoring failed.
    """
    settings = study_settings(directory)
    base = local_directory(settings.model)
    base_scores = base_scores_of(directory, study)
    check_base(base, base_scores)
    known = read_blend(directory)
    title = "Scoring blends on the search items"
    with progress(title, total=len(trials) * len(weights), unit="models") as bar:
        for entry in trials:
            tuned = scored_fingerprint(directory, entry)
            for weight in weights:
                point = known.point(entry.number, weight, form)
                if point is None or not _holds(point, directory, study, tuned):
                    source = kept_model(directory, study, entry)
                    source = source or train_again(directory, entry, settings)
                    scores = score_blend(
                        settings, directory, source, base, weight, base_scores, form
                    )
                    point = BlendPoint(
                        trial=entry.number,
                        weight=weight,
                        form=form,
                        tuned=tuned,
                        base_scores=str(study.base_scores),
                        scores=relative_path(scores, directory),
                    )
                    known.add(point)
                    write_blend(directory, known)
                bar.advance(1)


def _holds(point: BlendPoint, directory: Path, study: StudyFile, tuned: str) -> bool:
    """Whether a point was made from these two models, and its scores are there."""
    return (
        point.tuned == tuned
        and point.base_scores == study.base_scores
        and is_finished(directory / point.scores)
    )


def score_blend(
    settings: RunSettings,
    directory: Path,
    source: Path,
    base: Path,
    weight: float,
    base_scores: Path,
    form: Blend = "even",
) -> Path:
    """Make one blend, score it, and remove it."""
    made = directory / BLENDS / f"model{PARTIAL}"
    check_within(made, directory)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        write_model(source, made, dtype="float32", base=base, blend=weight, form=form)
        passed("blend.model_written")
        return evaluate(settings, made, directory / BLENDS, split="dev", base=base_scores)
    finally:
        shutil.rmtree(made, ignore_errors=True)
