"""The fast steps against the plain ones: to the last bit, or to a stated tolerance."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from lrmc_ray.method.fast import moclip_update
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.moclip import MoClip
from tests.support.moclip_paths import CLIPS, leaning_gradients, random, run, train

torch.set_num_threads(1)


SHAPES = [(60, 1001), (5, 3), (1,), (), (40, 30)]


def both_paths(dtype, shapes=SHAPES, *, num=6, fast=None, **options):
    """The same gradients for a plain and a fast optimizer; the last parameter is transposed.

    One gradient is an outlier, on which every reading of the cap binds.
    """
    optimizers = []
    for kind, more in ((MoClip, {}), (FastMoClip, fast or {})):
        starts = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        params = [torch.nn.Parameter(start) for start in starts[:-1]]
        params.append(torch.nn.Parameter(starts[-1].T))
        optimizers.append(
            kind(params, lr=0.01, weight_decay=0.1, delta_max=60.0, **options, **more)
        )
    gradients = [
        leaning_gradients(*shape, num=num, seed=i, dtype=dtype) for i, shape in enumerate(shapes)
    ]
    for of_tensor in gradients:
        of_tensor[3] *= -30
    for step in zip(*gradients, strict=True):
        for optimizer in optimizers:
            params = optimizer.param_groups[0]["params"]
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.reshape(param.shape).clone()
            optimizer.step()
    return optimizers


def values_of(optimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    states = [optimizer.state[p][n] for p in params for n in ("exp_avg", "exp_avg_sq", "step")]
    return [*(p.detach() for p in params), *states]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fast_steps_are_the_plain_ones_to_the_last_bit(clip, angle, second_moment, dtype):
    plain, fast = both_paths(dtype, clip=clip, angle=angle, second_moment=second_moment)
    for ours, theirs in zip(values_of(fast), values_of(plain), strict=True):
        assert torch.equal(ours, theirs)
    counted, expected = fast.angle_statistics(), plain.angle_statistics()
    assert counted.histogram == expected.histogram
    assert counted.num_angles == (0 if clip == "none" else 5 * len(SHAPES))
    if clip != "none":
        assert counted == expected
        assert 0 < counted.clipped_share < 1 or angle == "global"


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_tensors_in_several_pieces_have_the_plain_weights_up_to_the_dot_products(
    clip, angle, monkeypatch
):
    """Sums of float64 products, taken in another order."""
    monkeypatch.setattr(moclip_update, "CACHED_BYTES", 8 * 100)
    plain, fast = both_paths(torch.float64, [(33, 101), (70, 3), (4, 3)], clip=clip, angle=angle)
    for ours, theirs in zip(values_of(fast), values_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_update_for_the_compiler_states_the_plain_one(clip, second_moment, dtype, monkeypatch):
    """Uncompiled: the same formula, with the arctangent of float32 alone another."""
    monkeypatch.setattr(moclip_update, "MIN_COMPILED_ELEMENTS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    moclip_update.compiled_once.cache_clear()
    try:
        plain, fast = both_paths(
            dtype, fast={"compiled": True}, clip=clip, second_moment=second_moment
        )
    finally:
        moclip_update.compiled_once.cache_clear()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    for ours, theirs in zip(values_of(fast), values_of(plain), strict=True):
        # Of the outlier's momentum, a sum of large terms that cancel, the error is absolute.
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10 * largest)


def test_a_deep_copy_stays_compiled():
    optimizer = FastMoClip([torch.nn.Parameter(torch.zeros(2))], lr=0.1, compiled=True)
    assert copy.deepcopy(optimizer).compiled


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-25])
def test_cautious_never_moves_a_weight_against_its_gradient(compiled, magnitude):
    """Where ``scale`` does for a third of them; of a product of 1e-50 float32 keeps no sign."""
    gradients = [magnitude * random(20_000, seed=i, dtype=torch.float32) for i in range(8)]
    against = {}
    for clip in ("scale", "cautious"):
        param = torch.nn.Parameter(torch.zeros(20_000))
        optimizer = FastMoClip([param], lr=0.01, clip=clip, compiled=compiled)
        against[clip] = 0
        for gradient in gradients:
            before = param.detach().clone()
            train(optimizer, param, [gradient])
            m = optimizer.state[param]["exp_avg"]
            moved = before - param.detach()
            assert ((moved == 0) == ((m.sign() != gradient.sign()) & (clip == "cautious"))).all()
            against[clip] += int((moved.sign() == -gradient.sign()).sum())
    assert against["cautious"] == 0
    assert 0.2 < against["scale"] / (8 * 20_000) < 0.5


def test_the_layout_of_a_parameter_does_not_matter():
    """Transposed parameters and gradients take the list path, contiguous ones go in pieces."""
    shapes = [(70, 1001), (3, 2)]
    starts = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    gradients = [leaning_gradients(*shape, dtype=torch.float32) for shape in shapes]
    for layouts in itertools.product([False, True], repeat=2):
        params = [
            torch.nn.Parameter(start.T.contiguous().T if layouts[0] else start.clone())
            for start in starts
        ]
        optimizer = FastMoClip(params, lr=0.01, clip="project", delta_max=45.0, weight_decay=0.1)
        for step in zip(*gradients, strict=True):
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.T.contiguous().T if layouts[1] else gradient.clone()
            optimizer.step()
        for param, start, steps in zip(params, starts, gradients, strict=True):
            expected = run(start, steps, clip="project", weight_decay=0.1)
            torch.testing.assert_close(param.data, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("piece", [10, 1000, 10**6])
def test_dot_products_of_many_vectors_are_those_of_each(piece, monkeypatch):
    """Whole, and in pieces of which some come together and some are parts of a vector."""
    monkeypatch.setattr(moclip_update, "CACHED_BYTES", 8 * piece)
    monkeypatch.setattr(moclip_update, "DEVICE_BYTES", 8 * 1500)
    sizes = (5, 1, 3000, 77, 1, 400)
    grads = [random(n, seed=n, dtype=torch.float32) * 10.0 ** (i - 3) for i, n in enumerate(sizes)]
    momenta = [random(n, seed=n + 1, dtype=torch.float32) for n in sizes]
    momenta[3].zero_()
    grads[4].fill_(math.inf)
    found = moclip_update.foreach_dot_products(grads, momenta).numpy()
    for row, grad, momentum in zip(found, grads, momenta, strict=True):
        g, m = grad.double().numpy(), momentum.double().numpy()
        expected = [g @ g, g @ m, m @ m]
        # The products' sum has the error of its terms, which may cancel.
        error = 1e-14 * np.abs(g * m).sum() if np.isfinite(g).all() else 0.0
        np.testing.assert_allclose(row, expected, rtol=1e-13, atol=error)


@pytest.mark.parametrize("seed", range(5))
def test_batches_are_in_order_and_have_small_temporaries(seed, monkeypatch):
    monkeypatch.setattr(moclip_update, "DEVICE_BYTES", 4 * 100)
    sizes = torch.randint(1, 130, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = list(moclip_update.by_size(sizes, lambda size: size, torch.float32))
    assert list(itertools.chain.from_iterable(batches)) == sizes
    for batch, following in itertools.pairwise(batches):
        assert sum(batch) <= 100 or len(batch) == 1
        assert sum(batch) + following[0] > 100  # it would not have fitted


class NoHostSync(TorchDispatchMode):
    """Fails on the operations by which the host waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_step_does_not_wait_for_the_device(clip, angle):
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        torch.ones(1).item()
    params = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(3).bfloat16())]
    optimizer = FastMoClip(params, lr=0.1, clip=clip, angle=angle, delta_max=45.0, weight_decay=0.1)
    with NoHostSync():
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [3, 3]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_step_reads_no_value_of_a_tensor_that_has_none(clip, angle):
    """Meta tensors stand for an accelerator: reading one, or mixing in a host vector, raises."""
    params = [torch.nn.Parameter(torch.zeros(n, device="meta")) for n in (3, 4)]
    optimizer = FastMoClip(params, lr=0.1, clip=clip, angle=angle, delta_max=45.0, weight_decay=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].device.type == "meta"
    assert optimizer.state[params[0]]["step"] == 3


def test_arctan2_in_float32():
    """Against float64, over all magnitudes; the bound on the step needs pi / 2 at most."""
    exponents = torch.linspace(-30, 37, 135, dtype=torch.float64)
    magnitudes = torch.cat([torch.zeros(1), (10.0**exponents).float(), torch.rand(5000)])
    y, x = (t.flatten() for t in torch.meshgrid(magnitudes, magnitudes[:400], indexing="ij"))
    expected = torch.atan2(y.double(), x.double())
    actual = moclip_update.arctan2_nonnegative(y, x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=5e-7, atol=1e-36)
    assert torch.equal(moclip_update.arctan2_nonnegative(-y, x), -actual)
    assert actual.max() == torch.tensor(math.pi / 2)
    assert moclip_update.arctan2_nonnegative(torch.tensor(math.nan), torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("clips", [[c for c in CLIPS if c != "cautious"], ["cautious"]])
def test_the_compiled_update_is_compiled_once_and_equals_the_plain_one(clips):
    """Two shapes, changing steps and learning rates, all caps: one compilation of each pass."""
    shapes = [(70, 300), (20_000,), (3,)]
    starts = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    gradients = [leaning_gradients(*shape, dtype=torch.float32) for shape in shapes]
    paths = {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for clip, compiled in itertools.product(clips, [False, True]):
            params = [torch.nn.Parameter(start.clone()) for start in starts]
            options = {"lr": 0.01, "clip": clip, "weight_decay": 0.1, "delta_max": 60.0}
            optimizer: MoClip = FastMoClip(params, compiled=True, **options)
            if not compiled:
                optimizer = MoClip(params, **options)
            for i, step in enumerate(zip(*gradients, strict=True)):
                optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
                for param, gradient in zip(params, step, strict=True):
                    param.grad = gradient.clone()
                optimizer.step()
            assert getattr(optimizer, "compiled", False) == compiled
            paths[clip, compiled] = params, optimizer.angle_statistics()
    for clip in clips:
        (plain, plain_statistics), (fast, statistics) = paths[clip, False], paths[clip, True]
        for one, other in zip(plain, fast, strict=True):
            torch.testing.assert_close(one.data, other.data, rtol=2e-6, atol=2e-7)
        assert statistics.histogram == plain_statistics.histogram
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    options = {"lr": 0.01, "compiled": True}
    path = gradients[1]
    capless = run(starts[1], path, clip="none", kind=FastMoClip, **options)
    assert torch.equal(run(starts[1], path, delta_max=180.0, kind=FastMoClip, **options), capless)


def test_without_a_compiler_the_step_warns_and_goes_on_uncompiled():
    start = random(20_000, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(20_000, dtype=torch.float32)
    param = torch.nn.Parameter(start.clone())
    optimizer = FastMoClip([param], lr=0.01, compiled=True, delta_max=45.0)
    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch("cpp.cxx", (None, "/nonexistent"))
    with fresh_cache(), no_compiler, pytest.warns(RuntimeWarning, match="No working C.. compiler"):
        train(optimizer, param, gradients[:1])
    assert not optimizer.compiled
    with warnings.catch_warnings(action="error"):
        train(optimizer, param, gradients[1:])
    torch.testing.assert_close(param.data, run(start, gradients), rtol=1e-6, atol=1e-7)
