"""A run that trains only the rows of the vocabulary it touches ends in the bits of any other."""

import pytest
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.train import vocabulary
from tests.support.tiny import make_data, make_model
from tests.support.training import (
    assert_same,
    kill_after,
    model_of,
    record_of,
    run_alone,
    settings_of,
)

torch.set_num_threads(1)

FEW = {"batch_size": 2, "tau": 0.2, "anchor_weight": 0.0, "tail_samples": 8}
"""Settings with which half of the 512 rows are touched."""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """A model and its record."""
    directory = tmp_path_factory.mktemp("base")
    model = make_model(directory / "model", tied=request.param)
    data = make_data(directory / "data.jsonl", num_rows=8)
    return {"model": model, "record": record_of(model, data, directory / "record")}


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """However few rows are spared."""
    monkeypatch.setattr(vocabulary, "FEWEST_SPARED", 1)
    monkeypatch.setattr(vocabulary, "LARGEST_SHARE", 0.95)


def start(base, directory, **changes):
    return run_alone(settings_of(**(FEW | changes)), directory=directory, **base)


def trained(run):
    """Names and numbers of the rows that are trained apart."""
    return {name: len(found["tokens"]) for name, found in run.learner.vocabulary.state().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1, "max_grad_norm": 0.5, "probe_every": 2},
        pytest.param(
            {"evaluate_every": 2, "export": "best", "holdout_share": 0.2, "optimizer": "adamw"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["decay", "best"],
)
def test_killed_and_resumed_it_ends_in_the_bits_of_training_all_rows(
    base, tmp_path, monkeypatch, changes
):
    by_rows = start(base, tmp_path / "rows", **changes)
    sizes = trained(by_rows)
    assert all(0 < size < 500 for size in sizes.values())
    assert len(sizes) == (1 if by_rows.learner.head.weight_VD is embedding_of(by_rows) else 2)
    kill_after(by_rows, 4)
    again = start(base, tmp_path / "rows", **changes)
    outcome = again.run()
    assert again.first_step == 4
    assert trained(again) == sizes
    monkeypatch.setattr(vocabulary, "MOST_SAMPLES", 0)
    whole = start(base, tmp_path / "whole", **changes)
    assert trained(whole) == {}
    expected = whole.run()
    assert_same(model_of(tmp_path / "rows"), model_of(tmp_path / "whole"))
    assert outcome["final_loss"] == expected["final_loss"]
    assert outcome.get("best_nll") == expected.get("best_nll")


def embedding_of(run):
    return run.learner.model.get_input_embeddings().weight


def test_state_is_of_the_rows_alone(base, tmp_path):
    run = start(base, tmp_path)
    sizes = trained(run)
    next(run.steps())
    state = run.learner.state()
    for name, size in sizes.items():
        assert len(state["model"][name]) == size
        moments = [s["exp_avg"].shape for s in state["optimizer"]["state"].values()]
        assert (size, 64) in moments
    assert not any(moment[0] == 512 for moment in moments)
    # The whole weights are up to date.
    for name, tokens in ((n, s["tokens"]) for n, s in state["vocabulary"].items()):
        whole = run.learner.model.get_parameter(name)
        assert torch.equal(whole[tokens], state["model"][name])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "full"},
        {"loss": "active_only"},
        {"refresh_every": 3},
        {"l2_sp_weight": 0.1},
        {"optimizer": "mofo"},
        {"optimizer": "c_adamw"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"lora_rank": 4},
        {"tail_samples": 512},
        {"weight_decay": 0.1, "evaluate_every": 2, "export": "best", "holdout_share": 0.2},
    ],
    ids=str,
)
def test_all_rows_are_trained_where_another_thing_may_touch_them(base, tmp_path, changes):
    run = start(base, tmp_path, **changes)
    names = set(trained(run))
    tied = run.learner.head.weight_VD is embedding_of(run)
    sees_input_alone = "loss" in changes and not tied
    assert names == ({"model.embed_tokens.weight"} if sees_input_alone else set())


def test_a_state_of_other_rows_is_refused(base, tmp_path):
    state = start(base, tmp_path).learner.state()
    other = start(base, tmp_path, seed=5)
    with pytest.raises(DataError, match="other rows of the vocabulary"):
        other.learner.load(state)
