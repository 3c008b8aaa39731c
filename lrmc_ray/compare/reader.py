"""Reads a comparison back: ``compare.json``, and the scores and losses of its runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.compare.description import COMPARISON_FILE
from lrmc_ray.compare.measure import general_half
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.evaluate.changes import Comparison, compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.request import Split
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.names import METRICS

RESAMPLES = 2000
"""Bootstrap resamples behind every interval over items."""


class ComparisonReader:
    """The runs of a comparison, and their scores against the base's."""

    def __init__(self, directory: Path) -> None:
        """Read ``compare.json`` of ``directory``.

        Raises:
            IncompleteArtifactError: no comparison has begun there.
            DataError: the file is damaged.
        """
        path = directory / COMPARISON_FILE
        try:
            self.description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise IncompleteArtifactError(
                f"{directory} has no {COMPARISON_FILE}: no comparison has begun there; run "
                "`python -m lrmc_ray.compare` first"
            ) from None
        except ValueError as error:
            raise DataError(f"{path} is not readable JSON ({error})") from None
        self.directory = directory
        self._base: dict[Split, Scores] = {}

    def entry(self, method: str, lr: float, seed: int, split: Split) -> Mapping[str, Any] | None:
        """The run, as ``compare.json`` describes it."""
        key = (method, lr, seed, split)
        for run in self.description["runs"]:
            if (run["method"], run["lr"], run["seed"], run["split"]) == key:
                found: Mapping[str, Any] = run
                return found
        return None

    def base(self, split: Split) -> Scores:
        """The base's scores: of the domain all items of ``split``, of each general task half."""
        if split not in self._base:
            path = self.directory / self.description["base_scores"][split]
            self._base[split] = general_half(Scores.load(path), split)
        return self._base[split]

    def undivided_tasks(self) -> tuple[str, ...]:
        """Domain tasks of which the items that are reported chose the learning rates, too."""
        if not {"dev", "test"} <= self.description.get("base_scores", {}).keys():
            return ()
        dev, test = self.base("dev"), self.base("test")
        return tuple(
            task
            for task in test.tasks
            if test.objective(task).group == "domain" and not test.asks_others(dev, task)
        )

    def compared(self, entry: Mapping[str, Any], scores: str | None = None) -> Comparison:
        """A run's scores against the base's, on the items of its split.

        Args:
            entry: the run.
            scores: other ones of the same split, of a model between the base and the run's.
        """
        split: Split = entry["split"]
        return compare(
            self.base(split),
            general_half(Scores.load(self.directory / (scores or entry["scores"])), split),
            forgetting_weight=self.description["forgetting_weight"],
            seed=self.description["bootstrap_seed"],
            resamples=RESAMPLES,
        )

    def forgetting(self, entry: Mapping[str, Any]) -> float:
        """Of a run, on all general items: those that choose, and those that are reported."""
        base = Scores.load(self.directory / self.description["base_scores"][entry["split"]])
        tuned = Scores.load(self.directory / entry["scores"])
        compared = compare(base, tuned, forgetting_weight=1.0, seed=0, resamples=2)
        return compared.forgetting.value

    def comparisons(self, method: str, lr: float | None, split: Split) -> dict[int, Comparison]:
        """By seed, of the runs that are scored."""
        if lr is None:
            return {}
        found = {}
        for seed in self.description["seeds"]:
            entry = self.entry(method, lr, seed, split)
            if entry is not None and entry["state"] == "COMPLETE":
                found[seed] = self.compared(entry)
        return found

    def drift(self, method: str, lr: float, seed: int, group: str) -> float | None:
        """KL(base || tuned); that on general text may have been measured with the first split."""
        for split in ("test", "dev"):
            entry = self.entry(method, lr, seed, "test" if split == "test" else "dev")
            value = (entry or {}).get("results", {}).get(f"eval/kl_base_{group}")
            if value is not None:
                return float(value)
        return None

    def losses(self, entry: Mapping[str, Any]) -> list[float]:
        """Training loss of every step."""
        path = self.directory / entry["directory"] / "training" / METRICS
        return [line.metrics["train/loss"] for line in read_metrics(path)]
