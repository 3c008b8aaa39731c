"""The operator under the losses: its logits, and where the weight's gradient goes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lrmc_ray.method.fast import candidate_logits as operator
from lrmc_ray.method.fast.candidate_logits import candidate_logits, token_logits
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.restricted_loss import Tail, draw_tail, restricted_cross_entropy
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from tests.support.method_inputs import head_problem, leaves, masked_cross_entropy

torch.set_num_threads(1)

BACKENDS = ("sparse", "gather", "dense")


def true_weight_gradient(hidden: Tensor, weight: Tensor, sets: CandidateSets) -> Tensor:
    (weight,) = leaves(weight)
    masked_cross_entropy(hidden @ weight.T, sets).sum().backward()
    assert weight.grad is not None
    return weight.grad


def sparse_loss(hidden: Tensor, weight: Tensor, sets: CandidateSets, **options) -> Tensor:
    return restricted_cross_entropy(hidden, OutputHead(weight), sets, backend="sparse", **options)


TAIL = draw_tail(40, 40, seed=0, step=0)


def test_a_leafs_gradient_is_added_to_in_place():
    """The buffer stays the same object: it may be a view into a flat one for all parameters."""
    hidden, weight, _, sets = head_problem()
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
        known = {x.untyped_storage().data_ptr() for x in args if is_strided(x)}
        result = func(*args, **(kwargs or {}))
        if is_strided(result) and result.untyped_storage().data_ptr() not in known:
            self.count += tuple(result.shape) in self.shapes
        return result


def is_strided(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
def test_a_micro_batch_makes_no_dense_tensor(tail):
    hidden, weight, _, sets = head_problem()
    hidden, weight = leaves(hidden, weight)
    if tail:  # a tail as long as the vocabulary would be dense itself
        tail = Tail(*(x[:9] for x in tail))
    weight.grad = torch.zeros_like(weight)
    with DenseTensors((40, 5), (7, 40)) as made:
        sparse_loss(hidden, weight, sets, tail=tail).backward()
    assert made.count == 0
    with DenseTensors((40, 5), (7, 40)) as made:  # the counter does count
        restricted_cross_entropy(hidden, OutputHead(weight), sets, backend="dense").backward()
    assert made.count > 0


@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
def test_every_way_to_the_weights_gradient_agrees(tail):
    hidden, weight, _, sets = head_problem()
    if tail:
        (w,) = leaves(weight)
        F.cross_entropy(hidden @ w.T, sets.gold_ids.long(), reduction="sum").backward()
        truth = w.grad
    else:
        truth = true_weight_gradient(hidden, weight, sets)

    def close(gradient: Tensor) -> None:
        torch.testing.assert_close(gradient, truth, atol=1e-10, rtol=0)

    (w,) = leaves(weight)
    sparse_loss(hidden, w, sets, tail=tail).backward()
    close(w.grad)

    (w,) = leaves(weight)  # only returned: grad stays as it was
    close(torch.autograd.grad(sparse_loss(hidden, w, sets, tail=tail), w)[0])
    assert w.grad is None

    (w,) = leaves(weight)
    sparse_loss(hidden, w, sets, tail=tail).backward(inputs=[w])
    close(w.grad)

    (base, delta) = leaves(weight - 1, torch.ones_like(weight))  # a merged weight is no leaf
    sparse_loss(hidden, base + delta, sets, tail=tail).backward()
    close(base.grad)
    close(delta.grad)

    (padded,) = leaves(torch.cat([weight, weight]))  # a padded vocabulary, used in part
    sparse_loss(hidden, padded[:40], sets, tail=tail).backward()
    close(padded.grad[:40])
    assert not padded.grad[40:].any()

    (w,) = leaves(weight)
    seen: list[Tensor] = []
    w.register_hook(seen.append)
    sparse_loss(hidden, w, sets, tail=tail).backward()
    close(sum(seen))
    close(w.grad)

    (w,) = leaves(weight)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    sparse_loss(hidden, w, sets, tail=tail).backward()
    close(seen[-1])

    for use_reentrant in (False, True):
        h, w = leaves(hidden, weight)
        checkpoint(
            lambda h, w: sparse_loss(h, w, sets, tail=tail), h, w, use_reentrant=use_reentrant
        ).backward()
        close(w.grad)

    (w,) = leaves(weight)
    loss = sparse_loss(hidden, w, sets, tail=tail)
    loss.backward(retain_graph=True)
    loss.backward()
    close(w.grad / 2)


def test_gradients_that_are_not_asked_for_are_not_made():
    hidden, weight, _, sets = head_problem()
    h, w = leaves(hidden, weight)
    sparse_loss(h, w, sets, tail=TAIL).backward(inputs=[h])
    assert h.grad is not None
    assert w.grad is None
    torch.autograd.grad(sparse_loss(h, w, sets, tail=TAIL), h)
    assert w.grad is None
    (h,) = leaves(hidden)
    sparse_loss(h, weight, sets).backward()  # a frozen head, as under LoRA
    true_h = leaves(hidden)[0]
    masked_cross_entropy(true_h @ weight.T, sets).sum().backward()
    torch.testing.assert_close(h.grad, true_h.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("has_grad", [False, True])
def test_tied_weights_get_both_parts(has_grad):
    """The embedding's part reaches the same tensor through autograd, before or after ours."""
    _, weight, _, sets = head_problem()
    input_ids_N = torch.tensor([3, 1, 4, 1, 5, 9, 2])

    def gradient(loss) -> Tensor:
        embedding = nn.Embedding(40, 5, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(weight)
        if has_grad:
            embedding.weight.grad = torch.ones_like(embedding.weight)
        loss(torch.tanh(embedding(input_ids_N)), embedding.weight).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(
        gradient(lambda h, w: sparse_loss(h, w, sets)),
        gradient(lambda h, w: masked_cross_entropy(h @ w.T, sets).sum()),
        atol=1e-10,
        rtol=0,
    )


def test_distributed_data_parallel_sees_the_gradient(tmp_path):
    hidden, weight, _, sets = head_problem()

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
            future: torch.futures.Future[Tensor] = torch.futures.Future()
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
    hidden, weight, _, sets = head_problem(3, n=30)
    truth = true_weight_gradient(hidden, weight, sets)
    for rows_per_block in (1, 3, 1000):
        monkeypatch.setattr(operator, "BLOCK_ELEMENTS", 5 * rows_per_block)
        (w,) = leaves(weight)
        sparse_loss(hidden, w, sets).backward()
        torch.testing.assert_close(w.grad, truth, atol=1e-10, rtol=0)


def test_bfloat16_errors_are_no_worse_than_torchs():
    """bf16 in, float64 truth on the same bf16 values; budget: torch's error + 1e-5 relative.

    Torch's way: logits in bf16, cross-entropy of them in float32.
    """
    hidden, weight, _, sets = head_problem(4, n=200, d=64, v=500, tau=0.9)
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
    hidden, weight, _, sets = head_problem()
    hidden, weight = hidden.to(types[0]), weight.to(types[1])
    truth = masked_cross_entropy(hidden.double() @ weight.double().T, sets).sum()
    h, w = leaves(hidden, weight)
    loss = sparse_loss(h, w, sets, tail=TAIL)
    loss.backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, *types)
    for backend in BACKENDS:
        loss = restricted_cross_entropy(h, OutputHead(w), sets, backend=backend)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_auto_takes_the_dense_product_only_where_sets_are_large():
    hidden, weight, _, _ = head_problem(v=40)
    wide = select_candidates(torch.zeros(7, 40), torch.zeros(7, dtype=torch.int64), tau=1.0)
    with DenseTensors((7, 40)) as made:
        candidate_logits(hidden, OutputHead(weight), wide)
    assert made.count == 1
    narrow = select_candidates(
        torch.zeros(7, 40), torch.zeros(7, dtype=torch.int64), tau=1.0, k_max=2
    )
    with DenseTensors((7, 40)) as made:
        candidate_logits(hidden, OutputHead(weight), narrow)
    assert made.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"softcap": 2.0}])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_way_to_the_logits_agrees_with_all_of_them(has_bias, options, dtype):
    hidden, weight, bias, sets = (
        x.to(dtype) if isinstance(x, Tensor) else x for x in head_problem()
    )
    head = OutputHead(weight, bias if has_bias else None, **options)
    wide = torch.promote_types(dtype, torch.float32)
    all_NV = head_logits(hidden, head, dtype=wide)
    for backend in ("auto", *BACKENDS):
        logits_E = candidate_logits(hidden, head, sets, backend=backend)
        assert logits_E.dtype == wide
        torch.testing.assert_close(logits_E, all_NV[sets.row_ids, sets.token_ids])
    some = torch.tensor([3, 39, 0])
    torch.testing.assert_close(token_logits(hidden, head, some), all_NV[:, some])
