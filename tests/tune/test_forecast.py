"""What a search will cost: against hand-made searches and a model whose size is known."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrmc_ray.config import ResourceSettings, RunSettings
from lrmc_ray.errors import ResourceError
from lrmc_ray.record.sources import find_sources
from lrmc_ray.tune.explain import explain
from lrmc_ray.tune.forecast import (
    count_parameters,
    count_tokens,
    divide,
    forecast,
    with_expected_steps,
)
from lrmc_ray.tune.token_counts import count_sample_tokens
from tests.support.tiny import make_data


@pytest.fixture
def settings(tiny_model, tmp_path):
    data = make_data(tmp_path / "train.jsonl", num_rows=10)
    return RunSettings.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "data": {"train": [str(data)]},
            "search": {"trials": 8},
            "train": {"steps": 30, "batch_size": 8, "micro_batches": 4},
            "evaluate": {"limit": 50},
            "parameters": {
                "delta_max": {"low": 10, "high": 120, "when": {"optimizer": "moclip"}},
                "tau": {"range": "auto"},
                "lr": {"low": 1e-6, "high": 1e-4, "log": True},
            },
        }
    )


def ended_trial(number, state, cost):
    settings = {"steps": 15, "batch_size": 8}
    return {
        "number": number, "role": "search", "state": state, "settings": settings, "cost": cost
    }  # fmt: skip


def write_study(directory, settings, costs):
    directory.mkdir()
    study = {
        **{"schema": 1, "id": directory.name, "name": "demo", "created": "now"},
        **{"state": "FINISHED", "forgetting_weight": 1.0},
        "settings": settings.model_dump(mode="json", exclude={"parameters"}),
        "stage_seconds": {"record": 30.0, "base_evaluation": 20.0},
        "trials": [
            ended_trial(number, "COMPLETE" if cost else "FAIL", cost)
            for number, cost in enumerate([*costs, {}])
        ],
    }
    (directory / "study.json").write_text(json.dumps(study))


@pytest.mark.parametrize(
    ("slots", "trials", "resources", "expected"),
    [
        (2, 6, {}, (2, (1, 1))),
        (8, 4, {}, (2, (1, 4))),
        (8, 40, {}, (8, (1, 1))),
        (8, 40, {"max_concurrent": 3}, (3, (1, 2))),
        (8, 40, {"workers": (2, 4)}, (4, (2, 2))),
        (1, 6, {}, (1, (1, 1))),
    ],
)
def test_cores_are_divided_among_trials(slots, trials, resources, expected):
    assert divide(slots, ResourceSettings(**resources), trials) == expected


def test_not_one_trial_fits():
    with pytest.raises(ResourceError, match="a trial needs 4 workers, 2 fit"):
        divide(2, ResourceSettings(workers=(4, 4)), 6)


def test_measured_costs_are_scaled_to_the_steps_of_the_search(settings, tmp_path):
    """15 steps took 60, 120 and 90 core seconds; 30 steps on 1 core each take 180."""
    costs = [
        {"train_seconds": 60.0, "evaluate_seconds": 10.0, "train_cores": 1},
        {"train_seconds": 60.0, "evaluate_seconds": 12.0, "train_cores": 2},
        {"train_seconds": 90.0, "evaluate_seconds": 14.0},
    ]
    write_study(tmp_path / "demo-1", settings, costs)
    found = forecast(settings, tmp_path, slots=2)
    assert found.is_measured
    assert (found.concurrent, found.workers) == (2, 1)
    assert found.train_seconds == pytest.approx(180.0)
    assert found.evaluate_seconds == 12.0
    # Record, base, four rounds of two trials with 5 s to start, and the final scoring.
    assert found.seconds == pytest.approx(30 + 20 + 4 * (180 + 12 + 5) + 10 + 6)
    assert "median of 3 finished trials" in found.basis


def test_early_stopping_costs_a_slice_and_saves_half_of_the_later_trials(settings, tmp_path):
    """As above, 16 of 50 items on the way; of 8 trials the last 4 may end, after half of 180 s."""
    costs = [{"train_seconds": 90.0, "evaluate_seconds": 12.5}]
    write_study(tmp_path / "demo-1", settings, costs)
    study = json.loads((tmp_path / "demo-1" / "study.json").read_text())
    stopped = ended_trial(9, "PRUNED", {"train_seconds": 1.0, "evaluate_seconds": 0.0})
    study["trials"] += [stopped] * 3  # they say nothing of what a whole trial takes
    (tmp_path / "demo-1" / "study.json").write_text(json.dumps(study))
    without = forecast(settings, tmp_path, slots=2)
    assert (without.early_seconds, without.saved_seconds) == (0.0, 0.0)
    search = settings.search.model_copy(update={"early_stopping": "median"})
    median = settings.model_copy(update={"search": search})
    found = forecast(median, tmp_path, slots=2)
    assert found.train_seconds == without.train_seconds == pytest.approx(180.0)
    assert found.early_seconds == pytest.approx(4.0)
    assert found.seconds == pytest.approx(without.seconds + 4 * 4.0)
    assert found.core_seconds == pytest.approx(without.core_seconds + 8 * 4.0)
    assert found.saved_seconds == pytest.approx(4 / 2 * (90 + 12.5) / 2)


def test_a_search_over_other_tasks_is_no_measure(settings, tmp_path):
    other = settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"limit": 7})}
    )
    costs = [{"train_seconds": 60.0, "evaluate_seconds": 10.0}]
    write_study(tmp_path / "demo-1", other, costs)
    assert not forecast(settings, tmp_path, slots=2).is_measured


def test_the_rough_estimate_follows_the_models_size(settings, tmp_path, tiny_model):
    from lrmc_ray.models.loading import load_model

    parameters = sum(p.numel() for p in load_model(tiny_model).parameters())
    assert count_parameters(tiny_model) == parameters
    found = forecast(settings, tmp_path / "none", slots=2)
    path = tmp_path / "train.jsonl"
    counts = count_sample_tokens(
        find_sources([str(path)]),
        tiny_model,
        settings.train,
        max_length=1024,
        on_gpu=False,
    )
    assert found.train_seconds == pytest.approx(
        6 * parameters * 240 * counts.computed / 7e10 + 30 * parameters * 8.4e-9
    )
    assert found.record_seconds == pytest.approx(2 * parameters * 10 * counts.alone / 14e10)
    told = f"about {counts.alone:.0f} tokens per sample, {counts.computed:.0f} of them computed"
    assert told in found.basis
    assert count_tokens([path], 3) == (10, 30.0)
    assert "rough estimate" in found.basis


def test_without_a_tokenizer_characters_are_counted(settings, tmp_path, tiny_model):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_model / name)
    model = settings.model.model_copy(update={"name": str(bare)})
    found = forecast(settings.model_copy(update={"model": model}), tmp_path / "none", slots=2)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    per_sample = sum(len(line) + 1 for line in lines) / 4 / len(lines)
    parameters = count_parameters(bare)
    assert found.record_seconds == pytest.approx(2 * parameters * 10 * per_sample / 14e10)
    assert found.train_seconds == pytest.approx(
        6 * parameters * 240 * per_sample / 7e10 + 30 * parameters * 8.4e-9
    )


def test_an_absent_model_costs_nobody_knows_what(settings, tmp_path):
    absent = settings.model_copy(
        update={"model": settings.model.model_copy(update={"name": "some/model"})}
    )
    assert forecast(absent, tmp_path, slots=2) is None


def test_explain_says_what_is_searched_and_what_it_costs(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    explain(settings, tmp_path, as_json=False)
    said = capsys.readouterr().out
    for words in (
        "1e-06 to 0.0001",
        "optimizer = moclip",
        "automatic, from the record",
        "combined = domain gain - 1 x forgetting",
        "Trials: 8. First the settings of [train] and plain fine-tuning",
        "Cost: about",
        "Rough estimate",
    ):
        assert words in said
    assert "Early stopping: none (search.early_stopping)." in said
    wanted = {"objective": "budget", "early_stopping": "median"}
    budget = settings.model_copy(update={"search": settings.search.model_copy(update=wanted)})
    explain(budget, tmp_path, as_json=False)
    said = capsys.readouterr().out
    assert "at most 1 points of 100 of forgetting" in said
    assert "after 50 % of its steps a trial is scored on 16 items a task" in said
    assert "Early stopping costs" in said
    few = budget.search.model_copy(update={"trials": 4})
    explain(budget.model_copy(update={"search": few}), tmp_path, as_json=False)
    assert "Early stopping: none: 4 trials are not more than" in capsys.readouterr().out
    explain(settings, tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["trials"], told["objective"]) == (8, "combined")
    assert told["forecast"]["trials"] == 8


def test_epochs_are_explained_as_steps(settings, tmp_path):
    """By the rows of the data: 2.5 epochs of 10 samples in batches of 8 take 4 steps."""
    train = settings.train.model_copy(update={"epochs": 2.5, "steps": 999})
    epochs = settings.model_copy(update={"train": train})
    expected = with_expected_steps(epochs, tmp_path).train
    assert (expected.steps, expected.epochs) == (4, None)
    steps = settings.model_copy(
        update={"train": train.model_copy(update={"steps": 4, "epochs": None})}
    )
    found, wanted = (forecast(one, tmp_path, slots=2).train_seconds for one in (epochs, steps))
    assert found == wanted
    assert with_expected_steps(settings, tmp_path) is settings


def test_epochs_are_those_of_the_record_where_there_is_one(settings, tmp_path):
    """Of which two samples were too long, so 8 are left: 2.5 epochs take 3 steps."""
    from lrmc_ray.files.artifacts import fingerprint
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.record.identity import identify
    from lrmc_ray.record.sources import training_sources
    from tests.support.training import record_of

    train = settings.train.model_copy(update={"epochs": 2.5})
    epochs = settings.model_copy(update={"train": train})
    identity, _ = identify(epochs, local_directory(epochs.model), training_sources(epochs))
    (tmp_path / "records").mkdir()
    data = tmp_path / "shorter.jsonl"
    data.write_text("".join((tmp_path / "train.jsonl").read_text().splitlines(True)[:8]))
    record_of(local_directory(epochs.model), data, tmp_path / "records" / fingerprint(identity))
    assert with_expected_steps(epochs, tmp_path).train.steps == 3


def test_the_command_explains_without_starting_anything(settings, tmp_path):
    data, model = settings.data.train[0], settings.model.name
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lrmc_ray.tune", "--explain", "--space", "budget", "--json"),
            *("--model", model, "--train-data", data, "--output", str(tmp_path / "runs")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert (told["objective"], told["max_forgetting"]) == ("budget", 0.01)
    assert told["parameters"]["delta_max"]["when"] == {"optimizer": "moclip"}
    assert not (tmp_path / "runs").exists()


def test_parquet_counts_rows_and_their_size(tmp_path):
    path = tmp_path / "data.parquet"
    texts = [f"{number:0400d}" for number in range(100)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    samples, tokens = count_tokens([path], 512)
    assert samples == 100
    assert tokens == pytest.approx(100 * 100, rel=0.05)  # 400 characters each
