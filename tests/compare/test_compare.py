"""The comparison around its runs: what is run, what is chosen, faults, resumption, settings."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from lrmc_ray.compare import run as run_module
from lrmc_ray.compare.command import chosen_methods, main
from lrmc_ray.compare.description import COMPARISON_FILE, Description
from lrmc_ray.compare.explain import explain
from lrmc_ray.compare.jobs import (
    Job,
    Outcome,
    best_learning_rate,
    comparison_identity,
    job_of_entry,
    learning_rate_jobs,
    needs_record,
    num_jobs,
    open_jobs,
    reported_jobs,
)
from lrmc_ray.compare.run import Comparing, recording_cores
from lrmc_ray.config import (
    ResourceSettings,
    RunSettings,
    TrainSettings,
    find_space,
    read_toml,
    validate,
)
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.tune import limits
from lrmc_ray.tune.processes import PROCESSES
from lrmc_ray.tune.provenance import newest_earlier, why_new
from lrmc_ray.tune.result import failure_cause
from tests.support.small_comparison import compare_command
from tests.support.synthetic_comparison import (
    METHODS,
    RATES,
    FakeRay,
    make_space,
    write_base,
    write_run,
)

ROOT = Path(__file__).parents[2]
MATTER_MOST = ("sft", "defaults", "paper", "c_adamw_anchor", "full_cautious_anchor")
"""Methods of ``compare_four_grounds`` that have six seeds."""


def complete(*scores: float) -> dict[Job, Outcome]:
    """Development jobs of ``sft`` at the learning rates in their order."""
    return {
        Job("sft", lr, 0, "dev"): Outcome("COMPLETE", choice=score)
        for lr, score in zip(RATES, scores, strict=False)
    }


# What is chosen


def test_the_learning_rate_is_the_one_with_the_highest_development_score():
    space = make_space()
    assert best_learning_rate(space, "sft", complete(0.2, 0.5, 0.4)) == 3e-5
    assert best_learning_rate(space, "sft", complete(0.9, 0.5, 0.4)) == 1e-5
    # Of equals the lowest, which changes the model least.
    assert best_learning_rate(space, "sft", complete(0.2, 0.5, 0.5)) == 3e-5
    assert best_learning_rate(space, "sft", complete(-3.0, -2.0, -1.0)) == 1e-4


def test_nothing_is_chosen_before_every_learning_rate_has_ended():
    space = make_space()
    assert best_learning_rate(space, "sft", complete(0.2, 0.5)) is None
    assert best_learning_rate(space, "lora", complete(0.2, 0.5, 0.3)) is None


def test_a_failed_learning_rate_is_not_chosen_and_does_not_hold_up_the_others():
    space = make_space()
    outcomes = complete(0.2, 0.5, 0.4) | {Job("sft", 3e-5, 0, "dev"): Outcome("FAIL", cause="x")}
    assert best_learning_rate(space, "sft", outcomes) == 1e-4
    failed = {job: Outcome("FAIL", cause="x") for job in outcomes}
    assert best_learning_rate(space, "sft", failed) is None
    assert open_jobs(space, ["sft"], failed) == []


def test_test_scores_have_no_part_in_the_choice():
    space = make_space()
    outcomes = complete(0.2, 0.5, 0.4)
    for lr in RATES:
        for seed in (0, 1, 2):
            value = 99.0 if lr == 1e-5 else -99.0
            outcomes[Job("sft", lr, seed, "test")] = Outcome("COMPLETE", choice=value)
    assert best_learning_rate(space, "sft", outcomes) == 3e-5


# What is run


def test_learning_rates_on_the_first_seed_then_the_best_on_all_for_the_test():
    space = make_space()
    first = [Job("sft", lr, 0, "dev") for lr in RATES]
    assert open_jobs(space, ["sft"], {}) == first == learning_rate_jobs(space, "sft")
    assert open_jobs(space, ["sft"], complete(0.1)) == first[1:]
    outcomes = complete(0.1, 0.3, 0.2)
    then = [Job("sft", 3e-5, seed, "test") for seed in (0, 1, 2)]
    assert open_jobs(space, ["sft"], outcomes) == then == reported_jobs(space, "sft", 3e-5)
    outcomes[then[1]] = Outcome("FAIL", cause="x")
    assert open_jobs(space, ["sft"], outcomes) == [then[0], then[2]]
    assert num_jobs(space, ["sft", "lora"]) == (3 + 3) + (2 + 3)


def test_a_method_is_finished_before_the_next_one_begins():
    """So that at most one method's models wait on the disk."""
    space = make_space()
    jobs = open_jobs(space, ["sft", "lora"], complete(0.1, 0.3, 0.2))
    assert [job.method for job in jobs] == ["sft"] * 3 + ["lora"] * 2


def test_adding_methods_rates_or_seeds_is_the_same_comparison_and_other_budgets_are_not():
    def identity(**changes):
        return comparison_identity(make_space(**changes))

    first = identity()
    assert identity(compare={"seeds": [0, 7], "learning_rates": [1e-3]}) == first
    assert identity(methods={**METHODS, "x": METHODS["sft"]}) == first
    assert identity(resources={"max_concurrent": 1}) == first
    assert identity(train={"steps": 13}) != first
    assert identity(evaluate={"limit": 20}) != first
    assert identity(search={"forgetting_weight": 2.0}) != first
    # A larger tau is another record, and so are all runs.
    larger = {**METHODS, "x": {"title": "x", "train": {"tau": 0.995}}}
    assert identity(methods=larger) != first


def test_a_run_has_the_methods_settings_over_the_shared_ones(tmp_path):
    comparing = Comparing(Description(make_space(), ["lrmc"], tmp_path, {}))
    train = comparing.description.train_settings(Job("lora", 1e-3, 5, "dev"))
    assert (train.lora_rank, train.lr, train.seed, train.steps) == (4, 1e-3, 5, 12)
    job = Job("lrmc", 1e-5, 0, "dev")
    comparing.description.values = {"record": {"directory": "r"}, "base_scores": {"dev": "b"}}
    sent = comparing.arguments(job, (1, 1))
    settings = RunSettings.model_validate(sent["settings"])
    assert settings.train == comparing.description.train_settings(job)
    assert settings.record.tau == comparing.space.recorded_tau()
    assert settings.resources.workers == (1, 1)
    # The same run, whatever else is compared; another one where its settings are others.
    own = comparing.description.run_directory(job)
    assert comparing.description.run_directory(Job("lrmc", 1e-5, 0, "test")) == own
    other = make_space(methods={**METHODS, "lrmc": {"title": "t", "train": {"clip": "rotate"}}})
    assert (
        Comparing(Description(other, ["lrmc"], tmp_path, {})).description.run_directory(job) != own
    )


def test_stage_0_counts_for_those_who_use_it():
    def needs(**changes):
        return needs_record(TrainSettings(**{"anchor_weight": 0.0, **changes}))

    assert all(
        needs(loss=loss)
        for loss in ("restricted", "frozen_tail", "soft", "active_only", "asft", "flow")
    )
    assert not any(needs(loss=loss) for loss in ("full", "dft", "eaft", "kl_to_base"))
    assert needs(loss="full", stm_perplexity=2.5)
    assert needs(loss="full", anchor_weight=0.1)


# From begin to end, without Ray


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """A comparison whose runs are made up; ``begin(...).run()`` runs them."""

    def make(only=("sft", "lrmc", "lora"), *, faults=None, retry_failed=False, **changes):
        comparing = Comparing(Description(make_space(**changes), only, tmp_path, {}))
        comparing.description.open(retry_failed=retry_failed)
        if not comparing.description.values["base_scores"]:
            write_base(comparing)
        ray = FakeRay(comparing, faults or {})
        comparing.ray = ray
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(run_module, "worker_slots", lambda resources: 2)
        monkeypatch.setattr(run_module, "release_orphaned_groups", lambda: 0)
        monkeypatch.setattr(run_module, "forecast", lambda *_, **__: None)
        monkeypatch.setattr(limits, "finish_steps", lambda *_: None)
        return comparing

    return make


def states(comparing):
    written = json.loads((comparing.directory / "compare.json").read_text())
    return {str(job_of_entry(entry)): entry["state"] for entry in written["runs"]}


def test_a_whole_comparison(begin):
    comparing = begin()
    comparing.run_jobs()
    expected = [
        *(f"{method}-lr{lr:g}-seed0, dev" for method in ("sft", "lrmc") for lr in RATES),
        *(f"{method}-lr3e-05-seed{seed}, test" for method in ("sft", "lrmc") for seed in range(3)),
        *(f"lora-lr{lr:g}-seed0, dev" for lr in (1e-4, 1e-3)),
        *(f"lora-lr0.0001-seed{seed}, test" for seed in range(3)),
    ]
    assert sorted(comparing.ray.started) == sorted(expected)
    assert max(comparing.ray.at_once) == 2
    assert comparing.description.is_finished
    assert comparing.description.num_failed == 0
    assert set(states(comparing).values()) == {"COMPLETE"}
    assert len(states(comparing)) == num_jobs(comparing.space, comparing.methods) == 17
    written = json.loads((comparing.directory / "compare.json").read_text())
    assert written["chosen"] == {"sft": 3e-5, "lrmc": 3e-5, "lora": 1e-4}
    # Every model has been scored, so none is left.
    assert list(comparing.directory.glob("runs/*/training/model")) == []


def test_the_general_scores_of_the_first_seed_are_not_made_twice(begin):
    comparing = begin(["sft"])
    comparing.run_jobs()
    first = comparing.arguments(Job("sft", 3e-5, 0, "test"), (1, 1))
    assert first["general_from"].endswith("/scores/dev")
    assert first["base_scores"].endswith("scores/test")
    assert comparing.arguments(Job("sft", 3e-5, 1, "test"), (1, 1))["general_from"] is None
    assert comparing.arguments(Job("sft", 3e-5, 0, "dev"), (1, 1))["general_from"] is None


def test_models_are_removed_as_soon_as_nothing_asks_for_them(begin):
    comparing = begin(["sft"])
    write_run(comparing, Job("sft", 1e-5, 0, "dev"))
    comparing.description.complete(Job("sft", 1e-5, 0, "dev"))
    write_run(comparing, Job("sft", 3e-5, 0, "dev"))
    comparing.description.complete(Job("sft", 3e-5, 0, "dev"))
    comparing.description.remove_models()
    assert models(comparing) == ["sft-lr1e-05-seed0", "sft-lr3e-05-seed0"]  # not yet chosen
    write_run(comparing, Job("sft", 1e-4, 0, "dev"))
    comparing.description.complete(Job("sft", 1e-4, 0, "dev"))
    comparing.description.remove_models()
    assert models(comparing) == ["sft-lr3e-05-seed0"]  # waits for the test questions
    write_run(comparing, Job("sft", 3e-5, 0, "test"))
    comparing.description.complete(Job("sft", 3e-5, 0, "test"))
    comparing.description.remove_models()
    assert models(comparing) == []
    kept = begin(["sft"], compare={"keep_models": True})
    write_run(kept, Job("sft", 3e-5, 1, "test"))
    kept.description.complete(Job("sft", 3e-5, 1, "test"))
    kept.description.remove_models()
    assert models(kept) == ["sft-lr3e-05-seed1"]


def models(comparing):
    found = comparing.directory.glob("runs/*/training/model")
    return sorted(path.parts[-3].rpartition("-")[0] for path in found)


@pytest.mark.parametrize("killed_at", [0, 1, 4, 7, 12, 16])
def test_the_same_command_goes_on_and_does_nothing_twice(begin, killed_at):
    whole = num_jobs(make_space(), list(METHODS))
    first = begin()
    started = first.ray._start

    def start_or_die(**arguments):
        if len(first.ray.started) == killed_at:
            raise KeyboardInterrupt
        return started(**arguments)

    first.ray._start = start_or_die
    with pytest.raises(KeyboardInterrupt):
        first.run_jobs()
    again = begin()
    again.run_jobs()
    assert again.description.is_finished
    done = first.ray.started + again.ray.started
    # Results are files of the runs: what had ended is known, even if it was not written down.
    assert sorted(done) == sorted(set(done))
    assert len(done) == whole
    third = begin()
    assert third.description.is_finished
    third.run_jobs()
    assert third.ray.started == []


def test_a_failing_run_ends_failed_with_its_cause_and_the_others_go_on(begin):
    died = FakeRay.RayError("worker died")
    faults = {
        "sft-lr3e-05-seed0, dev": FakeRay.RayTaskError(ValueError("the loss is NaN")),
        "lrmc-lr3e-05-seed1, test": died,
    }
    comparing = begin(faults=faults)
    comparing.run_jobs()
    assert comparing.description.num_failed == 2
    failed = {k for k, state in states(comparing).items() if state == "FAIL"}
    assert failed == set(faults)
    assert (
        comparing.description.outcomes[Job("sft", 3e-5, 0, "dev")].cause
        == "ValueError('the loss is NaN')"
    )
    assert comparing.description.outcomes[Job("lrmc", 3e-5, 1, "test")].cause == "its process died"
    assert comparing.description.values["chosen"]["sft"] == 1e-5
    # Failed is final, until it is asked for again.
    again = begin()
    assert again.description.is_finished
    assert again.description.num_failed == 2
    assert (
        again.description.outcomes[Job("sft", 3e-5, 0, "dev")].cause
        == "ValueError('the loss is NaN')"
    )
    retried = begin(retry_failed=True)
    retried.run_jobs()
    assert retried.description.num_failed == 0
    assert retried.description.values["chosen"]["sft"] == 3e-5
    assert retried.ray.started[0] == "sft-lr3e-05-seed0, dev"
    assert "lrmc-lr3e-05-seed1, test" in retried.ray.started
    assert not any("lora" in name for name in retried.ray.started)


def test_a_run_says_itself_why_it_failed(begin):
    comparing = begin(["sft"], faults={"sft-lr1e-05-seed0, dev": FakeRay.RayError("x")})
    directory = comparing.description.run_directory(Job("sft", 1e-5, 0, "dev"))
    directory.mkdir(parents=True)
    write_json(directory / "failure.json", {"cause": "train.lr is too high"})
    comparing.run_jobs()
    assert (
        comparing.description.outcomes[Job("sft", 1e-5, 0, "dev")].cause == "train.lr is too high"
    )


def test_a_part_can_be_run_first_and_the_rest_later(begin):
    begin(["lora"]).run_jobs()
    rest = begin()
    assert "lora" in rest.description.values["chosen"]
    rest.run_jobs()
    assert not any("lora" in name for name in rest.ray.started)
    assert rest.description.is_finished
    # A learning rate that is added later finds the runs that are there.
    more = begin(["sft"], compare={"learning_rates": [3e-5, 1e-4, 1e-5], "seeds": [0, 1]})
    assert more.description.is_finished


def test_what_is_compared_no_more_is_not_reported(begin):
    begin().run_jobs()
    fewer = begin(["sft"], methods={"sft": METHODS["sft"]})
    assert fewer.description.is_finished
    assert {entry["method"] for entry in fewer.description.values["runs"]} == {"sft"}
    # Nor a method whose settings have changed: it is run again.
    other = {**METHODS, "lrmc": {"title": "t", "train": {"clip": "rotate"}}}
    changed = begin(methods=other)
    assert {entry["method"] for entry in changed.description.values["runs"]} == {"sft", "lora"}
    assert not changed.description.is_finished


def test_the_time_limit_and_what_becomes_of_an_overdue_run(begin, monkeypatch):
    comparing = begin(["sft"])
    assert comparing.time_limit() == math.inf
    write_run(comparing, Job("sft", 1e-5, 0, "dev"))
    comparing.description.complete(Job("sft", 1e-5, 0, "dev"))
    assert comparing.time_limit() == 2250.0  # ten times 150 + 75 seconds
    chosen = begin(["sft"], compare={"run_timeout_seconds": 5.0})
    assert chosen.time_limit() == 5.0
    late = chosen.description.run_directory(Job("sft", 3e-5, 0, "dev"))
    late.mkdir(parents=True)
    chosen.tasks[late] = "its task"
    cancelled = []
    chosen.ray.cancel = lambda reference, force: cancelled.append((reference, force))
    monkeypatch.setattr("lrmc_ray.tune.limits.stacks_of", lambda _: [])
    watch = chosen.watch()
    watch.begin(late)
    (late / PROCESSES).write_text("{}\n")
    for _ in range(3):
        watch.look(-1.0)
    assert cancelled == [("its task", True)]
    assert "raise compare.run_timeout_seconds if it is only slow" in failure_cause(late)


def test_an_interrupted_comparison_asks_its_runs_for_a_checkpoint(begin, monkeypatch):
    asked = []
    comparing = begin(["sft"])
    monkeypatch.setattr(limits, "finish_steps", lambda paths, seconds: asked.extend(paths))
    comparing.ray.wait = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        comparing.run_jobs()
    jobs = [Job("sft", lr, 0, "dev") for lr in RATES[:2]]
    assert asked == [comparing.description.run_directory(job) / "training" for job in jobs]


def test_explain_counts_what_is_there_and_what_is_left(begin):
    comparing = begin(["sft"])
    assert "1 methods: 5 models of 12 steps, scored 6 times, 0 of which are there" in explain(
        comparing.description
    )
    write_run(comparing, Job("sft", 1e-5, 0, "dev"))
    again = begin(["sft"])
    assert "1 of which are there" in explain(again.description)
    assert "At 3 min 45 s each, the median of 1 that have ended, 5 more take 18 min 45 s" in (
        explain(again.description)
    )


# Settings and command line


def error_of(**changes) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is asserted
        make_space(**changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"compare": {"seeds": [0, 0]}}, ["compare.seeds must differ", "got [0, 0]"]),
        ({"compare": {"learning_rates": [1e-5, 1e-5]}}, ["compare.learning_rates must differ"]),
        ({"compare": {"learning_rates": []}}, ["compare.learning_rates"]),
        ({"compare": {"learning_rates": [2.0]}}, ["less than 1"]),
        ({"train": {"precision": "auto"}}, ["train.precision must be fp32 or bf16", "got auto"]),
        (
            {"methods": {"sft": {"title": "t", "train": {"precision": "auto"}}}},
            ["train.precision must be fp32 or bf16"],
        ),
        ({"compare": {"reference": "plain"}}, ["reference must name one", "sft", "got 'plain'"]),
        ({"evaluate": {"limit": 3}}, ["evaluate.limit must be at least 4", "got 3"]),
        ({"methods": {}}, ["methods"]),
        ({"methods": {"SFT": METHODS["sft"]}}, ["methods.SFT"]),
        (
            {"methods": {"sft": {"title": "t", "train": {"lr": 1e-5}}}},
            ["methods.sft.train must not set lr", "compare.learning_rates"],
        ),
        (
            {"methods": {"sft": {"title": "t", "train": {"optimiser": "adamw"}}}},
            ["methods.sft", "unknown setting optimiser", "Did you mean 'optimizer'"],
        ),
        (
            {"methods": {"sft": {"title": "t", "train": {"tau": 1.5}}}},
            ["methods.sft", "tau", "less than or equal to 1", "got 1.5"],
        ),
        (
            {"methods": {"sft": {"title": "t", "train": {"anchor_weight": 1.0}}},
             "record": {"prompt_k_max": 0}},
            ["anchor_weight > 0 needs recorded prompt positions"],
        ),
        (
            {"methods": {"sft": {"title": "t", "learning_rates": [1e-5, 1e-5]}}},
            ["methods.sft.learning_rates must differ"],
        ),
        (
            {"effects": [{"title": "the loss", "pairs": [["sft", "mofo"]]}]},
            ["'the loss' must have pairs of methods (sft, lrmc, lora), got 'mofo'"],
        ),
        (
            {"effects": [{"title": "the loss", "pairs": [["sft", "sft"]]}]},
            ["two methods that differ, got 'sft' twice"],
        ),
        ({"effects": [{"title": "the loss", "pairs": []}]}, ["effects.0.pairs"]),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, parts):
    message = error_of(**changes)
    assert all(part in message for part in parts), message


def test_the_record_serves_every_method():
    space = make_space(
        methods={
            "sft": METHODS["sft"],
            "wide": {"title": "w", "train": {"tau": 0.997, "k_min": 5}},
        },
        record={"k_min": 5},
    )
    assert space.recorded_tau() == 0.997
    settings = space.run_settings(space.train_of("sft", lr=1e-5, seed=0))
    assert settings.recorded_tau() == 0.997
    message = error_of(methods={"sft": {"title": "t", "train": {"k_min": 7}}})
    assert "k_min must not exceed record.k_min, got 7 > 2" in message


def test_a_part_of_the_methods():
    space = make_space()
    assert chosen_methods(space, None) == ["sft", "lrmc", "lora"]
    assert chosen_methods(space, "lora, sft") == ["sft", "lora"]
    with pytest.raises(ConfigError, match=r"\(sft, lrmc, lora\), got 'mofo'"):
        chosen_methods(space, "sft,mofo")
    with pytest.raises(ConfigError, match="at least one method"):
        chosen_methods(space, ",")


@pytest.mark.parametrize(
    "name", ["compare", "compare_smoke", "compare_transfer", "compare_four_grounds"]
)
def test_the_shipped_spaces_are_valid(name):
    space = validate(CompareSpace, read_toml(find_space(name)), name)
    assert space.compare.reference in space.methods
    methods = {
        (space.train_of(name, lr=1e-5, seed=0).model_dump_json(), space.learning_rates_of(name))
        for name in space.methods
    }
    assert len(methods) == len(space.methods)  # none is there twice
    if name == "compare":
        assert space.compare.learning_rates == (5e-6, 1e-5, 3e-5, 1e-4, 3e-4)
        assert len(space.compare.seeds) == 3
        sft = space.train_of("sft", lr=1e-5, seed=0)
        assert (sft.loss, sft.optimizer, sft.anchor_weight) == ("full", "adamw", 0.0)
        # Every loss, optimizer and reading of the cap has its place.
        used = [space.train_of(name, lr=1e-5, seed=0) for name in space.methods]
        assert {t.loss for t in used} == {
            "full", "restricted", "soft", "active_only", "dft", "kl_to_base",
        }  # fmt: skip
        assert {t.optimizer for t in used} == {"adamw", "moclip", "adam_atan2", "c_adamw", "mofo"}
        assert {t.clip for t in used} == {"scale", "cautious", "momentum", "project", "rotate"}
    if name == "compare_four_grounds":
        assert {method: space.seeds_of(method) for method in MATTER_MOST} == dict.fromkeys(
            MATTER_MOST, (6, 7, 8, 9, 10, 11)
        )
        others = [method for method in space.methods if method not in MATTER_MOST]
        assert {space.seeds_of(method) for method in others} == {(6, 7, 8)}
        used = [space.train_of(name, lr=1e-5, seed=0) for name in space.methods]
        assert {"asft", "eaft", "flow", "frozen_tail"} <= {t.loss for t in used}
        assert "magma" in {t.optimizer for t in used}
        assert 2.5 in {t.stm_perplexity for t in used}


@pytest.mark.parametrize(
    ("name", "changes", "archive"),
    [
        ("compare", {}, "compare_nl2sql"),
        ("transfer60", {"steps": 60}, "transfer"),
    ],
)
def test_the_raw_results_are_found_by_the_shipped_spaces(name, changes, archive, tmp_path):
    """They are reported, not mixed with what would be trained and scored now."""
    file = "compare_transfer" if name == "transfer60" else name
    space = validate(CompareSpace, read_toml(find_space(file)), file)
    compare = space.compare.model_copy(update={"name": name})
    train = space.train.model_copy(update=changes)
    space = space.model_copy(update={"train": train, "compare": compare})
    path = ROOT / "benchmarks" / "results" / f"{archive}.tar.xz"
    with tarfile.open(path) as tar:
        kept = [member for member in tar if "/runs/" not in member.name or name != "compare"]
        tar.extractall(tmp_path, kept, filter="data")
    description = Description(space, list(space.methods), tmp_path, {"model": "now"})
    assert not description.has_begun
    asked = comparison_identity(space)
    why = why_new(description.directory, COMPARISON_FILE, asked, {"model": "now"})
    assert why is not None
    assert "does not say what it was trained and scored on" in why
    description.go_back()
    file_of = description.directory / COMPARISON_FILE
    before = json.loads(file_of.read_text())
    assert before["settings"]["train"]["steps"] == space.train.steps
    if name == "compare":
        return  # to read its 800 scores takes ten seconds
    description.open()
    after = json.loads(file_of.read_text())
    asked_for = ("seeds", "reference", "effects")
    for name in asked_for:
        del before[name], after[name]
    assert after == before
    assert {outcome.state for outcome in description.outcomes.values()} == {"COMPLETE"}
    assert len(description.outcomes) == len(before["runs"]) > 10
    other = space.model_copy(update={"train": space.train.model_copy(update={"steps": 7})})
    assert (
        newest_earlier(tmp_path / description.id, COMPARISON_FILE, comparison_identity(other))
        is None
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--methods", "nothing"], 2, "--methods must name methods of the space file"),
        (["--space", "nothing"], 3, "space file nothing does not exist"),
        (["compare.seed=1"], 2, "unknown setting compare.seed. Did you mean 'compare.seeds'"),
        (["methods.sft.train.lr=1e-5"], 2, "methods.sft.train must not set lr"),
        (["--space", "demo"], 2, "methods is missing"),
        (["--train-data", "no.jsonl"], 3, "no.jsonl does not exist"),
    ],
)
def test_errors_of_the_command_line(arguments, code, said, tmp_path, capsys):
    assert run_command(main, [*arguments, "--output", str(tmp_path)]) == code
    assert said in capsys.readouterr().err


def test_looking_at_a_comparison_that_has_not_begun_leaves_nothing_behind(tmp_path, capsys):
    assert run_command(main, ["--explain", "--output", str(tmp_path)]) == 0
    assert "42 methods: 251 models" in capsys.readouterr().out
    assert run_command(main, ["--report-only", "--output", str(tmp_path)]) == 3
    assert "this comparison has not begun; run the same command without --report-only" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


# With Ray, on a small model


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_killed_and_started_again_it_ends_as_one_that_was_left_alone(tmp_path, tiny_model):
    """kill -9 after the first run that ended, while another one trains."""
    results = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        budget = ("train.steps=6", "train.checkpoint_every=1", "--methods", "sft")
        command = compare_command(folder, tiny_model, *budget)
        if name == "killed":
            log = (folder / "log").open("wb")
            first = subprocess.Popen(command, stderr=log, start_new_session=True, cwd=ROOT)
            deadline = time.monotonic() + 400
            while not list(folder.glob("runs/compare-smoke-*/runs/*/dev.json")):
                assert first.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        (found,) = folder.glob("runs/compare-smoke-*/compare.json")
        runs = json.loads(found.read_text())["runs"]
        assert {run["state"] for run in runs} == {"COMPLETE"}
        results.append([(run["method"], run["lr"], run["seed"], run["results"]) for run in runs])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("resources", "cores"),
    [({}, 4), ({"cpus_per_worker": 2}, 8), ({"actors": (1, 3)}, 3), ({"actors": (1, 9)}, 4)],
)
def test_recording_costs_the_cores_that_its_actors_hold(resources, cores):
    assert recording_cores(ResourceSettings(**resources), 4) == cores
