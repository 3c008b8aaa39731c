"""The fast steps against the plain ones: to the last bit, or to a stated tolerance."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

from lrmc_ray.method.fast import moclip_kernel, moclip_update
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.moclip import MoClip
from tests.support.moclip_paths import CLIPS, leaning_gradients, random, run, train
from tests.support.operators import NoHostSync

torch.set_num_threads(1)


SHAPES = [(60, 1001), (5, 3), (1,), (), (40, 30)]


def both_paths(dtype, shapes=SHAPES, *, num=6, **options):
    """The same gradients for a plain and a fast optimizer; the last parameter is transposed.

    One gradient is an outlier, on which every reading of the cap binds.
    """
    optimizers = []
    for kind in (MoClip, FastMoClip):
        starts = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        params = [torch.nn.Parameter(start) for start in starts[:-1]]
        params.append(torch.nn.Parameter(starts[-1].T))
        optimizers.append(kind(params, lr=0.01, weight_decay=0.1, delta_max=60.0, **options))
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
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
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_float32_steps_are_the_plain_ones_up_to_rounding(clip, angle, second_moment):
    plain, fast = both_paths(torch.float32, clip=clip, angle=angle, second_moment=second_moment)
    for ours, theirs in zip(values_of(fast), values_of(plain), strict=True):
        # Of the outlier's momentum, a sum of large terms that cancel, the error is absolute.
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7 * largest)
    counted, expected = fast.angle_statistics(), plain.angle_statistics()
    assert counted.histogram == expected.histogram
    assert clip == "none" or counted.clipped_share == expected.clipped_share


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


@pytest.mark.parametrize("is_contiguous", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-25])
def test_cautious_never_moves_a_weight_against_its_gradient(is_contiguous, magnitude):
    """Where ``scale`` does for a third of them; of a product of 1e-50 float32 keeps no sign."""
    gradients = [magnitude * random(20_000, seed=i, dtype=torch.float32) for i in range(8)]
    against = {}
    for clip in ("scale", "cautious"):
        param = torch.nn.Parameter(torch.zeros(20_000 if is_contiguous else 40_000))
        if not is_contiguous:
            param.data = param.data[::2]
        optimizer = FastMoClip([param], lr=0.01, clip=clip)
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
    """Transposed parameters go through torch's operators, contiguous ones through the loops."""
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


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_step_does_not_wait_for_the_device(clip, angle, monkeypatch):
    monkeypatch.setattr(moclip_kernel, "can_take", lambda *tensors: False)  # as on a device
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
