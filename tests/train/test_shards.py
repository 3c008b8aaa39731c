"""Training with the model in shards, against training with the whole model on one worker."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from benchmarks.tiny_models import make
from lrmc_ray.method import shards as shards_module
from lrmc_ray.method.sharded_rows import ShardedRows
from lrmc_ray.method.shards import Shard
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.head import head_of
from lrmc_ray.train.sharding import shard_model
from tests.support.all_double import AllDouble
from tests.support.cases import asked_for, rest_is_slow
from tests.train import sharded_workers
from tests.train.sharded_workers import CASES, MODELS, run

# Every process loads torch, and waits for the slowest.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of a weight after 3 steps of lr 0.01."""


FEW = [
    *MODELS,
    *("llama in float32", "mixture in float32", "cautious, global", "rotate, global"),
    *("bf16 moments", "adamw", "l2_sp", "paper, by rows", "idle worker"),
    *("llama in bf16", "mixture in bf16", "offloaded, by rows"),
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
    cases = {name: CASES[name] for name in names}
    return {n: run(case, WorkerGroup(), shard=case.is_alone_in_shards) for n, case in cases.items()}


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
        assert len(ranks[0][name].results) == CASES[name].steps


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


def hidden_and_gradients(model_type, how):
    """Of a random model: its hidden states, and the gradients of a function of them, by name."""
    model = make(model_type).train()
    shards = {name: Shard(p, p.shape, 0) for name, p in model.named_parameters()}
    in_bf16, sharding = how != "float64", None
    if how == "float64":
        model.double().config._experts_implementation = "eager"
    elif how == "shards":
        sharding = shard_model(
            model, head_of(model), WorkerGroup(), torch.device("cpu"), under_autocast=True
        )
        shards = sharding.shards
    seen: dict[str, torch.dtype] = {}
    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_hook(
        lambda module, *_: seen.update(norm=module.weight.dtype)
    )
    layer.self_attn.q_proj.register_forward_hook(
        lambda module, inputs, _: seen.update(product=module.weight.dtype, input=inputs[0].dtype)
    )
    with (
        sharding.model.vocabulary.whole() if sharding else contextlib.nullcontext(),
        AllDouble() if how == "float64" else contextlib.nullcontext(),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            hidden = model.model(input_ids=torch.arange(40).view(2, 20)).last_hidden_state
        (hidden.double() * torch.arange(hidden.numel()).view_as(hidden).sin()).sum().backward()
        if sharding:
            sharding.model.take_gradients()
    gradients = {n: s.own.grad for n, s in shards.items() if "lm_head" not in n}
    return hidden.detach(), gradients, seen


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_what_is_gathered_in_bf16_has_the_bits_of_autocast(model_type):
    expected, gradients, _ = hidden_and_gradients(model_type, "autocast")
    found, others, seen = hidden_and_gradients(model_type, "shards")
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
    assert seen == {"product": torch.bfloat16, "norm": torch.float32, "input": torch.float32}


def test_experts_gathered_in_bf16_are_nearly_as_near_as_autocast():
    """Which leaves the products of stacked experts in float32."""
    _, exact, _ = hidden_and_gradients("qwen3_moe", "float64")
    errors = {}
    for how in ("autocast", "shards"):
        _, found, _ = hidden_and_gradients("qwen3_moe", how)
        pairs = [(found[name].double(), exact[name]) for name in exact]
        errors[how] = sum(float((one - other).square().sum()) for one, other in pairs) ** 0.5
    assert 0 < errors["shards"] < 2 * errors["autocast"]


@pytest.mark.parametrize("under_autocast", [False, True])
def test_every_unit_is_told_what_is_offloaded(under_autocast, monkeypatch):
    told = []

    def recorded(module, **options):
        told.append((type(module).__name__, options["offload_policy"], options["mp_policy"]))
        return fully_shard(module, **options)

    monkeypatch.setattr(shards_module, "fully_shard", recorded)
    for offload in (False, True):
        told.clear()
        model = make("llama")
        options = {"under_autocast": under_autocast, "offload": offload}
        sharding = shard_model(model, head_of(model), WorkerGroup(), torch.device("cpu"), **options)
        names = [name.removeprefix("FSDP") for name, _, _ in told]
        assert sorted(names) == ["LlamaDecoderLayer", "LlamaDecoderLayer", "LlamaModel"]
        for name, policy, precision in told:
            # Without a GPU memory cannot be pinned.
            assert policy == (CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy())
            is_short = under_autocast and name == "LlamaDecoderLayer"
            assert precision.param_dtype == (torch.bfloat16 if is_short else None)
            assert precision.reduce_dtype == (torch.float32 if is_short else None)
        assert all(shard.own.is_cpu for shard in sharding.shards.values())


def test_no_pass_sees_weights_of_before():
    """Behind a pass without gradients a checkpoint may be read."""
    model = make("llama")
    sharding = shard_model(model, head_of(model), WorkerGroup(), torch.device("cpu"))

    def hidden():
        with torch.no_grad(), sharding.model.vocabulary.whole():
            return model.model(input_ids=torch.arange(8)[None]).last_hidden_state

    before = hidden()
    with torch.no_grad():
        sharding.shards["model.norm.weight"].own.mul_(2)
    assert torch.allclose(hidden(), 2 * before)


def test_rows_are_there_within_a_step_alone():
    rows = ShardedRows(nn.Parameter(torch.arange(8.0)[:, None]), WorkerGroup(), torch.device("cpu"))
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
