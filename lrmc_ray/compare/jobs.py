"""Which runs a comparison consists of, and which of them are still to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lrmc_ray.config import TrainSettings
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.evaluate.request import Split

State = Literal["COMPLETE", "FAIL"]


@dataclass(frozen=True, order=True)
class Job:
    """One model, trained and scored on one split."""

    method: str
    lr: float
    seed: int
    split: Split

    @property
    def run(self) -> str:
        """What its model is called; both splits of it share a directory."""
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"

    @property
    def is_reported(self) -> bool:
        """Whether its scores are of the items that are reported."""
        return self.split == "test"

    def __str__(self) -> str:
        return f"{self.run}, {self.split}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: State
    choice: float = math.nan
    """Of a complete development job: the combined score that the learning rate is chosen by."""
    cause: str | None = None


def best_learning_rate(
    space: CompareSpace, method: str, outcomes: Mapping[Job, Outcome]
) -> float | None:
    """The learning rate with the highest combined development score; of equals the lowest.

    None while one is still to be scored, and where all failed.
    """
    scores: dict[float, float] = {}
    for job in learning_rate_jobs(space, method):
        if job not in outcomes:
            return None
        if outcomes[job].state == "COMPLETE":
            scores[job.lr] = outcomes[job].choice
    return max(sorted(scores), key=scores.__getitem__) if scores else None


def learning_rate_jobs(space: CompareSpace, method: str) -> list[Job]:
    """What the choice of a method's learning rate rests on."""
    return [
        Job(method, lr, space.compare.seeds[0], "dev") for lr in space.learning_rates_of(method)
    ]


def reported_jobs(space: CompareSpace, method: str, lr: float) -> list[Job]:
    """What is reported of a method at the chosen learning rate."""
    return [Job(method, lr, seed, "test") for seed in space.seeds_of(method)]


def open_jobs(
    space: CompareSpace, methods: Sequence[str], outcomes: Mapping[Job, Outcome]
) -> list[Job]:
    """Jobs that can start now, method by method, so that few models wait to be scored."""
    jobs = []
    for method in methods:
        lr = best_learning_rate(space, method, outcomes)
        known = (
            learning_rate_jobs(space, method) if lr is None else reported_jobs(space, method, lr)
        )
        jobs += [job for job in known if job not in outcomes]
    return jobs


def num_jobs(space: CompareSpace, methods: Sequence[str]) -> int:
    """Jobs in all, if none fails."""
    return sum(len(space.learning_rates_of(m)) + len(space.seeds_of(m)) for m in methods)


def comparison_identity(space: CompareSpace) -> dict[str, Any]:
    """What makes two comparisons the same one: what all methods share, not which they are.

    A method, a learning rate or a seed that is added later finds the runs that are there.
    """
    values = space.model_dump(mode="json")
    return {
        **{key: values[key] for key in ("model", "data", "record", "train", "evaluate")},
        "tau": space.recorded_tau(),
        "search": {key: values["search"][key] for key in ("forgetting_weight", "seed")},
    }


def needs_record(train: TrainSettings) -> bool:
    """Whether a method uses what Stage 0 records, and not only the tokenized samples."""
    return (
        train.loss in ("restricted", "frozen_tail", "soft", "active_only", "asft", "flow")
        or train.stm_perplexity is not None
        or train.anchor_weight > 0
    )


def result_file(job: Job) -> str:
    """Where a run keeps the result of one split."""
    return f"{job.split}.json"


def job_of_entry(entry: Mapping[str, Any]) -> Job:
    """The job that an entry of the comparison's file describes."""
    return Job(entry["method"], entry["lr"], entry["seed"], entry["split"])
