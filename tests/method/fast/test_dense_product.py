"""Products in half precision against float64; on the CPU, by what torch has there."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lrmc_ray.method import candidate_sets
from lrmc_ray.method.candidate_sets import CandidateSets, row_gold
from lrmc_ray.method.fast import candidate_logits as operator
from lrmc_ray.method.fast.dense_product import factor_type, picked_products, wide_product
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import anchor_kl, draw_tail, restricted_cross_entropy
from tests.support.method_inputs import head_problem, leaves, masked_cross_entropy

torch.set_num_threads(1)

HALF, BRAIN = torch.float16, torch.bfloat16
UNIT = {BRAIN: 2.0**-8, HALF: 2.0**-11, torch.float32: 2.0**-24}
"""Largest relative error of one rounding."""
N, D, V = 60, 48, 90
HEADS = {
    "bare": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 3.0},
    "all": {"has_bias": True, "logit_scale": 1.7, "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(operator, "is_taken_on", lambda device: True)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, CandidateSets]:
    hidden, weight, bias, sets = head_problem(3, n=N, d=D, v=V, tau=0.9)
    return hidden.to(dtype), (weight / math.sqrt(D) * 2).to(dtype), bias.to(dtype), sets


def losses(name: str, tail, hidden: Tensor, head: OutputHead, sets: CandidateSets, backend: str):
    if name == "restricted":
        return restricted_cross_entropy(hidden, head, sets, tail=tail, backend=backend)
    return anchor_kl(hidden, head, sets, tail=tail, backend=backend)


class Derivatives:
    """Keeps the derivatives of the candidates' products, in float64."""

    def __init__(self, monkeypatch) -> None:
        self.found: list[Tensor] = []
        original = operator._SampledProduct.apply

        def seen(*args):
            products_E = original(*args)
            products_E.register_hook(self.found.append)
            return products_E

        monkeypatch.setattr(operator._SampledProduct, "apply", seen)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
@pytest.mark.parametrize("name", ["restricted", "anchor"])
@pytest.mark.parametrize("head_name", HEADS)
def test_each_number_is_as_near_as_its_roundings_allow(
    head_name, name, has_tail, dtype, monkeypatch
):
    """The loss to float32. Of a gradient: each derivative is rounded once, and the element once.

    A tail's products are in float32, so its part is rounded once, added to a gradient of ``dtype``.
    """
    hidden, weight, bias, sets = problem(dtype)
    options = dict(HEADS[head_name])
    has_bias = options.pop("has_bias", False)
    tail = draw_tail(20, V, seed=0, step=0) if has_tail else None
    derivatives = Derivatives(monkeypatch)
    trues = leaves(hidden.double(), weight.double(), bias.double())
    head = OutputHead(trues[1], trues[2] if has_bias else None, **options)
    truth = losses(name, tail, trues[0], head, sets, "sparse")
    truth.backward()

    ours = leaves(hidden, weight, bias)
    head = OutputHead(ours[1], ours[2] if has_bias else None, **options)
    loss = losses(name, tail, ours[0], head, sets, "dense")
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=2e-6)
    unit = UNIT[dtype]
    sizes_NV = torch.zeros(N, V, dtype=torch.float64)
    sizes_NV[sets.row_ids, sets.token_ids] = derivatives.found[0].abs()
    # float16 has steps of 2^-24, and what it rounds is divided by the largest.
    least = 2.0**-25 * float(sizes_NV.max()) if dtype == HALF else 0.0
    rounded_NV = unit * sizes_NV + least
    limits = rounded_NV @ trues[1].abs(), rounded_NV.T @ trues[0].abs()
    for our, true, limit in zip(ours, trues, limits, strict=False):
        assert our.grad.dtype == dtype
        parts = 2 if has_tail else 1  # a tail's part is rounded, and so is the sum
        allowed = limit + parts * unit * (true.grad.abs() + limit) + 2e-5 * true.grad.abs().max()
        if has_tail:
            allowed = allowed + unit * true.grad.abs().max()
        assert bool(((our.grad.double() - true.grad).abs() <= allowed).all())
        norm = float((our.grad.double() - true.grad).norm() / true.grad.norm())
        assert norm < unit  # two roundings of 0.43 of it in the mean square each, a third of a tail


def test_the_derivative_is_rounded_once_and_nothing_else_is(monkeypatch):
    """The same matrix products in float64, of derivatives that are rounded by hand."""
    derivatives = Derivatives(monkeypatch)
    hidden, weight, _, sets = problem(BRAIN)
    trues = leaves(hidden.double(), weight.double())
    losses("restricted", None, trues[0], OutputHead(trues[1]), sets, "sparse").backward()
    dlogits_NV = torch.zeros(N, V, dtype=torch.float64)
    dlogits_NV[sets.row_ids, sets.token_ids] = derivatives.found[0].bfloat16().double()
    ours = leaves(hidden, weight)
    losses("restricted", None, ours[0], OutputHead(ours[1]), sets, "dense").backward()
    expected = dlogits_NV @ weight.double(), dlogits_NV.T @ hidden.double()
    for our, value, true in zip(ours, expected, trues, strict=True):
        # Few derivatives lie beside a border of rounding, on whose other side float32 has them.
        near = (our.grad.double() - value).abs() <= 2.0**-8 * value.abs() + 1e-6
        assert int((~near).sum()) <= near.numel() // 200
        far = (our.grad.double() - true.grad).abs() > 2.0**-8 * true.grad.abs() + 1e-6
        assert int(far.sum()) > near.numel() // 20  # it is rounded at all


def test_small_derivatives_of_float16_do_not_vanish():
    """Thirty alike candidates and a factor of 1e-6: 3e-8 each, which float16 alone has as zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = (1e-4 * torch.randn(4, D, generator=generator)).half()
    weight = (300 * torch.randn(30, D, generator=generator)).half()
    sets = CandidateSets(
        torch.arange(0, 121, 30),
        torch.arange(30, dtype=torch.int32).repeat(4),
        torch.full((120,), -3.4, dtype=torch.float16),
        torch.tensor([3, 0, 29, 7], dtype=torch.int32),
    )
    ours, trues = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    for (h, w), backend in ((ours, "dense"), (trues, "sparse")):
        (1e-6 * restricted_cross_entropy(h, OutputHead(w), sets, backend=backend)).backward()
    error = (ours[0].grad.double() - trues[0].grad).norm() / trues[0].grad.norm()
    assert float(error) < 2.0**-10
    none = leaves(hidden, weight)  # a gradient of zeros divides by nothing
    (0.0 * restricted_cross_entropy(none[0], OutputHead(none[1]), sets, backend="dense")).backward()
    assert not none[0].grad.any()
    assert not none[1].grad.any()


@pytest.mark.parametrize("types", [(BRAIN, torch.float32), (torch.float32, BRAIN), (BRAIN, HALF)])
def test_factors_of_two_types_are_multiplied_in_float32(types):
    assert factor_type(*types) == torch.float32
    hidden, weight, _, sets = problem(torch.float64)
    hidden, weight = hidden.to(types[0]), weight.to(types[1])
    ours, trues = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    for (h, w), backend in ((ours, "dense"), (trues, "sparse")):
        restricted_cross_entropy(h, OutputHead(w), sets, backend=backend).backward()
    for our, true in zip(ours, trues, strict=True):
        limit = UNIT[our.dtype] * true.grad.abs() + 1e-5
        assert bool(((our.grad.double() - true.grad).abs() <= limit).all())


def test_float32_and_float64_give_what_autograd_gives(monkeypatch):
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        hidden, weight, _, sets = problem(dtype)
        found = []
        for taken in (True, False):
            monkeypatch.setattr(operator, "is_taken_on", lambda device, taken=taken: taken)
            h, w = leaves(hidden, weight)
            loss = restricted_cross_entropy(h, OutputHead(w), sets, backend="dense")
            loss.backward()
            found.append((loss, h.grad, w.grad))
        for our, their in zip(*found, strict=True):
            torch.testing.assert_close(our, their, rtol=limit, atol=limit)


def test_the_gradient_goes_where_the_operators_put_it():
    hidden, weight, _, sets = problem(BRAIN)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return restricted_cross_entropy(h, OutputHead(w), sets, backend="dense")

    (w,) = leaves(weight)
    value = loss(hidden, w)
    with Made() as made:
        value.backward()
    truth = w.grad.clone()
    assert len(made.products) == 1  # nothing is made of the hidden states' gradient
    (w,) = leaves(weight)  # only returned
    assert torch.equal(torch.autograd.grad(loss(hidden, w), w)[0], truth)
    assert w.grad is None
    (w,) = leaves(weight)
    flat = torch.zeros(D, V + 1, dtype=BRAIN)
    w.grad = flat[:, 1:].T
    loss(hidden, w).backward()
    torch.testing.assert_close(flat[:, 1:].T, truth)
    assert not flat[:, 0].any()
    (base,) = leaves(weight)  # no leaf
    loss(hidden, base * 1.0).backward()
    torch.testing.assert_close(base.grad, truth)
    (h,), frozen = leaves(hidden), nn.Parameter(weight, requires_grad=False)
    loss(h, frozen).backward()
    assert frozen.grad is None
    h, w = leaves(hidden, weight)
    loss(h, w).backward(inputs=[h])
    assert w.grad is None
    assert h.grad.any()


class Made(TorchDispatchMode):
    """Bytes of the [N, V] tensors that operators make, and the types of matrix products."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.bytes = shapes, 0
        self.products: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            factors = [x for x in args if isinstance(x, Tensor)][-2:]
            self.products.append(tuple(x.dtype for x in factors))
        is_view = name in ("t", "permute", "detach", "transpose", "view") or name.endswith("_")
        if isinstance(made, Tensor) and tuple(made.shape) in self.shapes and not is_view:
            self.bytes += made.numel() * made.element_size()
        return made


def plain(hidden: Tensor, weight: Tensor, sets: CandidateSets) -> Tensor:
    logits_NV = F.linear(hidden, weight).float()
    return F.cross_entropy(logits_NV, sets.gold_ids.long(), reduction="sum")


def dense(hidden: Tensor, weight: Tensor, sets: CandidateSets) -> Tensor:
    return restricted_cross_entropy(hidden, OutputHead(weight), sets, backend="dense")


def test_a_gpu_has_less_to_do_than_for_all_logits_and_cross_entropy():
    """Less than a third of the bytes of [N, V], and as many products in the same types."""
    hidden, weight, _, sets = problem(BRAIN)
    seen, backward_products = {}, {}
    for method in (plain, dense):
        h, w = leaves(hidden, weight)
        w.grad = torch.zeros_like(w)
        with Made((N, V)) as forward:
            loss = method(h, w, sets)
        with Made((N, V)) as backward:
            loss.backward()
        seen[method] = forward.bytes + backward.bytes
        backward_products[method] = backward.products
    assert (seen[plain], seen[dense]) == (20 * N * V, 6 * N * V)
    assert backward_products[dense] == backward_products[plain] == [(BRAIN, BRAIN)] * 2


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_a_gpu_multiplies_factors_of_half_precision_as_they_are(dtype):
    """By tensors without content: no GPU is there."""
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(N, D, device="cuda", dtype=dtype)
        weight = torch.empty(V, D, device="cuda", dtype=dtype)
        with Made((N, V), (V, D), (D, V)) as made:
            assert wide_product(hidden, weight.T).dtype == torch.float32
    assert made.products == [(dtype, dtype)]
    assert made.bytes == 4 * N * V


def test_a_product_in_half_precision_is_one_in_float32():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 300, generator=generator).bfloat16()
    right = torch.randn(300, 7, generator=generator).bfloat16()
    exact = left.double() @ right.double()
    sizes = left.double().abs() @ right.double().abs()
    found = wide_product(left, right)
    assert found.dtype == torch.float32
    assert bool(((found - exact).abs() <= 300 * 2.0**-24 * sizes).all())
    hidden, weight = left, right.T.contiguous()
    rows, tokens = torch.tensor([0, 0, 4]), torch.tensor([6, 2, 1], dtype=torch.int32)
    picked_E = picked_products(hidden, weight, rows, tokens)
    torch.testing.assert_close(picked_E, found[rows, tokens.long()])


def test_gold_by_sums_is_gold_by_its_place():
    _, _, _, sets = problem(BRAIN)
    values = torch.randn(len(sets.token_ids), generator=torch.Generator().manual_seed(0))
    upstream = torch.rand(N, generator=torch.Generator().manual_seed(1))
    found = []
    for way in (row_gold, candidate_sets._row_gold_by_sums):
        (v,) = leaves(values)
        gold_N = way(v, sets)
        (gold_N * upstream).sum().backward()
        found.append((gold_N, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    truth = masked_cross_entropy(torch.zeros(N, V), sets)
    assert torch.allclose(truth, sets.sizes.log())
