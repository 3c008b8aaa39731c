"""The losses from all logits by kernels, against dense float64; on the CPU by Triton's interpreter.

Also how much less there is to do than for all logits and ``F.cross_entropy``: launches and bytes.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmc_ray.method.fast import backend_choice, dense_loss, fused_loss
from lrmc_ray.method.fast.backend_choice import (
    LossSize,
    cross_entropy_seconds,
    dense_kernel_seconds,
    kernel_backend,
    kernel_seconds,
)
from lrmc_ray.method.fast.dense_product import wide_product
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import (
    anchor_kl,
    draw_tail,
    restricted_cross_entropy,
)
from tests.support import kernel_losses
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
    error,
    inputs,
    sets_of,
    true_loss,
)
from tests.support.method_inputs import leaves, rng
from tests.support.operators import Launches, NothingRead

triton = pytest.importorskip("triton", reason="Triton is not installed")
dense_triton = pytest.importorskip("lrmc_ray.method.fast.dense_triton")

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log(0)

# Derivatives are rounded as well: twice the variance.
DENSE_LIMITS = {kind: limit if kind == FLOAT else 1.5 * limit for kind, limit in LIMITS.items()}
check = functools.partial(kernel_losses.check, way=dense_loss.dense_loss, limits=DENSE_LIMITS)
our_loss = functools.partial(kernel_losses.kernel_loss, way=dense_loss.dense_loss)


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_loss_and_gradients_of_every_head(options, tail, is_anchor):
    place = HEADS.index(options) + list(TAILS).index(tail) + is_anchor
    types = [(FLOAT,) * 3, (BRAIN,) * 3, (HALF,) * 3, (BRAIN, FLOAT, FLOAT)][place % 4]
    check(types, sets_of(RAGGED), TAILS[tail], is_anchor=is_anchor, **options)


def test_an_anchor_of_more_than_all_probability_follows_the_formula():
    """By hand made sets may have it: the mass that the base has is not 1."""
    sets = sets_of([3, 5, 2])
    sets.logprobs[:] = -0.5
    check((FLOAT,) * 3, sets, TAILS["tail"], is_anchor=True)


@pytest.mark.parametrize("tail", [None, 1100])
def test_more_tokens_candidates_and_samples_than_a_block(tail):
    sets = sets_of([1300, 1, 1100], 1400)
    drawn = None if tail is None else draw_tail(tail, 1400, seed=0, step=0)
    check((FLOAT,) * 3, sets, drawn, d=7, v=1400)


def test_rows_of_a_plan_rise_and_have_what_the_sets_have():
    sets = sets_of([5, 1, 12, 7], 30)
    plan = sets.planned().plan
    base = dict(zip(zip(sets.row_ids.tolist(), sets.token_ids.tolist(), strict=True),
                    sets.logprobs.tolist(), strict=True))  # fmt: skip
    for row, (a, b) in enumerate(itertools.pairwise(sets.offsets.tolist())):
        tokens = plan.tokens_E[a:b].tolist()
        assert tokens == sorted(sets.token_ids[a:b].tolist())
        assert plan.logprobs_E[a:b].tolist() == [base[row, token] for token in tokens]
    assert plan.renamed(lambda tokens: tokens + 3).tokens_E.tolist() == (plan.tokens_E + 3).tolist()


def test_small_losses_derivatives_of_float16_do_not_vanish():
    """With a factor of 1e-6 derivatives are 3e-8: zero, or one step of float16, by themselves."""
    hidden = (1e-4 * torch.randn(4, 20, generator=rng(0))).half()
    weight = (300 * torch.randn(30, 20, generator=rng(1))).half()
    sets = sets_of([30] * 4, 30)
    ours, trues = (
        leaves(hidden.to(DEVICE), weight.to(DEVICE)),
        leaves(*(x.double() for x in (hidden, weight))),
    )
    (1e-6 * our_loss(ours[0], OutputHead(ours[1]), sets)).sum().backward()
    (1e-6 * true_loss(trues[0], OutputHead(trues[1]), sets, None, is_anchor=False)).sum().backward()
    assert error(ours[0].grad, trues[0].grad) < 2.0**-9


@pytest.mark.parametrize("factor", [-4096.0, 0.0, 3e-5])
def test_factors_of_float16_are_divided_with_their_sign(factor):
    """As a scaler of gradients has them, so that nothing is infinite in between."""
    hidden, weight, bias = (x.half() for x in inputs(6))
    hidden, weight = hidden / 100, weight / 10
    ours, trues = (
        leaves(hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)),
        leaves(*(x.double() for x in (hidden, weight, bias))),
    )
    for (h, w, b), loss in (
        (ours, our_loss),
        (trues, functools.partial(true_loss, is_anchor=False)),
    ):
        (factor * loss(h, OutputHead(w, b), sets_of(RAGGED), None)).sum().backward()
    for our, true in zip(ours, trues, strict=True):
        if factor:
            # Steps of 6e-8 are felt by gradients of 1e-6.
            small = 6e-8 * math.sqrt(our.numel()) / float(true.grad.norm())
            assert error(our.grad, true.grad) < DENSE_LIMITS[HALF] + small
        else:
            assert not our.grad.any()


def test_gradients_go_where_they_belong():
    sets, (hidden, weight, _) = sets_of(RAGGED), (x.to(DEVICE) for x in inputs(6))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return our_loss(h, OutputHead(w), sets, TAILS["tail"]).sum()

    h, w = leaves(hidden, weight)
    loss(h, w).backward()
    truth = w.grad.clone()
    h, w = leaves(hidden, weight)
    w.grad = torch.ones_like(w)
    buffer = w.grad
    loss(h, w).backward()
    assert w.grad is buffer
    torch.testing.assert_close(buffer - 1, truth, atol=1e-6, rtol=1e-5)
    h, w = leaves(hidden, weight)  # of another layout
    w.grad = torch.zeros(20, V + 1, device=DEVICE)[:, 1:].T
    loss(h, w).backward()
    torch.testing.assert_close(w.grad, truth)
    h, w = leaves(hidden, weight)  # only returned
    torch.testing.assert_close(torch.autograd.grad(loss(h, w), w)[0], truth)
    assert w.grad is None
    h, base = leaves(hidden, weight)  # no leaf
    loss(h, base * 1.0).backward()
    torch.testing.assert_close(base.grad, truth)
    h, w = leaves(hidden, weight)  # twice
    value = loss(h, w)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(w.grad, 2 * truth)
    h, w = leaves(hidden, weight)
    loss(h, w).backward(inputs=[h])
    assert w.grad is None
    assert h.grad.any()
    (h,), frozen = leaves(hidden), nn.Parameter(weight, requires_grad=False)
    loss(h, frozen).backward()
    assert frozen.grad is None
    with torch.no_grad():
        assert not loss(*leaves(hidden, weight)).requires_grad


@pytest.mark.parametrize("is_anchor", [False, True], ids=["restricted", "anchor"])
@pytest.mark.parametrize("tail", ["no tail", "tail"])
def test_a_row_without_candidates_counts_nothing(tail, is_anchor):
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(3))
    results = []
    for kept in (torch.arange(3), torch.tensor([0, 2])):
        h, w = leaves(hidden[kept], weight)
        sets = sets_of([3, 0, 2]).rows(kept)
        loss_N = our_loss(h, OutputHead(w), sets, TAILS[tail], is_anchor=is_anchor)
        loss_N.sum().backward()
        results.append((loss_N, h.grad, w.grad))
    with_empty, without = results
    assert with_empty[0][1] == 0
    assert not with_empty[1][1].any()
    assert torch.equal(with_empty[0][[0, 2]], without[0])
    torch.testing.assert_close(with_empty[2], without[2])


def test_no_positions_and_one_candidate_have_loss_zero():
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(5))
    h, w = leaves(hidden[:0], weight)
    our_loss(h, OutputHead(w), sets_of([2]).rows(torch.arange(0)), TAILS["tail"]).sum().backward()
    assert h.grad.shape == (0, 20)
    assert not w.grad.any()
    for is_anchor in (False, True):
        h, w = leaves(hidden, weight)
        loss_N = our_loss(h, OutputHead(w), sets_of([1] * 5), is_anchor=is_anchor)
        loss_N.sum().backward()
        assert not loss_N.any()
        assert not h.grad.any()
        assert not w.grad.any()


def test_a_state_that_is_no_number_makes_no_number_of_a_loss():
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(3))
    hidden[1, 3] = math.nan
    for tail, is_anchor in itertools.product((None, TAILS["tail"]), (False, True)):
        sets = sets_of([3, 5, 2])
        loss_N = our_loss(hidden, OutputHead(weight), sets, tail, is_anchor=is_anchor)
        assert loss_N.isnan().tolist() == [False, True, False]


def test_two_runs_give_the_same_bits_and_nobody_waits():
    planned, tail = sets_of(RAGGED).planned().to(DEVICE), TAILS["drawn twice"].to(DEVICE)
    results = []
    for _ in range(2):
        tensors = leaves(*(x.to(DEVICE) for x in inputs(6)))
        for loss in (restricted_cross_entropy, anchor_kl):
            with NothingRead():
                head = OutputHead(tensors[1], tensors[2], softcap=4.0)
                loss(tensors[0], head, planned, tail=tail, backend="dense_kernel").backward()
        results.append([x.grad for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_and_columns_of_a_weight_may_lie_anywhere():
    """Torch multiplies, so what the other kernels refuse is taken."""
    sets, (hidden, weight, _) = sets_of(RAGGED), (x.to(DEVICE) for x in inputs(6))
    truth = our_loss(hidden, OutputHead(weight), sets)
    columns = weight.T.contiguous().T
    assert fused_loss.refusal(hidden, OutputHead(columns)) is not None
    assert fused_loss.refusal(hidden, OutputHead(columns), gathers=False) is None
    torch.testing.assert_close(our_loss(hidden, OutputHead(columns), sets), truth)
    with pytest.raises(ValueError, match=r"dense_kernel needs .* but an input is torch\.float64"):
        our_loss(hidden.double(), OutputHead(weight), sets)


# What there is to do


def cross_entropy(hidden, head, sets, reduction="sum"):
    logits_NV = F.linear(hidden, head.weight_VD, head.bias_V).float()
    return F.cross_entropy(head.shape_logits(logits_NV), sets.gold_ids.long(), reduction=reduction)


def cross_entropy_of_shares(hidden, head, sets):
    """The anchor's rival: all logits against the recorded probabilities, dense already."""
    logits_NV = F.linear(hidden, head.weight_VD, head.bias_V).float()
    shares_NV = logits_NV.new_empty(logits_NV.shape)
    return F.cross_entropy(head.shape_logits(logits_NV), shares_NV, reduction="sum")


def counted(loss, dtype, *, has_bias=False, reduction="sum", **options) -> Launches:
    """What a loss and its backward pass start."""
    sets = sets_of([30, 17, 40, 8], 64).planned()
    h, w, b = (
        torch.ones(size, dtype=dtype, requires_grad=True) for size in ((4, 16), (64, 16), 64)
    )
    for tensor in (w, b):
        tensor.grad = torch.zeros_like(tensor)
    head = OutputHead(w, b if has_bias else None, **options)
    more = {} if reduction == "sum" else {"reduction": reduction}
    with Launches((4, 64)) as launches:
        loss_N = loss(h, head, sets, **more)
        loss_N.backward(torch.ones_like(loss_N) if reduction == "none" else None)
    return launches


@pytest.fixture
def _on_a_gpu(monkeypatch):
    """Kernels are counted in place of being run, and so is what is one product on a GPU."""
    for kernel in ("row_losses", "row_derivatives"):
        monkeypatch.setattr(dense_triton, kernel, Launches.kernel(kernel))
    monkeypatch.setattr(dense_loss, "wide_product", Launches.as_one("mm", wide_product))


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_there_are_no_more_launches_and_bytes_than_cross_entropy_has(options, dtype, reduction):
    ours = counted(
        functools.partial(restricted_cross_entropy, backend="dense_kernel"), dtype,
        reduction=reduction, **options,
    )  # fmt: skip
    theirs = counted(cross_entropy, dtype, reduction=reduction, **options)
    assert ours.calls["row_losses"] == ours.calls["row_derivatives"] == 1
    assert ours.number < theirs.number, (ours.calls, theirs.calls)
    assert ours.peak <= theirs.peak
    if options or reduction != "sum":
        return
    half = dtype.itemsize == 2
    assert theirs.number == backend_choice._LOGIT_LAUNCHES[half]
    assert ours.number == backend_choice._DENSE_KERNEL_LAUNCHES + (dtype == HALF)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_an_anchor_has_no_more_launches_than_cross_entropy_of_probabilities(dtype):
    ours = counted(functools.partial(anchor_kl, backend="dense_kernel"), dtype)
    theirs = counted(cross_entropy_of_shares, dtype)
    assert ours.number < theirs.number
    assert ours.peak <= theirs.peak


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_what_auto_takes_is_never_slower_than_cross_entropy(dtype):
    """By the estimates of both, from one position to a million, one candidate to all tokens."""
    taken = set()
    for rows, hidden, vocabulary in itertools.product(
        (1, 16, 128, 2048, 2**20), (16, 576, 2560, 16_384), (8, 1000, 49_152, 262_144)
    ):
        for each in sorted({1, 2, 24, 256, 1024, vocabulary // 8, vocabulary}):
            if not 0 < each <= vocabulary:
                continue
            size = LossSize(rows, hidden, vocabulary, rows * each, dtype, longest=each)
            limit = cross_entropy_seconds(size)
            for gathers in (True, False):
                way = kernel_backend(size, gathers=gathers)
                taken.add(way)
                seconds = kernel_seconds if way == "kernel" else dense_kernel_seconds
                assert seconds(size) <= limit
            assert dense_kernel_seconds(size) <= limit
    assert taken == {"kernel", "dense_kernel"}


def test_bytes_of_both_by_hand():
    """1000 positions, 4096 tokens, bf16: all logits 42 bytes each; ours 10 and the candidates'."""
    size = LossSize(1000, 64, 4096, 24_000, BRAIN, longest=24)
    logits = 1000 * 4096
    products = logits * 64 * 0.0135e-12
    expected = 12 * 10e-6 + 42 * logits / 2.6e12 + products
    assert cross_entropy_seconds(size) == pytest.approx(expected)
    moved = 10 * logits + 24_000 * (2 * (4 + 32) + 32)
    expected = 7 * 10e-6 + moved / 2.6e12 + products
    assert dense_kernel_seconds(size) == pytest.approx(expected)
    full = LossSize(1000, 64, 4096, logits, FLOAT, longest=4096)
    expected = 7 * 10e-6 + 36 * logits / 2.6e12 + logits * 64 * 0.13e-12
    assert dense_kernel_seconds(full) == pytest.approx(expected)


def test_the_losses_go_this_way_where_they_are_asked_to():
    sets, (hidden, weight, bias) = sets_of(RAGGED).to(DEVICE), (x.to(DEVICE) for x in inputs(6))
    head, tail = OutputHead(weight, bias), TAILS["drawn twice"].to(DEVICE)
    for loss in (restricted_cross_entropy, anchor_kl):
        ours = loss(hidden, head, sets, tail=tail, backend="dense_kernel")
        torch.testing.assert_close(ours, loss(hidden, head, sets, tail=tail, backend="gather"))


def test_addresses_beyond_2_to_the_31_products_are_right():
    """Row 2^21 of 1025 tokens: memory is taken for the rows that are touched alone."""
    rows, tokens = 2**21 + 1, 1025
    wide = torch.empty(rows * tokens, device=DEVICE).view(rows, tokens)
    made = torch.empty(rows * tokens, device=DEVICE).view(rows, tokens)
    wide[-1] = torch.randn(tokens, generator=rng(0)).to(DEVICE)
    sets = sets_of([9], tokens).planned().to(DEVICE)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=DEVICE)
    offsets[-1] = 9
    gold = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    gold[-1] = sets.gold_ids[0]
    common = {
        "bias": wide, "offsets": offsets, "tokens": sets.plan.tokens_E,
        "logprobs": sets.plan.logprobs_E, "gold_ids": gold,
        "rows": torch.tensor([rows - 1], dtype=torch.int32, device=DEVICE),
        "outside": wide, "tail_ids": gold, "tail_logweights": wide, "num_tokens": tokens,
        "num_tail": 0, "logit_scale": 1.0, "softcap": 1.0, "IS_ANCHOR": False, "HAS_BIAS": False,
        "HAS_CAP": False, "HAS_TAIL": False, **dense_loss.TILE,
    }  # fmt: skip
    loss = torch.zeros(rows, device=DEVICE)
    state = torch.zeros(rows, 4, device=DEVICE)
    dense_triton.row_losses[(1,)](logits=wide, loss=loss, state=state, **common)
    (z,) = leaves(wide[-1].double())
    inside = z[sets.token_ids.long()]
    truth = inside.logsumexp(0) - z[int(gold[-1])]
    truth.backward()
    assert error(loss[-1], truth) < 1e-6
    dense_triton.row_derivatives[(1,)](
        logits=wide, state=state, upstream=torch.ones(rows, device=DEVICE), hidden=wide,
        dlogits=made, scaled=wide, rests=loss, num_hidden=0, hidden_stride=0, upstream_stride=1,
        DIVIDES=False, **common,
    )  # fmt: skip
    assert error(made[-1], z.grad) < 1e-6
