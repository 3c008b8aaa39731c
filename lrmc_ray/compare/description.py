"""What ``compare.json`` says of a comparison: its methods, its runs, and how they ended."""

import json
import logging
import math
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lrmc_ray.compare.blends import read_blends
from lrmc_ray.compare.jobs import (
    Job,
    Outcome,
    best_learning_rate,
    comparison_identity,
    job_of_entry,
    learning_rate_jobs,
    needs_record,
    open_jobs,
    reported_jobs,
    result_file,
)
from lrmc_ray.compare.measure import choice_score
from lrmc_ray.config import TrainSettings
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.files.artifacts import fingerprint, write_json
from lrmc_ray.files.names import CHECKPOINTS, MODEL
from lrmc_ray.tune.provenance import datasets, newest_earlier, versions, why_new
from lrmc_ray.tune.result import read_result

_log = logging.getLogger(__name__)

COMPARISON_FILE = "compare.json"

RUNS = "runs"
"""The folder of the runs' directories, here and in a storage."""


class Description:
    """``compare.json`` of one comparison, and the outcomes of its jobs.

    Attributes:
        space: the comparison.
        methods: those that this command is about.
        contents: what its runs are trained and scored on.
        values: what the file says; empty before :meth:`open`.
        outcomes: of the jobs that have ended.
    """

    def __init__(
        self,
        space: CompareSpace,
        methods: Sequence[str],
        output: Path,
        contents: Mapping[str, str],
    ) -> None:
        """Nothing is read yet.

        Args:
            space: all settings.
            methods: those that this command is about.
            output: holds the comparison's directory.
            contents: what its runs are trained and scored on, see ``provenance.contents``.
        """
        self.space = space
        self.methods = list(methods)
        self.contents = dict(contents)
        identity = {**comparison_identity(space), "contents": self.contents}
        self.id = f"{space.compare.name}-{fingerprint(identity)}"
        self.directory = output.resolve() / self.id
        self.outcomes: dict[Job, Outcome] = {}
        self.values: dict[str, Any] = {}
        self._session = [time.time(), time.time()]
        self._began = time.monotonic()
        self._is_earlier = False

    @property
    def has_begun(self) -> bool:
        """Whether an earlier command has written the file."""
        return (self.directory / COMPARISON_FILE).is_file()

    def go_back(self) -> None:
        """Take the newest comparison of the same settings, if there is one, whatever it is of."""
        asked = comparison_identity(self.space)
        earlier = newest_earlier(self.directory, COMPARISON_FILE, asked)
        if earlier is not None:
            _log.warning("this is %s, made of what was there then", earlier.directory.name)
            self.directory, self.id = earlier.directory, earlier.directory.name
            self.contents = dict(earlier.contents)
            self._is_earlier = True

    def open(self, *, retry_failed: bool = False) -> None:
        """Read what earlier commands have done, or begin."""
        if self._is_earlier:
            self._open_earlier()
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.has_begun:
            path = self.directory / COMPARISON_FILE
            self.values = json.loads(path.read_text(encoding="utf-8"))
        else:
            asked = comparison_identity(self.space)
            if (why := why_new(self.directory, COMPARISON_FILE, asked, self.contents)) is not None:
                _log.warning("%s", why)
            self.values = {
                "schema": 1,
                "id": self.id,
                "asked": fingerprint(asked),
                "contents": self.contents,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "sessions": [],
                "stage_seconds": {},
                "record": {},
                "base_scores": {},
                "runs": [],
                "versions": versions(),
                "datasets": [file.model_dump() for file in datasets(self.space)],
            }
        self.values |= _asked_for(self.space)
        self.values["sessions"].append(self._session)
        self._adopt(retry_failed=retry_failed)

    def _open_earlier(self) -> None:
        """Read a comparison that is only reported: what it says of its runs stays as it is.

        Another version may have called their directories otherwise.
        """
        path = self.directory / COMPARISON_FILE
        self.values = json.loads(path.read_text(encoding="utf-8"))
        asked = _asked_for(self.space)
        self.values |= {name: asked[name] for name in ("reference", "seeds", "effects")}
        for entry in self.values["runs"]:
            choice = self._choice(entry) if entry["state"] == "COMPLETE" else math.nan
            outcome = Outcome(entry["state"], choice=choice, cause=entry.get("cause"))
            self.outcomes[job_of_entry(entry)] = outcome
        self.write()

    def _adopt(self, *, retry_failed: bool) -> None:
        """Take over what runs have left: a crash may have come before it was written down."""
        earlier, self.values["runs"] = self.values["runs"], []
        failed = {
            (job_of_entry(entry), entry["directory"]): entry["cause"]
            for entry in earlier
            if entry["state"] == "FAIL"
        }
        progressed = True
        while progressed:
            progressed = False
            for job in open_jobs(self.space, list(self.space.methods), self.outcomes):
                directory = self.run_directory(job)
                cause = failed.pop((job, self.run_name(job)), None)
                if read_result(directory, result_file(job)) is not None:
                    self.complete(job)
                elif cause is None:
                    continue
                elif retry_failed and job.method in self.methods:
                    shutil.rmtree(directory / "training", ignore_errors=True)
                    continue
                else:
                    self.fail(job, cause)
                progressed = True
        self.write()

    def write(self) -> None:
        """Bring ``compare.json`` on disk up to date."""
        # A clock that is set meanwhile changes no duration.
        self._session[1] = self._session[0] + time.monotonic() - self._began
        self.values["chosen"] = {
            method: best_learning_rate(self.space, method, self.outcomes)
            for method in self.space.methods
        }
        write_json(self.directory / COMPARISON_FILE, self.values)

    def entry(self, job: Job) -> dict[str, Any]:
        """The description of ``job``, added if it is new."""
        runs: list[dict[str, Any]] = self.values["runs"]
        for entry in runs:
            if job_of_entry(entry) == job:
                return entry
        entry = asdict(job)
        runs.append(entry)
        runs.sort(key=job_of_entry)
        return entry

    # A run

    def train_settings(self, job: Job) -> TrainSettings:
        """The settings of ``train`` of a job."""
        return self.space.train_of(job.method, lr=job.lr, seed=job.seed)

    def run_name(self, job: Job) -> str:
        """Path of a run's directory, as seen from the comparison's."""
        settings = self.train_settings(job).model_dump(mode="json")
        return f"{RUNS}/{job.run}-{fingerprint(settings)[:6]}"

    def run_directory(self, job: Job) -> Path:
        """Where a model and its scores are."""
        return self.directory / self.run_name(job)

    def stored_name(self) -> str:
        """The comparison's name in a storage; of its own, so that what is there belongs to it."""
        if "stored_as" not in self.values:
            self.values["stored_as"] = f"comparisons/{self.id}-{secrets.token_hex(4)}"
            self.write()
        name: str = self.values["stored_as"]
        return name

    def complete(self, job: Job) -> None:
        """Take over the result that the run of ``job`` has left."""
        result = read_result(self.run_directory(job), result_file(job))
        assert result is not None
        directory = self.run_name(job)
        entry = self.entry(job)
        entry |= {
            "state": "COMPLETE",
            "cause": None,
            "directory": directory,
            "scores": f"{directory}/{result.scores}",
            "results": result.results,
            "blends": read_blends(self.run_directory(job), directory) if job.is_reported else [],
            "cost": result.cost,
            "train": result.train,
        }
        self.outcomes[job] = Outcome("COMPLETE", choice=self._choice(entry))

    def _choice(self, entry: Mapping[str, Any]) -> float:
        """The score that the learning rate is chosen by; NaN of another split."""
        if entry["split"] != "dev":
            return math.nan
        return choice_score(
            self.directory / self.values["base_scores"]["dev"],
            self.directory / entry["scores"],
            forgetting_weight=self.values["forgetting_weight"],
            seed=self.values["bootstrap_seed"],
        )

    def fail(self, job: Job, cause: str) -> None:
        """Write down that the run of ``job`` failed, and why."""
        entry = self.entry(job)
        entry |= {"state": "FAIL", "cause": cause, "directory": self.run_name(job)}
        self.outcomes[job] = Outcome("FAIL", cause=cause)
        # It is not to go on from there, and checkpoints are large.
        training = self.run_directory(job) / "training"
        shutil.rmtree(training / CHECKPOINTS, ignore_errors=True)

    def remove_models(self) -> None:
        """Remove the models that nothing will ask for again."""
        if self.space.compare.keep_models:
            return
        for method in self.methods:
            lr = best_learning_rate(self.space, method, self.outcomes)
            waiting = (
                learning_rate_jobs(self.space, method)
                if lr is None
                else [j for j in reported_jobs(self.space, method, lr) if j not in self.outcomes]
            )
            kept = {self.run_directory(job) for job in waiting}
            for job in self.outcomes:
                directory = self.run_directory(job) if job.method == method else None
                if directory is not None and directory not in kept:
                    shutil.rmtree(directory / "training" / MODEL, ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.num_ended > 0 and not open_jobs(self.space, self.methods, self.outcomes)

    @property
    def num_ended(self) -> int:
        """Jobs of these methods that have ended."""
        return sum(job.method in self.methods for job in self.outcomes)

    @property
    def num_failed(self) -> int:
        """Jobs of these methods that failed."""
        return sum(
            outcome.state == "FAIL" and job.method in self.methods
            for job, outcome in self.outcomes.items()
        )


def _asked_for(space: CompareSpace) -> dict[str, Any]:
    """What the settings of this command say, which may be more than an earlier one's."""
    settings = space.model_dump(mode="json")
    places = {seed: place for place, seed in enumerate(space.compare.seeds)}

    def order(seed: int) -> tuple[int, int]:
        """The comparison's seeds as they are written, then those of single methods."""
        return places.get(seed, len(places)), seed

    return {
        "name": space.compare.name,
        "reference": space.compare.reference,
        "seeds": sorted({seed for m in space.methods for seed in space.seeds_of(m)}, key=order),
        "forgetting_weight": space.search.forgetting_weight,
        "bootstrap_seed": space.search.seed,
        "methods": [
            {
                "name": name,
                **settings["methods"][name],
                "learning_rates": list(space.learning_rates_of(name)),
                "seeds": list(space.seeds_of(name)),
                "needs_record": needs_record(space.train_of(name, lr=1e-5, seed=0)),
            }
            for name in space.methods
        ],
        "effects": settings["effects"],
        "settings": {
            k: v for k, v in settings.items() if k not in ("methods", "effects", "parameters")
        },
    }
