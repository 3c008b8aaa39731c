"""The choice of candidates against the NumPy reference and the definitions; cuts are exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lrmc_ray.method import subsets
from lrmc_ray.method.fast import top_tokens
from lrmc_ray.method.subsets import (
    CandidateSets,
    cut,
    select_candidates,
    without_added_gold,
)
from tests.support import reference
from tests.support.method_inputs import assert_same_sets, random_logits, rng

torch.set_num_threads(1)

fast = settings(deadline=None, max_examples=60, derandomize=True)


def assert_same_as_reference(actual: CandidateSets, expected: list[reference.Row]) -> None:
    bounds = actual.offsets.tolist()
    assert actual.num_rows == len(expected)
    for i, row in enumerate(expected):
        entries = slice(bounds[i], bounds[i + 1])
        assert actual.token_ids[entries].tolist() == row.token_ids.tolist()
        np.testing.assert_array_equal(actual.logprobs[entries].numpy(), row.logprobs)
        assert int(actual.gold_ids[i]) == row.gold_id


@given(
    seed=st.integers(0, 2**31 - 1),
    tau=st.floats(0.01, 1.0),
    k_min=st.integers(1, 8),
    more=st.integers(0, 60),
    tied=st.booleans(),
    plain=st.booleans(),
)
@fast
def test_selection_follows_the_reference(seed, tau, k_min, more, tied, plain):
    logits_NV, gold_N = random_logits(seed, 6, 50, tied=tied)
    actual = select_candidates(
        logits_NV, gold_N, tau=tau, k_min=k_min, k_max=k_min + more, plain=plain
    )
    expected = reference.select_candidates(
        logits_NV.numpy(), gold_N.numpy(), tau=tau, k_min=k_min, k_max=k_min + more
    )
    assert_same_as_reference(actual, expected)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tau", "k_max"), [(0.5, 1024), (0.97, 1024), (0.999, 300), (0.9, 64)])
def test_selection_in_a_large_vocabulary_follows_the_reference(tau, k_max, tied, plain):
    logits_NV, gold_N = random_logits(1, 12, 40_003, tied=tied)
    actual = select_candidates(logits_NV, gold_N, tau=tau, k_max=k_max, plain=plain)
    expected = reference.select_candidates(logits_NV.numpy(), gold_N.numpy(), tau=tau, k_max=k_max)
    assert_same_as_reference(actual, expected)


@given(
    seed=st.integers(0, 2**31 - 1),
    high=st.floats(0.1, 1.0),
    share=st.floats(0.01, 1.0),
    k_min=st.integers(1, 6),
    spare=st.integers(0, 3),
    more=st.integers(0, 40),
    tied=st.booleans(),
)
@fast
def test_the_cut_of_a_record_is_the_record_of_the_cut(seed, high, share, k_min, spare, more, tied):
    logits_NV, gold_N = random_logits(seed, 8, 40, tied=tied)
    k_max = k_min + spare + more
    recorded = select_candidates(logits_NV, gold_N, tau=high, k_min=k_min + spare, k_max=k_max)
    low = high * share
    assert_same_sets(
        cut(recorded, low, k_min=k_min),
        select_candidates(logits_NV, gold_N, tau=low, k_min=k_min, k_max=k_max),
    )


@given(seed=st.integers(0, 2**31 - 1), high=st.floats(0.3, 1.0), share=st.floats(0.01, 1.0))
@fast
def test_cuts_are_exact_with_a_cap_of_its_own_for_every_row(seed, high, share):
    logits_NV, gold_N = random_logits(seed, 8, 40)
    k_max_N = torch.randint(1, 30, (8,), generator=rng(seed))
    recorded = select_candidates(logits_NV, gold_N, tau=high, k_max=k_max_N)
    assert_same_sets(
        cut(recorded, high * share),
        select_candidates(logits_NV, gold_N, tau=high * share, k_max=k_max_N),
    )


def test_cuts_are_exact_at_the_recorded_masses_themselves():
    """The hardest thresholds: tau equal to, and one step above, what k tokens hold."""
    logits_NV, gold_N = random_logits(3, 1, 30)
    recorded = select_candidates(logits_NV, gold_N, tau=1.0)
    stored = recorded.logprobs.double().exp()
    masses = (stored * 2**40).floor().cumsum(0) / 2**40
    for k, mass in enumerate(masses.tolist()[:-1], start=1):
        for tau, size in ((mass, k), (math.nextafter(mass, 2.0), k + 1)):
            kept = cut(recorded, tau)
            appended = int(gold_N[0]) not in recorded.token_ids[:size].tolist()
            assert int(kept.sizes[0]) == size + appended
            assert_same_sets(kept, select_candidates(logits_NV, gold_N, tau=tau))


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.05, 0.99), k_max=st.integers(1, 40))
@fast
def test_sets_reach_tau_are_the_smallest_that_do_and_hold_gold(seed, tau, k_max):
    logits_NV, gold_N = random_logits(seed, 5, 40)
    sets = select_candidates(logits_NV, gold_N, tau=tau, k_max=k_max)
    probabilities_NV = logits_NV.double().softmax(-1)
    capped_N = sets.capped(tau)
    for i, (start, end) in enumerate(zip(sets.offsets[:-1], sets.offsets[1:], strict=True)):
        ids, stored = sets.token_ids[start:end].tolist(), sets.logprobs[start:end].double().exp()
        assert ids.count(int(gold_N[i])) == 1
        gold_is_appended = len(ids) > k_max or (
            len(ids) > 1 and ids[-1] == gold_N[i] and stored[:-1].sum() >= tau
        )
        core = stored[:-1] if gold_is_appended else stored
        if core.sum() >= tau:
            assert not capped_N[i]
            assert core[:-1].sum() < tau  # one token fewer would not do
        else:
            assert len(core) == k_max
        # Never more mass is claimed than there is.
        assert stored.sum() <= probabilities_NV[i, ids].sum()
        assert sets.outside_mass()[i] >= 1 - probabilities_NV[i, ids].sum()


def test_worked_example():
    """p = 1/2, 1/4, 1/8, 1/16, 1/16. Rounded down, two tokens hold a little less than 3/4."""
    logits_NV = torch.tensor([[0.0625, 0.5, 0.125, 0.25, 0.0625]]).log()
    gold_N = torch.tensor([4])

    def ids(**options) -> list[int]:
        return select_candidates(logits_NV, gold_N, **options).token_ids.tolist()

    assert ids(tau=0.49) == [1, 4]
    assert ids(tau=0.74) == [1, 3, 4]
    assert ids(tau=0.75) == [1, 3, 2, 4]
    assert ids(tau=0.93) == [1, 3, 2, 0, 4]  # ids 0 and 4 are tied: the smaller one first
    assert ids(tau=0.49, k_min=3) == [1, 3, 2, 4]
    assert ids(tau=0.99, k_max=2) == [1, 3, 4]
    sets = select_candidates(logits_NV, gold_N, tau=0.74)
    below_log_half = np.nextafter(np.float16(math.log(0.5)), np.float16(-1))
    assert sets.logprobs.tolist()[0] in (below_log_half, np.float16(math.log(0.5)))
    assert sets.logprobs.tolist()[0] <= math.log(0.5)
    assert float(sets.outside_mass()) == pytest.approx(1 - 0.5 - 0.25 - 0.0625, abs=2e-3)


@pytest.mark.parametrize("vocabulary_size", [70, 4099])
def test_ties_at_the_cap_go_to_the_smallest_ids(vocabulary_size):
    """More tied tokens than fit; torch.topk may return any of them."""
    logits_NV = torch.zeros(3, vocabulary_size)
    logits_NV[:, 7] = 1.0
    logits_NV[1] *= -1
    gold_N = torch.tensor([0, 0, vocabulary_size - 1])
    sets = select_candidates(logits_NV, gold_N, tau=1.0, k_max=5)
    rows = [
        sets.token_ids[a:b].tolist() for a, b in zip(sets.offsets, sets.offsets[1:], strict=False)
    ]
    assert rows == [
        [7, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [7, 0, 1, 2, 3, vocabulary_size - 1],
    ]


def test_logprobs_are_the_largest_float16_not_above_the_truth():
    logits_NV, gold_N = random_logits(5, 20, 200)
    sets = select_candidates(logits_NV, gold_N, tau=1.0)
    truth = logits_NV.double().log_softmax(-1)[sets.row_ids, sets.token_ids].numpy()
    stored = sets.logprobs.numpy()
    assert (stored.astype(np.float64) <= truth).all()
    above = np.nextafter(stored, np.float16(np.inf)).astype(np.float64)
    assert (above > truth).all()


def test_a_gold_token_of_vanishing_probability_is_stored_finite():
    logits_NV = torch.tensor([[0.0, -1e5], [0.0, -1e-30]])
    sets = select_candidates(logits_NV, torch.tensor([1, 1]), tau=0.4)
    assert sets.token_ids.tolist() == [0, 1, 0, 1]
    assert sets.logprobs.tolist()[1] == torch.finfo(torch.float16).min
    sets.check(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_at_their_values(dtype):
    logits_NV, gold_N = random_logits(6, 10, 3000)
    logits_NV = logits_NV.to(dtype)
    assert_same_sets(
        select_candidates(logits_NV, gold_N, tau=0.9),
        select_candidates(logits_NV.double(), gold_N, tau=0.9),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_left_as_they_are(dtype):
    logits_NV, gold_N = random_logits(7, 10, 300)
    logits_NV = logits_NV.to(dtype)
    before = logits_NV.clone()
    select_candidates(logits_NV, gold_N, tau=0.9)
    assert torch.equal(logits_NV, before)


def test_a_cap_for_every_row_is_the_rows_one_by_one():
    logits_NV, gold_N = random_logits(8, 6, 5000)
    k_max_N = torch.tensor([1, 5000, 64, 200, 7, 1024])
    together = select_candidates(logits_NV, gold_N, tau=0.99, k_max=k_max_N)
    alone = [
        select_candidates(logits_NV[i : i + 1], gold_N[i : i + 1], tau=0.99, k_max=int(k_max_N[i]))
        for i in range(6)
    ]
    assert_same_sets(together, CandidateSets.concatenate(alone))


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.nbytes:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("cached_rows", [0, 1, 3, 7, 100])
def test_chunks_bound_the_temporaries_and_change_nothing(monkeypatch, cached_rows):
    logits_NV, gold_N = random_logits(9, 60, 1000)
    whole = select_candidates(logits_NV, gold_N, tau=0.9, k_max=50)
    monkeypatch.setattr(subsets, "CHUNK_ELEMENTS", 7 * 1000)
    monkeypatch.setattr(top_tokens, "CACHED_ELEMENTS", cached_rows * 1000 + 500)
    with LargestTensor() as largest:
        chunked = select_candidates(logits_NV, gold_N, tau=0.9, k_max=50)
    assert_same_sets(chunked, whole)
    # The logits themselves have 60,000 elements, the result at most 60 * 51.
    assert largest.numel <= 7 * 1000 + 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits_NV, gold_N = random_logits(10, 4, 100)
    logits_NV[2, 77] = value
    with pytest.raises(ValueError, match="logits must be finite"):
        select_candidates(logits_NV, gold_N, tau=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ({"tau": 90.0}, r"tau must be in \(0, 1\], got 90.0; it is a fraction"),
        ({"tau": math.nan}, r"tau must be in \(0, 1\], got nan"),
        ({"tau": 0.9, "k_min": 0}, r"k_min must be in \[1, k_max\], got k_min 0"),
        ({"tau": 0.9, "k_min": 9, "k_max": 8}, r"k_min 9, k_max 8"),
        ({"tau": 0.9, "k_max": torch.tensor([4, 0])}, r"k_min 1, k_max 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        select_candidates(torch.zeros(2, 20), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("gold", [-1, 20])
def test_gold_outside_the_vocabulary_is_refused(gold):
    with pytest.raises(ValueError, match=r"gold_N must be in \[0, 20\)"):
        select_candidates(torch.zeros(2, 20), torch.tensor([0, gold]), tau=0.9)


def test_cut_refuses_what_was_not_recorded():
    logits_NV, gold_N = random_logits(11, 4, 50)
    recorded = select_candidates(logits_NV, gold_N, tau=0.5, k_max=4)
    smallest = int(recorded.sizes.min())
    with pytest.raises(ValueError, match=rf"k_min must be in \[1, {smallest}\].*record again"):
        cut(recorded, 0.4, k_min=smallest + 1)
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\]"):
        cut(recorded, 1.5)


def test_no_positions_are_no_rows():
    empty = select_candidates(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64), tau=0.9)
    assert (empty.num_rows, empty.token_ids.numel(), empty.offsets.tolist()) == (0, 0, [0])
    assert_same_sets(cut(empty, 0.5), empty)
    assert_same_sets(empty.rows(torch.zeros(0, dtype=torch.int64)), empty)
    empty.check(20)


# The ablation without gold


@given(
    seed=st.integers(0, 2**31 - 1),
    tau=st.floats(0.05, 0.99),
    k_min=st.integers(1, 4),
    k_max=st.integers(4, 12),
    is_cut=st.booleans(),
)
@fast
def test_without_added_gold_the_sets_are_those_of_the_model_alone(seed, tau, k_min, k_max, is_cut):
    """Independent of the gold token: the most probable one is always there, so none is added."""
    logits_NV, gold_N = random_logits(seed, 12, 40)
    own = select_candidates(logits_NV, logits_NV.argmax(-1), tau=tau, k_min=k_min, k_max=k_max)
    options = {"k_min": k_min, "k_max": k_max}
    if is_cut:
        recorded = select_candidates(logits_NV, gold_N, tau=0.995, **options)
        sets = cut(recorded, tau, k_min=k_min)
    else:
        sets = select_candidates(logits_NV, gold_N, tau=tau, **options)
    bare = without_added_gold(sets, tau, **options)
    bare.check(40)
    for row, gold in enumerate(gold_N.tolist()):
        ids = own.rows(torch.tensor([row])).token_ids.tolist()
        expected = ids if gold in ids else [gold]
        assert bare.rows(torch.tensor([row])).token_ids.tolist() == expected
    assert torch.equal(bare.gold_ids, gold_N.int())
