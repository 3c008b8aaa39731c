"""Candidate sets against the NumPy reference and the definitions; cuts are exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lrmc_ray.method import subsets
from lrmc_ray.method.subsets import (
    CandidateSets,
    cut,
    select_candidates,
    without_added_gold,
)
from tests.support import reference

# Shape suffixes: N = positions, V = vocabulary size.

torch.set_num_threads(1)

FIELDS = ("offsets", "token_ids", "logprobs", "gold_ids")
fast = settings(deadline=None, max_examples=60, derandomize=True)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(seed: int, num_rows: int, vocabulary_size: int, *, tied: bool = False):
    """Peaked and flat rows; with ``tied``, few distinct values, so that every cut meets ties."""
    generator = rng(seed)
    scale = torch.rand(num_rows, 1, generator=generator) * 4
    logits_NV = scale * torch.randn(num_rows, vocabulary_size, generator=generator)
    if tied:
        logits_NV = logits_NV.round()
    return logits_NV, torch.randint(vocabulary_size, (num_rows,), generator=generator)


def assert_equal(actual: CandidateSets, expected: CandidateSets) -> None:
    for field in FIELDS:
        a, e = getattr(actual, field), getattr(expected, field)
        assert a.dtype == e.dtype
        assert torch.equal(a, e), field


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
)
@fast
def test_selection_follows_the_reference(seed, tau, k_min, more, tied):
    logits_NV, gold_N = random_logits(seed, 6, 50, tied=tied)
    actual = select_candidates(logits_NV, gold_N, tau=tau, k_min=k_min, k_max=k_min + more)
    expected = reference.select_candidates(
        logits_NV.numpy(), gold_N.numpy(), tau=tau, k_min=k_min, k_max=k_min + more
    )
    assert_same_as_reference(actual, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tau", "k_max"), [(0.5, 1024), (0.97, 1024), (0.999, 300), (0.9, 64)])
def test_selection_in_a_large_vocabulary_follows_the_reference(tau, k_max, tied):
    """Large enough that the search goes through maxima of blocks, with a remainder."""
    logits_NV, gold_N = random_logits(1, 12, 40_003, tied=tied)
    actual = select_candidates(logits_NV, gold_N, tau=tau, k_max=k_max)
    expected = reference.select_candidates(logits_NV.numpy(), gold_N.numpy(), tau=tau, k_max=k_max)
    assert_same_as_reference(actual, expected)


@pytest.mark.parametrize("top_ids", [range(0, 40_000, 2_500), range(40_000, 40_003)])
def test_likely_tokens_are_found_wherever_they_stand(top_ids):
    """All in one block of the search, or all in the remainder behind the last block."""
    logits_NV, gold_N = random_logits(2, 4, 40_003)
    logits_NV[:, list(top_ids)] += 12
    for tau in (0.3, 0.9, 0.9999):
        assert_same_as_reference(
            select_candidates(logits_NV, gold_N, tau=tau, k_max=500),
            reference.select_candidates(logits_NV.numpy(), gold_N.numpy(), tau=tau, k_max=500),
        )


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
    assert_equal(
        cut(recorded, low, k_min=k_min),
        select_candidates(logits_NV, gold_N, tau=low, k_min=k_min, k_max=k_max),
    )


@given(seed=st.integers(0, 2**31 - 1), high=st.floats(0.3, 1.0), share=st.floats(0.01, 1.0))
@fast
def test_cuts_are_exact_with_a_cap_of_its_own_for_every_row(seed, high, share):
    logits_NV, gold_N = random_logits(seed, 8, 40)
    k_max_N = torch.randint(1, 30, (8,), generator=rng(seed))
    recorded = select_candidates(logits_NV, gold_N, tau=high, k_max=k_max_N)
    assert_equal(
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
            assert_equal(kept, select_candidates(logits_NV, gold_N, tau=tau))


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
    assert_equal(
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
    assert_equal(together, CandidateSets.concatenate(alone))


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
    monkeypatch.setattr(subsets, "_CHUNK_ELEMENTS", 7 * 1000)
    monkeypatch.setattr(subsets, "_CACHED_ELEMENTS", cached_rows * 1000 + 500)
    with LargestTensor() as largest:
        chunked = select_candidates(logits_NV, gold_N, tau=0.9, k_max=50)
    assert_equal(chunked, whole)
    # The logits themselves have 60,000 elements, the result at most 60 * 51.
    assert largest.numel <= 7 * 1000 + 8


def test_rows_of_very_different_levels_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(subsets, "_CACHED_ELEMENTS", 2 * 50)
    logits_NV, gold_N = random_logits(12, 9, 50)
    logits_NV += torch.tensor([0.0, 3e4, -3e4]).repeat(3)[:, None]
    together = select_candidates(logits_NV, gold_N, tau=0.9)
    alone = [select_candidates(logits_NV[i : i + 1], gold_N[i : i + 1], tau=0.9) for i in range(9)]
    assert_equal(together, CandidateSets.concatenate(alone))


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
    assert_equal(cut(empty, 0.5), empty)
    assert_equal(empty.rows(torch.zeros(0, dtype=torch.int64)), empty)
    empty.check(20)


def test_sets_recorded_in_inference_mode_can_be_cut_outside():
    subsets._mass_table.cache_clear()
    logits_NV, gold_N = random_logits(12, 4, 50)
    with torch.inference_mode():
        recorded = select_candidates(logits_NV, gold_N, tau=0.9)
    assert_equal(cut(recorded, 0.5), select_candidates(logits_NV, gold_N, tau=0.5))


def test_rows_and_concatenate_take_sets_apart_and_together():
    logits_NV, gold_N = random_logits(13, 9, 60)
    sets = select_candidates(logits_NV, gold_N, tau=0.9)
    index = torch.tensor([8, 0, 3, 3])
    assert_equal(sets.rows(index), select_candidates(logits_NV[index], gold_N[index], tau=0.9))
    mask = gold_N % 2 == 0
    assert_equal(sets.rows(mask), select_candidates(logits_NV[mask], gold_N[mask], tau=0.9))
    parts = [sets.rows(torch.arange(a, b)) for a, b in ((0, 4), (4, 4), (4, 9))]
    assert_equal(CandidateSets.concatenate(parts), sets)
    assert_equal(sets.to("cpu"), sets)
    assert sets.to("meta").token_ids.device.type == "meta"


def test_row_quantities_follow_their_definitions():
    sets = CandidateSets(
        offsets=torch.tensor([0, 1, 3, 6]),
        token_ids=torch.tensor([4, 2, 4, 0, 1, 2], dtype=torch.int32),
        logprobs=torch.tensor([0.0, -0.5, -3.0, -1.0, -1.5, -9.0], dtype=torch.float16),
        gold_ids=torch.tensor([4, 4, 1], dtype=torch.int32),
    )
    sets.check(5)
    assert sets.sizes.tolist() == [1, 2, 3]
    assert sets.row_ids.tolist() == [0, 1, 1, 2, 2, 2]
    assert sets.is_gold.tolist() == [True, False, True, False, True, False]
    assert sets.active().tolist() == [False, True, True]
    mass = [1.0, math.exp(-0.5) + math.exp(-3.0), math.exp(-1) + math.exp(-1.5) + math.exp(-9)]
    torch.testing.assert_close(
        sets.outside_mass(), 1 - torch.tensor(mass, dtype=torch.float64), atol=1e-11, rtol=0
    )
    assert sets.capped(mass[1] - 1e-9).tolist() == [False, False, True]
    assert sets.capped(mass[1] + 1e-9).tolist() == [False, True, True]


def test_outside_mass_is_never_negative():
    """Two tokens of stored probability one cannot be recorded, but must not break a report."""
    sets = CandidateSets(
        torch.tensor([0, 2]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.zeros(2, dtype=torch.float16),
        torch.tensor([0], dtype=torch.int32),
    )
    assert sets.outside_mass().tolist() == [0.0]


VALID = {
    "offsets": torch.tensor([0, 2, 3]),
    "token_ids": torch.tensor([5, 1, 3], dtype=torch.int32),
    "logprobs": torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float16),
    "gold_ids": torch.tensor([1, 3], dtype=torch.int32),
}


def test_check_accepts_valid_sets():
    CandidateSets(**VALID).check(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}, "offsets must be a torch.int64"),
        ({"logprobs": torch.tensor([-0.5, -2.0, -0.1])}, "logprobs must be a torch.float16"),
        ({"token_ids": torch.tensor([[5, 1, 3]], dtype=torch.int32)}, r"shape \(1, 3\)"),
        ({"offsets": torch.tensor([0, 3])}, "offsets must be one longer than gold_ids"),
        ({"logprobs": torch.tensor([-0.5, -2.0], dtype=torch.float16)}, "as long as token_ids"),
        ({"offsets": torch.tensor([1, 2, 3])}, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 4, 3])}, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 1, 2])}, "offsets must rise from 0"),
        ({"token_ids": torch.tensor([6, 1, 3], dtype=torch.int32)}, r"\[0, 6\), got 6"),
        ({"token_ids": torch.tensor([-1, 1, 3], dtype=torch.int32)}, r"\[0, 6\), got -1"),
        ({"gold_ids": torch.tensor([1, 9], dtype=torch.int32)}, r"gold_ids must .*got 9"),
        ({"gold_ids": torch.tensor([3, 3], dtype=torch.int32)}, "row 0 lacks 3"),
        ({"token_ids": torch.tensor([1, 1, 3], dtype=torch.int32)}, "distinct within a row"),
        (
            {"logprobs": torch.tensor([-0.5, math.nan, -1], dtype=torch.float16)},
            "finite and at most 0, got nan",
        ),
        (
            {"logprobs": torch.tensor([-0.5, -math.inf, -1], dtype=torch.float16)},
            "finite and at most 0, got -inf",
        ),
        (
            {"logprobs": torch.tensor([0.5, -1, -1], dtype=torch.float16)},
            "finite and at most 0, got 0.5",
        ),
        (
            {"logprobs": torch.tensor([-2, -0.5, -0.1], dtype=torch.float16)},
            "descend within a row",
        ),
    ],
)
def test_check_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        CandidateSets(**{**VALID, **changes}).check(6)


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
