"""`lrmc plan`: its estimates against a record of the whole data, made in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.console import run_command
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.method.subsets import CandidateSets, cut
from lrmc_ray.record import examples as examples_module
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.record.names import EXAMPLES
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from lrmc_ray.tune import plan as plan_module
from lrmc_ray.tune.plan import main
from tests.support.tiny import make_data

torch.set_num_threads(1)


def actors_here(prepared, shards, tokenizer_size):
    recorder = Recorder(**recorder_options(prepared, tokenizer_size))
    for shard in shards:
        yield recorder.record(shard)


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr("ray.init", lambda *a, **o: pytest.fail("Ray started"))


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "train.jsonl", num_rows=60)


def planned(tiny_model, data, output, *more, capsys) -> dict[str, Any]:
    argv = ["--model", tiny_model, "--train-data", data, "--output", output, "--json", *more]
    assert run_command(main, list(map(str, argv))) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def whole(tiny_model, data, tmp_path, monkeypatch):
    """The finished record of all data at tau 0.9."""
    monkeypatch.setattr(record_run, "run_actors", actors_here)
    overrides = [f'model.name="{tiny_model}"', f'data.train="{data}"', "train.tau=0.9"]
    return record(load_settings(None, overrides), tmp_path / "whole")


def test_a_plan_of_all_samples_is_the_record(tiny_model, data, tmp_path, whole, capsys):
    result = planned(
        *(tiny_model, data, tmp_path / "plan", "train.tau=0.9", "--sample-tokens", 10**9),
        capsys=capsys,
    )
    records = Records(whole)
    summary = read_manifest(whole, made_by="")["summary"]
    samples = [records[index] for index in range(len(records))]
    supervised = CandidateSets.concatenate([s.candidates.rows(s.is_supervised_P) for s in samples])
    assert result["measured"]["samples"] == result["data"]["samples"] == 60
    assert result["data"]["tokens"] == summary["tokens"]
    assert result["data"]["supervised_tokens"] == summary["supervised_positions"]
    assert result["data"]["prompt_positions"] == summary["prompt_positions"]
    rows = {row["tau"]: row for row in result["at_tau"]}
    assert list(rows) == [0.8, 0.9, 0.95, 0.99]
    for tau in (0.8, 0.9):
        sizes = cut(supervised, tau).sizes.double()
        # Another batch, so another last bit of a logit now and then.
        assert rows[tau]["k_mean"] == pytest.approx(float(sizes.mean()), rel=0.01, abs=0.06)
        assert rows[tau]["active_share"] == pytest.approx(
            float((sizes > 1).double().mean()), abs=0.01
        )
    assert rows[0.99]["k_mean"] > rows[0.95]["k_mean"] > rows[0.9]["k_mean"]
    assert result["bytes"]["supervised"] == pytest.approx(summary["supervised_bytes"], rel=0.05)
    assert result["bytes"]["prompt"] == pytest.approx(summary["prompt_bytes"], rel=0.05)


def test_a_sample_of_a_part_scales_to_the_whole(tiny_model, data, tmp_path, whole, capsys):
    result = planned(
        *(tiny_model, data, tmp_path / "plan", "train.tau=0.9", "--sample-tokens", 900),
        capsys=capsys,
    )
    assert 900 <= result["measured"]["tokens"] < result["data"]["tokens"] / 2
    summary = read_manifest(whole, made_by="")["summary"]
    assert result["bytes"]["supervised"] == pytest.approx(summary["supervised_bytes"], rel=0.3)
    assert result["bytes"]["prompt"] == pytest.approx(summary["prompt_bytes"], rel=0.3)
    speed = result["measured"]["tokens"] / result["measured"]["seconds"]
    assert result["measured"]["tokens_per_second"] == pytest.approx(speed, rel=0.2)
    hours = result["hours_by_actors"]
    assert hours["1"] == pytest.approx(
        result["data"]["tokens"] / result["measured"]["tokens_per_second"] / 3600, rel=0.01
    )
    assert hours["8"] == pytest.approx(hours["1"] / 8)
    assert result["hours_here"] == pytest.approx(hours["1"] / result["actors_here"])


def test_a_capped_position_is_counted_as_such(tiny_model, data, tmp_path, capsys):
    result = planned(
        *(tiny_model, data, tmp_path / "plan", "--k-max", 4, "--prompt-k-max", 0),
        *("train.anchor_weight=0", "train.tau=0.5"),
        capsys=capsys,
    )
    rows = {row["tau"]: row for row in result["at_tau"]}
    assert list(rows) == [0.5, 0.8, 0.9, 0.95, 0.99]
    assert rows[0.99]["capped_share"] > rows[0.8]["capped_share"] > rows[0.5]["capped_share"]
    assert rows[0.99]["capped_share"] > 0.9  # random weights are never sure
    assert all(row["k_95"] <= 5 for row in rows.values())  # four, and gold
    assert (result["bytes"]["prompt"], result["data"]["prompt_positions"]) == (0, 0)
    # With as many candidates as are said to be needed, a tenth of the sets or fewer are cut short.
    needed = result["needed_k_max"]
    assert needed > 4
    wider = planned(
        *(tiny_model, data, tmp_path / "wider", "--k-max", needed, "--prompt-k-max", 0),
        *("train.anchor_weight=0", "train.tau=0.5"),
        capsys=capsys,
    )
    assert wider["capped_share"] <= 0.1
    assert wider["needed_k_max"] is None
    half = planned(
        *(tiny_model, data, tmp_path / "half", "--k-max", needed // 2, "--prompt-k-max", 0),
        *("train.anchor_weight=0", "train.tau=0.5"),
        capsys=capsys,
    )
    assert half["capped_share"] > 0.1
    assert half["needed_k_max"] == needed


def test_tokenizing_for_the_plan_serves_the_record(tiny_model, data, tmp_path, capsys, monkeypatch):
    planned(tiny_model, data, tmp_path, "--sample-tokens", 50, capsys=capsys)
    monkeypatch.setattr(prepare_module, "tokenize", lambda prepared: pytest.fail("again"))
    monkeypatch.setattr(record_run, "run_actors", actors_here)
    settings = load_settings(None, [f'model.name="{tiny_model}"', f'data.train="{data}"'])
    finished = record(settings, tmp_path)
    # And a plan for a record that is there says so.
    shown = planned(tiny_model, data, tmp_path, capsys=capsys)
    assert shown == {"directory": str(finished)}


def test_the_text_form_has_every_figure_and_the_next_command(tiny_model, data, tmp_path, capsys):
    argv = ["--model", tiny_model, "--train-data", data, "--output", tmp_path, "--max-length", 99]
    assert run_command(main, [*map(str, argv), "--sample-tokens", "200"]) == 0
    shown = capsys.readouterr().out
    for said in ("60 samples", "capped", "active", "0.95", "prompt", "64 actor(s)", "this machine"):
        assert said in shown
    assert shown.splitlines()[-1].partition("lrmc record --model")[0].startswith("Next: ")
    assert shown.splitlines()[-1].endswith("data.max_length=99")
    assert "--sample-tokens" not in shown


def test_bad_rows_and_settings_end_a_plan_like_a_record(tiny_model, tmp_path, capsys, no_ray):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    argv = ["--model", str(tiny_model), "--train-data", str(bad), "--output", str(tmp_path / "o")]
    assert run_command(main, argv) == 4
    assert f"{bad}:1: not valid JSON" in capsys.readouterr().err
    assert run_command(main, [*argv, "--sample-tokens", "0"]) == 2
    assert run_command(main, [*argv, "--train-data", str(tmp_path / "none")]) == 3


@pytest.mark.parametrize("window", [1, 7, 4096])
def test_random_rows_are_random_distinct_and_enough(
    tiny_model, data, tmp_path, monkeypatch, window
):
    monkeypatch.setattr(examples_module, "SORT_WINDOW", window)
    monkeypatch.setattr(plan_module, "SORT_WINDOW", window)
    settings = load_settings(None, [f'model.name="{tiny_model}"', f'data.train="{data}"'])
    path = prepare_module.prepare(settings, tmp_path).partial / EXAMPLES
    chosen = [plan_module.random_rows(path, 60, 500, seed) for seed in (0, 0, 1)]
    ids = [{row["sample_id"] for row in rows} for rows in chosen]
    assert ids[0] == ids[1] != ids[2]
    for rows in chosen:
        lengths = [len(row["input_ids"]) for row in rows]
        assert lengths == sorted(lengths)
        assert sum(lengths) >= 500
        assert len({row["sample_id"] for row in rows}) == len(rows)
    assert len(plan_module.random_rows(path, 60, 10**9, 0)) == 60


# A search on a cluster


def planned_search(tiny_model, data, output, *more, capsys) -> dict[str, Any]:
    argv = ["--model", tiny_model, "--train-data", data, "--output", output, "--json", *more]
    code = run_command(main, list(map(str, argv)))
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else {"code": code, "said": said.err}


CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_trials_side_by_side_on_a_cluster_and_their_hours(tiny_model, data, tmp_path, capsys):
    def plan(*more):
        return planned_search(tiny_model, data, tmp_path, *more, capsys=capsys)

    on_gpus = ("--cluster", CLUSTER, "resources.gpus_per_worker=1", "search.trials=12")
    result = plan(*on_gpus, "train.micro_batches=8")
    assert (result["slots"], result["trials_side_by_side"]) == (8, 3)
    assert result["workers_of_a_trial"] == [1, 2]
    assert result["hours"] is None  # nothing is known of the GPUs
    one = plan(*on_gpus, "--gpu-tflops", 10)
    ten = plan(*on_gpus, "--gpu-tflops", 1000)
    assert one["gpu_hours"] > ten["gpu_hours"] > 0
    assert one["core_hours"] is None
    # Two trials on a GPU: twice as many at once.
    shared = plan(*on_gpus, "resources.gpus_per_worker=0.5", "resources.max_concurrent=6")
    assert (shared["slots"], shared["trials_side_by_side"]) == (16, 6)
    cores = plan("--slots", 4, "search.trials=8", "resources.workers=[2, 2]")
    assert (cores["trials_side_by_side"], cores["workers_of_a_trial"]) == (2, [2, 2])
    assert cores["core_hours"] > 0
    assert not (tmp_path / "records").exists()  # nothing was tokenized


def test_what_does_not_fit_on_the_cluster_is_refused(tiny_model, data, tmp_path, capsys):
    def refused(*more):
        return planned_search(tiny_model, data, tmp_path, *more, capsys=capsys)

    for override in ("resources.custom={nvme = 1}", "resources.cpus_per_worker=9"):
        result = refused("--cluster", CLUSTER, override)
        assert result["code"] == 6, result
        assert "must fit" in result["said"]
    assert refused("--slots", 1, "resources.workers=[2, 4]")["code"] == 6
    assert refused("--slots", 0)["code"] == 2
    assert refused("--cluster", CLUSTER.parent / "clusters" / "local.yaml")["code"] == 2
    assert refused("--cluster", tmp_path / "none.yaml")["code"] == 3
