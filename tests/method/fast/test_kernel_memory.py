"""Kernels touch the elements of their tensors alone: every mask, by Triton's interpreter.

Nothing has a size that is a multiple of a block, and rows of weight and gradient have gaps. What a
lane without a task would read in place of nothing, token 0 and position 0, is no number.
"""

import math
import os

import pytest
import torch

from lrmc_ray.method.candidate_sets import CandidateSets, row_offsets
from lrmc_ray.method.fast import chunk_table, dense_loss, loss_plan, moclip_launch
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import anchor_kl, draw_tail, restricted_cross_entropy
from tests.support.kernel_memory import KernelMemory, addresses, spread
from tests.support.method_inputs import leaves, rng

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of log(0)
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter"),
]

V = 19
WAYS = {"alone": (9, [3, 1, 5, 2, 17]), "parts": (2, [3, 1, 7, 2, 6]), "tiles": (9, [15] * 26)}
"""The longest position that one program takes, and the sizes of positions: of two tiles the second
is not full."""


def sets_of(sizes: list[int]) -> CandidateSets:
    """Sets of tokens from 1 on, the last of all at the last position."""
    generator = rng(0)
    rows = [torch.randperm(V - 1, generator=generator)[:size].int() + 1 for size in sizes]
    if V - 1 not in rows[-1]:
        rows[-1][0] = V - 1
    logprobs = [torch.full((n,), -math.log(max(n, 1)) - 0.5).half() for n in sizes]
    gold = torch.stack([row[0] if len(row) else torch.ones((), dtype=torch.int32) for row in rows])
    return CandidateSets(
        row_offsets(torch.tensor(sizes)), torch.cat(rows), torch.cat(logprobs), gold
    )


@pytest.fixture
def memory(monkeypatch):
    """Watches all launches of a test."""
    found = KernelMemory()
    with found.watched(monkeypatch):
        yield found


def by_way(way: str, monkeypatch) -> CandidateSets:
    longest, sizes = WAYS[way]
    monkeypatch.setattr(loss_plan, "LONG", longest if way in ("parts", "tiles") else 99)
    monkeypatch.setattr(loss_plan, "PART", 5)
    if way == "alone":
        monkeypatch.setattr(loss_plan, "CHUNK", 1)
    if way == "tiles":
        monkeypatch.setattr(loss_plan, "FEWEST_SAVED", 0)
    return sets_of(sizes)


KERNELS = {
    "alone": {"candidate_loss", "add_token_rows", "add_partial_rows"},
    "parts": {"part_products", "part_gradients", "add_parts"},
    "tiles": {"tile_products", "tile_gradients"},
}
TAILED = {"tail_products", "add_tail_to_hidden", "add_tail_to_weight"}


@pytest.mark.parametrize(
    ("way", "size", "loss"),
    [
        ("alone", 13, anchor_kl),
        ("alone", 131, restricted_cross_entropy),
        ("parts", 13, restricted_cross_entropy),
        ("tiles", 13, restricted_cross_entropy),
    ],
)
def test_losses_and_their_gradients(way, size, loss, memory, monkeypatch):
    sets = by_way(way, monkeypatch)
    rows = sets.num_rows
    generator = rng(1)
    hidden, bias = torch.randn(rows, size, generator=generator), torch.randn(V, generator=generator)
    weight = spread(torch.randn(V, size, generator=generator) / math.sqrt(size))
    weight[0] = bias[0] = torch.nan
    tail = draw_tail(7, V, seed=0, step=0, probabilities=torch.arange(V).clamp_max(1))
    (h, b), w = leaves(hidden, bias), torch.nn.Parameter(weight)
    w.grad = spread(torch.zeros(V, size))
    head = OutputHead(w, b, softcap=4.0)
    loss(h, head, sets, tail=tail, backend="kernel").backward()
    for plain in (h, w, b):
        assert plain.grad.isfinite().all()
        assert plain.grad.any()
    assert memory.kernels >= KERNELS[way] | TAILED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [restricted_cross_entropy, anchor_kl])
def test_losses_from_all_logits(loss, dtype, memory, monkeypatch):
    """Several blocks of candidates, of samples and of hidden states, none of them full."""
    monkeypatch.setattr(dense_loss, "TILE", {"BLOCK": 4, "num_warps": 4})
    tensors = (torch.randn(size, generator=rng(1)).to(dtype) for size in ((5, 13), (V, 13), (V,)))
    hidden, weight, bias = leaves(*tensors)
    sets = sets_of([3, 0, 5, 2, 17])
    tail = draw_tail(7, V, seed=0, step=0, probabilities=torch.arange(V).clamp_max(1))
    head = OutputHead(weight, bias, softcap=4.0)
    loss(hidden, head, sets, tail=tail, backend="dense_kernel").backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (hidden, weight, bias))
    assert memory.kernels == {"row_losses", "row_derivatives"}


@pytest.mark.parametrize("way", ["alone", "parts"])
def test_a_position_that_is_no_number_spoils_no_gradient_of_others(way, memory, monkeypatch):
    """It has no candidates here, so nothing is to be read of it for the weight's gradient."""
    by_way(way, monkeypatch)
    sets = sets_of([0, 3, 1, 4, 2])
    hidden = torch.randn(5, 13, generator=rng(1))
    hidden[0] = torch.nan
    weight = torch.nn.Parameter(torch.randn(V, 13, generator=rng(2)))
    head = OutputHead(weight)
    restricted_cross_entropy(hidden, head, sets, backend="kernel").backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_what_stands_in_for_a_gradient_is_not_written_to(wanted, memory, monkeypatch):
    sets = by_way("parts", monkeypatch)
    tensors = {
        "hidden": torch.randn(sets.num_rows, 13, generator=rng(1)),
        "weight": torch.randn(V, 13, generator=rng(2)),
        "bias": torch.randn(V, generator=rng(3)),
    }
    tensors[wanted].requires_grad_()
    head = OutputHead(tensors["weight"], tensors["bias"])
    restricted_cross_entropy(tensors["hidden"], head, sets, backend="kernel").backward()
    assert tensors[wanted].grad.any()


def test_several_blocks_of_a_tail_and_of_positions(memory):
    """More sampled tokens and positions than one program takes, neither a multiple."""
    sets = sets_of([1] * 67)
    (hidden,) = leaves(torch.randn(67, 5, generator=rng(1)))
    weight = torch.randn(V, 5, generator=rng(2))
    tail = draw_tail(70, V, seed=0, step=0, probabilities=torch.ones(V))
    loss = restricted_cross_entropy(hidden, OutputHead(weight), sets, tail=tail, backend="kernel")
    loss.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("clip", ["cautious", "project"])
@pytest.mark.parametrize("way", ["tensor", "global", "reduced"])
def test_steps_of_moclip(way, clip, dtypes, memory, monkeypatch):
    monkeypatch.setattr(moclip_launch, "MOST_SPANS", 2)
    kernels = {"chunk_dots", "chunk_update"}
    options = {"angle": way}
    if way == "reduced":
        kernels.add("add_spans")
        options = {"reduce_dots": lambda dots: None}
    monkeypatch.setattr(chunk_table, "CHUNK", 2048)
    monkeypatch.setattr(moclip_launch, "TOGETHER", 2)
    monkeypatch.setattr(moclip_launch, "runs_on", lambda device: True)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=rng(0)).to(dtypes[0]))
        for shape in [(5000,), (7, 3), (2048,), (1,)]
    ]
    params.append(torch.nn.Parameter(torch.zeros(0, 3).to(dtypes[0])))
    options |= {"clip": clip, "delta_max": 60.0, "state_dtype": dtypes[1]}
    optimizer = FastMoClip(params, lr=0.1, **options)
    for step in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=rng(step)).to(dtypes[0])
        optimizer.step()
    assert memory.kernels == kernels
    assert all(param.isfinite().all() for param in params)


@triton.jit
def _copy(source, other, number):
    places = tl.arange(0, 16)
    tl.store(other + places, tl.load(source + places, mask=places < number), mask=places < 8)


def test_the_watch_sees_what_is_beside(monkeypatch):
    wide = torch.zeros(30)
    memory = KernelMemory()
    raises = pytest.raises(AssertionError, match="_copy reads 1 of 9 elements")
    with raises, memory.watched(monkeypatch):
        _copy[(1,)](wide[:8], wide[10:18], 9)
    assert memory.faults[1] == "_copy writes 8 of 8 elements beside its tensors"  # no output's name


def test_addresses_are_of_elements_alone():
    base = torch.zeros(4, 5, dtype=torch.int64)
    found = (addresses(base[1:3, :2]) - base.data_ptr()) // 8
    assert found.tolist() == [5, 6, 10, 11]
    assert addresses(base[:, :0]).size == 0
