"""A whole search, run by the project's own code, whose trials are made up: no Ray, no model.

The record, the scores and the training are stand-ins that leave the files that the real ones do.
What a trial finds is a function of its settings, so the same search finds the same twice.
"""

import contextlib
import functools
import json
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.files.artifacts import fingerprint, is_finished, publish, write_manifest
from lrmc_ray.files.names import METRICS, MODEL
from lrmc_ray.files.study import trial_directory
from lrmc_ray.tune import trial as trial_module
from lrmc_ray.tune.processes import PROCESSES
from lrmc_ray.tune.result import RunResult
from lrmc_ray.tune.run import Search

ITEMS = 6
"""Of each task."""


@dataclass
class FakeSearch:
    """What the stand-ins share.

    Attributes:
        settings: of the search.
        output: of the search.
        contents: what it is trained and scored on.
        on_start: called with the number of every trial that has a process, and trains next.
        on_train: called with the number of every trial that has been trained.
        on_score: called before the base is scored.
        slots: workers that fit side by side.
    """

    settings: RunSettings
    output: Path
    contents: dict[str, str] = field(default_factory=dict)
    on_start: Callable[[int], None] = lambda _: None
    on_train: Callable[[int], None] = lambda _: None
    on_score: Callable[[], None] = lambda: None
    slots: int = 2

    def run(self) -> Search:
        """Run the command's part behind its arguments."""
        search = Search(self.settings, self.output, self.contents)
        if not search.description.is_finished:
            search.run("local", verbose=False)
        return search


def settings_of(trials: int, **search: Any) -> RunSettings:
    """Settings of a search over tau and the learning rate."""
    return RunSettings.model_validate(
        {
            "search": {"name": "fake", "trials": trials, **search},
            "train": {"steps": 4},
            "parameters": {
                "tau": {"low": 0.8, "high": 0.99},
                "lr": {"low": 1e-6, "high": 1e-3, "log": True},
            },
        }
    )


def results_of(train: Mapping[str, Any]) -> dict[str, float]:
    """What training with these settings is made to find, with the best at tau 0.9, lr 3e-5."""
    off = math.log10(train["lr"] / 3e-5)
    gain = 0.6 - 0.1 * off**2 - abs(train["tau"] - 0.9)
    forgetting = 0.02 + 0.05 * max(0.0, off)
    names = ("eval/domain_gain", "eval/forgetting", "eval/combined")
    values = (gain, forgetting, gain - forgetting)
    results: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        results |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
    return results | {"eval/kl_base_domain": 0.3, "eval/kl_base_general": 0.01}


def rows_of(right: float) -> list[dict[str, Any]]:
    """Scores of a few items, of which a share is right."""
    rows = []
    for task, group in (("nl2sql", "domain"), ("wordnet", "general")):
        for index in range(ITEMS):
            value = float(index < right * ITEMS)
            for metric, score in (("accuracy", value), ("probability", 0.2 + 0.5 * value)):
                rows.append(
                    {
                        "task": task, "group": group, "kind": "choice", "metric": metric,
                        "item_id": f"{task}-{index}", "value": score, "weight": 1.0,
                        "output": None,
                    }
                )  # fmt: skip
    return rows


def _place_of_scores(output: Path, model: str, split: str) -> tuple[dict[str, str], Path]:
    identity = {"model": model, "split": split}
    return identity, output / "scores" / fingerprint(identity)


def _write_scores(output: Path, model: str, split: str, right: float) -> Path:
    identity, final = _place_of_scores(output, model, split)
    if not is_finished(final):
        partial = final.with_name(final.name + ".partial")
        Scores.from_rows(rows_of(right)).save(partial)
        manifest = {"kind": "scores", "identity": identity, "drift": {}, "seconds": 1.0}
        publish(partial, final, manifest)
    return final


def _evaluate(_: Any, model: Path, output: Path, *, split: str, **__: Any) -> Path:
    """Scores of a model by the name of its directory."""
    return _write_scores(
        output, os.path.relpath(model, output), split, 0.9 if "trials" in model.parts else 0.2
    )


def _base_directory(_: Any, model: Path, output: Path, *, split: str) -> Path:
    return _place_of_scores(output, os.path.relpath(model, output), split)[1]


def _score_base(fake: FakeSearch, *arguments: Any, **options: Any) -> Path:
    if not is_finished(_base_directory(*arguments, split=options["split"])):
        fake.on_score()
    return _evaluate(*arguments, **options)


def _record(_: Any, output: Path, _used: Any) -> Path:
    final = output / "records" / "0123456789ab"
    if not is_finished(final):
        final.mkdir(parents=True, exist_ok=True)
        summary = {
            "supervised_positions": 100, "k_mean": 9.0, "k_median": 6, "capped_share": 0.01,
            "active_share": 0.8, "bytes": 1000,
        }  # fmt: skip
        write_manifest(final, {"kind": "records", "summary": summary, "seconds": 1.0})
    return final


def _train_and_score(fake: FakeSearch, run: RunSettings, directory: Path, base: Path) -> RunResult:
    """What a trial leaves that trains and is scored."""
    train = run.train.model_dump(mode="json")
    training = directory / "training"
    if not is_finished(training):
        fake.on_start(int(directory.name))
        (training / MODEL).mkdir(parents=True, exist_ok=True)
        (training / MODEL / "config.json").write_text(json.dumps({"trial": directory.name}))
        lines = [
            json.dumps({"step": step, "time": 1.7e9 + step, "metrics": {"train/loss": 1.0 / step}})
            for step in range(1, 5)
        ]
        (training / METRICS).write_text("\n".join(lines) + "\n")
        write_manifest(training, {"kind": "training", "identity": train})
        fake.on_train(int(directory.name))
    trial_module.await_scores(base)
    results = results_of(train)
    scores = _write_scores(directory, directory.name, "dev", results["eval/domain_gain"] + 0.2)
    cost = {
        "train_seconds": 10.0, "processed_tokens": 900, "original_tokens": 1000, "train_cores": 1,
        "train_cpu_seconds": 10.0, "peak_memory_bytes": 1e9, "evaluate_seconds": 3.0,
        "evaluate_cores": 1,
    }  # fmt: skip
    return RunResult(results, str(scores.relative_to(directory)), train, cost)


class _Tuner:
    """Runs the trials that the searcher hands out, one after the other."""

    def __init__(self, trainable: Callable[..., Any], *, tune_config: Any, **_: Any) -> None:
        self._trainable, self._searcher = trainable, tune_config.search_alg

    def fit(self) -> None:
        """Until the searcher says that it is finished."""
        for turn in range(10**9):
            config = self._searcher.suggest(str(turn))
            if not isinstance(config, dict):
                return
            try:
                result = self._trainable(config)
            except Exception:
                self._searcher.on_trial_complete(str(turn), error=True)
            else:
                self._searcher.on_trial_complete(str(turn), result=result)


def _tune(fake: FakeSearch) -> types.SimpleNamespace:
    """In place of Ray Tune."""

    def with_parameters(_: Any, **fixed: Any) -> Callable[[dict[str, Any]], dict[str, float]]:
        study = Path(fixed["study_directory"])
        settings = RunSettings.model_validate(fixed["settings"])

        def trainable(config: dict[str, Any]) -> dict[str, float]:
            directory = trial_directory(study, config["number"])
            changes = {**config["params"], **config["overrides"]}
            train = trial_module.trial_settings(settings.train, changes)
            run = settings.model_copy(update={"train": train})
            return trial_module.attempt(
                directory,
                str(config["number"]),
                lambda: _train_and_score(fake, run, directory, Path(fixed["base_scores"])),
            ).results

        return trainable

    return types.SimpleNamespace(
        Tuner=_Tuner,
        TuneConfig=types.SimpleNamespace,
        RunConfig=types.SimpleNamespace,
        FailureConfig=types.SimpleNamespace,
        with_parameters=with_parameters,
        with_resources=lambda trainable, _: trainable,
    )


def _note_process(directory: Path) -> None:
    with (directory / PROCESSES).open("a", encoding="utf-8") as log:
        log.write("{}\n")


class _Tracker:
    """In place of MLflow's copy."""

    trade_off_path = None

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def install(patch: pytest.MonkeyPatch, fake: FakeSearch) -> FakeSearch:
    """Put the stand-ins in their places."""
    model = fake.output / "base_model"
    model.mkdir(parents=True, exist_ok=True)
    run, trials, finish = "lrmc_ray.tune.run", "lrmc_ray.tune.trials", "lrmc_ray.tune.finish"
    quiet: Any = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    patch.setattr(f"{run}.ray_session", quiet)
    patch.setattr(f"{run}.check_trial_slots", lambda *_: None)
    patch.setattr(f"{run}.worker_slots", lambda *_: fake.slots)
    patch.setattr(f"{run}.forecast", lambda *_, **__: None)
    patch.setattr(f"{run}.check_unchanged", lambda *_: None)
    patch.setattr(f"{run}.samples_of_search", lambda _: None)
    patch.setattr(f"{run}.record", _record)
    patch.setattr(f"{run}.StudyTracker", lambda *_, **__: contextlib.nullcontext(_Tracker()))
    patch.setattr(f"{run}.evaluate", functools.partial(_score_base, fake))
    patch.setattr(f"{run}.base_directory", _base_directory)
    patch.setattr(f"{finish}.evaluate", _evaluate)
    for module in (run, finish):
        patch.setattr(f"{module}.local_directory", lambda _: model)
    patch.setattr(f"{finish}.write_model_card", lambda *_: None)
    patch.setattr(f"{trials}.tune", _tune(fake))
    patch.setattr(f"{trials}.end_leftovers", lambda _: None)
    patch.setattr(f"{trials}.release_orphaned_groups", lambda: 0)
    patch.setattr("lrmc_ray.tune.watch.POLL_SECONDS", 0.02)
    patch.setattr("lrmc_ray.tune.base_scores.LOOK_SECONDS", 0.02)
    patch.setattr("lrmc_ray.tune.trial.write_process", _note_process)
    return fake
