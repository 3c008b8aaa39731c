"""The same training on 1 to 4 workers, in processes of their own."""

import itertools
import math
import multiprocessing

import hypothesis.strategies as st
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings

from lrmc_ray.method import workers
from lrmc_ray.method.microbatch import active_length
from lrmc_ray.method.workers import WorkerGroup, waves
from tests.method import elastic_workers
from tests.method.elastic_workers import CASES, LR, STEPS, WEIGHT_DECAY, WORLD_SIZES, Case
from tests.support.cases import asked_for, rest_is_slow
from tests.support.plain_training import largest_difference, tiny_llama

# Every process loads torch, and waits for the slowest.
pytestmark = pytest.mark.timeout(900)


FEW = [
    *("tied", "anchor", "anchor and tail", "soft", "active_only", "frozen_tail"),
    *("kl_to_base, mofo", "one busy part", "no busy part", "packed", "shared prefix"),
    *("tied, by rows", "shared prefix, by rows", "fast", "fast, one busy part"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """Of every world size, of every rank, of every case: one set of processes for all."""
    directory = tmp_path_factory.mktemp("workers")
    # The server imports torch and transformers once, then forks every worker.
    multiprocessing.get_context("forkserver").set_forkserver_preload([elastic_workers.__name__])
    asked = asked_for(request, "name")
    names = [name for name in CASES if name in FEW or name in asked]
    torch.multiprocessing.start_processes(
        elastic_workers.worker,
        (directory, names),
        nprocs=max(WORLD_SIZES),
        start_method="forkserver",
    )
    return elastic_workers.outcomes(directory)


STRICT = [name for name, case in CASES.items() if case.reduction == "strict"]


@pytest.mark.parametrize("name", rest_is_slow(STRICT, set(STRICT) & set(FEW)))
def test_strict_gives_the_same_bits_for_every_number_of_workers(outcomes, name):
    """With dropout, several optimizer steps and W = 3, which does not divide 4 micro-batches."""
    digests = {rank[name].digest for ranks in outcomes.values() for rank in ranks}
    assert len(digests) == 1
    results = [rank[name].results for ranks in outcomes.values() for rank in ranks]
    assert all(result == results[0] for result in results)
    assert len(results[0]) == STEPS


BY_ROWS = [name for name in STRICT if name.endswith(", by rows")]


@pytest.mark.parametrize("name", rest_is_slow(BY_ROWS, set(BY_ROWS) & set(FEW)))
def test_training_the_touched_rows_alone_gives_the_same_bits(outcomes, name):
    whole = name.removesuffix(", by rows")
    for ranks in outcomes.values():
        assert {rank[name].digest for rank in ranks} == {ranks[0][whole].digest}


FAST = [name for name in CASES if name not in STRICT]


@pytest.mark.parametrize("name", rest_is_slow(FAST, set(FAST) & set(FEW)))
def test_fast_agrees_up_to_rounding(outcomes, name):
    """Measured: parameters within 3e-6, losses within 3e-8 relative, after 3 steps of lr 0.01."""
    alone = outcomes[1][0][name]
    for world_size, ranks in outcomes.items():
        assert len({rank[name].digest for rank in ranks}) == 1
        assert all(rank[name].results == ranks[0][name].results for rank in ranks)
        assert largest_difference(ranks[0][name].parameters, alone.parameters) < 2e-5
        for ours, theirs in zip(ranks[0][name].results, alone.results, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        # Only where nothing is added up are the bits the same; so ``strict`` is not in vain.
        is_same = ranks[0][name].digest == alone.digest
        assert is_same == (world_size == 1 or CASES[name].num_active <= 2)


def test_fast_and_strict_agree_up_to_rounding(outcomes):
    fast, strict = outcomes[4][0]["fast"], outcomes[4][0]["anchor"]
    assert largest_difference(fast.parameters, strict.parameters) < 2e-5


def test_workers_without_an_active_position_change_nothing(outcomes):
    """Three of four parts empty: one worker computes, all of them hold its result."""
    (case,) = [case for name, case in CASES.items() if name == "one busy part"]
    samples = elastic_workers.samples_of_step(case, 0)
    empty = [sample for sample in samples if not active_length(sample, case.loss.activity)]
    assert len(empty) == 6
    result = outcomes[4][3]["one busy part"].results[0]
    assert 0 < result.num_processed < result.num_tokens / 2
    assert result.num_supervised == sum(int(s.is_supervised_P.sum()) for s in samples)
    assert result.loss > 0


def test_without_any_active_position_weights_only_decay(outcomes):
    start = tiny_llama(dtype=torch.float32, dropout=0.1)
    decayed = [p.detach() * (1 - LR * WEIGHT_DECAY) ** STEPS for p in start.parameters()]
    outcome = outcomes[4][2]["no busy part"]
    torch.testing.assert_close(outcome.parameters, decayed)
    assert {(r.loss, r.grad_norm, r.num_active, r.is_applied) for r in outcome.results} == {
        (0.0, 0.0, 0, True)
    }


def test_dropout_takes_part(outcomes):
    without = elastic_workers.run(Case(dropout=0.0), WorkerGroup())
    assert without.digest != outcomes[1][0]["tied"].digest
    assert without.results[0].loss != outcomes[1][0]["tied"].results[0].loss


@given(num=st.integers(0, 40), world_size=st.integers(1, 9))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_part_is_computed_by_one_worker(num, world_size):
    parts = [3 * number for number in range(num)]
    rounds = waves(parts, world_size)
    assert [part for wave in rounds for part in wave] == parts
    assert all(1 <= len(wave) <= world_size for wave in rounds)
    # No worker waits while another has two to do.
    assert len(rounds) == math.ceil(num / world_size)


@given(sizes=st.lists(st.integers(1, 60), max_size=30))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_buckets_are_in_order_and_as_large_as_may_be(sizes):
    tensors = [torch.empty(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "BUCKET_ELEMENTS", 50)
        found = [[t.numel() for t in bucket] for bucket in workers.buckets(tensors)]
    assert [size for bucket in found for size in bucket] == sizes
    assert all(len(bucket) == 1 or sum(bucket) <= 50 for bucket in found)
    for bucket, following in itertools.pairwise(found):
        assert sum(bucket) + following[0] > 50


def test_one_worker_alone_needs_no_process_group():
    group, tensor = WorkerGroup(), torch.ones(3)
    group.sum_(tensor)
    group.broadcast_(tensor, source=0)
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert group.gather("own") == ["own"]
