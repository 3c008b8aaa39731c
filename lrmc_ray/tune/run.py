"""The main command: search the settings that learn the domain and forget least.

    python -m lrmc_ray.tune                     # the embedded demo
    python -m lrmc_ray.tune --space tune_spaces/tau_delta_max.toml --model M --train-data F

Records once, scores the base once, then runs trials side by side with Ray Tune; Optuna proposes
their settings. The same command again goes on where it stopped, also after kill -9.
"""

import json
import logging
import math
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.cluster.resources import TRIAL_SLOT, check_trial_slots, worker_slots
from lrmc_ray.cluster.session import RAY_LOG, ray_session, release_orphaned_groups
from lrmc_ray.config import RunSettings, TrainSettings
from lrmc_ray.console import format_seconds, progress
from lrmc_ray.errors import LrmcError
from lrmc_ray.files.artifacts import (
    PARTIAL,
    fingerprint,
    read_manifest,
    write_json,
)
from lrmc_ray.files.names import RUNG
from lrmc_ray.files.storage import open_storage, publish_report
from lrmc_ray.tune.forecast import divide, forecast

if TYPE_CHECKING:
    import optuna

    from lrmc_ray.report.mlflow import StudyTracker
    from lrmc_ray.tune.queue import TrialQueue

from lrmc_ray.tune.description import (
    datasets,
    flat_settings,
    json_ready,
    relative_path,
    study_identity,
    versions,
)

_log = logging.getLogger(__name__)

STUDY_FILE = "study.json"


SETTINGS_FILE = "settings.json"


STORED_AS = "stored_as"
"""In ``study.json``, the study's name in the storage."""


BEST_MODEL = "best_model"


STOP_SECONDS = 20.0
"""How long an interrupted search waits for the checkpoints of its running trials."""


CLOCK_SECONDS = 2.0
"""Most by which the clocks of two nodes may differ."""


SHORTEST_LIMIT_SECONDS = 600.0
"""Time that every trial has, where no limit is set."""


LIMIT_FACTOR = 10.0
"""A trial may take this many times as long as the longest that has ended."""


class Search:
    """One search in its directory: the study, the trials, MLflow's copy, the report."""

    def __init__(
        self,
        settings: RunSettings,
        output: Path,
        tracking_uri: str | None = None,
        experiment: str | None = None,
    ) -> None:
        """Open the search in ``output``, which holds the records and scores that searches share."""
        from lrmc_ray.files.names import default_tracking_uri

        self.settings = settings
        self.output = output.resolve()
        self.id = fingerprint(json_ready(study_identity(settings)))
        self.directory = self.output / f"{settings.search.name}-{self.id}"
        self.tracking_uri = tracking_uri or default_tracking_uri(self.output)
        self.experiment = experiment
        self.description: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._recorded: Path | None = None
        self._began: dict[int, float] = {}
        """When each running trial was handed out here, in seconds since 1970."""
        self._session = [time.time(), time.time()]
        self._queue: TrialQueue | None = None
        self.tracker: StudyTracker | None = None

    # The study's description, study.json

    def open(self) -> None:
        """Read ``study.json``, or begin it."""
        from lrmc_ray.report.mlflow import EXPERIMENT

        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / STUDY_FILE
        if path.is_file():
            self.description = json.loads(path.read_text(encoding="utf-8"))
            self.description["sessions"].append(self._session)
            if self.experiment is not None:
                self.description["experiment"] = self.experiment
            return
        settings = json_ready(self.settings.model_dump(mode="json"))
        self.description = {
            "schema": 1,
            "id": f"{self.settings.search.name}-{self.id}",
            "name": self.settings.search.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": "RUNNING",
            "objective": self.settings.search.objective,
            "forgetting_weight": self.settings.search.forgetting_weight,
            "max_forgetting": self.settings.search.max_forgetting,
            "space": settings.pop("parameters"),
            "settings": settings,
            "versions": versions(),
            "stage_seconds": {},
            "sessions": [self._session],
            "experiment": self.experiment or EXPERIMENT,
            "forecast": None,
            "importance": {},
            "record": {},
            "datasets": datasets(self.settings),
            "artifacts": [],
            "trials": [],
            "best": None,
            "closest": None,
            "final": {},
        }
        self.write()

    def write(self) -> None:
        """Bring ``study.json`` up to date."""
        self._session[1] = time.time()
        write_json(self.directory / STUDY_FILE, self.description)

    def entry(self, number: int) -> dict[str, Any]:
        """The description of trial ``number``, added if it is new."""
        trials: list[dict[str, Any]] = self.description["trials"]
        for trial in trials:
            if trial["number"] == number:
                return trial
        trial = {"number": number}
        trials.append(trial)
        trials.sort(key=lambda trial: trial["number"])
        return trial

    # Stages that every trial shares

    def prepare(self) -> tuple[Path, Path]:
        """The record and the base model's scores, made if they are not there."""
        from lrmc_ray.evaluate.run import evaluate
        from lrmc_ray.models import local_directory
        from lrmc_ray.record.run import record

        recorded = record(self.settings, self.output)
        manifest = read_manifest(recorded, made_by="python -m lrmc_ray.record")
        self.description["record"] = manifest["summary"]
        self.description["stage_seconds"]["record"] = manifest["seconds"]
        tasks = [*self.settings.evaluate.domain_tasks, *self.settings.evaluate.general_tasks]
        with progress("Scoring the base model", total=len(tasks), unit="tasks") as bar:
            base = evaluate(
                self.settings,
                local_directory(self.settings.model),
                self.output,
                split="dev",
                parallel=self.slots(),
            )
            bar.advance(len(tasks))
        scored = read_manifest(base, made_by="python -m lrmc_ray.evaluate")
        self.description["stage_seconds"]["base_evaluation"] = scored["seconds"]
        self.description["base_scores"] = relative_path(base, self.directory)
        self._find_ranges(recorded)
        self.write()
        return recorded, base

    def _find_ranges(self, recorded: Path) -> None:
        """Replace automatic ranges by what the record and a short run say, once per study."""
        from lrmc_ray.tune.suggest import automatic, suggest, with_ranges

        names = automatic(self.settings)
        if not names:
            return
        if "ranges" not in self.description:
            found = suggest(self.settings, recorded, names)
            self.description["ranges"] = {name: asdict(one) for name, one in found.items()}
            for name, one in found.items():
                _log.info("%s from %g to %g: %s", name, one.low, one.high, one.reason)
        self.settings = with_ranges(self.settings, self.description["ranges"])
        dumped = json_ready(self.settings.model_dump(mode="json"))
        self.description["space"] = dumped["parameters"]

    def slots(self) -> int:
        """Workers that the machine or cluster can hold at once.

        Raises:
            ResourceError: not even one.
        """
        return worker_slots(self.settings.resources)

    # The trials

    def run_trials(self, recorded: Path, base: Path) -> None:
        """Run every trial that has not ended, side by side."""
        from ray import tune

        from lrmc_ray.tune.queue import StudySearcher, TrialQueue, open_study

        self._recorded = recorded
        study = open_study(self.directory / "study.db", self.id, self.settings.search.objective)
        queue = TrialQueue(study, self.settings)
        self._queue = queue
        self._adopt(study)
        if queue.is_finished:
            return
        self._end_leftovers()
        concurrent, workers = self.shares()
        settings = self.settings.model_copy(
            update={"resources": self.settings.resources.model_copy(update={"workers": workers})}
        )
        stored_as = self._enter_storage(base)
        searcher = StudySearcher(queue, lambda *change: self._on_change(study, queue, *change))
        scratch = self.directory / "tune"
        shutil.rmtree(scratch, ignore_errors=True)
        trainable = tune.with_resources(
            tune.with_parameters(
                _trainable,
                settings=settings.model_dump(mode="json"),
                study_directory=str(self.directory),
                record=str(recorded),
                base_scores=str(base),
                stored_as=stored_as,
            ),
            {TRIAL_SLOT: 1},
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
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
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failure.append(error)

        # In a side thread: signals stay with this one, which also shows the progress.
        thread = threading.Thread(target=fit, name="tune", daemon=True)
        thread.start()
        self._watch(thread)
        if failure:
            raise failure[0]
        shutil.rmtree(scratch, ignore_errors=True)

    def _enter_storage(self, base: Path) -> str | None:
        """Bring to the storage what trials compare with on the way; the study's name in it.

        None where all nodes share the disk.
        """
        from lrmc_ray.evaluate.items import ITEMS_FILE
        from lrmc_ray.files.study import TRIALS
        from lrmc_ray.tune.trial import BASE_SCORES

        storage = open_storage(self.settings.resources.storage)
        if storage is None:
            return None
        # One of its own, that nobody has written to: what is there belongs to these very trials.
        name: str = self.description.setdefault(
            STORED_AS, f"studies/{self.description['id']}-{secrets.token_hex(4)}"
        )
        self.write()
        storage.publish(f"{name}/{BASE_SCORES}", {ITEMS_FILE: base / ITEMS_FILE})
        for path in (self.directory / TRIALS).glob(f"*/training/{RUNG}"):
            storage.put(path, f"{name}/{path.relative_to(self.directory).as_posix()}")
        return name

    def leave_storage(self) -> None:
        """Remove what a search that has ended left there."""
        storage = open_storage(self.settings.resources.storage)
        if storage is not None and STORED_AS in self.description:
            storage.delete_all(self.description[STORED_AS])

    def shares(self) -> tuple[int, tuple[int, int]]:
        """Trials side by side, and the fewest and most workers of each."""
        return divide(self.slots(), self.settings.resources, self.settings.search.trials)

    def _end_leftovers(self) -> None:
        """End trial processes of a sitting that was killed."""
        from lrmc_ray.tune.processes import end_leftovers

        end_leftovers(self.directory / "trials")

    def _adopt(self, study: "optuna.Study") -> None:
        """Bring ``study.json`` up to the study: a crash may have come between the two."""
        for trial in study.get_trials(deepcopy=False):
            if trial.user_attrs.get("ready"):
                self._describe(trial)
        self._choose_best()
        self.write()

    def _on_change(
        self,
        study: "optuna.Study",
        queue: "TrialQueue",
        number: int,
        result: Mapping[str, Any] | None,
        cause: str | None,
    ) -> None:
        """A trial starts (neither result nor cause) or has ended."""
        from lrmc_ray.files.study import trial_directory
        from lrmc_ray.tune.processes import DIED, death_cause
        from lrmc_ray.tune.trial import FAILURE, failure_cause

        directory = trial_directory(self.directory, number)
        if cause == DIED:
            cause = death_cause(directory)
        if result is None and cause is None:
            (directory / FAILURE).unlink(missing_ok=True)
            self._began[number] = time.time()
        else:
            self._began.pop(number, None)
            release_orphaned_groups()
        if cause is not None:
            queue.fail(number, failure_cause(directory) or cause)
        with self._lock:
            trial = study.get_trials(deepcopy=False)[number]
            entry = self._describe(trial)
            if self.tracker is not None:
                if result is None and cause is None:
                    self.tracker.child(number, entry["settings"], role=entry["role"])
                    self.tracker.forward(number, self.directory / entry["metrics_file"])
                elif cause is not None:
                    self.tracker.finish(number, "FAILED", cause=entry["cause"])
                elif entry["state"] == "PRUNED":
                    self.tracker.finish(number, "PRUNED", cause=entry["cause"])
                else:
                    self.tracker.finish(number, "FINISHED", entry["results"])
            if result is not None or cause is not None:
                self._choose_best()
                self._remove_models()
            self.write()

    def _describe(self, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
        """Bring the entry of ``trial`` up to date."""
        from lrmc_ray.config import trial_settings
        from lrmc_ray.files.study import trial_directory
        from lrmc_ray.train.early_stopping import read_decision
        from lrmc_ray.tune.queue import COMBINED
        from lrmc_ray.tune.trial import read_result

        entry = self.entry(trial.number)
        directory = trial_directory(self.directory, trial.number)
        name = trial.state.name
        tuned = trial_settings(
            self.settings.train, {**trial.params, **trial.user_attrs["overrides"]}
        )
        entry |= {
            "role": trial.user_attrs["role"],
            "state": "RUNNING" if name == "WAITING" else name,
            "cause": trial.user_attrs.get("cause"),
            "params": dict(trial.params),
            "settings": json_ready(self._with_steps(tuned).model_dump(mode="json")),
            "directory": relative_path(directory, self.directory),
            "metrics_file": relative_path(directory / "training" / "metrics.jsonl", self.directory),
            "scores": None,
            "results": {},
            "cost": {},
            "rung": None,
        }
        entry.setdefault("started", time.time())
        result = read_result(directory)
        if (decision := read_decision(directory / "training")) is not None:
            entry["rung"] = asdict(decision)
        if name == "COMPLETE" and result is not None and COMBINED in result["results"]:
            entry |= {
                "scores": f"{entry['directory']}/{result['scores']}",
                "results": result["results"],
                "cost": result["cost"],
            }
        if name == "PRUNED" and result is not None and decision is not None:
            entry |= {"cause": decision.reason(result["train"]["steps"]), "cost": result["cost"]}
        if name in ("COMPLETE", "PRUNED", "FAIL"):
            entry.setdefault("ended", time.time())
        return entry

    def _with_steps(self, tuned: TrainSettings) -> TrainSettings:
        """A trial's settings with ``epochs``, if they are set, turned into ``steps``."""
        from lrmc_ray.train.driver import with_steps

        if tuned.epochs is None or self._recorded is None:
            return tuned
        settings = self.settings.model_copy(update={"train": tuned})
        try:
            return with_steps(settings, self._recorded).train
        except LrmcError:  # the trial itself fails of it, with its cause
            return tuned

    def _choose_best(self) -> None:
        """Name the best trial; or, where none keeps the budget, the one that comes closest."""
        from lrmc_ray.evaluate.statistics import choose

        search = self.settings.search
        finished = [t for t in self.description["trials"] if t["results"]]
        choice = choose(
            _points(finished),
            search.objective,
            forgetting_weight=search.forgetting_weight,
            max_forgetting=search.max_forgetting,
        )
        number = finished[choice.index]["number"] if choice else None
        best, closest = (number, None) if choice and choice.is_feasible else (None, number)
        if best != self.description["best"]:
            self.description["final"] = {}
        self.description |= {"best": best, "closest": closest}

    def _kept(self) -> set[int]:
        """Trials whose models the end of the search still needs."""
        from lrmc_ray.evaluate.statistics import pareto_front

        trials = self.description["trials"]
        kept = {t["number"] for t in trials if t["state"] == "RUNNING" or t["role"] == "yardstick"}
        if self.settings.search.objective == "pareto":
            # The knee may move back to an older trial of the front.
            finished = [t for t in trials if t["results"]]
            kept |= {finished[i]["number"] for i in pareto_front(_points(finished))}
        return kept | {self.description["best"], self.description.get("closest")}

    def _remove_models(self) -> None:
        if self.settings.search.keep_models == "all":
            return
        kept = self._kept()
        for trial in self.description["trials"]:
            if trial["number"] not in kept:
                model = self.directory / trial["directory"] / "training" / "model"
                shutil.rmtree(model, ignore_errors=True)

    def _watch(self, thread: threading.Thread) -> None:
        """Show the trials until the last has ended, and stop those that take too long."""
        from lrmc_ray.tune.watch import watch

        def is_running() -> bool:
            self._stop_overdue()
            # The controller of a dead trial's training dies a little after it.
            release_orphaned_groups()
            return thread.is_alive()

        try:
            watch(
                self.directory,
                total=self.settings.search.trials,
                is_running=is_running,
                read=self._snapshot,
            )
        except (KeyboardInterrupt, SystemExit):
            self._finish_steps()
            raise

    def time_limit(self) -> float:
        """Seconds after which a trial is stopped."""
        if self.settings.search.trial_timeout_seconds is not None:
            return self.settings.search.trial_timeout_seconds
        costs = [trial.get("cost") or {} for trial in self._snapshot()]
        taken: list[float] = [
            cost["train_seconds"] + cost["evaluate_seconds"] for cost in costs if cost
        ]
        if not taken:
            return math.inf
        return max(SHORTEST_LIMIT_SECONDS, LIMIT_FACTOR * max(taken))

    def _stop_overdue(self) -> None:
        """Kill the processes of trials beyond their time; Ray Tune then sees them fail."""
        from lrmc_ray.files.study import trial_directory
        from lrmc_ray.tune.processes import last_process
        from lrmc_ray.tune.trial import FAILURE

        limit = self.time_limit()
        for number, handed_out in list(self._began.items()):
            directory = trial_directory(self.directory, number)
            process = last_process(directory)
            # One from before is that of an earlier sitting; clocks of nodes may differ a little.
            if process is None or process["began"] < handed_out - CLOCK_SECONDS:
                continue
            taken = time.time() - process["began"]
            if taken <= limit:
                continue
            cause = (
                f"it has not ended after {format_seconds(taken)}, more than "
                f"{format_seconds(limit)}; raise search.trial_timeout_seconds if it is only slow"
            )
            write_json(directory / FAILURE, {"cause": cause})
            if not _kill_trial(directory):
                _log.warning("trial %d is overdue, and its process was not found", number)
            self._began.pop(number, None)

    def _finish_steps(self) -> None:
        """Let every running trial finish its step and save a checkpoint, for a while."""
        from lrmc_ray.files.study import trial_directory
        from lrmc_ray.tune.processes import finish_steps

        finish_steps(
            [trial_directory(self.directory, number) / "training" for number in self._began],
            STOP_SECONDS,
        )

    def _snapshot(self) -> list[dict[str, Any]]:
        with self._lock:
            best = self.description["best"]
            return [
                {**trial, "is_best": trial["number"] == best}
                for trial in self.description["trials"]
            ]

    # The end

    def score_finalists(self) -> None:
        """Score base, best and yardstick on the questions that no choice was made on."""
        from lrmc_ray.evaluate.run import evaluate
        from lrmc_ray.models import local_directory

        best = self.description["best"]
        yardsticks = [
            t["number"]
            for t in self.description["trials"]
            if t["role"] == "yardstick" and t["state"] == "COMPLETE"
        ]
        finalists = {
            "base": (local_directory(self.settings.model), self.description["base_scores"])
        }
        for name, numbers in (
            ("best", [best] if best is not None else []),
            ("yardstick", yardsticks),
        ):
            for number in numbers:
                trial = self.entry(number)
                model = self.directory / trial["directory"] / "training" / "model"
                if model.is_dir():
                    finalists[name] = (model, trial["scores"])

        scored = self.settings.evaluate.model_copy(update={"limit": self._final_limit})
        settings = self.settings.model_copy(update={"evaluate": scored})

        def score(name: str, base: Path | None) -> Path:
            model, searched = finalists[name]
            return evaluate(
                settings,
                model,
                self.output,
                split="test",
                base=base,
                # The general tasks have one set of items; only the domain has fresh questions.
                general_from=(self.directory / searched).resolve(),
            )

        title = "Scoring on the test questions"
        with progress(title, total=len(finalists), unit="models") as bar:
            base = score("base", None)
            final = {"base": relative_path(base, self.directory)}
            bar.advance(1)
            others = [name for name in finalists if name != "base"]
            if finalists.get("best") == finalists.get("yardstick"):
                others = others[:1]  # one model, one evaluation
            with ThreadPoolExecutor(max(1, len(others))) as pool:
                for name, scores in zip(
                    others, pool.map(lambda name: score(name, base), others), strict=True
                ):
                    final[name] = relative_path(scores, self.directory)
                    bar.advance(1)
            if len(final) < len(finalists):
                final["yardstick"] = final["best"]
                bar.advance(1)
        self.description |= {"final": final, "final_limit": self._final_limit}
        self.write()

    @property
    def _final_limit(self) -> int | None:
        return self.settings.search.final_limit or self.settings.evaluate.limit

    def export(self) -> Path | None:
        """Copy the best trial's model, with its model card, to ``best_model``."""
        from lrmc_ray.report.model_card import write_model_card

        if self.description["best"] is None:
            return None
        trial = self.entry(self.description["best"])
        source = self.directory / trial["directory"] / "training" / "model"
        final = self.directory / BEST_MODEL
        marker = final / "lrmc.json"
        wanted = {"study": self.description["id"], "trial": trial["number"], **trial["settings"]}
        if marker.is_file() and json.loads(marker.read_text()) == wanted:
            return final
        partial = final.with_name(BEST_MODEL + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        write_json(partial / marker.name, wanted)
        write_model_card(partial, self.directory)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return final

    def report(self) -> None:
        """Write the report of what there is, and send it to MLflow."""
        from lrmc_ray.report.figures_png import FIGURE_FILE
        from lrmc_ray.report.page import REPORT_FILE, write_report

        if self._queue is not None:
            self.description["importance"] = self._queue.importance()
        self.write()
        write_report(self.directory)
        artifacts = [
            {"path": SETTINGS_FILE, "folder": "config"},
            {"path": REPORT_FILE, "folder": ""},
            {"path": FIGURE_FILE, "folder": ""},
        ]
        self.description["artifacts"] = artifacts
        self.write()
        if self.tracker is not None:
            for artifact in artifacts:
                self.tracker.log_artifact(self.directory / artifact["path"], artifact["folder"])

    def publish_report(self) -> None:
        """Copy what people read to the storage, if there is one: the head may not last."""
        from lrmc_ray.report.figures_png import FIGURE_FILE
        from lrmc_ray.report.page import REPORT_FILE

        names = (SETTINGS_FILE, STUDY_FILE, REPORT_FILE, FIGURE_FILE)
        files = {name: self.directory / name for name in names}
        publish_report(self.settings.resources.storage, self.description["id"], files)

    @property
    def num_failed(self) -> int:
        """Trials that failed."""
        return sum(trial["state"] == "FAIL" for trial in self.description["trials"])

    @property
    def is_finished(self) -> bool:
        """Whether the search has ended, with as many trials as are asked for now."""
        trials = self.description["trials"]
        return (
            self.description["state"] == "FINISHED"
            and len(trials) >= self.settings.search.trials
            and self.description.get("final_limit") == self._final_limit
            and all(trial["state"] in ("COMPLETE", "PRUNED", "FAIL") for trial in trials)
        )

    def end(self) -> None:
        """Declare the search finished."""
        self.description["state"] = "FINISHED"
        self.description["ended"] = time.time()
        self.write()


def _kill_trial(directory: Path) -> bool:
    """End a trial's process, wherever it runs; whether it was there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from lrmc_ray.tune.processes import kill_process, last_process

    where = last_process(directory)
    if where is None:
        return False
    kill = ray.remote(kill_process).options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(where["node"], soft=False),
    )
    try:
        return bool(ray.get(kill.remote(where["pid"], where["born"]), timeout=60))
    except (ray.exceptions.RayError, TimeoutError):
        return False  # its node is gone, and the trial with it


def _trainable(config: dict[str, Any], **fixed: Any) -> None:
    """What Ray Tune runs: one trial, one report."""
    from ray import tune

    from lrmc_ray.tune.trial import run_trial

    tune.report(run_trial(config, **fixed))


def _points(trials: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(gain, forgetting) of finished trials."""
    return [(t["results"]["eval/domain_gain"], t["results"]["eval/forgetting"]) for t in trials]


def tune(search: Search, address: str, *, verbose: bool) -> None:
    """Run ``search`` to its end, or as far as it gets.

    Raises:
        LrmcError: it cannot go on; what there is has been reported.
    """
    from lrmc_ray.report.mlflow import StudyTracker

    settings = search.settings
    search.write()  # this sitting has begun
    with ExitStack() as stack:
        write_json(search.directory / SETTINGS_FILE, json_ready(settings.model_dump(mode="json")))
        search.tracker = stack.enter_context(
            StudyTracker(
                search.tracking_uri,
                study_id=search.description["id"],
                study_name=search.description["name"],
                directory=search.directory,
                experiment=search.description["experiment"],
                params=flat_settings(search.description["settings"]),
                datasets=search.description["datasets"],
                catch_up=f"lrmc mlflow-sync {search.directory}",
            )
        )
        search.tracker.log_artifact(search.directory / SETTINGS_FILE, "config")
        storage = settings.resources.storage
        log = search.directory / RAY_LOG
        stack.enter_context(ray_session(address, log=log, verbose=verbose, storage=storage))
        check_trial_slots(storage)
        if search.description["forecast"] is None:
            expected = forecast(settings, search.output, slots=search.slots())
            search.description["forecast"] = asdict(expected) if expected else None
        recorded, base = search.prepare()
        try:
            search.run_trials(recorded, base)
        except BaseException:
            search.report()
            search.publish_report()
            _log.info("what there is so far: %s", search.directory / "report.html")
            raise
        search.score_finalists()
        search.export()
        search.report()
        search.leave_storage()
        search.end()
    search.description["trade_off_path"] = search.tracker.trade_off_path
    search.write()
    search.publish_report()
