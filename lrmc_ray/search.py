"""The search's memory: an Optuna study on disk, and the Searcher that feeds Ray Tune from it.

The study is the truth. Ray Tune only runs what the searcher hands out, and its own state is thrown
away: after a crash a new Tuner is started, and the searcher hands out the unfinished trials first,
each in its own directory, where its training goes on from a checkpoint. Every trial ends COMPLETE
or FAIL; none stays RUNNING.
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

_log = logging.getLogger(__name__)

OBJECTIVE = "eval/combined"
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def open_study(path: Path, name: str) -> optuna.Study:
    """The study in the SQLite file ``path``, made if it is not there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )


def distribution(name: str, searched: ParameterRange) -> BaseDistribution:
    """Optuna's form of a searched setting."""
    if searched.choices is not None:
        return CategoricalDistribution(searched.choices)
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
        self._settings = settings
        self._distributions = {
            name: distribution(name, searched) for name, searched in settings.parameters.items()
        }
        self._abandon_unready()
        self._waiting = [
            trial for trial in study.get_trials(deepcopy=False) if trial.state in UNFINISHED
        ]
        roles = {trial.user_attrs.get("role") for trial in study.get_trials(deepcopy=False)}
        if "defaults" not in roles:
            self._waiting.append(self._ask_defaults())
        if settings.search.yardstick_lr is not None and "yardstick" not in roles:
            self._waiting.append(self._ask_yardstick(settings.search.yardstick_lr))

    def _abandon_unready(self) -> None:
        """Fail trials that a crash cut off before their settings were complete."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state in UNFINISHED and not trial.user_attrs.get("ready"):
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _ask_defaults(self) -> FrozenTrial:
        defaults = self._settings.train.model_dump()
        inside = {
            name: defaults[name]
            for name, space in self._distributions.items()
            if space._contains(space.to_internal_repr(defaults[name]))
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
        trial = self._study.ask(dict(distributions))
        trial.set_user_attr("role", role)
        trial.set_user_attr("overrides", dict(overrides))
        trial.set_user_attr("ready", True)
        return self._study.get_trials(deepcopy=False)[trial.number]

    @property
    def num_counted(self) -> int:
        """Trials that count towards ``search.trials``: all but those cut off before they began."""
        trials = self._study.get_trials(deepcopy=False)
        return sum(bool(trial.user_attrs.get("ready")) for trial in trials)

    @property
    def is_finished(self) -> bool:
        """Whether every trial of the search has ended."""
        return not self._waiting and self.num_counted >= self._settings.search.trials

    def next(self) -> FrozenTrial | None:
        """The next trial: an unfinished one if there is, else a new one; None when all are out."""
        if self._waiting:
            return self._waiting.pop(0)
        if self.num_counted >= self._settings.search.trials:
            return None
        search = self._settings.search
        # Seeded per trial: a resumed search neither repeats its points nor depends on when it died.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(search.seed * 10_007 + len(self._study.get_trials(deepcopy=False))) % 2**32,
            n_startup_trials=search.startup_trials,
            constant_liar=True,  # trials run side by side
        )
        return self._ask("search", self._distributions, {})

    def complete(self, number: int, value: float) -> None:
        """Tell the study a trial's objective."""
        self._study.tell(number, value, skip_if_finished=True)

    def fail(self, number: int, cause: str) -> None:
        """Tell the study that a trial failed, and why."""
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        self._study._storage.set_trial_user_attr(trial_id, "cause", cause)
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray's types are skipped
    """Hands the queue's trials to Ray Tune and tells the study how they ended."""

    def __init__(self, queue: TrialQueue, on_change: Any) -> None:
        """Call ``on_change(number, result, cause)`` when a trial starts or ends."""
        super().__init__(metric=OBJECTIVE, mode="max")
        self._queue = queue
        self._on_change = on_change
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The settings of the next trial."""
        trial = self._queue.next()
        if trial is None:
            finished: str = Searcher.FINISHED
            return finished
        self._numbers[trial_id] = trial.number
        self._on_change(trial.number, None, None)
        return {
            "number": trial.number,
            "params": dict(trial.params),
            "overrides": trial.user_attrs["overrides"],
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study; a trial without a finite objective has failed."""
        number = self._numbers.pop(trial_id)
        value = (result or {}).get(OBJECTIVE)
        if not error and isinstance(value, float) and math.isfinite(value):
            self._queue.complete(number, value)
            self._on_change(number, result, None)
            return
        cause = "its process died" if error else f"its objective is {value}, not a finite number"
        self._on_change(number, None, cause)

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
