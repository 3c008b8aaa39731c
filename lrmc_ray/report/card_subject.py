"""Which model of a study a card is about, and what was measured of it."""

from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.numbers import points
from lrmc_ray.files.origin import Origin
from lrmc_ray.report.blends import BlendPlace, blend_curve
from lrmc_ray.report.markdown import inert, inert_code
from lrmc_ray.report.study import Study, Trial, Verdict


@dataclass(frozen=True, eq=False)
class CardSubject:
    """A trial's model, or one between the base and it."""

    trial: Trial
    verdict: Verdict | None
    """Its own scores; None where nobody has measured them."""
    origin: Origin | None = None
    """What its ``lrmc.json`` says; None for the search's best model."""
    nearest: tuple[BlendPlace, ...] = ()
    """Of a blend that was not measured: measured ones beside it."""

    @property
    def blend(self) -> float | None:
        """How far it is from the base; None for the trial's own model."""
        return None if self.origin is None else self.origin.blend

    @property
    def grows_with_depth(self) -> bool:
        """Whether that is so for its first layer alone."""
        return self.origin is not None and self.origin.blend_form == "depth"

    def what(self) -> str:
        """Sentences on what it is, where it is not simply the trial's model."""
        sentences = []
        if self.blend is not None and self.grows_with_depth:
            sentences.append(
                "**It is a blend (LiNeS):** base + x (tuned - base), weight by weight, where x "
                f"grows from {self.blend:g} in the first layer to 1 in the last, and is "
                f"{self.blend:g} outside of the layers; tuned is {self.trial.name}."
            )
        elif self.blend is not None:
            sentences.append(
                f"**It is a blend:** base + {self.blend:g} x (tuned - base), weight by weight, "
                f"{self.blend:g} of the way from the base to {self.trial.name}."
            )
        if self.origin is not None and self.origin.dtype == "bf16":
            sentences.append(
                "Its weights are rounded to bfloat16; scores are those of float32 weights."
            )
        return f"{' '.join(sentences)}\n" if sentences else ""

    def unmeasured(self, study: Study) -> str:
        """What stands in place of scores that there are not."""
        depth = " --by-depth" if self.grows_with_depth else ""
        command = f"lrmc blend OUTPUT/{study.file.id} --trial {self.trial.entry.number}"
        text = (
            f"This blend was not scored; `{command} --at {self.blend:g}{depth}` does that, with "
            "the output directory of the search in place of OUTPUT."
        )
        if self.nearest:
            parts = [
                f"{'at 1, the trial,' if place.weight == 1.0 else f'at {place.weight:g}'} gain "
                f"{points(place.comparison.domain_gain.value)}, "
                f"forgetting {points(place.comparison.forgetting.value)}"
                for place in self.nearest
            ]
            text += (
                f" Measured on the search items, in points of 100, were other blends of the same "
                f"two models{', growing with depth' if depth else ''}: {'; '.join(parts)}."
            )
        return f"{text}\n"

    def chain(self) -> str:
        """Where its base comes from, if that was tuned as well; empty otherwise."""
        if self.origin is None or not self.origin.ancestors:
            return ""
        steps = []
        for number, made in enumerate(self.origin.ancestors, start=1):
            by = f"trial {made.trial} of {made.study}" if made.study else "a training by itself"
            depth = ", growing with depth" if made.blend_form == "depth" else ""
            blend = f", blend {made.blend:g}{depth}" if made.blend is not None else ""
            base, data = inert_code(made.base), inert(", ".join(made.data))
            steps.append(f"{number}. from {base} by {inert(by)}{blend}, on {data}")
        last = f"{len(steps) + 1}. from {inert_code(str(self.origin.model['name']))}: this model"
        return (
            "\n".join([*steps, last])
            + "\n\nGain, forgetting and drift are against the base of the last step; what an "
            "earlier step forgot is not counted in them.\n"
        )


def subject_of(study: Study, origin: Origin | None = None) -> CardSubject:
    """What a card says of a model that ``origin`` describes; without one, of the best trial.

    Raises:
        IncompleteArtifactError: the trial has no scores.
    """
    number = None if origin is None else origin.trial
    trial = study.best
    if number is not None:
        trial = next((t for t in study.compared if t.entry.number == number), None)
    if trial is None or trial.comparison is None or trial.scores is None or study.verdict is None:
        raise IncompleteArtifactError(
            f"{study.directory} has no trial with scores, so there is no best model to describe; "
            "run the same `python -m lrmc_ray.tune` command again"
        )
    if origin is not None and origin.blend is not None:
        return _blended(study, trial, origin, origin.blend)
    if trial is study.shown:
        return CardSubject(trial, study.verdict, origin)
    assert study.file.base_scores is not None, "a study that is loaded has them"
    place = BlendPlace(1.0, trial.scores, trial.comparison)
    return CardSubject(trial, _on_search_items(study, place), origin)


def _blended(study: Study, trial: Trial, origin: Origin, weight: float) -> CardSubject:
    curve = blend_curve(study, trial, origin.blend_form)
    place = curve.place(weight)
    if place is not None:
        return CardSubject(trial, _on_search_items(study, place), origin)
    nearest = tuple(one for one in curve.around(weight) if one is not None)
    return CardSubject(trial, None, origin, nearest)


def _on_search_items(study: Study, place: BlendPlace) -> Verdict:
    assert study.file.base_scores is not None, "a study that is loaded has them"
    return Verdict(
        base=Scores.load(study.directory / Path(study.file.base_scores)),
        scores=place.scores,
        comparison=place.comparison,
        plain=None,
        versus=None,
        fresh_tasks=(),
    )
