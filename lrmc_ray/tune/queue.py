"""The search's memory: an Optuna study on disk, and the Searcher that feeds Ray Tune from it.

The study is the truth. Ray Tune only runs what the searcher hands out, and its own state is thrown
away: after a crash a new Tuner is started, and the searcher hands out the unfinished trials first,
each in its own directory, where its training goes on from a checkpoint. Every trial ends COMPLETE,
PRUNED (it stopped itself early) or FAIL; none stays RUNNING.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from lrmc_ray.config import ParameterRange, RunSettings, TrainSettings
from lrmc_ray.config.search import Objective
from lrmc_ray.files.fault_points import passed
from lrmc_ray.tune.importance import importance
from lrmc_ray.tune.processes import DIED
from lrmc_ray.tune.result import COMBINED, FORGETTING, GAIN
from lrmc_ray.tune.trial import PRUNED, RUNG_FORGETTING, RUNG_STEP, RUNG_VALUE

_log = logging.getLogger(__name__)

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def open_study(path: Path, name: str, objective: Objective = "combined") -> optuna.Study:
    """The study in the SQLite file ``path``, made if it is not there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
    directions = [optuna.study.StudyDirection.MAXIMIZE]
    if objective == "pareto":
        directions.append(optuna.study.StudyDirection.MINIMIZE)
    return optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True
    )


def objective_values(objective: Objective, results: Mapping[str, float]) -> list[float]:
    """What the study is told of a trial, by objective."""
    if objective == "combined":
        return [results[COMBINED]]
    if objective == "budget":
        return [results[GAIN]]
    return [results[GAIN], results[FORGETTING]]


def distribution(name: str, searched: ParameterRange) -> BaseDistribution:
    """Optuna's form of a searched setting."""
    if searched.choices is not None:
        return CategoricalDistribution(searched.choices)
    assert searched.range is None, "automatic ranges are found before the search begins"
    assert searched.low is not None
    assert searched.high is not None
    if TrainSettings.model_fields[name].annotation is int:
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)


class TrialQueue:
    """Which trial comes next, and how each ended."""

    def __init__(self, study: optuna.Study, settings: RunSettings) -> None:
        """Prepare ``study``: its first trial is the defaults, its second plain fine-tuning."""
        self._study = study
        self._is_stopped = False
        self._settings = settings
        # Those that others depend on first.
        parameters = sorted(settings.parameters.items(), key=lambda item: bool(item[1].when))
        self._distributions = {name: distribution(name, searched) for name, searched in parameters}
        self._abandon_unready()
        trials = study.get_trials(deepcopy=False)
        self._waiting = [trial for trial in trials if trial.state in UNFINISHED]
        # One command at a time adds trials, so they are counted here: to list all takes longer with
        # each of them.
        self._num_trials = len(trials)
        ready = [trial for trial in trials if trial.user_attrs.get("ready")]
        self.num_counted = len(ready)
        """Trials that count towards ``search.trials``."""
        roles = {trial.user_attrs["role"] for trial in ready}
        if "defaults" not in roles:
            self._waiting.append(self._ask_defaults())
        if settings.search.yardstick_lr is not None and "yardstick" not in roles:
            self._waiting.append(self._ask_yardstick(settings.search.yardstick_lr))

    def trial(self, number: int) -> FrozenTrial:
        """What the study knows of a trial."""
        storage, study = self._study._storage, self._study._study_id
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study, number))

    def ready_trials(self) -> list[FrozenTrial]:
        """All trials but those cut off before they began."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get("ready")]

    def _abandon_unready(self) -> None:
        """Fail trials that a crash cut off before their settings were complete."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state in UNFINISHED and not trial.user_attrs.get("ready"):
                # What was put in the queue can be told of once it is out of it.
                is_queued = trial.state == TrialState.WAITING
                number = self._study.ask().number if is_queued else trial.number
                self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _ask_defaults(self) -> FrozenTrial:
        defaults = self._settings.train.model_dump()
        inside = {
            name: defaults[name]
            for name, space in self._distributions.items()
            if _holds(space, defaults[name])
        }
        self._study.enqueue_trial(inside)
        return self._ask("defaults", self._distributions, {})

    def _ask_yardstick(self, lr: float) -> FrozenTrial:
        # It has no searched parameters, so the sampler learns nothing wrong from it.
        overrides = {"loss": "full", "optimizer": "adamw", "lr": lr, "anchor_weight": 0.0}
        return self._ask("yardstick", {}, overrides)

    def _ask(
        self,
        role: str,
        distributions: Mapping[str, BaseDistribution],
        overrides: Mapping[str, Any],
    ) -> FrozenTrial:
        trial = self._study.ask()
        for name, space in distributions.items():
            if self._is_searched(name, trial.params):
                _suggest(trial, name, space)
        trial.set_user_attr("role", role)
        trial.set_user_attr("overrides", dict(overrides))
        trial.set_user_attr("ready", True)
        self._num_trials = trial.number + 1
        self.num_counted += 1
        return self.trial(trial.number)

    def _is_searched(self, name: str, params: Mapping[str, Any]) -> bool:
        """Whether the condition of parameter ``name`` holds in a trial with ``params``."""
        return all(
            params.get(key, getattr(self._settings.train, key)) == value
            for key, value in self._settings.parameters[name].when.items()
        )

    @property
    def is_finished(self) -> bool:
        """Whether every trial of the search has ended."""
        return not self._waiting and self.num_counted >= self._settings.search.trials

    def stop(self) -> None:
        """Hand out no more trials."""
        self._is_stopped = True

    def next(self) -> FrozenTrial | None:
        """The next trial: an unfinished one if there is, else a new one; None when all are out."""
        if self._is_stopped:
            return None
        if self._waiting:
            return self._waiting.pop(0)
        if self.num_counted >= self._settings.search.trials:
            return None
        search = self._settings.search
        # Seeded per trial: a resumed search neither repeats its points nor depends on when it died.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(search.seed * 10_007 + self._num_trials) % 2**32,
            n_startup_trials=search.startup_trials,
            constant_liar=True,  # trials run side by side
        )
        return self._ask("search", self._distributions, {})

    def again(self, number: int) -> None:
        """Hand out a trial once more, before all others: its process was lost."""
        self._waiting.insert(0, self.trial(number))

    def complete(self, number: int, results: Mapping[str, float]) -> None:
        """Tell the study a trial's objective, and how far beyond the budget it is."""
        search = self._settings.search
        trial_id = self.trial(number)._trial_id
        trial = optuna.trial.Trial(self._study, trial_id)
        trial.set_user_attr("results", {key: results[key] for key in (GAIN, FORGETTING, COMBINED)})
        if search.objective == "budget":
            trial.set_constraint("forgetting", results[FORGETTING] - search.max_forgetting)
        values = objective_values(search.objective, results)
        self._study.tell(number, values, skip_if_finished=True)

    def report(self, number: int, step: int, value: float) -> None:
        """Tell the study what a trial scored on the way."""
        trial = self.trial(number)
        if trial.state in UNFINISHED and step not in trial.intermediate_values:
            optuna.trial.Trial(self._study, trial._trial_id).report(value, step)

    def prune(self, number: int, forgetting: float) -> None:
        """Tell the study that a trial stopped itself; the sampler learns from its last score."""
        search = self._settings.search
        if search.objective == "budget":
            trial_id = self.trial(number)._trial_id
            trial = optuna.trial.Trial(self._study, trial_id)
            trial.set_constraint("forgetting", forgetting - search.max_forgetting)
        self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def importance(self) -> dict[str, dict[str, float]]:
        """How much each searched parameter matters for gain, forgetting and combined score."""
        trials = self._completed_search_trials()
        results = [trial.user_attrs["results"] for trial in trials]
        scores = {key: [one[key] for one in results] for key in (GAIN, FORGETTING, COMBINED)}
        conditions = [searched.when for searched in self._settings.parameters.values()]
        return importance(trials, scores, {name for when in conditions for name in when})

    def _completed_search_trials(self) -> list[FrozenTrial]:
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state == TrialState.COMPLETE and trial.params and "results" in trial.user_attrs
        ]

    def fail(self, number: int, cause: str) -> None:
        """Tell the study that a trial failed, and why."""
        trial_id = self.trial(number)._trial_id
        self._study._storage.set_trial_user_attr(trial_id, "cause", cause)
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _holds(space: BaseDistribution, value: Any) -> bool:
    """Whether ``value`` lies in the space."""
    try:
        return bool(space._contains(space.to_internal_repr(value)))
    except ValueError:  # no choice of the space, or None where it has numbers
        return False


def _suggest(trial: optuna.Trial, name: str, space: BaseDistribution) -> None:
    """Let ``trial`` draw one parameter."""
    if isinstance(space, FloatDistribution):
        trial.suggest_float(name, space.low, space.high, log=space.log)
    elif isinstance(space, IntDistribution):
        trial.suggest_int(name, space.low, space.high, log=space.log)
    else:
        assert isinstance(space, CategoricalDistribution)
        trial.suggest_categorical(name, space.choices)


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray's types are skipped
    """Hands the queue's trials to Ray Tune and tells the study how they ended."""

    def __init__(self, queue: TrialQueue, on_change: Any) -> None:
        """Call ``on_change(number, result, cause)`` when a trial starts or ends."""
        super().__init__(metric=COMBINED, mode="max")
        self._queue = queue
        self._on_change = on_change
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The settings of the next trial."""
        trial = self._queue.next()
        if trial is None and self._numbers:
            return None  # one that runs may be handed out again
        if trial is None:
            finished: str = Searcher.FINISHED
            return finished
        self._numbers[trial_id] = trial.number
        self._on_change(trial.number, None, None)
        return {
            "number": trial.number,
            "params": dict(trial.params),
            "overrides": trial.user_attrs["overrides"],
            "role": trial.user_attrs["role"],
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study; a trial without a finite objective has failed."""
        number = self._numbers.pop(trial_id)
        if error or result is None:
            self._on_change(number, None, DIED)
            return
        if RUNG_STEP in result:
            self._queue.report(number, int(result[RUNG_STEP]), result[RUNG_VALUE])
        if result.get(PRUNED):
            self._queue.prune(number, result[RUNG_FORGETTING])
            self._on_change(number, result, None)
            return
        for name in (GAIN, FORGETTING, COMBINED):
            value = result.get(name)
            if not isinstance(value, float) or not math.isfinite(value):
                self._on_change(number, None, f"its {name} is {value}, not a finite number")
                return
        self._queue.complete(number, result)
        passed("tune.trial_told", str(number))
        self._on_change(number, result, None)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher for a restore that is never made."""
        return {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> "StudySearcher":
        """Itself: there is one study."""
        return self

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""
