"""Scores of the models between the base and a trial's, compared with the base."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from lrmc_ray.evaluate.changes import Comparison, compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.files.blend import BlendPoint, read_blend
from lrmc_ray.method.names import Blend
from lrmc_ray.report.study import RESAMPLES, Study, Trial, bootstrap_seed


@dataclass(frozen=True, eq=False)
class BlendPlace:
    """A measured point of a curve; at weight 1 it is the trial itself."""

    weight: float
    scores: Scores
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class BlendCurve:
    """Gain and forgetting from the base to one trial's model, on the search's items."""

    trial: Trial
    form: Blend
    places: tuple[BlendPlace, ...]
    """By rising weight, the trial itself last."""

    def place(self, weight: float) -> BlendPlace | None:
        """What was measured at ``weight``; None if nothing."""
        return next((place for place in self.places if place.weight == weight), None)

    def around(self, weight: float) -> tuple[BlendPlace | None, BlendPlace | None]:
        """The nearest measured places below and above ``weight``."""
        below = [place for place in self.places if place.weight < weight]
        above = [place for place in self.places if place.weight > weight]
        return (below[-1] if below else None, above[0] if above else None)


def blend_curves(study: Study, trials: Sequence[int] | None = None) -> list[BlendCurve]:
    """The measured curves of a study, in the order of the trials; by depth behind even.

    Args:
        study: with its trials.
        trials: numbers of those that are wanted; all by default.

    Raises:
        DataError: ``blend.json``, or scores that it names, are damaged.
        IncompleteArtifactError: scores that it names are gone.
    """
    file = read_blend(study.directory)
    curves = []
    forms: tuple[Blend, ...] = get_args(Blend)
    for trial in study.compared:
        if trials is None or trial.entry.number in trials:
            own = [p for p in file.points if _counts(p, study, trial)]
            found = [_curve(study, trial, form, own) for form in forms]
            curves += [curve for curve in found if len(curve.places) > 1]
    return curves


def blend_curve(study: Study, trial: Trial, form: Blend) -> BlendCurve:
    """One curve, measured or not; raises as :func:`blend_curves` does."""
    points = [p for p in read_blend(study.directory).points if _counts(p, study, trial)]
    return _curve(study, trial, form, points)


def _counts(point: BlendPoint, study: Study, trial: Trial) -> bool:
    """Whether a point is of this trial, against the base scores that the study has now."""
    return point.trial == trial.entry.number and point.base_scores == study.file.base_scores


def _curve(study: Study, trial: Trial, form: Blend, points: Sequence[BlendPoint]) -> BlendCurve:
    assert study.file.base_scores is not None, "a study that is loaded has them"
    assert trial.comparison is not None, "only compared trials have a curve"
    assert trial.scores is not None, "only compared trials have a curve"
    base = Scores.load(study.directory / study.file.base_scores)
    against = functools.partial(
        compare,
        base,
        forgetting_weight=study.file.forgetting_weight,
        seed=bootstrap_seed(study.file),
        resamples=RESAMPLES,
    )
    places = []
    own = [point for point in points if point.form == form]
    for point in sorted(own, key=lambda point: point.weight):
        scores = Scores.load(study.directory / point.scores)
        places.append(BlendPlace(point.weight, scores, against(scores)))
    return BlendCurve(trial, form, (*places, BlendPlace(1.0, trial.scores, trial.comparison)))
