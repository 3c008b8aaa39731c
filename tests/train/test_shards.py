"""Training with the model in shards, against training with the whole model on one worker."""

import pytest
import torch
from torch import nn

from lrmc_ray.method.sharded_rows import ShardedRows
from lrmc_ray.method.workers import WorkerGroup
from tests.support.cases import asked_for, rest_is_slow
from tests.train import sharded_workers
from tests.train.sharded_workers import CASES, MODELS, STEPS, run

# Every process loads torch, and waits for the slowest.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of a weight after 3 steps of lr 0.01."""


FEW = [
    *MODELS,
    *("llama in float32", "mixture in float32", "cautious, global", "rotate, global"),
    *("bf16 moments", "adamw", "mofo", "l2_sp", "paper, by rows", "idle worker"),
    "more workers than layers, tokens and micro-batches",
    *("full", "frozen_tail, idle worker", "kl_to_base", "frozen layer"),
]


@pytest.fixture(scope="module")
def names(request):
    """The cases that are run."""
    asked = asked_for(request, "name")
    return [name for name in CASES if name in FEW or name in asked]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, names):
    """Of every world size, of every rank, of every case: one set of processes for all."""
    return sharded_workers.outcomes(tmp_path_factory.mktemp("shards"), names)


@pytest.fixture(scope="module")
def alone(names):
    """The same with the whole model on one worker."""
    return {name: run(CASES[name], WorkerGroup(), shard=False) for name in names}


def difference(found, expected):
    assert found.parameters.keys() == expected.parameters.keys()
    return max(
        float((found.parameters[name].double() - whole.double()).abs().max())
        for name, whole in expected.parameters.items()
    )


@pytest.mark.parametrize("name", rest_is_slow(CASES, FEW))
def test_shards_give_what_the_whole_model_gives(outcomes, alone, name):
    tolerance = TOLERANCE[CASES[name].dtype]
    expected = alone[name]
    for ranks in outcomes.values():
        for found in (rank[name] for rank in ranks):
            assert difference(found, expected) < tolerance
            angle = pytest.approx(expected.angle_deg, abs=1e3 * tolerance, nan_ok=True)
            assert found.angle_deg == angle
            for ours, theirs in zip(found.results, expected.results, strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
                assert ours.anchor == pytest.approx(theirs.anchor, rel=tolerance, abs=tolerance)
                assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=tolerance)
                assert ours.sample_ids == theirs.sample_ids
        assert all(rank[name].results == ranks[0][name].results for rank in ranks)
        assert len(ranks[0][name].results) == STEPS


def test_two_runs_with_as_many_workers_have_the_same_bits(outcomes):
    for ranks in outcomes.values():
        for rank in ranks:
            first, second = rank["llama in float32"], rank["llama again"]
            assert first.results == second.results
            for name, parameter in first.parameters.items():
                assert torch.equal(parameter, second.parameters[name])


@pytest.mark.parametrize("name", MODELS)
def test_each_worker_holds_its_part_alone(outcomes, alone, name):
    whole = alone[name].num_own
    for world_size, ranks in outcomes.items():
        held = [rank[name].num_own for rank in ranks]
        assert sum(held) == whole
        # Of four experts, two of three workers hold two, and the third holds none.
        assert max(held) < (1.6 if name == "mixture" else 1.1) * whole / world_size


@pytest.mark.parametrize("name", rest_is_slow([name for name in CASES if "none" not in name], FEW))
def test_the_runs_move_the_weights(alone, name):
    """What is compared above is not the start."""
    case = CASES[name]
    moved = [
        float((parameter - start).abs().max())
        for parameter, start in zip(
            alone[name].parameters.values(), sharded_workers.start_of(case), strict=True
        )
    ]
    assert max(moved) > 0.005


def test_rows_are_there_within_a_step_alone():
    rows = ShardedRows(nn.Parameter(torch.arange(8.0)[:, None]), WorkerGroup())
    tokens = torch.tensor([1, 4])
    with pytest.raises(RuntimeError, match="before they are gathered"):
        rows.places(tokens)
    with rows.gathered(tokens):
        assert rows.places(torch.tensor([4, 1, 4])).tolist() == [1, 0, 1]
        assert rows.rows_XD.flatten().tolist() == [1.0, 4.0]
        with pytest.raises(IndexError, match="the row of token 3 was not gathered"):
            rows.places(torch.tensor([1, 3]))
        rows.rows_XD.grad = torch.tensor([[10.0], [20.0]])
        rows.reduce()
    assert rows.own_XD.grad is not None
    assert rows.own_XD.grad.flatten().tolist() == [0, 10, 0, 0, 20, 0, 0, 0]
    with rows.gathered(torch.arange(5)):  # more than 60 % of the rows
        assert len(rows.rows_XD) == 8
        assert rows.places(torch.tensor([7])).tolist() == [7]
