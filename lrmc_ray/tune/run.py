"""The main command: search the settings that learn the domain and forget least.

    python -m lrmc_ray.tune                     # the embedded demo
    python -m lrmc_ray.tune --space tune_spaces/tau_delta_max.toml --model M --train-data F

Records once, runs trials side by side with Ray Tune, whose settings Optuna proposes, and scores the
base once, beside the first trials. The same command again goes on where it stopped, also after
kill -9.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lrmc_ray.cluster.resources import check_trial_slots, worker_slots
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.config import RunSettings
from lrmc_ray.config.base import flatten
from lrmc_ray.errors import DiskError
from lrmc_ray.evaluate.run import base_directory, evaluate
from lrmc_ray.files.artifacts import read_manifest, relative_path, write_json
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.names import SETTINGS_FILE, default_tracking_uri
from lrmc_ray.files.place import place_of
from lrmc_ray.models.directory import local_directory
from lrmc_ray.record.run import record
from lrmc_ray.report.mlflow import StudyTracker
from lrmc_ray.report.mlflow_mirror import catch_up_command
from lrmc_ray.train.precision import find_precision, taking
from lrmc_ray.tune import finish
from lrmc_ray.tune.base_scores import BaseScores, slots_beside
from lrmc_ray.tune.description import Description, study_directory, study_fingerprint
from lrmc_ray.tune.forecast import forecast
from lrmc_ray.tune.provenance import check_unchanged
from lrmc_ray.tune.suggest import automatic, suggest, with_ranges
from lrmc_ray.tune.used import samples_of_search

if TYPE_CHECKING:
    from lrmc_ray.tune.queue import TrialQueue

_log = logging.getLogger(__name__)


class Search:
    """One search in its directory: what all trials share, the trials, the end.

    Attributes:
        settings: the search, automatic ranges replaced once they are found.
        contents: what its trials are trained and scored on.
        description: what ``study.json`` says.
        queue: which trial comes next; None before :meth:`run_trials`.
        tracker: MLflow's copy of the search; None before :meth:`run`.
        place: where the nodes find each other's files.
    """

    def __init__(
        self,
        settings: RunSettings,
        output: Path,
        contents: Mapping[str, str],
        tracking_uri: str | None = None,
        experiment: str | None = None,
    ) -> None:
        """Open the search, or begin it; its directory must be held, see ``lock_directory``.

        Args:
            settings: of the search.
            output: holds the study, and the records and scores that searches share.
            contents: what its trials are trained and scored on, see ``provenance.contents``.
            tracking_uri: of MLflow, by default a database in ``output``.
            experiment: of MLflow.
        """
        self.settings = settings
        self.output = output.resolve()
        self.contents = contents
        self.id = study_fingerprint(settings, contents)
        self.directory = study_directory(settings, output, contents)
        self.tracking_uri = tracking_uri or default_tracking_uri(self.output)
        self.place = place_of(settings.resources.storage)
        self.description = Description(self.directory, settings, contents, experiment=experiment)
        self.queue: TrialQueue | None = None
        self.tracker: StudyTracker | None = None

    def run(self, address: str, *, verbose: bool) -> None:
        """Run the search to its end, or as far as it gets.

        Raises:
            LrmcError: it cannot go on; what there is has been reported.
        """
        study = self.description.file
        self.description.write()  # this sitting has begun
        passed("tune.begun")
        with ExitStack() as stack:
            settings_file = self.directory / SETTINGS_FILE
            write_json(settings_file, self.settings.model_dump(mode="json"))
            tracker = stack.enter_context(self._forwarding())
            self.tracker = tracker
            tracker.log_artifact(settings_file, "config")
            storage = self.place.uri
            log = self.directory / RAY_LOG
            stack.enter_context(ray_session(address, log=log, verbose=verbose, storage=storage))
            check_trial_slots(storage)
            if study.forecast is None:
                expected = forecast(self.settings, self.output, slots=self.slots())
                study.forecast = asdict(expected) if expected else None
            recorded = self.record()
            base = stack.enter_context(self.base_scores())
            self.prepare(recorded, base)
            passed("tune.prepared")
            try:
                self.run_trials(recorded, base)
                base.wait()
            except DiskError:
                raise  # there is no space for a report either
            except BaseException:
                if base.are_there:
                    self._report(tracker)
                    self._publish_report()
                    _log.info("what there is so far: %s", self.directory / "report.html")
                raise
            passed("tune.trials_ended")
            check_unchanged(self.contents, self.settings)
            finish.score_finalists(self.description, self.output)
            passed("tune.finalists_scored")
            finish.export_best(self.description)
            passed("tune.exported")
            self._report(tracker)
            passed("tune.reported")
            if study.stored_as is not None:
                self.place.clear(study.stored_as)
            self.description.end()
            passed("tune.ended")
        study.trade_off_path = tracker.trade_off_path
        self.description.write()
        self._publish_report()

    def _forwarding(self) -> StudyTracker:
        """Begin to forward the study to MLflow."""
        study = self.description.file
        assert study.experiment is not None, "a study says its experiment when it begins"
        return StudyTracker(
            self.tracking_uri,
            study_id=study.id,
            study_name=study.name,
            directory=self.directory,
            experiment=study.experiment,
            params=flatten(study.settings),
            datasets=study.datasets,
            catch_up=catch_up_command(self.directory, self.tracking_uri),
        )

    # What every trial shares

    def record(self) -> Path:
        """The record, made if it is not there."""
        study = self.description.file
        recorded = record(self.settings, self.output, samples_of_search(self.settings))
        manifest = read_manifest(recorded, made_by="python -m lrmc_ray.record")
        study.record = manifest["summary"]
        study.stage_seconds["record"] = manifest["seconds"]
        return recorded

    def base_scores(self) -> BaseScores:
        """The base model's scores, to be made if they are not there."""
        settings, study = self.settings, self.description.file
        model = local_directory(settings.model)
        directory = base_directory(settings, model, self.output, split="dev")

        def make(slots: int, is_wanted: Callable[[], bool]) -> None:
            evaluate(
                *(settings, model, self.output),
                split="dev",
                parallel=slots,
                is_wanted=is_wanted,
            )
            check_unchanged(self.contents, settings)

        def note() -> None:
            passed("tune.base_scored")
            scored = read_manifest(directory, made_by="python -m lrmc_ray.evaluate")
            with self.description.lock:
                study.stage_seconds["base_evaluation"] = scored["seconds"]
                study.base_scores = relative_path(directory, self.directory)
                self.description.write_soon()

        num_tasks = len(settings.evaluate.domain_tasks) + len(settings.evaluate.general_tasks)
        return BaseScores(directory, make, note, num_tasks=num_tasks)

    def prepare(self, recorded: Path, base: BaseScores) -> None:
        """Begin to score the base, and find what is found automatically."""
        slots = self.slots()
        base.begin(slots, slots_beside(self.settings, slots))
        check_unchanged(self.contents, self.settings)
        self._find_precision(recorded)
        self._find_ranges(recorded)
        self.description.write()

    def _find_precision(self, recorded: Path) -> None:
        """Replace an automatic precision by what it comes to here, once per study."""
        if self.settings.train.precision != "auto":
            return
        study = self.description.file
        if study.precision is None:
            study.precision = find_precision(self.settings, recorded)
        self.settings = taking(self.settings, study.precision)
        self.description.settings = self.settings

    def _find_ranges(self, recorded: Path) -> None:
        """Replace automatic ranges by what the record and a short run say, once per study."""
        names = automatic(self.settings)
        if not names:
            return
        study = self.description.file
        if study.ranges is None:
            study.ranges = suggest(self.settings, recorded, names)
            for name, one in study.ranges.items():
                _log.info("%s from %g to %g: %s", name, one.low, one.high, one.reason)
        self.settings = with_ranges(self.settings, study.ranges)
        study.space = self.settings.model_dump(mode="json")["parameters"]

    def slots(self) -> int:
        """Workers that the machine or cluster can hold at once.

        Raises:
            ResourceError: not even one.
        """
        return worker_slots(self.settings.resources)

    def run_trials(self, recorded: Path, base: BaseScores) -> None:
        """Run every trial that has not ended, side by side."""
        # These load Ray, which takes its settings from what the session has set before.
        from lrmc_ray.tune.queue import TrialQueue, open_study
        from lrmc_ray.tune.trials import Trials

        self.description.recorded = recorded
        study = open_study(self.directory / "study.db", self.id, self.settings.search.objective)
        self.queue = TrialQueue(study, self.settings)
        trials = Trials(self.settings, self.description, self.queue, self.tracker)
        trials.run(recorded, base, slots=self.slots())

    # The end

    def _report(self, tracker: StudyTracker) -> None:
        if self.queue is not None:
            self.description.file.importance = self.queue.importance()
        finish.report(self.description, tracker)

    def _publish_report(self) -> None:
        self.place.publish_report(self.description.file.id, finish.report_files(self.directory))
