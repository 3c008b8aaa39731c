"""Checkpoints of shards are written while training goes on: their bits, their end, their errors."""

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS
from lrmc_ray.train.checkpoints import SHARDS, checkpoint_path, list_checkpoints, step_of
from tests.support.tiny import make_data, make_model
from tests.support.training import assert_same, model_of, record_of
from tests.train import sharded_saves
from tests.train.sharded_saves import WORKERS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of all runs."""
    directory = tmp_path_factory.mktemp("runs")
    model = make_model(directory / "model")
    data = make_data(directory / "train.jsonl", num_rows=24)
    sharded_saves.run_all(directory, record_of(model, data, directory / "record"), model)
    return directory


def seen(runs, name):
    return [torch.load(runs / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORKERS)]


def steps_of(directory):
    return [step_of(path) for path in list_checkpoints(directory / CHECKPOINTS)]


def ledger_of(directory):
    lines = (directory / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_has_what_the_workers_held_behind_its_step(runs, tmp_path, step):
    """Nothing of that behind step 4 was written before step 5 had changed the weights."""
    path = checkpoint_path(runs / "beside" / CHECKPOINTS, step)
    dcp_to_torch_save(path / SHARDS, tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    first, second = (found["held"][step] for found in seen(runs, "beside"))
    assert saved.keys() == first.keys()
    assert {name.split("/")[0] for name in saved} == {"model", "exp_avg", "exp_avg_sq"}
    for name, whole in saved.items():
        assert torch.equal(whole, torch.cat([first[name], second[name]])), name


def test_the_first_one_is_waited_for_and_others_are_not(runs):
    """Without a first one, a run that is killed would have to begin anew, and it refuses to."""
    assert seen(runs, "beside")[0]["found"] == [(2, [2]), (4, [2])]
    assert steps_of(runs / "beside") == [2, 4]
    assert not list((runs / "beside" / CHECKPOINTS).glob("*.partial"))


def test_one_that_is_asked_for_is_waited_for(runs):
    """By whoever is about to end the process."""
    assert seen(runs, "asked for")[0]["found"] == [(2, [2]), (4, [2, 4])]
    assert not (runs / "asked for" / CHECKPOINT_NOW).exists()


def test_a_worker_keeps_one_copy_of_its_own_rows(runs):
    for found in seen(runs, "beside"):
        (first, place), (second, place_again) = found["staged"]
        held = sum(tensor.nbytes for tensor in found["held"][4].values())
        assert (first, place) == (second, place_again)
        assert first == held


def test_one_that_was_not_written_to_its_end_never_counts(runs):
    for found in seen(runs, "dies first"):
        assert found["error"] == ("Killed", None)
    assert ledger_of(runs / "dies") == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert steps_of(runs / "dies") == [2, 4]
    assert not list((runs / "dies" / CHECKPOINTS).glob("*.partial"))
    assert_same(model_of(runs / "dies"), model_of(runs / "beside"))


def test_what_one_worker_cannot_write_is_an_error_of_all_at_the_next_step(runs):
    """The one before counts, and with space again the run ends as if nothing had been."""
    first, second = (found["error"] for found in seen(runs, "disk is full first"))
    assert first == second
    assert first[0] == "RuntimeError"  # torch keeps the error of the file to itself
    assert ledger_of(runs / "disk is full") == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert_same(model_of(runs / "disk is full"), model_of(runs / "beside"))


def test_what_fails_on_one_worker_fails_on_all(runs):
    first, second = (torch.load(runs / f"together-{rank}.pt") for rank in range(WORKERS))
    full = ("OSError", "[Errno 28] No space left on device")
    assert first == [[0, 10], full, ("RuntimeError", "KeyError: 'x'")]
    assert second == [[0, 10], full, ("KeyError", "'x'")]
