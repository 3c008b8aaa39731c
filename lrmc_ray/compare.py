"""Methods against each other at equal budget: learning rates on one seed, the best of each on more.

    python -m lrmc_ray.compare                          # the demo, tune_spaces/compare.toml
    python -m lrmc_ray.compare --methods sft,lora       # a part of it; the rest can follow

Every method tries each learning rate on the first seed and is scored on the development questions.
The best one by combined score is then trained on the other seeds, and all seeds are scored on the
test questions. No test question, and no general item that is reported, has a part in the choice.

Records once, scores the base once, trains through the same rooms as ``tune``. The same command
again goes on where it stopped, also after kill -9, and does nothing twice.
"""

import argparse
import json
import logging
import math
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lrmc_ray.artifacts import (
    fingerprint,
    is_finished,
    lock_directory,
    read_manifest,
    write_json,
)
from lrmc_ray.compare_settings import CompareSpace
from lrmc_ray.config import RunSettings, TrainSettings
from lrmc_ray.console import format_seconds, progress, run_command, setup_logging
from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.ray_session import (
    RAY_LOG,
    TRIAL_SLOT,
    check_trial_slots,
    ray_session,
    release_orphaned_groups,
    worker_slots,
)
from lrmc_ray.run_files import CHECKPOINTS, MODEL
from lrmc_ray.storage import check_storage, open_storage, publish_report

_log = logging.getLogger(__name__)

MADE_BY = "python -m lrmc_ray.compare"
COMPARISON_FILE = "compare.json"
SETTINGS_FILE = "settings.json"
SOME_RUNS_FAILED = 10
"""Exit code of a finished comparison with failed runs."""
POLL_SECONDS = 1.0
STOP_SECONDS = 20.0
"""How long an interrupted comparison waits for the checkpoints of its runs."""
SHORTEST_LIMIT_SECONDS = 600.0
LIMIT_FACTOR = 10.0
"""A run may take this many times as long as the longest that has ended, and the former at least."""

State = Literal["COMPLETE", "FAIL"]


@dataclass(frozen=True, order=True)
class Job:
    """One model, trained and scored on one split."""

    method: str
    lr: float
    seed: int
    split: Literal["dev", "test"]

    @property
    def run(self) -> str:
        """What its model is called; both splits of it share a directory."""
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"

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
    return [Job(method, lr, seed, "test") for seed in space.compare.seeds]


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
    return sum(len(space.learning_rates_of(m)) + len(space.compare.seeds) for m in methods)


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
        from lrmc_ray.tune import datasets, versions

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
        from lrmc_ray.trial import read_result

        earlier, self.description["runs"] = self.description["runs"], []
        failed = {
            (_job(entry), entry["directory"]): entry["cause"]
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
            if _job(entry) == job:
                return entry
        entry = asdict(job)
        runs.append(entry)
        runs.sort(key=_job)
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
        from lrmc_ray.trial import read_result

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
        from lrmc_ray.compare_table import choice_score

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
        from lrmc_ray.evaluate import MADE_BY as EVALUATE
        from lrmc_ray.evaluate import evaluate
        from lrmc_ray.models import local_directory
        from lrmc_ray.record import MADE_BY as RECORD
        from lrmc_ray.record import record

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

        from lrmc_ray.trial import end_leftovers

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
        from lrmc_ray.forecast import divide

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

        from lrmc_ray.trial import failure_cause

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

        from lrmc_ray.trial import FAILURE

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
        from lrmc_ray.trial import finish_steps

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


def needs_record(train: TrainSettings) -> bool:
    """Whether a method uses what Stage 0 records, and not only the tokenized samples."""
    return train.loss in ("restricted", "soft", "active_only") or train.anchor_weight > 0


def result_file(job: Job) -> str:
    """Where a run keeps the result of one split."""
    return f"{job.split}.json"


def _job(entry: Mapping[str, Any]) -> Job:
    return Job(entry["method"], entry["lr"], entry["seed"], entry["split"])


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
    from lrmc_ray.trial import attempt, leave_storage, train_and_score

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


def chosen_methods(space: CompareSpace, names: str | None) -> list[str]:
    """The methods that the command line asks for, all by default, in the order of the file.

    Raises:
        ConfigError: one is not in the space file.
    """
    if names is None:
        return list(space.methods)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in space.methods:
            raise ConfigError(
                f"--methods must name methods of the space file ({', '.join(space.methods)}), got "
                f"{name!r}"
            )
    if not wanted:
        raise ConfigError("--methods must name at least one method, got none")
    return [name for name in space.methods if name in wanted]


def explain(comparing: Comparing) -> str:
    """What a comparison would run, and what that costs by the runs that have ended."""
    space, methods = comparing.space, comparing.methods
    total = num_jobs(space, methods)
    models = sum(len(space.learning_rates_of(m)) + len(space.compare.seeds) - 1 for m in methods)
    lines = []
    for method in methods:
        rates = ", ".join(f"{lr:g}" for lr in space.learning_rates_of(method))
        lines.append(f"  {method:<20} {space.methods[method].title:<40} lr {rates}")
    lines.append(
        f"{len(methods)} methods: {models} models of {space.train.steps} steps, scored {total} "
        f"times, {comparing.num_ended} of which are there; seeds "
        f"{', '.join(map(str, space.compare.seeds))}."
    )
    runs = comparing.description.get("runs", [])
    if costs := [entry["cost"] for entry in runs if entry.get("cost")]:
        import statistics

        seconds = statistics.median(c["train_seconds"] + c["evaluate_seconds"] for c in costs)
        left = total - comparing.num_ended
        lines.append(
            f"At {format_seconds(seconds)} each, the median of {len(costs)} that have ended, "
            f"{left} more take {format_seconds(seconds * left)} one after the other; as many run "
            "side by side as the machine has room for."
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.compare``."""
    from lrmc_ray.cli import add_run_arguments, read_settings

    parser = argparse.ArgumentParser(
        prog=MADE_BY,
        description="Compare methods at equal budget: every learning rate on one seed, the best of "
        "each by the development questions on more seeds, reported on the test questions.",
    )
    add_run_arguments(parser, default_space="compare")
    parser.add_argument(
        "--methods", metavar="A,B", help="a part of the methods (default: all of the space file)"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="run what failed before once more"
    )
    parser.add_argument(
        "--explain", action="store_true", help="only say what would be run, and what is there"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report of what is there"
    )
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose)
    space = read_settings(arguments, CompareSpace)
    methods = chosen_methods(space, arguments.methods)
    from lrmc_ray.record import training_files

    training_files(space)
    storage = space.resources.storage
    if storage is not None and not (arguments.explain or arguments.report_only):
        check_storage(storage)
    comparing = Comparing(space, methods, arguments.output)
    has_begun = (comparing.directory / COMPARISON_FILE).is_file()
    if arguments.explain and not has_begun:
        print(explain(comparing))
        return 0
    if arguments.report_only and not has_begun:
        raise IncompleteArtifactError(
            f"{comparing.directory} has no {COMPARISON_FILE}: this comparison has not begun; run "
            "the same command without --report-only"
        )
    with lock_directory(comparing.directory):
        comparing.open(retry_failed=arguments.retry_failed)
        if arguments.explain:
            print(explain(comparing))
            return 0
        if not arguments.report_only:
            _run(comparing, arguments.address, verbose=arguments.verbose)
        _report(comparing, as_json=arguments.json)
    return SOME_RUNS_FAILED if comparing.num_failed else 0


def _run(comparing: Comparing, address: str, *, verbose: bool) -> None:
    """Run ``comparing`` to its end; however it ends, what there is gets reported."""
    from lrmc_ray.compare_report import write_report

    storage = comparing.space.resources.storage
    if comparing.is_finished:
        print("This comparison has finished; nothing was done again.", file=sys.stderr)
        return
    write_json(comparing.directory / SETTINGS_FILE, comparing.description["settings"])
    log = comparing.directory / RAY_LOG
    with ray_session(address, log=log, verbose=verbose, storage=storage):
        check_trial_slots(storage)
        comparing.prepare()
        try:
            comparing.run()
            comparing.leave_storage()
        except BaseException:
            if comparing.outcomes:
                write_report(comparing.directory)
                _log.info("what there is so far: %s", comparing.directory / "compare.html")
            raise


def _report(comparing: Comparing, *, as_json: bool) -> None:
    from lrmc_ray.compare_report import (
        as_json_object,
        console_effects,
        console_table,
        sentences,
        write_report,
    )
    from lrmc_ray.compare_table import load_table

    files = write_report(comparing.directory)
    copied = [comparing.directory / COMPARISON_FILE, *files.values()]
    storage = comparing.space.resources.storage
    publish_report(storage, comparing.id, {path.name: path for path in copied})
    table = load_table(comparing.directory)
    if as_json:
        print(json.dumps(as_json_object(table)))
        return
    from rich.console import Console

    console = Console()
    console.print(console_table(table))
    if table.effects:
        console.print(console_effects(table))
    for sentence in sentences(table):
        print(sentence)
    print()
    for kind, path in files.items():
        print(f"{kind:<9}{path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
