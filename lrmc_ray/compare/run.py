"""Methods against each other at equal budget: learning rates on one seed, the best of each on more.

    python -m lrmc_ray.compare                          # the demo, tune_spaces/compare.toml
    python -m lrmc_ray.compare --methods sft,lora       # a part of it; the rest can follow

Every method tries each learning rate on the first seed and is scored on the development questions.
The best one by combined score is then trained on the other seeds, and all seeds are scored on the
test questions. No test question, and no general item that is reported, has a part in the choice.

Records once, scores the base once, trains through the same rooms as ``tune``. The same command
again goes on where it stopped, also after kill -9, and does nothing twice.
"""

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
from typing import Any, Literal

from lrmc_ray.cluster.resources import TRIAL_SLOT, worker_slots
from lrmc_ray.cluster.session import release_orphaned_groups
from lrmc_ray.compare.jobs import (
    Job,
    Outcome,
    best_learning_rate,
    comparison_identity,
    job_of,
    learning_rate_jobs,
    needs_record,
    num_jobs,
    open_jobs,
    reported_jobs,
    result_file,
)
from lrmc_ray.config import RunSettings, TrainSettings
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.console import format_seconds, progress
from lrmc_ray.files.artifacts import (
    fingerprint,
    is_finished,
    read_manifest,
    write_json,
)
from lrmc_ray.files.names import CHECKPOINTS, MODEL
from lrmc_ray.files.storage import open_storage

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.compare"


COMPARISON_FILE = "compare.json"


SETTINGS_FILE = "settings.json"


POLL_SECONDS = 1.0


STOP_SECONDS = 20.0
"""How long an interrupted comparison waits for the checkpoints of its runs."""


SHORTEST_LIMIT_SECONDS = 600.0


LIMIT_FACTOR = 10.0
"""A run may take this many times as long as the longest that has ended, and the former at least."""


class Comparing:
    """One comparison in its directory: its runs, ``compare.json``, the report."""

    def __init__(self, space: CompareSpace, methods: Sequence[str], output: Path) -> None:
        """Open the comparison in ``output``, which holds records and scores that others share."""
        self.space = space
        self.methods = list(methods)
        self.output = output.resolve()
        identity = json.loads(json.dumps(comparison_identity(space)))
        self.id = f"{space.compare.name}-{fingerprint(identity)}"
        self.directory = self.output / self.id
        self.outcomes: dict[Job, Outcome] = {}
        self.description: dict[str, Any] = {}
        self._session = [time.time(), time.time()]
        self._began: dict[Job, float] = {}

    # compare.json

    def open(self, *, retry_failed: bool = False) -> None:
        """Read what earlier commands have done, or begin."""
        from lrmc_ray.tune.description import datasets, versions

        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / COMPARISON_FILE
        if path.is_file():
            self.description = json.loads(path.read_text(encoding="utf-8"))
        else:
            self.description = {
                "schema": 1,
                "id": self.id,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "sessions": [],
                "stage_seconds": {},
                "record": {},
                "base_scores": {},
                "runs": [],
                "versions": versions(),
                "datasets": datasets(self.space),
            }
        settings = json.loads(self.space.model_dump_json())
        self.description |= {
            "name": self.space.compare.name,
            "reference": self.space.compare.reference,
            "seeds": list(self.space.compare.seeds),
            "forgetting_weight": self.space.search.forgetting_weight,
            "bootstrap_seed": self.space.search.seed,
            "methods": [
                {
                    "name": name,
                    **settings["methods"][name],
                    "learning_rates": list(self.space.learning_rates_of(name)),
                    "needs_record": needs_record(self.space.train_of(name, lr=1e-5, seed=0)),
                }
                for name in self.space.methods
            ],
            "effects": settings["effects"],
            "settings": {
                k: v for k, v in settings.items() if k not in ("methods", "effects", "parameters")
            },
        }
        self.description["sessions"].append(self._session)
        self._adopt(retry_failed=retry_failed)

    def _adopt(self, *, retry_failed: bool) -> None:
        """Take over what runs have left: a crash may have come before it was written down."""
        from lrmc_ray.tune.trial import read_result

        earlier, self.description["runs"] = self.description["runs"], []
        failed = {
            (job_of(entry), entry["directory"]): entry["cause"]
            for entry in earlier
            if entry["state"] == "FAIL"
        }
        progressed = True
        while progressed:
            progressed = False
            for job in open_jobs(self.space, list(self.space.methods), self.outcomes):
                directory = self.run_directory(job)
                cause = failed.pop((job, _name(directory)), None)
                if read_result(directory, result_file(job)) is not None:
                    self._complete(job)
                elif cause is None:
                    continue
                elif retry_failed and job.method in self.methods:
                    shutil.rmtree(directory / "training", ignore_errors=True)
                    continue
                else:
                    self._fail(job, cause)
                progressed = True
        self.write()

    def write(self) -> None:
        """Bring ``compare.json`` up to date."""
        self._session[1] = time.time()
        self.description["chosen"] = {
            method: best_learning_rate(self.space, method, self.outcomes)
            for method in self.space.methods
        }
        write_json(self.directory / COMPARISON_FILE, self.description)

    def _entry(self, job: Job) -> dict[str, Any]:
        """The description of ``job``, added if it is new."""
        runs: list[dict[str, Any]] = self.description["runs"]
        for entry in runs:
            if job_of(entry) == job:
                return entry
        entry = asdict(job)
        runs.append(entry)
        runs.sort(key=job_of)
        return entry

    def run_directory(self, job: Job) -> Path:
        """Where a model and its scores are."""
        settings = json.loads(self.train_settings(job).model_dump_json())
        return self.directory / "runs" / f"{job.run}-{fingerprint(settings)[:6]}"

    def train_settings(self, job: Job) -> TrainSettings:
        """The settings of ``train`` of a job."""
        return self.space.train_of(job.method, lr=job.lr, seed=job.seed)

    # How a job ended

    def _complete(self, job: Job) -> None:
        from lrmc_ray.tune.trial import read_result

        result = read_result(self.run_directory(job), result_file(job))
        assert result is not None
        directory = _name(self.run_directory(job))
        entry = self._entry(job)
        entry |= {
            "state": "COMPLETE",
            "cause": None,
            "directory": directory,
            "scores": f"{directory}/{result['scores']}",
            "results": result["results"],
            "cost": result["cost"],
            "train": result["train"],
        }
        choice = self._choice(entry) if job.split == "dev" else math.nan
        self.outcomes[job] = Outcome("COMPLETE", choice=choice)

    def _choice(self, entry: Mapping[str, Any]) -> float:
        """The combined score by which the learning rate is chosen."""
        from lrmc_ray.compare.measure import choice_score

        return choice_score(
            self.directory / self.description["base_scores"]["dev"],
            self.directory / entry["scores"],
            forgetting_weight=self.description["forgetting_weight"],
            seed=self.description["bootstrap_seed"],
        )

    def _fail(self, job: Job, cause: str) -> None:
        directory = self.run_directory(job)
        entry = self._entry(job)
        entry |= {"state": "FAIL", "cause": cause, "directory": _name(directory)}
        self.outcomes[job] = Outcome("FAIL", cause=cause)
        # It is not to go on from there, and checkpoints are large.
        shutil.rmtree(directory / "training" / CHECKPOINTS, ignore_errors=True)

    def _remove_models(self) -> None:
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

    # What all runs share

    def prepare(self) -> None:
        """Record, and score the base on both splits, unless that has been done."""
        from lrmc_ray.evaluate.run import MADE_BY as EVALUATE
        from lrmc_ray.evaluate.run import evaluate
        from lrmc_ray.models import local_directory
        from lrmc_ray.record.identity import MADE_BY as RECORD
        from lrmc_ray.record.run import record

        settings = self.shared_settings()
        slots = worker_slots(settings.resources)
        recorded = record(settings, self.output)
        manifest = read_manifest(recorded, made_by=RECORD)
        self.description["record"] = {
            "directory": _relative(recorded, self.directory),
            "summary": manifest["summary"],
        }
        seconds = self.description["stage_seconds"]
        seconds["record"] = manifest["seconds"]
        seconds["record_cores"] = slots * settings.resources.cpus_per_worker
        with progress("Scoring the base model", total=2, unit="splits") as bar:
            for split in ("dev", "test"):
                scores = evaluate(
                    settings,
                    local_directory(settings.model),
                    self.output,
                    split="dev" if split == "dev" else "test",
                    parallel=slots,
                )
                scored = read_manifest(scores, made_by=EVALUATE)
                seconds[f"base_{split}"] = scored["seconds"]
                self.description["base_scores"][split] = _relative(scores, self.directory)
                bar.advance()
        self.write()

    def shared_settings(self) -> RunSettings:
        """What record and base are made with."""
        return self.space.run_settings(self.space.train)

    # The runs

    def run(self) -> None:
        """Run every job that has not ended, side by side."""
        import ray

        from lrmc_ray.tune.processes import end_leftovers

        end_leftovers(self.directory / "runs")
        concurrent, workers = self._shares(worker_slots(self.space.resources))
        # A process of its own for each, which only waits for its workers.
        execute = ray.remote(num_cpus=0, resources={TRIAL_SLOT: 1}, max_retries=0, max_calls=1)(
            _execute
        )
        running: dict[Any, Job] = {}
        with progress(
            "Comparing",
            total=num_jobs(self.space, self.methods),
            unit="runs",
            completed=self.num_ended,
        ) as bar:
            try:
                while True:
                    waiting = [
                        job
                        for job in open_jobs(self.space, self.methods, self.outcomes)
                        if job not in running.values()
                    ]
                    for job in waiting[: concurrent - len(running)]:
                        running[execute.remote(**self._arguments(job, workers))] = job
                        self._began[job] = time.time()
                    if not running:
                        return
                    done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                    for reference in done:
                        job = running.pop(reference)
                        self._settle(job, reference)
                        bar.advance(note=f"{job}: {self.outcomes[job].state.lower()}")
                    self._stop_overdue(running)
                    release_orphaned_groups()
            except (KeyboardInterrupt, SystemExit):
                self._finish_steps(running.values())
                raise

    def _shares(self, slots: int) -> tuple[int, tuple[int, int]]:
        """Runs side by side, and the fewest and most workers of each."""
        from lrmc_ray.tune.forecast import divide

        return divide(slots, self.space.resources, num_jobs(self.space, self.methods))

    def _arguments(self, job: Job, workers: tuple[int, int]) -> dict[str, Any]:
        """What :func:`_execute` is called with."""
        settings = self.space.run_settings(self.train_settings(job))
        resources = settings.resources.model_copy(update={"workers": workers})
        settings = settings.model_copy(update={"resources": resources})
        general_from = None
        first = Job(job.method, job.lr, job.seed, "dev")
        if job.split == "test" and first in self.outcomes:
            # Its general tasks have been scored; only the domain has other questions.
            general_from = str(self.directory / self._entry(first)["scores"])
        return {
            "name": job.run,
            "split": job.split,
            "settings": settings.model_dump(mode="json"),
            "directory": str(self.run_directory(job)),
            "record": str(self.directory / self.description["record"]["directory"]),
            "base_scores": str(self.directory / self.description["base_scores"][job.split]),
            "general_from": general_from,
            "stored_as": self._stored_as(job),
        }

    def _stored_as(self, job: Job) -> str | None:
        """A run's name in the storage; None where all nodes share the disk."""
        if self.space.resources.storage is None:
            return None
        # One of its own, that nobody has written to: what is there belongs to these very runs.
        name = self.description.setdefault(
            "stored_as", f"comparisons/{self.id}-{secrets.token_hex(4)}"
        )
        self.write()
        return f"{name}/{_name(self.run_directory(job))}"

    def leave_storage(self) -> None:
        """Remove what runs that failed left there."""
        storage = open_storage(self.space.resources.storage)
        if storage is not None and "stored_as" in self.description:
            storage.delete_all(self.description["stored_as"])

    def _settle(self, job: Job, reference: Any) -> None:
        """Write down how ``job`` ended."""
        import ray

        from lrmc_ray.tune.trial import failure_cause

        self._began.pop(job, None)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = failure_cause(self.run_directory(job))
            if cause is None:
                told = isinstance(error, ray.exceptions.RayTaskError)
                cause = repr(error.cause) if told else "its process died"
            self._fail(job, cause)
            _log.warning("%s failed: %s", job, cause)
        else:
            self._complete(job)
        self._remove_models()
        self.write()

    def time_limit(self) -> float:
        """Seconds after which a run is stopped."""
        if self.space.compare.run_timeout_seconds is not None:
            return self.space.compare.run_timeout_seconds
        costs = [entry["cost"] for entry in self.description["runs"] if entry.get("cost")]
        taken: list[float] = [cost["train_seconds"] + cost["evaluate_seconds"] for cost in costs]
        if not taken:
            return math.inf
        return max(SHORTEST_LIMIT_SECONDS, LIMIT_FACTOR * max(taken))

    def _stop_overdue(self, running: Mapping[Any, Job]) -> None:
        """End runs beyond their time."""
        import ray

        from lrmc_ray.tune.trial import FAILURE

        limit = self.time_limit()
        for reference, job in running.items():
            taken = time.time() - self._began.get(job, math.inf)
            if taken <= limit:
                continue
            cause = (
                f"it has not ended after {format_seconds(taken)}, more than "
                f"{format_seconds(limit)}; raise compare.run_timeout_seconds if it is only slow"
            )
            write_json(self.run_directory(job) / FAILURE, {"cause": cause})
            self._began.pop(job)
            ray.cancel(reference, force=True)

    def _finish_steps(self, jobs: Any) -> None:
        from lrmc_ray.tune.processes import finish_steps

        finish_steps([self.run_directory(job) / "training" for job in jobs], STOP_SECONDS)

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


def _name(directory: Path) -> str:
    return f"runs/{directory.name}"


def _relative(path: Path, directory: Path) -> str:
    import os

    return os.path.relpath(path.resolve(), directory.resolve())


def _execute(
    *,
    name: str,
    split: Literal["dev", "test"],
    settings: Mapping[str, Any],
    directory: str,
    record: str,
    base_scores: str,
    general_from: str | None,
    stored_as: str | None,
) -> None:
    """Runs in a Ray task: train and score one model, and leave the result in its directory."""
    from lrmc_ray.tune.trial import attempt, leave_storage, train_and_score

    own, run = Path(directory), RunSettings.model_validate(dict(settings))

    def work() -> dict[str, Any]:
        training = own / "training"
        if is_finished(training) and not (training / MODEL).is_dir():
            shutil.rmtree(training)  # its model was removed: it is trained again, to the same bits
        result = train_and_score(
            run,
            own,
            Path(record),
            Path(base_scores),
            split=split,
            general_from=Path(general_from) if general_from else None,
            stored_as=stored_as,
        )
        leave_storage(run, stored_as)
        return result

    attempt(own, name, work, result_file=f"{split}.json")
