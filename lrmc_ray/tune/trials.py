"""The trials of a search, run side by side with Ray Tune."""

import contextlib
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from lrmc_ray.cluster.resources import TRIAL_SLOT
from lrmc_ray.cluster.session import release_orphaned_groups
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DiskError, LrmcError
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.full_disk import full_disk
from lrmc_ray.files.names import RUNG
from lrmc_ray.files.place import place_of
from lrmc_ray.files.storage import Storage
from lrmc_ray.files.study import TRIALS, TrialEntry, trial_directory
from lrmc_ray.report.mlflow import StudyTracker
from lrmc_ray.tune.base_scores import BaseScores
from lrmc_ray.tune.choice import remove_models
from lrmc_ray.tune.description import Description
from lrmc_ray.tune.forecast import divide
from lrmc_ray.tune.limits import RunWatch, time_limit
from lrmc_ray.tune.losses import LostProcesses
from lrmc_ray.tune.processes import DIED, death_cause, end_leftovers, kill_run
from lrmc_ray.tune.queue import StudySearcher, TrialQueue
from lrmc_ray.tune.result import FAILURE, failure_cause
from lrmc_ray.tune.trial import trainable
from lrmc_ray.tune.watch import watch

BASE_SCORES = "base_scores"
"""Name of the base model's scores in a storage, below the study's."""


class Trials:
    """Hands trials to Ray Tune, writes down how they end, and stops those that take too long."""

    def __init__(
        self,
        settings: RunSettings,
        description: Description,
        queue: TrialQueue,
        tracker: StudyTracker | None = None,
    ) -> None:
        """Bring ``study.json`` up to the queue: a crash may have come between the two.

        Args:
            settings: the search, without automatic ranges.
            description: what ``study.json`` says of it.
            queue: which trial comes next.
            tracker: MLflow's copy of the search.
        """
        self.settings = settings
        self.description = description
        self.directory = description.directory
        self.queue = queue
        self.tracker = tracker
        self.place = place_of(settings.resources.storage)
        self.full: DiskError | None = None
        """Why no further trial is begun."""
        self.lost = LostProcesses()
        self.removed: set[int] = set()
        """Trials whose models have been removed here."""
        self.running = RunWatch(
            kill_run,
            setting="search.trial_timeout_seconds",
            hang_seconds=settings.resources.hang_seconds,
            step_seconds=(description.file.forecast or {}).get("step_seconds", 0.0),
        )
        for trial in queue.ready_trials():
            description.describe(trial)
        description.choose_best()
        description.write()

    def run(self, recorded: Path, base: BaseScores, *, slots: int) -> None:
        """Run every trial that has not ended.

        Args:
            recorded: what they are trained on.
            base: the base model's scores, which may still be in the making.
            slots: workers that fit side by side.

        Raises:
            BaseException: whatever ended the trials, or the scoring of the base.
        """
        if self.queue.is_finished:
            return
        end_leftovers(self.directory / TRIALS)
        scratch = self.directory / "tune"
        shutil.rmtree(scratch, ignore_errors=True)
        tuner = self._tuner(recorded, base.directory, slots)
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failure.append(error)

        # In a side thread: signals stay with this one, which also shows the progress.
        thread = threading.Thread(target=fit, name="tune", daemon=True)
        thread.start()
        self._watch(thread, base)
        full = self.full or (full_disk(self.directory) if failure else None)
        with self.description.lock, contextlib.suppress(*([OSError] if full else [])):
            self.description.write()
        if full is not None:
            raise full
        if failure:
            raise failure[0]
        shutil.rmtree(scratch, ignore_errors=True)

    def _tuner(self, recorded: Path, base: Path, slots: int) -> tune.Tuner:
        """Ray Tune, which runs what the queue hands out."""
        concurrent, workers = divide(slots, self.settings.resources, self.settings.search.trials)
        resources = self.settings.resources.model_copy(update={"workers": workers})
        settings = self.settings.model_copy(update={"resources": resources})
        with_settings = tune.with_parameters(
            trainable,
            settings=settings.model_dump(mode="json"),
            study_directory=str(self.directory),
            home=self.place.home(self.directory, self.description.stored_name),
            record=str(recorded),
            base_scores=str(base),
            sent_scores=self._send_scores(base),
        )
        return tune.Tuner(
            tune.with_resources(with_settings, {TRIAL_SLOT: 1}),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(self.queue, self._on_change),
                num_samples=-1,  # the searcher says when it is finished
                max_concurrent_trials=concurrent,
                # The next trial goes on in the process of one that ended well.
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self.directory),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )

    def _send_scores(self, base: Path) -> str:
        """Let all nodes see what trials compare with on the way: base scores and each other.

        Returns:
            What all nodes call the base model's scores.
        """
        if not self.settings.search.stops_early:
            return str(base)  # nobody asks for them on the way

        def send_decisions(storage: Storage) -> None:
            # Those of an earlier sitting, which a lost storage would not have.
            for path in (self.directory / TRIALS).glob(f"*/training/{RUNG}"):
                name = path.relative_to(self.directory).as_posix()
                storage.put(path, f"{self.description.stored_name()}/{name}")

        sent = self.place.send(
            base.resolve(), lambda: f"{self.description.stored_name()}/{BASE_SCORES}"
        )
        self.place.either(lambda: None, send_decisions)
        return sent

    def _on_change(self, number: int, result: Mapping[str, Any] | None, cause: str | None) -> None:
        """A trial starts (neither result nor cause) or has ended."""
        directory = trial_directory(self.directory, number)
        starts = result is None and cause is None
        if starts:
            passed("tune.trial_asked", str(number))
            (directory / FAILURE).unlink(missing_ok=True)
            self.running.begin(directory)
        else:
            self.running.end(directory)
            release_orphaned_groups()
        if cause is not None:
            died = death_cause(directory) if cause == DIED else cause
            told = failure_cause(directory) or died
            if (full := full_disk(directory, told)) is not None:
                # The trial stays open, and goes on with the next command.
                self.full = full
                self.queue.stop()
                return
            is_here = self.settings.resources.storage is None
            if told == DIED and is_here and self.lost.goes_on(directory):
                self.queue.again(number)
                return
            self.queue.fail(number, told)
        with self.description.lock:
            entry = self.description.describe(self.queue.trial(number))
            if self.tracker is not None:
                _forward(self.tracker, entry, self.directory)
            if not starts:
                self.description.choose_best()
                self.removed.update(
                    remove_models(
                        self.directory,
                        self.description.file,
                        self.settings.search,
                        removed=self.removed,
                    )
                )
            self.description.write_soon()
        passed("tune.trial_described" if starts else "tune.trial_ended", str(number))

    def _watch(self, thread: threading.Thread, base: BaseScores) -> None:
        """Show the trials until the last has ended, and stop those that take too long."""

        def is_waiting(directory: Path) -> bool:
            """For the base's scores, or for cores: those who score the base may hold them."""
            if base.are_there:
                return False
            return is_finished(directory / "training") or not self.running.has_stepped(directory)

        def is_running() -> bool:
            base.look()
            self.running.look(self.time_limit(), is_waiting)
            self.description.catch_up()
            # The controller of a dead trial's training dies a little after it.
            release_orphaned_groups()
            return thread.is_alive()

        try:
            watch(
                self.directory,
                total=self.settings.search.trials,
                is_running=is_running,
                read=self.description.snapshot,
            )
        except DiskError:
            raise  # there is no space for checkpoints either
        except (KeyboardInterrupt, SystemExit, LrmcError):
            self.running.finish_steps()
            raise

    def time_limit(self) -> float:
        """Seconds after which a trial is stopped."""
        with self.description.lock:
            costs = [trial.cost for trial in self.description.file.trials]
        return time_limit(self.settings.search.trial_timeout_seconds, costs)


def _forward(tracker: StudyTracker, entry: TrialEntry, directory: Path) -> None:
    """Tell MLflow that a trial of the study in ``directory`` runs, or how it ended."""
    if entry.state == "RUNNING":
        assert entry.metrics_file is not None, "every trial has one"
        tracker.child(entry.number, entry.settings, role=entry.role)
        tracker.forward(entry.number, directory / entry.metrics_file)
    elif entry.state == "FAIL":
        tracker.finish(entry.number, "FAILED", cause=entry.cause)
    elif entry.state == "PRUNED":
        tracker.finish(entry.number, "PRUNED", cause=entry.cause)
    else:
        tracker.finish(entry.number, "FINISHED", entry.results)
