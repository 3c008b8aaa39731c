"""A rung of a search, and trials that came there."""

import dataclasses

from lrmc_ray.files.artifacts import write_json
from lrmc_ray.files.names import RUNG
from lrmc_ray.train.early_stopping import Rung, SliceChange, decide

RULE = Rung(
    step=3,
    tasks=(("capitals", "domain"), ("wordnet", "general"), ("plain_english", "general")),
    items=4,
    batch_tokens=512,
    base_scores="",
    trials="",
    number=7,
    may_stop=True,
    least=4,
    objective="combined",
    forgetting_weight=2.0,
    max_forgetting=0.01,
)


def change(gain=0.2, forgetting=0.0, error=0.0, combined=None):
    """A trial against the base; ``combined`` is gain less forgetting if it is not given."""
    return SliceChange(gain, forgetting, error, gain - forgetting if combined is None else combined)


def write_decision(trials, number, value):
    """The training run of a trial whose combined score on the way was ``value``."""
    training = trials / f"{number:04d}" / "training"
    training.mkdir(parents=True)
    made = decide(change(combined=value), {}, dataclasses.replace(RULE, number=number), seconds=0.1)
    write_json(training / RUNG, dataclasses.asdict(made))
    return training
