"""The compiled loops against torch in float64, and what compiling them must not do."""

import hashlib
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from lrmc_ray.method.fast import moclip_kernel
from lrmc_ray.method.fast.moclip_kernel import StepScalars
from lrmc_ray.method.moclip import update_

KEY = 123456789
SIZES = [0, 1, 7, 16, 1000, 4097]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(size: int, seed: int = 0) -> list[torch.Tensor]:
    """Weights, gradient and both moments, over many magnitudes, zeros among them."""
    found = []
    for index in range(4):
        generator = rng(10 * seed + index)
        exponents = torch.rand(size, generator=generator) * 12 - 9
        found.append(torch.randn(size, generator=generator) * 10**exponents)
        found[-1][torch.rand(size, generator=generator) < 0.1] = 0.0
    found[3] = found[3].square()
    return found


def step(values: list[torch.Tensor], *, p=0.7, q=0.0, sees_capped=False, is_cautious=False) -> None:
    beta1, beta2, t, lr, decay, scale = 0.9, 0.99, 3, 0.01, 0.1, 1.2
    scalars = StepScalars(
        *(1 - beta1, 1 - beta2, 1 / (1 - beta1**t), 1 / (1 - beta2**t)),
        decay=1 - lr * decay,
        step_size=lr * scale,
    )
    param, grad, exp_avg, exp_avg_sq = values
    choices = {"sees_capped": sees_capped, "is_cautious": is_cautious, "key": KEY}
    moclip_kernel.update_(param, grad, exp_avg, exp_avg_sq, p, q, scalars, **choices)


def plain_step(values: list[torch.Tensor], *, p=0.7, q=0.0, sees_capped=False, is_cautious=False):
    """The same by ``moclip.update_`` in float64."""
    param, grad = (value.double() for value in values[:2])
    is_rounded = values[2].dtype == torch.bfloat16
    exp_avg, exp_avg_sq = (v.clone() if is_rounded else v.double() for v in values[2:])
    param.grad = grad
    group = {
        **{"betas": (0.9, 0.99), "lr": 0.01, "weight_decay": 0.1, "atan2_scale": 1.2},
        "second_moment": "capped" if sees_capped else "raw",
        "clip": "cautious" if is_cautious else "scale",
        "delta_max": 60.0,
    }
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": torch.tensor(3.0)}
    update_(param, state, group, torch.tensor(p).double(), torch.tensor(q).double(), KEY)
    return param, exp_avg, exp_avg_sq


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [{}, {"p": 1.0}, {"q": -0.4}, {"sees_capped": True, "q": 0.3}, {"is_cautious": True}],
    ids=str,
)
@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_an_update_is_the_plain_one_in_float64_up_to_rounding(size, options, piece, monkeypatch):
    monkeypatch.setattr(moclip_kernel, "PIECE", piece)
    values = tensors(size)
    grad = values[1].clone()
    before = values[0].clone()
    expected = plain_step(values, **options)
    step(values, **options)
    assert torch.equal(values[1], grad)
    for ours, theirs in zip((values[2], values[3]), expected[1:], strict=True):
        largest = float(theirs.abs().max()) if size else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-8 * largest)
    # A step is at most 0.01 * 1.2 * pi / 2. Of a sum that cancels, the sign itself may be rounding.
    is_sure = (expected[1].abs() > 1e-6 * (grad.abs() + values[2].abs())).double()
    error = (values[0].double() - expected[0]).abs() * is_sure
    assert (error <= 3e-7 * before.abs() + 2e-8).all()


@pytest.mark.parametrize("size", SIZES)
def test_dot_products_are_those_of_exact_sums(size):
    grad, exp_avg = tensors(size)[1:3]
    pairs = [(grad, grad), (grad, exp_avg), (exp_avg, exp_avg)]
    found = moclip_kernel.dot_products(grad, exp_avg)
    assert (found.dtype, found.shape) == (torch.float64, (3,))
    for value, (a, b) in zip(found.tolist(), pairs, strict=True):
        terms = [float(x) * float(y) for x, y in zip(a, b, strict=True)]
        assert abs(value - math.fsum(terms)) <= 1e-14 * math.fsum(map(abs, terms))


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"sees_capped": True, "q": 0.3, "is_cautious": True}])
def test_bf16_moments_are_rounded_as_the_plain_way_rounds_them(options, piece, monkeypatch):
    """Where both have the same numbers before rounding, which differ by float32's last bits."""
    monkeypatch.setattr(moclip_kernel, "PIECE", piece)
    values = tensors(4097)
    values[2:] = [value.bfloat16() for value in values[2:]]
    dots = moclip_kernel.dot_products(*values[1:3])
    wide = [value.float() for value in values]
    torch.testing.assert_close(dots, moclip_kernel.dot_products(*wide[1:3]), rtol=1e-14, atol=0)
    expected = plain_step(values, **options)
    step(values, **options)
    step(wide, **options)
    # The weight moves by the moments before they are rounded.
    assert torch.equal(values[0], wide[0])
    for ours, theirs, exact in zip(values[2:], expected[1:], wide[2:], strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert (ours == theirs).float().mean() > 0.999
        below = exact.view(torch.int32).bitwise_and(~0xFFFF).view(torch.float32)
        above = (below.view(torch.int32) + 0x10000).view(torch.float32)
        assert ((ours.float() == below) | (ours.float() == above)).all()
        is_between = exact != below
        share = (ours.float() == above)[is_between].float().mean()
        assert 0.4 < share < 0.6


def test_every_number_of_threads_makes_the_same_bits(monkeypatch):
    monkeypatch.setattr(moclip_kernel, "PIECE", 1000)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            values = tensors(20_001, seed=4)
            halves = [*values[:2], values[2].bfloat16(), values[3].bfloat16()]
            halves[0] = halves[0].clone()
            for each in (values, halves):
                dots = moclip_kernel.dot_products(*each[1:3])
                step(each, is_cautious=True)
                found.append([dots, *each])
    finally:
        torch.set_num_threads(1)
    for first, *others in (found[::2], found[1::2]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_autograd_hears_of_the_change():
    weight = torch.nn.Parameter(torch.ones(5))
    product = (weight * weight).sum()
    values = [weight.detach(), *tensors(5)[1:]]
    step(values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@numba.njit
def _arctangents(y, x, found):
    for i in range(y.size):
        found[i] = moclip_kernel.arctan2_nonnegative(y[i], x[i])


def arctangents(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    found = np.empty(y.numel(), dtype=np.float32)
    _arctangents(y.contiguous().numpy(), x.contiguous().numpy(), found)
    return torch.from_numpy(found)


def test_arctan2_in_float32():
    """Against float64, over all magnitudes; the bound on the step needs pi / 2 at most."""
    exponents = torch.linspace(-30, 37, 135, dtype=torch.float64)
    magnitudes = torch.cat(
        [torch.zeros(1), (10.0**exponents).float(), torch.rand(5000, generator=rng(0))]
    )
    y, x = (t.flatten() for t in torch.meshgrid(magnitudes, magnitudes[:400], indexing="ij"))
    expected = torch.atan2(y.double(), x.double())
    actual = arctangents(y, x)
    torch.testing.assert_close(actual.double(), expected, rtol=5e-7, atol=1e-36)
    assert torch.equal(arctangents(-y, x), -actual)
    assert actual.max() == torch.tensor(math.pi / 2)
    assert arctangents(torch.tensor([math.nan]), torch.ones(1)).isnan().all()


# In processes of their own


def digest() -> str:
    values = tensors(30_000, seed=7)
    dots = moclip_kernel.dot_products(*values[1:3])
    step(values, is_cautious=True)
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in [dots, *values])).hexdigest()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_started_by_any_method_makes_the_same_bits(method):
    expected = digest()
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(digest) == expected


def processes(count: int, **environment: str) -> list[str]:
    """What as many processes print that begin at the same time."""
    code = "from tests.method.fast.test_moclip_kernel import digest; print(digest())"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    found = [process.communicate(timeout=240)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * count
    return found


def test_processes_that_compile_at_the_same_time_share_what_they_keep(tmp_path):
    expected = digest()
    assert processes(2, NUMBA_CACHE_DIR=str(tmp_path)) == [expected] * 2
    kept = [*tmp_path.rglob("*.nbc")]
    assert len(kept) == 2
    for path in [*kept, *tmp_path.rglob("*.nbi")]:
        path.write_bytes(path.read_bytes()[:20])  # as a full disk may leave it
    assert processes(1, NUMBA_CACHE_DIR=str(tmp_path)) == [expected]


def test_without_a_place_to_keep_it_a_process_compiles_for_itself():
    """Of numba's places, one that fits no source file leaves none."""
    assert processes(1, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator") == [digest()]
