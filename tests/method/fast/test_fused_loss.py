"""The kernels' losses and gradients against dense float64; on the CPU by Triton's interpreter."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lrmc_ray.method.candidate_sets import CandidateSets
from lrmc_ray.method.fast import fused_loss, loss_launch, loss_plan, triton_support
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import (
    Tail,
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
    soft_cross_entropy,
)
from tests.support.kernel_losses import (
    BRAIN,
    DEVICE,
    FLOAT,
    HALF,
    HEADS,
    LIMITS,
    RAGGED,
    TAILS,
    V,
    check,
    error,
    inputs,
    sets_of,
    true_loss,
)
from tests.support.kernel_losses import kernel_loss as our_loss
from tests.support.method_inputs import leaves, rng
from tests.support.operators import NoHostSync

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log(0)


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_loss_and_gradients_of_every_head(options, tail, is_anchor):
    # Ways that the kernels are compiled for, each with another type.
    place = HEADS.index(options) + list(TAILS).index(tail) + is_anchor
    types = [(FLOAT,) * 3, (BRAIN,) * 3, (HALF,) * 3, (BRAIN, FLOAT, FLOAT)][place % 4]
    check(types, sets_of(RAGGED), TAILS[tail], is_anchor=is_anchor, **options)


def test_an_anchor_of_more_than_all_probability_follows_the_formula():
    """By hand made sets may have it; recorded ones sum to 1 with what is outside."""
    sets = sets_of([3, 5, 2])
    sets.logprobs[:] = -0.5
    assert not sets.outside_mass().any()
    check((FLOAT,) * 3, sets, TAILS["tail"], is_anchor=True)


@pytest.mark.parametrize("types", [(FLOAT,) * 2, (BRAIN,) * 2, (HALF, BRAIN)], ids=str)
def test_1024_candidates_and_sizes_that_are_no_powers_of_2(types):
    """The weight's gradient is left out: by the interpreter a token takes milliseconds."""
    sets = sets_of([1024, 1, 700], 1100)
    hidden, weight = (x.to(t) for x, t in zip(inputs(3, 100, 1100)[:2], types, strict=True))
    (ours,), (true,) = leaves(hidden.to(DEVICE)), leaves(hidden.double())
    loss_N = our_loss(ours, OutputHead(weight.to(DEVICE), softcap=3.0), sets)
    true_N = true_loss(true, OutputHead(weight.double(), softcap=3.0), sets, None, is_anchor=False)
    for values in (loss_N, true_N):
        values.sum().backward()
    assert error(loss_N, true_N) < 1e-6
    assert error(ours.grad, true.grad) < LIMITS[types[0]]


def test_a_tail_longer_than_a_block():
    check((FLOAT,) * 3, sets_of([2, 5], 1200), draw_tail(1100, 1200, seed=0, step=0), d=7, v=1200)


def test_tokens_of_many_entries_are_added_up_in_parts(monkeypatch):
    """A token is in every set, in four parts; others in two, or in one."""
    monkeypatch.setattr(loss_plan, "CHUNK", 3)
    sets = sets_of([4, 3, 1, 5, 2, 4, 3, 1, 2, 6], 8)
    sets.token_ids[sets.offsets[:-1]] = 7
    others = (sets.token_ids == 7) & ~torch.isin(torch.arange(len(sets.token_ids)), sets.offsets)
    sets.token_ids[others] = 3
    sets.gold_ids[:] = sets.token_ids[sets.offsets[:-1]]
    plan = sets.planned().plan
    assert plan.num_partial > 4
    for types in ((FLOAT,) * 3, (BRAIN,) * 3):
        tensors = [x.to(t) for x, t in zip(inputs(10, 130, 8), types, strict=True)]
        ours = leaves(*(x.to(DEVICE) for x in tensors))
        trues = leaves(*(x.double() for x in tensors))
        our_loss(ours[0], OutputHead(ours[1], ours[2]), sets).sum().backward()
        entries = (trues[0][sets.row_ids] * trues[1][sets.token_ids]).sum(1)
        entries = entries + trues[2][sets.token_ids]
        by_row = torch.split(entries, sets.sizes.tolist())
        sum(x.logsumexp(0) - x[0] for x in by_row).backward()
        for our, true in zip(ours, trues, strict=True):
            assert error(our.grad, true.grad) < LIMITS[our.dtype]


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_has_every_entry_once_and_in_order(seed):
    generator = rng(seed)
    sizes = torch.randint(1, 9, (200,), generator=generator).tolist()
    sets = sets_of(sizes, 12, seed)
    plan = sets.planned().plan
    assert sorted(sizes, reverse=True) == sets.sizes[plan.rows_N.long()].tolist()
    assert plan.longest == max(sizes)
    assert sorted(plan.by_token.entries_E.tolist()) == list(range(len(sets.token_ids)))
    order = plan.by_token
    assert torch.equal(order.positions_E.long(), sets.row_ids[order.entries_E.long()])
    tokens_U = torch.unique(sets.token_ids)
    assert torch.equal(order.tokens_U(sets.token_ids), tokens_U)
    assert torch.equal(tokens_U[order.columns_E()], sets.token_ids)
    assert order.bounds_U.diff().tolist() == torch.bincount(sets.token_ids)[tokens_U].tolist()
    torch.testing.assert_close(plan.outside_N.double(), sets.outside_mass(), rtol=1e-6, atol=0)
    bounds = plan.bounds_X.tolist()
    chunks = [plan.by_token.entries_E[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    by_token: dict[int, list[list[int]]] = {}
    for chunk in chunks:
        assert 1 <= len(chunk) <= loss_plan.CHUNK
        (token,) = set(sets.token_ids[chunk].tolist())
        by_token.setdefault(token, []).append(chunk)
    assert list(by_token) == sorted(set(sets.token_ids.tolist()))
    for token, parts in by_token.items():
        expected = (sets.token_ids == token).nonzero()[:, 0].tolist()
        assert [entry for part in parts for entry in part] == expected
        assert all(len(part) == loss_plan.CHUNK for part in parts[:-1])
    several = {token: parts for token, parts in by_token.items() if len(parts) > 1}
    assert several
    assert sets.token_ids[plan.split_entries.long()].tolist() == list(several)
    assert plan.split_bounds.diff().tolist() == [len(parts) for parts in several.values()]
    partial = [place for place in plan.partial_X.tolist() if place >= 0]
    assert partial == list(range(plan.num_partial)) == list(range(int(plan.split_bounds[-1])))
    for place, chunk in zip(plan.partial_X.tolist(), chunks, strict=True):
        assert (place >= 0) == (int(sets.token_ids[chunk[0]]) in several)


def test_a_plan_goes_where_its_sets_go():
    sets = sets_of([2, 3]).planned()
    assert sets.planned() is sets
    assert sets.to("meta").plan.rows_N.device.type == "meta"
    assert sets.to("meta").plan.longest == 3
    assert sets.rows(torch.tensor([0])).plan is None


def by_way(way: str, monkeypatch) -> None:
    """Has positions go through parts or through dense tiles, where they would not by their size."""
    if way == "parts":
        monkeypatch.setattr(loss_plan, "LONG", 2)
        monkeypatch.setattr(loss_plan, "PART", 3)
    elif way == "tiles":
        monkeypatch.setattr(loss_plan, "FEWEST_SAVED", 0)


SHARED = [V, 30, 1, *[V - 3] * 15, 38, 2]
"""Sizes of which the largest sixteen share most of their tokens, and a tile of four do not."""


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
@pytest.mark.parametrize("tail", ["no tail", "all tokens", "drawn twice"])
@pytest.mark.parametrize("way", ["parts", "tiles"])
def test_positions_in_parts_and_tiles_have_the_same_loss(way, tail, is_anchor, monkeypatch):
    by_way(way, monkeypatch)
    sets = sets_of(RAGGED if way == "parts" else SHARED)
    plan = sets.planned().plan
    assert plan.num_apart == (4 if way == "parts" else 16)
    assert len(plan.parts.rows_L) == (4 if way == "parts" else 0)
    place = list(TAILS).index(tail) + is_anchor + 2 * (way == "parts")
    types = [(FLOAT,) * 3, (BRAIN,) * 3, (HALF,) * 3, (BRAIN, FLOAT, FLOAT)][place % 4]
    options = HEADS[(place + 1) % 4]
    check(types, sets, TAILS[tail], is_anchor=is_anchor, d=70, **options)


@pytest.mark.parametrize("way", ["parts", "tiles"])
def test_neither_parts_nor_tiles_change_a_bit_from_run_to_run(way, monkeypatch):
    by_way(way, monkeypatch)
    found = []
    for _ in range(2):
        tensors = leaves(*(x.to(DEVICE) for x in inputs(len(SHARED), 70)))
        head = OutputHead(tensors[1], tensors[2], softcap=4.0)
        loss_N = our_loss(tensors[0], head, sets_of(SHARED), TAILS["drawn twice"])
        loss_N.sum().backward()
        found.append([loss_N, *(x.grad for x in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_position_of_1024_candidates_is_in_parts_by_its_size():
    """Of 256 it is not; neither in tiles: too few rows of the weight would be saved."""
    sets = sets_of([1024, 257, 256, 3], 1100)
    plan = sets.planned().plan
    assert plan.parts.rows_L.tolist() == [0, 1]
    assert plan.parts.bounds_L.tolist() == [0, 16, 21]
    assert plan.parts.parts_P3[[0, 15, 16, 20]].tolist() == [
        [0, 0, 64], [0, 960, 1024], [1, 1024, 1088], [1, 1280, 1281],
    ]  # fmt: skip
    assert plan.rows_N.tolist() == [0, 1, 2, 3]
    assert plan.num_apart == 2
    assert not len(plan.tiles.rows_S)
    hidden, weight = (x.to(DEVICE) for x in inputs(4, 20, 1100)[:2])
    (ours,), (true,) = leaves(hidden), leaves(hidden.double().cpu())
    loss_N = our_loss(ours, OutputHead(weight), sets)
    true_N = true_loss(true, OutputHead(weight.double().cpu()), sets, None, is_anchor=False)
    for values in (loss_N, true_N):
        values.sum().backward()
    assert error(loss_N, true_N) < 1e-6
    assert error(ours.grad, true.grad) < LIMITS[FLOAT]


@pytest.mark.parametrize("seed", range(3))
def test_a_tile_has_every_candidate_once_and_halves_the_rows(seed, monkeypatch):
    monkeypatch.setattr(loss_plan, "FEWEST_SAVED", 0)
    monkeypatch.setattr(loss_plan, "COLUMNS", 8)
    sizes = torch.randint(1, V + 1, (75,), generator=rng(seed)).tolist()
    sets = sets_of(sizes, V, seed)
    plan = sets.planned().plan
    tiles, order = plan.tiles, sorted(range(75), key=lambda i: -sizes[i])
    rows_of_tile = tiles.rows_S.view(-1, 16).tolist()
    assert sorted(plan.rows_N.tolist()) == list(range(75))
    apart = [row for rows in rows_of_tile for row in rows if row >= 0]
    assert set(plan.rows_N[: plan.num_apart].tolist()) == set(apart)
    bounds = tiles.bounds_t.tolist()
    dense = []
    for first in range(0, 75, 16):
        rows = order[first : first + 16]
        parts = [set(sets.token_ids[sets.offsets[r] : sets.offsets[r + 1]].tolist()) for r in rows]
        tokens, entries = set().union(*parts), sum(map(len, parts))
        if 2 * (len(tokens) + 16) <= entries:
            dense.append((rows, parts, tokens))
    assert len(dense) == len(rows_of_tile) > 1
    for place, (rows, parts, tokens) in enumerate(dense):
        assert rows_of_tile[place] == rows + [-1] * (16 - len(rows))
        columns = slice(bounds[place], bounds[place + 1])
        assert sets.token_ids[tiles.entries_U[columns].long()].tolist() == sorted(tokens)
        for number, part in enumerate(parts):
            places = tiles.places_UT[columns, number]
            found = places[places >= 0].long()
            assert (sets.row_ids[found] == rows[number]).all()
            chosen = tiles.entries_U[columns][places >= 0].long()
            assert torch.equal(sets.token_ids[found], sets.token_ids[chosen])
            assert set(sets.token_ids[found].tolist()) == part
    blocks = [[t, c] for t, (a, b) in enumerate(itertools.pairwise(bounds)) for c in range(a, b, 8)]
    assert tiles.blocks_B2.tolist() == blocks


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
def test_factors_in_half_precision_are_multiplied_as_they_are_on_a_gpu(is_anchor, monkeypatch):
    """Forward in float16, which the interpreter can; by itself it takes float32 for every type."""
    by_way("tiles", monkeypatch)
    monkeypatch.setattr(loss_launch, "is_interpreted", lambda: False)
    assert not loss_launch.tail_tile(HALF, HALF)["WIDE"]
    assert not loss_launch.dense_tile(HALF, HALF)["WIDE"]
    assert loss_launch.tail_tile(HALF, is_gradient=True)["WIDE"]
    assert not loss_launch.tail_tile(BRAIN, is_gradient=True)["WIDE"]
    check((HALF,) * 3, sets_of(SHARED), TAILS["drawn twice"], is_anchor=is_anchor, d=70)


@triton.jit
def _multiply(left, right, target):
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    total = tl.load(target + places)
    factors = tl.load(left + places), tl.load(right + places)
    tl.store(target + places, product(factors[0], factors[1], total, False, tl.float16))


from lrmc_ray.method.fast.tail_triton import product  # noqa: E402  after the check for Triton


def test_a_derivative_goes_in_as_two_numbers_of_half_precision():
    """22 bits of it are kept, where one number would keep 11."""
    generator = rng(2)
    left, total = (torch.randn(16, 16, generator=generator) for _ in range(2))
    right = torch.randn(16, 16, generator=generator).half()
    truth = total.double() + left.double() @ right.double()
    target = total.clone().to(DEVICE)
    _multiply[(1,)](left.to(DEVICE), right.to(DEVICE), target)
    assert error(target, truth) < 1e-6
    assert error(total + left.half().float() @ right.float(), truth) > 5e-5


def test_what_lies_apart_in_memory_is_read_right():
    """A bias of every second number, hidden states in columns, sets cut out of wider tensors."""
    sets, (hidden, weight, bias) = sets_of(RAGGED), (x.to(DEVICE) for x in inputs(6))
    truth = our_loss(hidden, OutputHead(weight, bias), sets)
    wide = torch.stack((bias, -bias), dim=1)
    apart = CandidateSets(
        sets.offsets, *(torch.stack((x, x), dim=1)[:, 0] for x in
                        (sets.token_ids, sets.logprobs, sets.gold_ids))
    )  # fmt: skip
    head = OutputHead(torch.cat((weight, weight), dim=1)[:, :20], wide[:, 0])
    assert torch.equal(our_loss(hidden.T.contiguous().T, head, apart), truth)


@pytest.mark.parametrize("way", ["alone", "parts", "tiles"])
def test_addresses_beyond_2_to_the_31_elements_are_right(way, monkeypatch):
    """Weight and gradient as rows far apart, of which memory is taken for those alone that are
    touched."""
    by_way(way, monkeypatch)
    number, apart = 2100, 2**20
    sizes = [3, 1, 5] if way != "tiles" else [40] * 20  # the second tile is not full
    sets, tail = sets_of(sizes, V), draw_tail(9, V, seed=0, step=0)
    shift = number - V
    sets = CandidateSets(sets.offsets, sets.token_ids + shift, sets.logprobs, sets.gold_ids + shift)
    tail = Tail(tail.ids_R + shift, tail.logweights_R)
    hidden, weight, _ = (x.half() for x in inputs(len(sizes), 20, number))
    found = []
    for stride in (20, apart):
        spread, gradient = (
            torch.empty(number * stride, dtype=HALF, device=DEVICE).as_strided(
                (number, 20), (stride, 1)
            )
            for _ in range(2)
        )
        spread[shift:], gradient[shift:] = weight[shift:].to(DEVICE), 0.0
        parameter = nn.Parameter(spread)
        parameter.grad = gradient
        (h,) = leaves(hidden.to(DEVICE))
        loss_N = our_loss(h, OutputHead(parameter), sets, tail)
        loss_N.sum().backward()
        assert parameter.stride(0) == stride
        found.append((loss_N, h.grad, parameter.grad[shift:].contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_state_that_is_no_number_makes_no_number_of_a_loss():
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(3))
    hidden[1, 3] = math.nan
    for tail in (None, TAILS["tail"]):
        for is_anchor in (False, True):
            loss_N = our_loss(hidden, OutputHead(weight), sets_of([3, 5, 2]), tail,
                              is_anchor=is_anchor)  # fmt: skip
            assert loss_N.isnan().tolist() == [False, True, False]


def test_no_gradient_is_made_where_none_is_computed(monkeypatch):
    """Held-out losses: of a weight that needs one, too."""
    tensors, made = leaves(*(x.to(DEVICE) for x in inputs(2))), []
    original = fused_loss.candidate_loss

    def seen(*args):
        made.append(args[-1])
        return original(*args)

    monkeypatch.setattr(fused_loss, "candidate_loss", seen)
    with torch.no_grad():
        loss_N = our_loss(tensors[0], OutputHead(*tensors[1:]), sets_of([3, 9]), TAILS["tail"])
    again_N = our_loss(tensors[0], OutputHead(*tensors[1:]), sets_of([3, 9]), TAILS["tail"])
    assert made == [False, True]
    assert torch.equal(loss_N, again_N)


def test_one_candidate_gives_loss_and_gradient_zero_exactly():
    sets = sets_of([1] * 5)
    for is_anchor in (False, True):
        tensors = leaves(*(x.to(DEVICE) for x in inputs(5)))
        loss_N = our_loss(tensors[0], OutputHead(*tensors[1:]), sets, is_anchor=is_anchor)
        loss_N.sum().backward()
        assert not loss_N.any()
        assert all(not x.grad.any() for x in tensors)


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
@pytest.mark.parametrize("tail", ["no tail", "tail"])
def test_a_row_without_candidates_counts_nothing(tail, is_anchor):
    sizes = [3, 0, 2]
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(3))
    results = []
    for kept in (torch.arange(3), torch.tensor([0, 2])):
        h, w = leaves(hidden[kept], weight)
        sets = sets_of(sizes).rows(kept)
        loss_N = our_loss(h, OutputHead(w), sets, TAILS[tail], is_anchor=is_anchor)
        loss_N.sum().backward()
        results.append((loss_N, h.grad, w.grad))
    with_empty, without = results
    assert with_empty[0][1] == 0
    assert not with_empty[1][1].any()
    assert torch.equal(with_empty[0][[0, 2]], without[0])
    torch.testing.assert_close(with_empty[1][[0, 2]], without[1])
    torch.testing.assert_close(with_empty[2], without[2])


def test_no_positions_have_loss_zero():
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(1))
    for tail in TAILS.values():
        h, w = leaves(hidden[:0], weight)
        our_loss(h, OutputHead(w), sets_of([2]).rows(torch.arange(0)), tail).sum().backward()
        assert h.grad.shape == (0, 20)
        assert w.grad is None or not w.grad.any()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    sets = sets_of([7, 30])
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(2))
    for tail in (None, TAILS["tail"]):
        truth = true_loss(
            1e4 * hidden.double().cpu(), OutputHead(weight.double().cpu()), sets, tail,
            is_anchor=False,
        )  # fmt: skip
        torch.testing.assert_close(
            our_loss(1e4 * hidden, OutputHead(weight), sets, tail).double(), truth,
            rtol=1e-5, atol=1e-2,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    results = []
    for _ in range(2):
        tensors = leaves(*(x.to(DEVICE, dtype) for x in inputs(6, 70)))
        for is_anchor in (False, True):
            head = OutputHead(tensors[1], tensors[2], softcap=4.0)
            loss_N = our_loss(
                tensors[0], head, sets_of(RAGGED), TAILS["drawn twice"], is_anchor=is_anchor
            )
            (loss_N.sum() / 7).backward()
        results.append([loss_N, *(x.grad for x in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_added_where_the_operators_add_them():
    sets, (hidden, weight, _) = sets_of([3, 9]), (x.to(DEVICE) for x in inputs(2))
    tail = TAILS["tail"]

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return our_loss(h, OutputHead(w), sets, tail).sum()

    h, w = leaves(hidden, weight)
    loss(h, w).backward()
    truth = w.grad.clone()
    rows = torch.unique(torch.cat([sets.token_ids.long(), tail.ids_R]))
    untouched = ~torch.isin(torch.arange(V), rows)
    assert untouched.any()
    assert not truth[untouched].any()

    h, w = leaves(hidden, weight)  # a part of a flat buffer, whose columns are no neighbours
    flat = torch.ones(20, V + 1, device=DEVICE)
    w.grad = flat[:, 1:].T
    loss(h, w).backward()
    torch.testing.assert_close(flat[:, 1:].T - 1, truth, atol=1e-6, rtol=1e-5)
    assert (flat[:, 0] == 1).all()

    h, w = leaves(hidden, weight)
    w.grad = torch.ones_like(w)
    buffer = w.grad
    loss(h, w).backward(retain_graph=False)
    assert w.grad is buffer
    assert torch.equal(buffer[untouched], torch.ones_like(buffer[untouched]))
    torch.testing.assert_close(buffer - 1, truth, atol=1e-6, rtol=1e-5)

    h, w = leaves(hidden, weight)  # only returned
    torch.testing.assert_close(torch.autograd.grad(loss(h, w), w)[0], truth)
    assert w.grad is None

    padded = nn.Parameter(torch.cat([weight, weight], dim=1))  # no leaf, and rows further apart
    wide = torch.cat([hidden, hidden], dim=1)[:, :20]
    loss(wide, padded[:, :20]).backward()
    torch.testing.assert_close(padded.grad[:, :20], truth)
    assert not padded.grad[:, 20:].any()


def test_gradients_that_are_not_asked_for_are_not_made():
    sets, tensors = sets_of([3, 9]), tuple(x.to(DEVICE) for x in inputs(2))
    everything = leaves(*tensors)
    our_loss(everything[0], OutputHead(*everything[1:]), sets, TAILS["tail"]).sum().backward()
    for wanted in range(3):
        some = [x.clone().requires_grad_(place == wanted) for place, x in enumerate(tensors)]
        our_loss(some[0], OutputHead(*some[1:]), sets, TAILS["tail"]).sum().backward()
        for place, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert (one.grad is not None) == (place == wanted)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        loss_N = our_loss(tensors[0], OutputHead(*tensors[1:]), sets)
    assert not loss_N.requires_grad


def test_a_loss_by_kernels_does_not_wait_for_the_device():
    """Of planned sets, that is: without a plan the host has to make one."""
    planned, tail = sets_of([3, 9]).planned().to(DEVICE), TAILS["tail"].to(DEVICE)
    tensors = leaves(*(x.to(DEVICE) for x in inputs(2)))
    for loss in (restricted_cross_entropy, anchor_kl):
        with NoHostSync():
            head = OutputHead(*tensors[1:])
            loss(tensors[0], head, planned, tail=tail, backend="kernel").backward()
    assert all(x.grad.any() for x in tensors)


def test_the_losses_take_the_kernels_where_they_are_asked_to():
    sets, (hidden, weight, bias) = sets_of(RAGGED).to(DEVICE), (x.to(DEVICE) for x in inputs(6))
    head = OutputHead(weight, bias)
    tail = TAILS["drawn twice"].to(DEVICE)
    for loss in (restricted_cross_entropy, anchor_kl):
        ours = loss(hidden, head, sets, tail=tail, backend="kernel")
        torch.testing.assert_close(ours, loss(hidden, head, sets, tail=tail, backend="gather"))
    torch.testing.assert_close(
        soft_cross_entropy(hidden, head, sets, backend="kernel"),
        soft_cross_entropy(hidden, head, sets, backend="gather"),
    )
    for reduction in ("none", "mean"):
        options = {"reduction": reduction}
        torch.testing.assert_close(
            restricted_cross_entropy(hidden, head, sets, backend="kernel", **options),
            restricted_cross_entropy(hidden, head, sets, backend="gather", **options),
        )


def test_a_shared_tail_has_a_token_once():
    tail = Tail(torch.tensor([5, 2, 5, 9, 5]), torch.tensor([0.5, 0.1, 1.0, -3.0, 0.2]))
    shared = fused_loss.share_tail(*tail, 12)
    assert shared.ids_R.tolist() == [2, 5, 5, 5, 9]
    together = math.log(math.exp(0.5) + math.exp(1.0) + math.exp(0.2))
    expected = torch.tensor([0.1, together, -math.inf, -math.inf, -3.0])
    torch.testing.assert_close(shared.logweights_R, expected)
    assert shared.places_V.tolist() == [-1, -1, 0, -1, -1, 1, -1, -1, -1, 4, -1, -1]


def test_what_the_kernels_cannot_take_is_refused(monkeypatch):
    sets, (hidden, weight, _) = sets_of([3, 9]).to(DEVICE), (x.to(DEVICE) for x in inputs(2))

    def loss(h: Tensor, w: Tensor, backend="kernel") -> Tensor:
        return restricted_cross_entropy(h, OutputHead(w), sets, backend=backend)

    with pytest.raises(ValueError, match=r"an input is torch\.float64; take backend='auto'"):
        loss(hidden, weight.double())
    with pytest.raises(ValueError, match="the rows of the weight are not contiguous"):
        loss(hidden, weight.T.contiguous().T)
    monkeypatch.setattr(fused_loss, "WIDEST_HIDDEN", 19)
    with pytest.raises(ValueError, match=r"at most 19 elements .*, but the hidden size is 20"):
        loss(hidden, weight)
    monkeypatch.undo()
    monkeypatch.setattr(fused_loss, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        loss(hidden, weight)
    loss(hidden, weight, "auto")
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the hidden states are on cpu"):
        loss(hidden.cpu(), weight.cpu())


def test_where_triton_does_not_work_the_log_says_why(monkeypatch, caplog):
    """A kernel that cannot be started, here for want of a GPU, is no error but a warning, once."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    monkeypatch.setattr(triton_support.torch, "zeros", lambda *a, **o: 1 / 0)
    triton_support.works_on_gpu.cache_clear()
    assert not triton_support.works_on_gpu()
    assert not triton_support.works_on_gpu()
    triton_support.works_on_gpu.cache_clear()
    capability[0] = (7, 5)  # too little shared memory; nothing is tried
    assert not triton_support.works_on_gpu()
    triton_support.works_on_gpu.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == (
        "Triton cannot be used, so losses and steps take longer: division by zero"
    )


def test_auto_leaves_the_interpreter_alone(monkeypatch):
    """Without a GPU it is a way to test the kernels, not one to train."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight, _ = inputs(2)
    calls = []
    monkeypatch.setattr(fused_loss, "candidate_loss", lambda *args: calls.append(args))
    restricted_cross_entropy(hidden, OutputHead(weight), sets_of([3, 9]))
    assert not calls


def test_a_gradient_of_the_bias_is_added_once_to_what_is_there(monkeypatch):
    """Of a hidden size that several programs share, tokens of one and of several entries."""
    monkeypatch.setattr(loss_plan, "CHUNK", 2)
    sets = sets_of([4, 3, 1, 5, 2], 6).planned().to(DEVICE)
    hidden = torch.ones(5, 130, device=DEVICE)
    dlogits_E = torch.rand(15, generator=rng(3)).to(DEVICE)
    upstream_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)
    bias_V = torch.full((6,), 10.0, device=DEVICE)
    task = loss_launch.LossTask(OutputHead(hidden, bias_V), sets, None, is_anchor=False)
    rows = loss_launch.WeightRows(None, bias_V)
    loss_launch.add_candidates_to_weight(hidden, dlogits_E, upstream_N, task, rows)
    assert sets.plan.num_partial
    expected = torch.full((6,), 10.0, dtype=torch.float64)
    added = (dlogits_E * upstream_N[sets.row_ids]).double().cpu()
    expected.index_add_(0, sets.token_ids.long().cpu(), added)
    torch.testing.assert_close(bias_V.double().cpu(), expected)
