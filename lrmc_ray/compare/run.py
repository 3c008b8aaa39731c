"""Methods against each other at equal budget: learning rates on one seed, the best of each on more.

    python -m lrmc_ray.compare                          # the demo, tune_spaces/compare.toml
    python -m lrmc_ray.compare --methods sft,lora       # a part of it; the rest can follow

Every method tries each learning rate on the first seed and is scored on the development questions.
The best one by combined score is then trained on the other seeds, and all seeds are scored on the
test questions. No test question, and no general item that is reported, has a part in the choice.

Records once, scores the base once, trains through the same rooms as ``tune``. The same command
again goes on where it stopped, also after kill -9, and does nothing twice.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from lrmc_ray.cluster.resources import TRIAL_SLOT, check_trial_slots, worker_slots
from lrmc_ray.cluster.session import RAY_LOG, ray_session, release_orphaned_groups
from lrmc_ray.compare.blends import blend_places
from lrmc_ray.compare.description import RUNS, Description
from lrmc_ray.compare.execute import execute
from lrmc_ray.compare.jobs import Job, num_jobs, open_jobs
from lrmc_ray.compare.report import write_report
from lrmc_ray.config import ResourceSettings
from lrmc_ray.console import progress
from lrmc_ray.errors import DiskError
from lrmc_ray.evaluate.names import MADE_BY as EVALUATE
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.files.artifacts import read_manifest, relative_path, write_json
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.full_disk import full_disk
from lrmc_ray.files.names import SETTINGS_FILE
from lrmc_ray.files.place import place_of
from lrmc_ray.models.directory import local_directory
from lrmc_ray.record.names import MADE_BY as RECORD
from lrmc_ray.record.run import record
from lrmc_ray.tune.forecast import divide, forecast
from lrmc_ray.tune.limits import RunWatch, time_limit
from lrmc_ray.tune.processes import DIED, end_leftovers
from lrmc_ray.tune.provenance import check_unchanged
from lrmc_ray.tune.result import failure_cause

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


def recording_cores(resources: ResourceSettings, slots: int) -> int:
    """Cores that Stage 0 holds: of as many actors as fit, ``slots``, and as may be."""
    most = resources.actors[1] if resources.actors else slots
    return min(slots, most) * resources.cpus_per_worker


class Comparing:
    """One comparison in its directory: what all runs share, and the runs.

    Attributes:
        description: what ``compare.json`` says, and what has ended.
        place: where the nodes find each other's files.
    """

    def __init__(self, description: Description) -> None:
        """Open a comparison, whose output holds records and scores that others share."""
        self.description = description
        self.space = description.space
        self.methods = description.methods
        self.output = description.directory.parent
        self.place = place_of(self.space.resources.storage)
        self.tasks: dict[Path, Any] = {}
        """The task that runs in a directory, which one job at a time uses."""

    @property
    def directory(self) -> Path:
        """Of the comparison."""
        return self.description.directory

    def run(self, address: str, *, verbose: bool) -> None:
        """Run the comparison to its end, or as far as it gets.

        Raises:
            LrmcError: it cannot go on; what there is has been reported.
        """
        write_json(self.directory / SETTINGS_FILE, self.description.values["settings"])
        log, storage = self.directory / RAY_LOG, self.place.uri
        with ray_session(address, log=log, verbose=verbose, storage=storage):
            check_trial_slots(storage)
            passed("compare.begun")
            self.prepare()
            passed("compare.prepared")
            try:
                self.run_jobs()
                passed("compare.runs_ended")
                self.leave_storage()
            except DiskError:
                raise  # there is no space for a report either
            except BaseException:
                if self.description.outcomes:
                    write_report(self.directory)
                    _log.info("what there is so far: %s", self.directory / "compare.html")
                raise

    def prepare(self) -> None:
        """Record, and score the base on both splits, unless that has been done."""
        settings = self.space.run_settings(self.space.train)
        values = self.description.values
        slots = worker_slots(settings.resources)
        recorded = record(settings, self.output)
        manifest = read_manifest(recorded, made_by=RECORD)
        values["record"] = {
            "directory": relative_path(recorded, self.directory),
            "summary": manifest["summary"],
        }
        seconds = values["stage_seconds"]
        seconds["record"] = manifest["seconds"]
        seconds["record_cores"] = recording_cores(settings.resources, slots)
        splits: tuple[Split, ...] = get_args(Split)
        with progress("Scoring the base model", total=len(splits), unit="splits") as bar:
            for split in splits:
                scores = evaluate(
                    settings,
                    local_directory(settings.model),
                    self.output,
                    split=split,
                    parallel=slots,
                )
                scored = read_manifest(scores, made_by=EVALUATE)
                seconds[f"base_{split}"] = scored["seconds"]
                values["base_scores"][split] = relative_path(scores, self.directory)
                bar.advance()
        check_unchanged(self.description.contents, settings)
        self.description.write()

    # The runs

    def run_jobs(self) -> None:
        """Run every job that has not ended, side by side."""
        import ray

        end_leftovers(self.directory / RUNS)
        concurrent, workers = divide(
            worker_slots(self.space.resources),
            self.space.resources,
            num_jobs(self.space, self.methods),
        )
        # A process of its own for each, which only waits for its workers.
        start = ray.remote(num_cpus=0, resources={TRIAL_SLOT: 1}, max_retries=0, max_calls=1)(
            execute
        )
        running: dict[Any, Job] = {}
        watch = self.watch()
        with progress(
            "Comparing",
            total=num_jobs(self.space, self.methods),
            unit="runs",
            completed=self.description.num_ended,
        ) as bar:
            try:
                while True:
                    for job in self._waiting(running.values())[: concurrent - len(running)]:
                        directory = self.description.run_directory(job)
                        watch.begin(directory)
                        self.tasks[directory] = start.remote(**self.arguments(job, workers))
                        running[self.tasks[directory]] = job
                        passed("compare.run_started", str(job))
                    if not running:
                        return
                    done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                    for reference in done:
                        job = running.pop(reference)
                        watch.end(self.description.run_directory(job))
                        passed("compare.run_ended", str(job))
                        self._settle(job, reference)
                        passed("compare.run_settled", str(job))
                        state = self.description.outcomes[job].state
                        bar.advance(note=f"{job}: {state.lower()}")
                    watch.look(self.time_limit())
                    release_orphaned_groups()
            except (KeyboardInterrupt, SystemExit):
                watch.finish_steps()
                raise

    def _waiting(self, running: Iterable[Job]) -> list[Job]:
        """Jobs that can start now."""
        started = set(running)
        known = open_jobs(self.space, self.methods, self.description.outcomes)
        return [job for job in known if job not in started]

    def arguments(self, job: Job, workers: tuple[int, int]) -> dict[str, Any]:
        """What :func:`execute` is called with for ``job``.

        Args:
            job: what is run.
            workers: the fewest and the most that it may have.
        """
        description, values = self.description, self.description.values
        settings = self.space.run_settings(description.train_settings(job))
        resources = settings.resources.model_copy(update={"workers": workers})
        settings = settings.model_copy(update={"resources": resources})
        compare = self.space.compare
        asked = blend_places(compare.blend_weights, compare.depth_blend_weights)
        places = asked if job.is_reported else []
        general_from = None
        first = Job(job.method, job.lr, job.seed, "dev")
        if job.split == "test" and first in description.outcomes:
            # Its general tasks have been scored; only the domain has other questions.
            general_from = str(self.directory / description.entry(first)["scores"])
        return {
            "name": job.run,
            "split": job.split,
            "settings": settings.model_dump(mode="json"),
            "directory": str(description.run_directory(job)),
            "record": str(self.directory / values["record"]["directory"]),
            "base_scores": str(self.directory / values["base_scores"][job.split]),
            "general_from": general_from,
            "stored_as": self.home(job),
            "blends": [(place.form, place.weight) for place in places],
        }

    def home(self, job: Job) -> str:
        """What all nodes call the directory of a run."""
        home = self.place.home(self.directory, self.description.stored_name)
        return f"{home}/{self.description.run_name(job)}"

    def leave_storage(self) -> None:
        """Remove what runs that failed left in a storage."""
        if "stored_as" in self.description.values:
            self.place.clear(self.description.stored_name())

    def _settle(self, job: Job, reference: Any) -> None:
        """Write down how ``job`` ended."""
        import ray

        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = failure_cause(self.description.run_directory(job))
            if cause is None:
                told = isinstance(error, ray.exceptions.RayTaskError)
                cause = repr(error.cause) if told else DIED
            if (full := full_disk(self.description.run_directory(job), cause)) is not None:
                raise full from None  # the run goes on with the next command
            self.description.fail(job, cause)
            _log.warning("%s failed: %s", job, cause)
        else:
            self.description.complete(job)
        self.description.remove_models()
        self.description.write()

    def time_limit(self) -> float:
        """Seconds after which a run is stopped."""
        costs = [entry.get("cost") or {} for entry in self.description.values["runs"]]
        return time_limit(self.space.compare.run_timeout_seconds, costs)

    def watch(self) -> RunWatch:
        """Ends the runs that take too long or hang."""
        resources = self.space.resources
        settings = self.space.run_settings(self.space.train)
        expected = forecast(settings, self.output, slots=worker_slots(resources))
        return RunWatch(
            self._cancel,
            setting="compare.run_timeout_seconds",
            hang_seconds=resources.hang_seconds,
            step_seconds=expected.step_seconds if expected else 0.0,
        )

    def _cancel(self, directory: Path) -> bool:
        """End the task that runs in ``directory``."""
        import ray

        ray.cancel(self.tasks[directory], force=True)
        return True
