"""The search for the likeliest tokens against a stable sort of every row, to the last bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.method.fast import logits_kernel, top_tokens
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from tests.support.method_inputs import assert_same_sets, random_logits, rng

torch.set_num_threads(1)


def assert_fast_is_plain(logits_NV, gold_N, **options) -> CandidateSets:
    found = select_candidates(logits_NV, gold_N, **options)
    assert_same_sets(found, select_candidates(logits_NV, gold_N, plain=True, **options))
    return found


@given(
    seed=st.integers(0, 2**31 - 1),
    vocabulary_size=st.integers(1, 400),
    tau=st.floats(0.01, 1.0),
    k_min=st.integers(1, 8),
    more=st.integers(0, 60),
    tied=st.booleans(),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_sets_of_the_search_are_those_of_the_sort(seed, vocabulary_size, tau, k_min, more, tied):
    logits_NV, gold_N = random_logits(seed, 6, vocabulary_size, tied=tied)
    assert_fast_is_plain(logits_NV, gold_N, tau=tau, k_min=k_min, k_max=k_min + more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("tau", "k_max"), [(0.5, 1024), (0.97, 1024), (0.999, 300), (0.9, 64), (1.0, 20_000)]
)
def test_the_same_in_a_large_vocabulary(tau, k_max, tied, dtype):
    """Large enough that the search goes through maxima of blocks, with a remainder."""
    logits_NV, gold_N = random_logits(1, 12, 40_003, tied=tied)
    sets = assert_fast_is_plain(logits_NV.to(dtype), gold_N, tau=tau, k_max=k_max)
    assert int(sets.sizes.max()) > (20 if tau < 0.6 else 64)


@pytest.mark.parametrize("top_ids", [range(0, 40_000, 2_500), range(40_000, 40_003)])
def test_likely_tokens_are_found_wherever_they_stand(top_ids):
    """All in one block of the search, or all in the remainder behind the last block."""
    logits_NV, gold_N = random_logits(2, 4, 40_003)
    logits_NV[:, list(top_ids)] += 12
    for tau in (0.3, 0.9, 0.9999):
        sets = assert_fast_is_plain(logits_NV, gold_N, tau=tau, k_max=500)
        assert set(sets.token_ids[sets.offsets[:-1]].tolist()) <= set(top_ids)


def test_the_same_with_a_cap_for_every_row():
    logits_NV, gold_N = random_logits(8, 200, 3000)
    k_max_N = torch.randint(1, 3001, (200,), generator=rng(8))
    assert_fast_is_plain(logits_NV, gold_N, tau=0.99, k_max=k_max_N)


def test_no_more_is_sorted_than_may_be_needed():
    """In a flat row the first 5 of 40,000 tokens alone, for a cap of 5, and their like."""
    logits_NV = torch.rand(3, 40_000, generator=rng(0))
    lse_n = logits_NV.double().logsumexp(-1)
    blocks = top_tokens.Blocks(logits_NV, 5)
    found_nK, ids_nK = top_tokens.top_tokens(
        logits_NV, blocks, lse_n, 0.9, 1, torch.tensor([5, 5, 5])
    )
    assert 5 <= found_nK.shape[1] < 50
    torch.testing.assert_close(found_nK[:, :5], logits_NV.topk(5).values, rtol=0, atol=0)
    assert torch.equal(ids_nK[:, :5], logits_NV.topk(5).indices)
    # Behind its own tokens a row has none.
    assert (found_nK.isinf() == (found_nK == -math.inf)).all()
    assert not ids_nK[found_nK.isinf()].any()


@pytest.fixture(params=["compiled", "by torch"])
def without_or_with_kernel(request, monkeypatch):
    if request.param == "by torch":  # as on a device, or in float64
        monkeypatch.setattr(logits_kernel, "can_take", lambda logits_nV: False)


def test_the_compiled_loops_are_used_where_they_can_be():
    logits_NV, _ = random_logits(1, 4, 100)
    assert logits_kernel.can_take(logits_NV)
    assert not logits_kernel.can_take(logits_NV.double())
    assert not logits_kernel.can_take(logits_NV[:, ::2])


@pytest.mark.usefixtures("without_or_with_kernel")
@pytest.mark.parametrize("cached_rows", [0, 1, 2, 7, 100])
def test_logsumexp_of_a_part_at_a_time_is_that_of_each_row(monkeypatch, cached_rows):
    """Rows of very different levels, which must not disturb each other; 0: half a row."""
    monkeypatch.setattr(top_tokens, "CACHED_ELEMENTS", cached_rows * 50 + 25)
    logits_NV, _ = random_logits(12, 9, 50)
    logits_NV += torch.tensor([0.0, 3e4, -3e4]).repeat(3)[:, None]
    found_N = top_tokens.cached_logsumexp(logits_NV, logits_NV.amax(-1))
    assert found_N.dtype == torch.float64
    expected_N = torch.cat([row.double().logsumexp(-1)[None] for row in logits_NV])
    torch.testing.assert_close(found_N, expected_N, rtol=1e-15, atol=1e-15)


@pytest.mark.usefixtures("without_or_with_kernel")
@pytest.mark.parametrize(("vocabulary_size", "widest"), [(1, 1), (40, 20), (1000, 5), (40_003, 64)])
def test_all_that_reach_a_threshold_are_found_in_order(vocabulary_size, widest):
    logits_NV, _ = random_logits(5, 6, vocabulary_size, tied=True)
    blocks = top_tokens.Blocks(logits_NV, widest)
    assert torch.equal(blocks.highest(), logits_NV.amax(-1))
    for share in (0.0, 0.5, 0.99, 1.0):
        threshold_N = logits_NV.quantile(share, dim=1, interpolation="nearest")
        row, token = blocks.reaching(threshold_N)
        expected = (logits_NV >= threshold_N[:, None]).nonzero()
        assert torch.equal(torch.stack([row, token], dim=1), expected)


@pytest.mark.usefixtures("without_or_with_kernel")
def test_finite_logits_whose_sum_is_not_are_taken():
    logits_NV = torch.full((2, 64), -3e38)
    logits_NV[:, 7] = 0.0
    sets = select_candidates(logits_NV, torch.tensor([7, 7]), tau=0.9)
    assert sets.token_ids.tolist() == [7, 7]


@pytest.mark.usefixtures("without_or_with_kernel")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 39_999, 40_002])
def test_a_logit_that_is_not_finite_is_noticed_wherever_it_stands(place, value):
    logits_NV, gold_N = random_logits(3, 5, 40_003)
    logits_NV[3, place] = value
    with pytest.raises(ValueError, match="logits must be finite"):
        select_candidates(logits_NV, gold_N, tau=0.9)


@pytest.mark.usefixtures("without_or_with_kernel")
def test_large_vocabularies_without_the_kernel_are_the_same():
    logits_NV, gold_N = random_logits(4, 6, 70_001)
    for tau in (0.5, 0.999):
        assert_fast_is_plain(logits_NV, gold_N, tau=tau, k_max=1024)


@given(st.lists(st.floats(-3e4, 0, width=32), min_size=1, max_size=40))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_exponentials_are_those_of_the_library(values):
    """Against float64; below exp(-600) there is next to nothing."""
    logits_1V = torch.tensor([[0.0, *values]])
    found = float(logits_kernel.exp_sums(logits_1V, torch.zeros(1)))
    assert found == pytest.approx(math.fsum(map(math.exp, [0.0, *values])), rel=1e-14)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_every_number_of_threads_gives_the_same_bits(threads):
    logits_NV, _ = random_logits(6, 5, 3000)
    highest_N = logits_NV.amax(-1)
    alone = logits_kernel.exp_sums(logits_NV, highest_N), logits_kernel.block_maxima(logits_NV, 187)
    torch.set_num_threads(threads)
    try:
        shared = (
            logits_kernel.exp_sums(logits_NV, highest_N),
            logits_kernel.block_maxima(logits_NV, 187),
        )
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert torch.equal(alone[1], logits_NV[:, : 16 * 187].view(5, 16, 187).amax(1))
