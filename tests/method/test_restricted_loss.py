"""The restricted loss and its operator against dense float64 computations and the reference."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lrmc_ray.method import candidate_logits as operator
from lrmc_ray.method.candidate_logits import candidate_logits
from lrmc_ray.method.restricted_loss import draw_tail, restricted_cross_entropy
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from tests.support import reference

# Shape suffixes: N = positions, D = hidden size, V = vocabulary size.

torch.set_num_threads(1)

BACKENDS = ("sparse", "gather", "dense")
HEADS = (
    {},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"bias": True, "logit_scale": 1.7, "softcap": 5.0},
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0, n: int = 7, d: int = 5, v: int = 40, tau: float = 0.8):
    """Hidden states, head weight and bias in float64, and sets recorded by another model."""
    generator = rng(seed)
    hidden_ND = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(v, d, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(v, generator=generator, dtype=torch.float64)
    recorded_NV = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    gold_N = torch.randint(v, (n,), generator=generator)
    return hidden_ND, weight_VD, bias_V, select_candidates(recorded_NV, gold_N, tau=tau)


def dense_logits(hidden_ND, weight_VD, bias_V=None, logit_scale=1.0, softcap=None) -> Tensor:
    logits_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    logits_NV = logits_NV * logit_scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def masked_cross_entropy(logits_NV: Tensor, sets: CandidateSets) -> Tensor:
    """[N], all logits, those outside S at -inf, and torch's own cross-entropy."""
    is_outside_NV = torch.ones_like(logits_NV, dtype=torch.bool)
    is_outside_NV[sets.row_ids, sets.token_ids] = False
    masked_NV = logits_NV.masked_fill(is_outside_NV, -math.inf)
    return F.cross_entropy(masked_NV, sets.gold_ids.long(), reduction="none")


def reference_rows(sets: CandidateSets) -> list[reference.Row]:
    return [
        reference.Row(sets.token_ids[a:b].numpy(), sets.logprobs[a:b].numpy(), int(gold))
        for (a, b), gold in zip(
            itertools.pairwise(sets.offsets.tolist()), sets.gold_ids, strict=True
        )
    ]


def gold_alone(sets: CandidateSets) -> CandidateSets:
    logprobs = torch.full(sets.gold_ids.shape, -0.1, dtype=torch.float16)
    return CandidateSets(torch.arange(sets.num_rows + 1), sets.gold_ids, logprobs, sets.gold_ids)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_equal_the_dense_masked_computation(backend, head):
    *tensors, sets = problem()
    hidden, weight, bias = leaves(*tensors)
    options = {**head, "bias_V": bias if head.get("bias") else None}
    options.pop("bias", None)
    loss = restricted_cross_entropy(hidden, weight, sets, backend=backend, **options)
    loss.backward()

    true_hidden, true_weight, true_bias = leaves(*tensors)
    options["bias_V"] = true_bias if head.get("bias") else None
    truth = masked_cross_entropy(dense_logits(true_hidden, true_weight, **options), sets).sum()
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(hidden.grad, true_hidden.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.grad, true_weight.grad, rtol=0, atol=1e-10)
    if head.get("bias"):
        torch.testing.assert_close(bias.grad, true_bias.grad, rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0.05, 1.0), n=st.integers(1, 9))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_loss_and_logit_gradient_follow_the_reference(seed, tau, n):
    """With the identity as head, hidden states are logits and their gradient the logits'."""
    _, _, _, sets = problem(seed, n=n, v=30, tau=tau)
    logits_NV = torch.randn(n, 30, generator=rng(seed), dtype=torch.float64, requires_grad=True)
    identity = torch.eye(30, dtype=torch.float64)
    loss = restricted_cross_entropy(logits_NV, identity, sets, backend="sparse")
    loss.backward()
    rows = reference_rows(sets)
    assert loss.item() == pytest.approx(
        reference.restricted_loss(logits_NV.detach().numpy(), rows), abs=1e-10
    )
    np.testing.assert_allclose(
        logits_NV.grad.numpy(),
        reference.restricted_loss_gradient(logits_NV.detach().numpy(), rows),
        atol=1e-12,
    )


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, with_tail):
    *tensors, sets = problem(1, n=4, d=3, v=12)
    tail = draw_tail(5, 12, seed=0, step=0) if with_tail else (None, None)

    def each(hidden, weight, bias):
        return restricted_cross_entropy(
            hidden,
            weight,
            sets,
            bias_V=bias,
            tail_ids=tail[0],
            tail_logweights=tail[1],
            logit_scale=0.7,
            softcap=4.0,
            reduction="none",
            backend=backend,
        )

    assert torch.autograd.gradcheck(each, leaves(*tensors))


def test_reductions():
    """The mean counts every row, also one whose only candidate is gold."""
    hidden, weight, _, sets = problem()
    sets = CandidateSets.concatenate(
        [sets.rows(torch.arange(6)), gold_alone(sets).rows(torch.tensor([6]))]
    )
    each = restricted_cross_entropy(hidden, weight, sets, reduction="none")
    torch.testing.assert_close(each, masked_cross_entropy(hidden @ weight.T, sets))
    assert (each == 0).sum() == 1
    total = restricted_cross_entropy(hidden, weight, sets)
    mean = restricted_cross_entropy(hidden, weight, sets, reduction="mean")
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / 7)


def test_one_candidate_gives_loss_and_gradient_zero_exactly():
    *tensors, sets = problem()
    alone = gold_alone(sets)
    hidden, weight, bias = leaves(*tensors)
    loss_N = restricted_cross_entropy(
        hidden, weight, alone, bias_V=bias, reduction="none", backend="sparse"
    )
    loss_N.sum().backward()
    assert not loss_N.any()
    for x in (hidden, weight, bias):
        assert not x.grad.any()


def test_the_order_of_candidates_is_irrelevant():
    hidden, weight, _, sets = problem()
    keys = torch.rand(sets.token_ids.shape, generator=rng(0)) + sets.row_ids
    order = keys.argsort()
    shuffled = CandidateSets(
        sets.offsets, sets.token_ids[order], sets.logprobs[order], sets.gold_ids
    )
    for backend in BACKENDS:
        torch.testing.assert_close(
            restricted_cross_entropy(hidden, weight, shuffled, backend=backend),
            restricted_cross_entropy(hidden, weight, sets, backend=backend),
        )


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, _, sets = problem()
    shifted = restricted_cross_entropy(
        hidden, weight, sets, bias_V=torch.full((40,), 1e4, dtype=torch.float64)
    )
    torch.testing.assert_close(
        shifted, restricted_cross_entropy(hidden, weight, sets), rtol=0, atol=1e-8
    )
    huge = restricted_cross_entropy(1e5 * hidden, weight, sets)
    truth = masked_cross_entropy(1e5 * hidden @ weight.T, sets).sum()
    torch.testing.assert_close(huge, truth)


def test_no_positions_have_loss_zero():
    hidden, weight, _, sets = problem()
    none = sets.rows(torch.zeros(0, dtype=torch.int64))
    tail_ids, tail_logweights = draw_tail(5, 40, seed=0, step=0)
    for backend, tail in itertools.product(BACKENDS, ({}, {"tail_ids": tail_ids})):
        h, w = leaves(hidden[:0], weight)
        if tail:
            tail["tail_logweights"] = tail_logweights
        loss = restricted_cross_entropy(h, w, none, backend=backend, **tail)
        loss.backward()
        assert loss.item() == 0.0
        assert h.grad.shape == (0, 5)
        assert w.grad is None or not w.grad.any()


# Where the weight's gradient goes


def true_weight_gradient(hidden: Tensor, weight: Tensor, sets: CandidateSets) -> Tensor:
    (weight,) = leaves(weight)
    masked_cross_entropy(hidden @ weight.T, sets).sum().backward()
    return weight.grad


def sparse_loss(hidden: Tensor, weight: Tensor, sets: CandidateSets, **options) -> Tensor:
    return restricted_cross_entropy(hidden, weight, sets, backend="sparse", **options)


TAIL = dict(zip(("tail_ids", "tail_logweights"), draw_tail(40, 40, seed=0, step=0), strict=True))


def test_a_leafs_gradient_is_added_to_in_place():
    """The buffer stays the same object: it may be a view into a flat one for all parameters."""
    hidden, weight, _, sets = problem()
    flat = torch.arange(300.0, dtype=torch.float64)
    (weight,) = leaves(weight)
    weight.grad = flat[100:].view(40, 5)
    buffer = weight.grad
    sparse_loss(hidden, weight, sets).backward()
    assert weight.grad is buffer
    added = flat - torch.arange(300.0, dtype=torch.float64)
    assert not added[:100].any()
    torch.testing.assert_close(
        added[100:].view(40, 5), true_weight_gradient(hidden, weight, sets), atol=1e-10, rtol=0
    )


class DenseTensors(TorchDispatchMode):
    """Counts the tensors of given shapes that operators make, other than views or in place."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if _is_strided(x)}
        result = func(*args, **(kwargs or {}))
        if _is_strided(result) and result.untyped_storage().data_ptr() not in known:
            self.count += tuple(result.shape) in self.shapes
        return result


def _is_strided(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


@pytest.mark.parametrize("tail", [{}, TAIL])
def test_a_micro_batch_makes_no_dense_tensor(tail):
    hidden, weight, _, sets = problem()
    hidden, weight = leaves(hidden, weight)
    if tail:  # a tail as long as the vocabulary would be dense itself
        tail = {name: x[:9] for name, x in tail.items()}
    weight.grad = torch.zeros_like(weight)
    with DenseTensors((40, 5), (7, 40)) as made:
        sparse_loss(hidden, weight, sets, **tail).backward()
    assert made.count == 0
    with DenseTensors((40, 5), (7, 40)) as made:  # the counter does count
        restricted_cross_entropy(hidden, weight, sets, backend="dense").backward()
    assert made.count > 0


@pytest.mark.parametrize("tail", [{}, TAIL])
def test_every_way_to_the_weights_gradient_agrees(tail):
    hidden, weight, _, sets = problem()
    if tail:
        (w,) = leaves(weight)
        F.cross_entropy(hidden @ w.T, sets.gold_ids.long(), reduction="sum").backward()
        truth = w.grad
    else:
        truth = true_weight_gradient(hidden, weight, sets)

    def close(gradient: Tensor) -> None:
        torch.testing.assert_close(gradient, truth, atol=1e-10, rtol=0)

    (w,) = leaves(weight)
    sparse_loss(hidden, w, sets, **tail).backward()
    close(w.grad)

    (w,) = leaves(weight)  # only returned: grad stays as it was
    close(torch.autograd.grad(sparse_loss(hidden, w, sets, **tail), w)[0])
    assert w.grad is None

    (w,) = leaves(weight)
    sparse_loss(hidden, w, sets, **tail).backward(inputs=[w])
    close(w.grad)

    (base, delta) = leaves(weight - 1, torch.ones_like(weight))  # a merged weight is no leaf
    sparse_loss(hidden, base + delta, sets, **tail).backward()
    close(base.grad)
    close(delta.grad)

    (padded,) = leaves(torch.cat([weight, weight]))  # a padded vocabulary, used in part
    sparse_loss(hidden, padded[:40], sets, **tail).backward()
    close(padded.grad[:40])
    assert not padded.grad[40:].any()

    (w,) = leaves(weight)
    seen = []
    w.register_hook(seen.append)
    sparse_loss(hidden, w, sets, **tail).backward()
    close(sum(seen))
    close(w.grad)

    (w,) = leaves(weight)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    sparse_loss(hidden, w, sets, **tail).backward()
    close(seen[-1])

    for use_reentrant in (False, True):
        h, w = leaves(hidden, weight)
        checkpoint(
            lambda h, w: sparse_loss(h, w, sets, **tail), h, w, use_reentrant=use_reentrant
        ).backward()
        close(w.grad)

    (w,) = leaves(weight)
    loss = sparse_loss(hidden, w, sets, **tail)
    loss.backward(retain_graph=True)
    loss.backward()
    close(w.grad / 2)


def test_gradients_that_are_not_asked_for_are_not_made():
    hidden, weight, _, sets = problem()
    h, w = leaves(hidden, weight)
    sparse_loss(h, w, sets, **TAIL).backward(inputs=[h])
    assert h.grad is not None
    assert w.grad is None
    torch.autograd.grad(sparse_loss(h, w, sets, **TAIL), h)
    assert w.grad is None
    (h,) = leaves(hidden)
    sparse_loss(h, weight, sets).backward()  # a frozen head, as under LoRA
    true_h = leaves(hidden)[0]
    masked_cross_entropy(true_h @ weight.T, sets).sum().backward()
    torch.testing.assert_close(h.grad, true_h.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("has_grad", [False, True])
def test_tied_weights_get_both_parts(has_grad):
    """The embedding's part reaches the same tensor through autograd, before or after ours."""
    _, weight, _, sets = problem()
    input_ids_N = torch.tensor([3, 1, 4, 1, 5, 9, 2])

    def gradient(loss) -> Tensor:
        embedding = nn.Embedding(40, 5, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(weight)
        if has_grad:
            embedding.weight.grad = torch.ones_like(embedding.weight)
        loss(torch.tanh(embedding(input_ids_N)), embedding.weight).backward()
        return embedding.weight.grad

    torch.testing.assert_close(
        gradient(lambda h, w: sparse_loss(h, w, sets)),
        gradient(lambda h, w: masked_cross_entropy(h @ w.T, sets).sum()),
        atol=1e-10,
        rtol=0,
    )


def test_distributed_data_parallel_sees_the_gradient(tmp_path):
    hidden, weight, _, sets = problem()

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, hidden: Tensor) -> Tensor:
            return sparse_loss(hidden, self.weight, sets)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Head())
        reduced = []

        def record(state, bucket):
            reduced.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, record)
        for _ in range(2):
            model.zero_grad()
            model(hidden).backward()
            truth = true_weight_gradient(hidden, weight, sets)
            torch.testing.assert_close(reduced[-1].view(40, 5), truth, atol=1e-10, rtol=0)
            torch.testing.assert_close(model.module.weight.grad, truth, atol=1e-10, rtol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_blocks_of_weight_rows_add_up(monkeypatch):
    hidden, weight, _, sets = problem(3, n=30)
    truth = true_weight_gradient(hidden, weight, sets)
    for rows_per_block in (1, 3, 1000):
        monkeypatch.setattr(operator, "_CHUNK_ELEMENTS", 5 * rows_per_block)
        (w,) = leaves(weight)
        sparse_loss(hidden, w, sets).backward()
        torch.testing.assert_close(w.grad, truth, atol=1e-10, rtol=0)


# Precision, types and sizes


def test_bfloat16_errors_are_no_worse_than_torchs():
    """bf16 in, float64 truth on the same bf16 values; budget: torch's error + 1e-5 relative.

    Torch's way: logits in bf16, cross-entropy of them in float32.
    """
    hidden, weight, _, sets = problem(4, n=200, d=64, v=500, tau=0.9)
    hidden, weight = hidden.bfloat16(), weight.bfloat16() / 4
    true_hidden, true_weight = leaves(hidden.double(), weight.double())
    truth = masked_cross_entropy(true_hidden @ true_weight.T, sets).sum()
    truth.backward()
    torch_hidden, torch_weight = leaves(hidden, weight)
    torchs = masked_cross_entropy((torch_hidden @ torch_weight.T).float(), sets).sum()
    torchs.backward()
    our_hidden, our_weight = leaves(hidden, weight)
    ours = sparse_loss(our_hidden, our_weight, sets)
    ours.backward()

    def error(value: Tensor, true_value: Tensor) -> float:
        return ((value.double() - true_value).norm() / true_value.norm()).item()

    assert ours.dtype == torch.float32
    assert error(ours, truth) <= error(torchs, truth) + 1e-5
    assert our_hidden.grad.dtype == our_weight.grad.dtype == torch.bfloat16
    for our, their, true in (
        (our_hidden, torch_hidden, true_hidden),
        (our_weight, torch_weight, true_weight),
    ):
        assert error(our.grad, true.grad) <= error(their.grad, true.grad) + 1e-5
        assert error(our.grad, true.grad) < 3e-3  # rounding to bf16 alone costs 1.7e-3


@pytest.mark.parametrize(
    "types", list(itertools.product((torch.float32, torch.bfloat16), repeat=2))
)
def test_hidden_states_and_weight_may_differ_in_type(types):
    hidden, weight, _, sets = problem()
    hidden, weight = hidden.to(types[0]), weight.to(types[1])
    truth = masked_cross_entropy(hidden.double() @ weight.double().T, sets).sum()
    h, w = leaves(hidden, weight)
    loss = sparse_loss(h, w, sets, **TAIL)
    loss.backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, *types)
    for backend in BACKENDS:
        loss = restricted_cross_entropy(h, w, sets, backend=backend)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_auto_takes_the_dense_product_only_where_sets_are_large():
    hidden, weight, _, _ = problem(v=40)
    wide = select_candidates(torch.zeros(7, 40), torch.zeros(7, dtype=torch.int64), tau=1.0)
    with DenseTensors((7, 40)) as made:
        candidate_logits(hidden, weight, wide)
    assert made.count == 1
    narrow = select_candidates(
        torch.zeros(7, 40), torch.zeros(7, dtype=torch.int64), tau=1.0, k_max=2
    )
    with DenseTensors((7, 40)) as made:
        candidate_logits(hidden, weight, narrow)
    assert made.count == 0


def test_wrong_arguments_are_refused():
    hidden, weight, _, sets = problem()
    with pytest.raises(ValueError, match="one row per candidate set, got 6 rows and 7 sets"):
        restricted_cross_entropy(hidden[:6], weight, sets)
    with pytest.raises(ValueError, match=r"backend must be .* got 'fast'"):
        restricted_cross_entropy(hidden, weight, sets, backend="fast")
    with pytest.raises(ValueError, match=r"reduction must be .* got 'total'"):
        restricted_cross_entropy(hidden, weight, sets, reduction="total")
    with pytest.raises(ValueError, match="tail_ids need tail_logweights"):
        restricted_cross_entropy(hidden, weight, sets, tail_ids=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="tail_ids need tail_logweights"):
        restricted_cross_entropy(
            hidden, weight, sets, tail_ids=torch.tensor([1, 2]), tail_logweights=torch.zeros(3)
        )
