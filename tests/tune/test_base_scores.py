"""The base model's scores: before the trials, or beside them."""

import threading
import time

import pytest

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError, ResourceError
from lrmc_ray.files import beats
from lrmc_ray.files.artifacts import write_manifest
from lrmc_ray.tune import base_scores, trial
from lrmc_ray.tune.base_scores import BaseScores, await_scores, slots_beside

EARLY = {"trials": 20, "early_stopping": "median", "early_stopping_trials": 4}


def settings_of(search, resources=None, micro_batches=1):
    values = {"search": search, "resources": resources or {}, "train": {"batch_size": 8}}
    values["train"]["micro_batches"] = micro_batches
    return RunSettings.model_validate(values)


@pytest.mark.parametrize(
    ("slots", "search", "resources", "micro_batches", "beside"),
    [
        (1, {"trials": 6}, {}, 1, 0),
        (2, {"trials": 6}, {}, 8, 1),  # two trials of one worker side by side
        (8, {"trials": 6}, {}, 8, 4),  # two of four workers
        (8, {"trials": 6}, {}, 2, 6),  # of which a trial of two micro-batches uses two
        (8, {"trials": 6}, {"workers": [3, 3]}, 1, 5),
        (8, {"trials": 6}, {"workers": [8, 8]}, 8, 0),  # it takes all
        (8, {"trials": 6, }, {"max_concurrent": 1}, 8, 0),
        (8, EARLY, {}, 1, 0),  # it is scored on the way, while it holds its slots
        (8, {**EARLY, "trials": 4}, {}, 1, 7),  # too few for one to be stopped
    ],
)  # fmt: skip
def test_slots_beside_the_first_trial(slots, search, resources, micro_batches, beside):
    assert slots_beside(settings_of(search, resources, micro_batches), slots) == beside


def test_a_trial_that_fits_nowhere_is_refused():
    with pytest.raises(ResourceError, match="a trial needs 3 workers, 2 fit"):
        slots_beside(settings_of({"trials": 6}, {"workers": [3, 3]}), 2)


class Making:
    """Scores in the making, which are made when a test says so."""

    def __init__(self, directory, error=None):
        self.directory, self.error = directory, error
        self.calls, self.notes = [], []
        self.may_end = threading.Event()
        self.scores = BaseScores(directory, self.make, self.note)

    def make(self, slots, is_wanted):
        self.calls.append((slots, threading.current_thread() is threading.main_thread()))
        while not self.may_end.is_set():
            if not is_wanted():
                raise DataError("given up")
            time.sleep(0.001)
        if self.error:
            raise self.error
        self.directory.mkdir(parents=True, exist_ok=True)
        write_manifest(self.directory, {})

    def note(self):
        assert (self.directory / "manifest.json").is_file()
        self.notes.append(threading.current_thread() is threading.main_thread())

    def end(self):
        self.may_end.set()
        deadline = time.monotonic() + 10
        while self.scores._work.is_busy and time.monotonic() < deadline:
            time.sleep(0.001)


@pytest.mark.parametrize("asked", ["look", "wait"])
def test_scores_made_beside_are_noted_once_when_somebody_asks(tmp_path, asked):
    making = Making(tmp_path / "scores")
    with making.scores as scores:
        scores.begin(8, 3)
        for _ in range(3):
            scores.look()
        assert not scores.are_there
        making.end()
        assert making.notes == []
        getattr(scores, asked)()
        assert scores.are_there
        scores.look()
        scores.wait()
    assert making.calls == [(3, False)]
    assert making.notes == [True]


@pytest.mark.parametrize("is_there", [False, True])
def test_scores_that_come_first_or_are_there_take_all_slots_and_no_thread(tmp_path, is_there):
    making = Making(tmp_path / "scores")
    making.may_end.set()
    if is_there:
        making.make(0, lambda: True)
        making.calls.clear()
    making.scores.begin(8, 3 if is_there else 0)
    assert making.calls == [(8, True)]
    assert making.notes == [True]
    assert making.scores.are_there


@pytest.mark.parametrize("asked", ["look", "wait"])
def test_what_scoring_raises_is_raised_where_somebody_asks(tmp_path, asked):
    making = Making(tmp_path / "scores", error=DataError("task t cannot be scored"))
    with making.scores as scores:
        scores.begin(2, 1)
        making.end()
        with pytest.raises(DataError, match="task t cannot be scored"):
            getattr(scores, asked)()
        assert not scores.are_there
    assert making.notes == []


def test_scoring_ends_with_the_search(tmp_path):
    making = Making(tmp_path / "scores")
    start = time.monotonic()
    with making.scores as scores:
        scores.begin(2, 1)
    assert not making.scores._work.is_busy
    assert time.monotonic() - start < 5
    assert making.notes == []


def test_scoring_that_does_not_end_keeps_nobody_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(base_scores, "END_SECONDS", 0.2)
    may_end = threading.Event()
    scores = BaseScores(tmp_path, lambda *_: may_end.wait(10) and None, lambda: None)
    start = time.monotonic()
    with scores:
        scores.begin(2, 1)
    assert 0.2 <= time.monotonic() - start < 5
    may_end.set()


def test_a_trial_waits_for_the_manifest_and_gives_signs_of_life(tmp_path, monkeypatch):
    directory, signs = tmp_path / "scores", list[str]()
    monkeypatch.setattr(base_scores, "LOOK_SECONDS", 0.01)
    thread = threading.Thread(target=await_scores, args=(directory,))
    with beats.beating(signs.append, every=0.0):
        thread.start()
        directory.mkdir()
        (directory / "items.parquet").touch()  # not enough
        thread.join(0.2)
        assert thread.is_alive()
        write_manifest(directory, {})
        thread.join(5)
    assert not thread.is_alive()
    assert len(set(signs)) == len(signs) > 3
    before = len(signs)
    await_scores(directory)
    assert len(signs) == before


def test_a_trial_trains_first_and_is_scored_when_the_scores_are_there(tmp_path, monkeypatch):
    base, seen = tmp_path / "scores", []
    monkeypatch.setattr(base_scores, "LOOK_SECONDS", 0.01)

    def train(_settings, _record, directory, **_):
        seen.append("trained")
        directory.mkdir(parents=True)
        cost = [
            *("train_seconds", "processed_tokens", "original_tokens", "cpu_seconds"),
            *("peak_memory_bytes", "world_size"),
        ]
        write_manifest(directory, {**dict.fromkeys(cost, 1), "pruned": False})
        return directory

    class ScoredError(Exception):
        pass

    def evaluate(*_, base, **__):
        seen.append("scored" if (base / "manifest.json").is_file() else "scored too early")
        raise ScoredError

    monkeypatch.setattr(trial, "train", train)
    monkeypatch.setattr(trial, "evaluate", evaluate)

    def score_base() -> None:
        base.mkdir()
        write_manifest(base, {})

    threading.Timer(0.3, score_base).start()
    with pytest.raises(ScoredError):
        trial.train_and_score(
            settings_of({"trials": 6}), tmp_path / "0000", tmp_path, base, stored_as="s"
        )
    assert seen == ["trained", "scored"]
