"""Evaluation through Ray on a small model: what it keeps, what it refuses, what it prints."""

import json
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from lrmc_ray.cluster.resources import can_hold_cores, fits_here, held_cores
from lrmc_ray.cluster.session import ray_session, release_orphaned_groups
from lrmc_ray.config import ResourceSettings, load_settings
from lrmc_ray.errors import ConfigError, DataError, EvaluationError
from lrmc_ray.evaluate.command import main
from lrmc_ray.evaluate.drift import DRIFT_POSITIONS, mean_kl
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.names import DRIFT_LOGPROBS, DRIFT_TEXTS, MADE_BY, RECEIPT
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.evaluate.task_files import task_fingerprints, task_manager
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.models.saving import save_model
from lrmc_ray.tasks.registry import expand
from tests.support.tiny import make_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TASKS = ['evaluate.domain_tasks="wordnet"', 'evaluate.general_tasks=["capitals", "plain_english"]']


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with ray_session(log=tmp_path_factory.mktemp("ray") / "ray.log", num_cpus=2):
        yield


@pytest.fixture(scope="module")
def settings(tiny_model):
    return load_settings(
        None,
        [f'model.name="{tiny_model}"', "evaluate.limit=12", "evaluate.drift_samples=5", *TASKS],
    )


@pytest.fixture(scope="module")
def tuned_model(tiny_model, tmp_path_factory):
    """The small model with noise on its weights."""
    model = load_model(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("tuned")
    save_model(model, tiny_model, directory)
    return directory


@pytest.fixture(scope="module")
def base(session, settings, tiny_model, tmp_path_factory):
    return evaluate(settings, tiny_model, tmp_path_factory.mktemp("runs"), split="dev")


@pytest.fixture(scope="module")
def tuned(base, settings, tuned_model):
    return evaluate(settings, tuned_model, base.parent.parent, split="dev", base=base, parallel=2)


@pytest.mark.parametrize("parallel", [2])
def test_a_repeated_run_with_more_actors_gives_the_same(
    parallel, base, settings, tiny_model, tmp_path
):
    again = evaluate(settings, tiny_model, tmp_path, split="dev", parallel=parallel)
    assert again.name == base.name
    assert pq.read_table(again / "items.parquet").equals(pq.read_table(base / "items.parquet"))
    assert json.loads((again / DRIFT_TEXTS).read_text()) == json.loads(
        (base / DRIFT_TEXTS).read_text()
    )
    with np.load(again / DRIFT_LOGPROBS) as ours, np.load(base / DRIFT_LOGPROBS) as theirs:
        for name in theirs:
            assert np.array_equal(ours[name], theirs[name])


@pytest.fixture
def new_trial(session):
    """Makes actors that score in their own process, as a trial of a search does."""
    import ray

    class Trial:
        def score(self, *arguments, **options):
            import sys

            from lrmc_ray.evaluate.run import evaluate

            return evaluate(*arguments, here=True, **options), "lm_eval" in sys.modules

        def break_scoring(self, how):
            import time

            from lrmc_ray.evaluate import processes

            def broken(*_):
                if how == "hang":
                    time.sleep(1e6)
                raise {"data": DataError, "other": RuntimeError}[how]("the model is broken")

            processes.score = broken

    return lambda: ray.remote(num_cpus=0)(Trial).remote()


def free_cores():
    import ray

    return ray.available_resources().get("CPU", 0.0)


def wait_for_cores(count, seconds=120):
    deadline = time.monotonic() + seconds
    while free_cores() != count and time.monotonic() < deadline:
        release_orphaned_groups()
        time.sleep(0.02)
    return free_cores()


def test_a_trials_process_scores_as_a_task_does_and_holds_cores_meanwhile(
    tuned, base, settings, tuned_model, tmp_path, new_trial
):
    import ray

    assert wait_for_cores(2.0) == 2.0
    scoring = new_trial().score.remote(settings, tuned_model, tmp_path, split="dev", base=base)
    assert wait_for_cores(1.0) == 1.0
    directory, is_own = ray.get(scoring)
    assert is_own
    assert wait_for_cores(2.0) == 2.0
    assert directory.name == tuned.name
    for file in ("items.parquet", RECEIPT):
        assert pq.read_table(directory / file).equals(pq.read_table(tuned / file))
    manifests = [read_manifest(path, made_by=MADE_BY) for path in (directory, tuned)]
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]


def test_scoring_that_fails_hangs_or_dies_in_a_trial_gives_its_cores_back(
    base, settings, tuned_model, tmp_path, new_trial
):
    import ray

    trial = new_trial()
    for how, error, told in (
        ("data", DataError, "^the model is broken$"),
        ("other", EvaluationError, "scoring .* failed: RuntimeError.*the model is broken"),
    ):
        ray.get(trial.break_scoring.remote(how))
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            ray.get(trial.score.remote(settings, tuned_model, tmp_path, split="dev", base=base))
        with pytest.raises(error, match=told):
            raise caught.value.cause
        assert wait_for_cores(2.0) == 2.0
    pair = [trial, new_trial()]  # two trials score side by side
    ray.get([each.break_scoring.remote("hang") for each in pair])
    scoring = [
        each.score.remote(settings, tuned_model, tmp_path / str(i), split="dev", base=base)
        for i, each in enumerate(pair)
    ]
    assert wait_for_cores(0.0) == 0.0
    for each, result in zip(pair, scoring, strict=True):
        ray.kill(each)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(result)
    assert wait_for_cores(2.0) == 2.0
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, True),
        ({"cpus_per_worker": 2}, True),
        ({"cpus_per_worker": 3}, False),  # of two
        ({"gpus_per_worker": 1}, False),
        ({"custom": {"fast": 1.0}}, False),
        ({"labels": {"zone": "a"}}, False),
    ],
)
def test_only_cores_of_a_single_machine_are_held_in_a_trial(resources, expected, monkeypatch):
    monkeypatch.setattr("lrmc_ray.cluster.resources.can_hold_cores", lambda count: count <= 2)
    assert fits_here(ResourceSettings.model_validate(resources)) == expected


def test_a_driver_holds_no_cores(session):
    """When it dies, nobody would know whose they were."""
    assert not can_hold_cores(1)


def test_trials_hold_cores_side_by_side_as_far_as_there_are_any(session):
    import ray

    class Trial:
        def hold(self, count):
            with held_cores(count):
                began = time.time()
                time.sleep(3.0)  # much longer than Ray takes to give a core, also on a busy machine
                return began, time.time()

    trials = [ray.remote(num_cpus=0)(Trial).remote() for _ in range(2)]
    ray.get([trial.hold.remote(1) for trial in trials])  # both processes are there
    (a, a_end), (b, b_end) = ray.get([trial.hold.remote(1) for trial in trials])
    assert max(a, b) < min(a_end, b_end)
    (a, a_end), (b, b_end) = ray.get([trial.hold.remote(2) for trial in trials])
    assert max(a, b) >= min(a_end, b_end)


def test_what_was_scored_is_not_scored_again(base, settings, tiny_model):
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    assert evaluate(settings, tiny_model, base.parent.parent, split="dev") == base
    assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == before


def test_drift_is_the_divergence_of_the_two_models(base, tuned, tiny_model, tuned_model):
    """Text by text, in float64, without batches."""
    texts = json.loads((base / DRIFT_TEXTS).read_text())
    assert [len(texts[name]) for name in ("wordnet", "capitals", "plain_english")] == [5, 3, 3]
    models = [load_model(directory).double() for directory in (tiny_model, tuned_model)]
    drift = read_manifest(tuned, made_by=MADE_BY)["drift"]
    for group, names in (("domain", ["wordnet"]), ("general", ["capitals", "plain_english"])):
        divergences = []
        for ids in [ids for name in names for ids in texts[name]]:
            with torch.inference_mode():
                before, after = (
                    model(torch.tensor([ids])).logits[0, -DRIFT_POSITIONS - 1 : -1].log_softmax(-1)
                    for model in models
                )
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
        name = f"eval/kl_base_{group}"
        assert drift[name] == pytest.approx(np.mean(divergences), rel=1e-3)
        assert min(divergences) * 0.999 <= drift[f"{name}_low"] < drift[name]
        assert drift[name] < drift[f"{name}_high"] <= max(divergences) * 1.001


def test_the_interval_of_the_drift_is_over_texts():
    """Positions of one text count once: equal texts have no spread, however unequal inside."""
    rng = np.random.default_rng(0)
    base_PV = np.log(rng.dirichlet(np.ones(7), size=DRIFT_POSITIONS)).astype(np.float32)
    tuned_PV = np.log(rng.dirichlet(np.ones(7), size=DRIFT_POSITIONS)).astype(np.float32)
    interval = mean_kl(np.tile(base_PV, (4, 1)), np.tile(tuned_PV, (4, 1)))
    assert interval.low == pytest.approx(interval.high)
    assert interval.value == pytest.approx(
        np.mean([np.sum(np.exp(b) * (b - t)) for b, t in zip(base_PV, tuned_PV, strict=True)]),
        rel=1e-5,
    )
    assert mean_kl(np.zeros((0, 7)), np.zeros((0, 7))) is None


def test_the_receipt_lists_what_was_lost_and_gained(base, tuned):
    before, after = Scores.load(base), Scores.load(tuned)
    expected = set()
    for task in ("wordnet", "capitals"):
        first, second = before.metric(task, "accuracy"), after.metric(task, "accuracy")
        for index, name in enumerate(first.item_ids):
            if first.values[index] != second.values[index]:
                change = "lost" if first.values[index] else "gained"
                expected.add((task, name, change))
    rows = pq.read_table(tuned / RECEIPT).to_pylist()
    assert {(row["task"], row["item_id"], row["change"]) for row in rows} == expected
    assert expected
    assert not (base / RECEIPT).exists()


def test_another_vocabulary_is_refused_before_scoring(base, settings, tmp_path, tiny_model):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(520)
    other = tmp_path / "other"
    model.save_pretrained(other)
    load_tokenizer(tiny_model).save_pretrained(other)
    with pytest.raises(DataError, match="has 520 tokens against 512"):
        evaluate(settings, other, tmp_path, split="dev", base=base)
    assert not list(tmp_path.glob("scores/*/items.parquet"))


def test_the_same_number_of_other_tokens_is_refused(base, settings, tmp_path, tiny_model):
    other = make_model(tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = [name for name in vocab if name.isalpha()][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has other tokens"):
        evaluate(settings, other, tmp_path, split="dev", base=base)


# Tasks of one's own, and bad ones


def task_file(folder, items, **changes):
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "my_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
        **changes,
    }
    path = folder / "mine.yaml"
    path.write_text(json.dumps({key: value for key, value in task.items() if value is not None}))
    return path


ITEMS = [
    {"question": f"{number} and one is", "choices": ["two", "many", "none"], "answer": number % 3}
    for number in range(6)
]


def request(path):
    return ScoreRequest(
        tasks=((str(path), "domain"),),
        batch_tokens=512,
        precision="fp32",
        limit=None,
        split="dev",
        drift_samples={"domain": 2, "general": 2},
    )


def test_a_task_file_of_ones_own_is_scored_and_its_data_are_part_of_what_is_kept(
    tiny_model, tmp_path
):
    path = task_file(tmp_path, ITEMS)
    scores = Scores.from_rows(score(tiny_model, request(path)).rows)
    assert scores.tasks == ("mine",)
    assert scores.metric("mine", "probability").num_items == 6
    before = task_fingerprints([str(path)], "dev")
    task_file(tmp_path, [{**item, "question": "else"} for item in ITEMS])
    after = task_fingerprints([str(path)], "dev")
    assert before.keys() == after.keys()
    assert before != after


@pytest.mark.parametrize(
    ("changes", "items", "error", "message"),
    [
        ({"output_type": "guess"}, ITEMS, ConfigError, "lm-eval refuses the task .*mine.yaml"),
        ({"dataset_path": "nowhere/at_all"}, ITEMS, ConfigError, "lm-eval refuses the task"),
        ({"test_split": "none"}, ITEMS, (ConfigError, DataError), "mine.yaml"),
        ({"doc_to_target": "right"}, ITEMS, ConfigError, "doc_to_target must be a field"),
        ({"doc_to_text": "{{question"}, ITEMS, (ConfigError, DataError), "mine.yaml"),
        ({}, [], DataError, "must have items, but there are none in"),
        ({}, [*ITEMS[:2], {**ITEMS[0], "answer": 7}], DataError, r"jsonl:3: the right choice"),
    ],
)  # fmt: skip
def test_a_bad_task_file_is_named(changes, items, error, message, tiny_model, tmp_path):
    path = task_file(tmp_path, items, **changes)
    with pytest.raises(error, match=message):
        score(tiny_model, request(path))


def test_a_file_that_is_no_yaml_is_refused(tiny_model, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: [unfinished")
    with pytest.raises(ConfigError, match="lm-eval refuses the task"):
        score(tiny_model, request(path))


def test_a_refusal_reaches_the_caller_through_ray(session, settings, tiny_model, tmp_path):
    path = task_file(tmp_path, ITEMS, output_type="guess")
    mine = settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"domain_tasks": (str(path),)})}
    )
    with pytest.raises(ConfigError, match="lm-eval refuses the task"):
        evaluate(mine, tiny_model, tmp_path, split="dev")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gpqa_main_zershot", "gpqa_main_zeroshot"),
        pytest.param("wordnett", "wordnet", marks=pytest.mark.slow),
    ],
)
def test_the_nearest_names_are_given(name, near, tmp_path):
    with pytest.raises(ConfigError, match=rf"task {name} is neither .* did you mean .*\b{near}\b"):
        task_manager([name], tmp_path, "dev")


def test_groups_of_tasks():
    assert expand(["general_offline", "capitals", "mmlu"]) == (
        "wordnet", "antonyms", "kinds", "capitals", "plain_english", "mmlu"
    )  # fmt: skip
    assert expand(["paper"]) == ("mmlu", "bbh", "gpqa_main_zeroshot", "minerva_math")


@pytest.mark.slow
def test_lm_eval_knows_the_papers_tasks(tmp_path):
    task_manager(expand(["paper"]), tmp_path, "dev")


# The command


@pytest.fixture
def run(settings, tiny_model, session, capsys, monkeypatch):
    """The command within the session that is there."""
    import contextlib

    monkeypatch.setattr(
        "lrmc_ray.evaluate.command.ray_session", lambda *_, **__: contextlib.nullcontext()
    )

    def run(output, *arguments):
        common = ["--output", str(output), "evaluate.limit=12", "evaluate.drift_samples=5", *TASKS]
        assert main([*common, *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_one_model_is_shown_with_standard_errors(run, tmp_path, tiny_model):
    shown = json.loads(run(tmp_path, "--model", str(tiny_model), "--json"))
    scores = Scores.load(next(tmp_path.glob("scores/*/items.parquet")).parent)
    accuracy = scores.metric("wordnet", "accuracy").values
    assert shown["wordnet/accuracy"] == accuracy.mean()
    assert shown["wordnet/accuracy_standard_error"] == pytest.approx(
        accuracy.std(ddof=1) / np.sqrt(12)
    )
    assert shown["wordnet/accuracy_low"] < shown["wordnet/accuracy"]
    text = run(tmp_path, "--model", str(tiny_model))
    assert "standard error" in text


def test_several_tuned_models_and_a_base_of_another_name(
    run, tmp_path, tiny_model, tuned_model, monkeypatch
):
    first = run(tmp_path, "--model", str(tiny_model), "--tuned", str(tuned_model), "--tuned",
                str(tiny_model), "--actors", "2", "--json")  # fmt: skip
    tuned, same = (json.loads(line) for line in first.splitlines())
    assert tuned["eval/kl_base_general"] > 0.001
    assert same["eval/kl_base_general"] == pytest.approx(0, abs=1e-9)
    assert same["eval/domain_gain"] == same["eval/forgetting"] == 0
    second = run(tmp_path, "--model", str(tuned_model), "--base", str(tiny_model), "--json")
    assert json.loads(second) == tuned
    monkeypatch.setattr(
        "lrmc_ray.evaluate.show.plain_console",
        lambda **_: Console(width=200, force_terminal=True, markup=False, emoji=False),
    )
    shown = run(tmp_path, "--model", str(tiny_model), "--base", str(tiny_model))
    assert "not distinguishable from 0" in shown
    grey = [line for line in shown.splitlines() if "\x1b[90m" in line]
    assert any("wordnet" in line for line in grey)
    assert "receipt.parquet" in shown


def test_no_actors_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="--actors must be at least 1, got 0"):
        main(["--output", str(tmp_path), "--actors", "0"])
