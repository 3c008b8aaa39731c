"""MoClip against the float64 reference, closed forms, torch and adam-atan2-pytorch."""

import copy
import math
import pickle
import threading
from typing import Any

import adam_atan2_pytorch
import numpy as np
import pytest
import torch
from torch import Tensor

from lrmc_ray.method.baselines.masked_adamw import MaskedAdamW
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.moclip import MoClip
from tests.support import reference
from tests.support.moclip_paths import (
    CAPS,
    CLIPS,
    angle_deg,
    leaning_gradients,
    random,
    run,
    train,
)

torch.set_num_threads(1)


@pytest.fixture(params=[MoClip, FastMoClip], ids=["plain", "fast"])
def kind(request):
    """Both classes, which take the same steps."""
    return request.param


# The reference


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
@pytest.mark.parametrize("delta_max", [10.0, 45.0, 100.0])
@pytest.mark.parametrize("shape", [(5, 3), (1,), (2,), ()])
def test_ten_steps_follow_the_float64_reference(kind, clip, second_moment, delta_max, shape):
    options = {
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "weight_decay": 0.1,
        "delta_max": delta_max,
        "clip": clip,
        "second_moment": second_moment,
        "atan2_scale": 1.1,
    }
    start, gradients = random(*shape, seed=0), leaning_gradients(*shape)
    expected = reference.moclip(start.numpy(), [g.numpy() for g in gradients], **options)
    param = torch.nn.Parameter(start.clone())
    optimizer = kind([param], **options)
    train(optimizer, param, gradients)
    state = optimizer.state[param]
    np.testing.assert_allclose(param.detach(), expected.param, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(state["exp_avg"], expected.exp_avg, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(state["exp_avg_sq"], expected.exp_avg_sq, rtol=1e-9, atol=1e-13)
    assert state["step"] == 10


@pytest.mark.parametrize("clip", CAPS)
def test_a_global_angle_is_that_of_one_long_vector_over_all_groups(kind, clip):
    shapes = [(5, 3), (1,), (7,)]
    starts = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [leaning_gradients(*shape, seed=i) for i, shape in enumerate(shapes)]
    settings_ = {"lr": 0.01, "delta_max": 45.0, "clip": clip}
    expected = reference.moclip_global(starts, list(zip(*gradients, strict=True)), **settings_)
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    # How the tensors are grouped does not matter.
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = kind(groups, **settings_, angle="global")
    for step in zip(*gradients, strict=True):
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    for param, result in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach(), result.param, rtol=1e-10)


def test_float32_stays_within_its_own_rounding_of_the_reference(kind):
    start = random(300, 300, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(300, 300, dtype=torch.float32)
    expected = reference.moclip(start.numpy(), [g.numpy() for g in gradients], lr=0.01)
    np.testing.assert_allclose(
        run(start, gradients, kind=kind), expected.param, rtol=2e-6, atol=2e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_none_is_adam_atan2(kind, dtype, weight_decay):
    """Bit for bit, but for the compiled loops of float32."""
    start, gradients = (
        random(70, 1001, seed=0, dtype=dtype),
        leaning_gradients(70, 1001, dtype=dtype),
    )
    theirs = torch.nn.Parameter(start.clone())
    package = adam_atan2_pytorch.AdamAtan2(
        [theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay, a=1.27, b=1.0
    )
    train(package, theirs, gradients)
    ours = run(
        start, gradients, clip="none", weight_decay=weight_decay, atan2_scale=1.27, kind=kind
    )
    if kind is FastMoClip and dtype == torch.float32:
        torch.testing.assert_close(ours, theirs.data, rtol=2e-6, atol=2e-7)
    else:
        assert torch.equal(ours, theirs.data)


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_180_degrees_is_none_bit_for_bit(kind, clip, angle, second_moment):
    start = random(301, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(301, dtype=torch.float32)
    gradients.insert(5, -gradients[4])
    options = {"angle": angle, "second_moment": second_moment, "weight_decay": 0.1}
    expected = run(start, gradients, clip="none", weight_decay=0.1, kind=kind)
    assert torch.equal(
        run(start, gradients, clip=clip, delta_max=180.0, **options, kind=kind), expected
    )
    # An angle of exactly 180 degrees: 3, 4, 5 and their halves round nothing.
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0])]
    options["betas"] = (0.5, 0.99)
    expected = run(exact[0], exact, clip="none", weight_decay=0.1, betas=(0.5, 0.99), kind=kind)
    assert torch.equal(
        run(exact[0], exact, clip=clip, delta_max=180.0, **options, kind=kind), expected
    )


# The cap by weight


def test_cautious_by_hand(kind):
    """beta1 0.5; after a first step of (4, 4, 4, 4, 4), m = 2, the second one is

    - 4: agrees. -1: against m, 0.5. -4: turns m to -1 and agrees. 0: no angle. -2: m is 0.
    """
    first = torch.full((5,), 4.0).double()
    second = torch.tensor([4.0, -1.0, -4.0, 0.0, -2.0]).double()
    betas = (0.5, 0.5)
    paths = {
        clip: run(
            torch.zeros(5).double(),
            [first, second],
            clip=clip,
            delta_max=179.0,
            betas=betas,
            kind=kind,
        )
        for clip in ("scale", "cautious")
    }
    m = torch.tensor([3.0, 0.5, -1.0, 1.0, 0.0]).double()
    v = torch.tensor([12.0, 4.5, 12.0, 4.0, 6.0]).double()
    start = -0.01 * math.pi / 4
    steps = -0.01 * torch.atan2(m / 0.75, (v / 0.75).sqrt())
    torch.testing.assert_close(paths["scale"], start + steps)
    steps[1] = 0.0
    torch.testing.assert_close(paths["cautious"], start + steps)


def test_cautious_leaves_out_what_cautious_adamw_leaves_out_and_lengthens_nothing(kind):
    """In a tensor of which a tenth of the rows has a gradient, C-AdamW steps 10 times as far."""
    gradients = [random(100, 40, seed=i) for i in range(5)]
    for gradient in gradients:
        gradient[10:] = 0.0
    adamw = torch.nn.Parameter(torch.zeros(100, 40).double())
    ours, plain = (torch.nn.Parameter(torch.zeros(100, 40).double()) for _ in range(2))
    optimizers = [
        MaskedAdamW([adamw], 1e-3, mask="cautious", betas=(0.9, 0.99)),
        kind([ours], 1e-3, clip="cautious", delta_max=179.9),
        kind([plain], 1e-3, clip="none"),
    ]
    for gradient in gradients:
        moved = []
        for optimizer, param in zip(optimizers, (adamw, ours, plain), strict=True):
            before = param.detach().clone()
            train(optimizer, param, [gradient])
            moved.append(param.detach() - before)
        assert torch.equal(moved[0] == 0, moved[1] == 0)
        kept = moved[1] != 0
        torch.testing.assert_close(moved[1][kept], moved[2][kept])
        assert moved[0].abs().max() > 9 * moved[1].abs().max()


@pytest.mark.parametrize("theta_deg", [0.0, 0.01, 1.0, 45.0, 90.0, 179.0, 179.99, 180.0])
@pytest.mark.parametrize("size", [2, 1000, 3_000_001])
def test_float32_angles_are_right_to_a_thousandth_of_a_degree(kind, theta_deg, size):
    m = random(size, seed=0, dtype=torch.float32) * 1e-3
    other = random(size, seed=1)
    across = other - (other @ m.double()) / (m.double() @ m.double()) * m.double()
    theta = math.radians(theta_deg)
    axis = m.double()
    g = axis * math.cos(theta) + across * (axis.norm() / across.norm()) * math.sin(theta)
    param = torch.nn.Parameter(torch.zeros(size))
    optimizer = kind([param], lr=0.0, betas=(0.0, 0.99))  # beta1 = 0: the momentum is m itself
    gradients = [m, (7 * g).float()]
    train(optimizer, param, gradients)
    measured_deg = optimizer.angle_statistics().mean_deg
    assert measured_deg == pytest.approx(angle_deg(gradients[1], m), abs=1e-3)
    assert measured_deg == pytest.approx(theta_deg, abs=1e-3)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**20])
def test_scaling_all_gradients_leaves_the_path(kind, clip, factor):
    """Powers of two round nothing: the path is the same bit for bit."""
    start = random(100, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(100, dtype=torch.float32)
    scaled = [factor * g for g in gradients]
    options = {"clip": clip, "second_moment": "capped"}
    assert torch.equal(
        run(start, scaled, **options, kind=kind), run(start, gradients, **options, kind=kind)
    )


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_no_step_is_longer_than_its_bound(kind, clip, second_moment):
    """Gradients over twelve orders of magnitude, with zeros among them."""
    lr, scale = 0.1, 1.27
    param = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = kind(
        [param], lr=lr, clip=clip, second_moment=second_moment, delta_max=30.0, atan2_scale=scale
    )
    longest = 0.0
    for i in range(60):
        before = param.detach().clone()
        param.grad = random(50, seed=i) * 10.0 ** float(random(1, seed=100 + i) * 4) * (i % 7 > 0)
        optimizer.step()
        longest = max(longest, float((param.detach() - before).abs().max()))
    assert 0.5 * lr * scale < longest <= lr * scale * math.pi / 2 * (1 + 1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_first_step_has_no_angle(kind, clip):
    """m = 0: corrected, both moments are those of g, and atan2(g, |g|) is a quarter of pi."""
    start, gradient = random(20, seed=0), random(20, seed=1)
    param = torch.nn.Parameter(start.clone())
    optimizer = kind([param], lr=0.01, clip=clip, delta_max=1.0, second_moment="capped")
    train(optimizer, param, [gradient])
    torch.testing.assert_close(param.data, start - 0.01 * math.pi / 4 * gradient.sign())
    assert optimizer.angle_statistics().num_angles == 0


@pytest.mark.parametrize("clip", CLIPS)
def test_a_zero_gradient_decays_the_moments_and_has_no_angle(kind, clip):
    gradient = random(20, seed=1)
    param = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = kind([param], lr=0.01, clip=clip, delta_max=1.0)
    train(optimizer, param, [gradient])
    before = param.detach().clone()
    train(optimizer, param, [torch.zeros(20, dtype=torch.float64)])
    m, v = 0.9 * 0.1 * gradient, 0.99 * 0.01 * gradient**2
    state = optimizer.state[param]
    torch.testing.assert_close(state["exp_avg"], m)
    torch.testing.assert_close(state["exp_avg_sq"], v)
    moved = 0.01 * torch.atan2(m / (1 - 0.9**2), (v / (1 - 0.99**2)).sqrt())
    torch.testing.assert_close(param.data, before - moved)
    assert optimizer.angle_statistics().num_angles == 0


def test_gradients_that_are_not_finite_pass_through_and_are_not_counted(kind):
    for bad in (math.nan, math.inf):
        gradients = [torch.ones(3), torch.tensor([-1.0, bad, 1.0])]
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = kind([param], lr=0.01, clip="project", delta_max=45.0)
        train(optimizer, param, gradients)
        expected = run(torch.zeros(3), gradients, clip="none", kind=kind)
        torch.testing.assert_close(param.data, expected, rtol=0, atol=0, equal_nan=True)
        assert optimizer.angle_statistics().num_angles == 0


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_a_state_dict_continues_bit_for_bit(kind, clip, dtype, state_dtype):
    start = random(40, 3, seed=0, dtype=dtype)
    gradients = leaning_gradients(40, 3, dtype=dtype)
    options = {"lr": 0.01, "clip": clip, "weight_decay": 0.1, "state_dtype": state_dtype}
    param = torch.nn.Parameter(start.clone())
    optimizer = kind([param], **options)
    train(optimizer, param, gradients[:5])
    other_param = torch.nn.Parameter(param.detach().clone())
    other = kind([other_param], lr=99.0)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    other.load_state_dict(saved)
    # Both go on: they must not share a tensor either.
    other.load_state_dict(optimizer.state_dict())
    expected = train(optimizer, param, gradients[5:])
    assert torch.equal(train(other, other_param, gradients[5:]), expected)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(other.state[other_param][name], optimizer.state[param][name])
    third_param = torch.nn.Parameter(start.clone())
    third = kind([third_param], **options)
    third.load_state_dict(saved)
    assert third.state[third_param]["step"] == 5
    assert third.state[third_param]["exp_avg"].dtype == (state_dtype or torch.float32)


def test_a_deep_copy_keeps_the_hook_and_the_dtype(kind):
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = kind([param], lr=0.1, reduce_dots=torch.Tensor.zero_, state_dtype=torch.bfloat16)
    train(optimizer, param, [torch.ones(2)] * 3)
    twin = copy.deepcopy(optimizer)
    assert twin.reduce_dots is torch.Tensor.zero_
    assert twin.state_dtype is torch.bfloat16
    # It counts its own angles.
    assert twin.angle_statistics().num_angles == 0
    assert optimizer.angle_statistics().num_angles == 0  # the hook has zeroed all of them


@pytest.mark.parametrize("clip", ["scale", "project"])
def test_a_learning_rate_schedule_scales_each_step(kind, clip):
    """The gradients are given, so step t moves by lr_t times what it moves by at lr 1."""
    gradients = leaning_gradients(6)
    unit_path = [
        run(torch.zeros(6).double(), gradients[: t + 1], lr=1.0, clip=clip, kind=kind)
        for t in range(6)
    ]
    param = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = kind([param], lr=0.5, clip=clip, delta_max=45.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    expected = torch.zeros(6, dtype=torch.float64)
    for t, gradient in enumerate(gradients[:6]):
        train(optimizer, param, [gradient])
        schedule.step()
        expected -= (0.5 / (1 + t)) * ((unit_path[t - 1] if t else 0.0) - unit_path[t])
        torch.testing.assert_close(param.data, expected)


OVERRIDES = {
    "lr": 0.03,
    "betas": (0.5, 0.7),
    "weight_decay": 0.2,
    "delta_max": 20.0,
    "clip": "project",
    "second_moment": "capped",
    "atan2_scale": 0.9,
}


@pytest.mark.parametrize("names", [[name] for name in OVERRIDES] + [list(OVERRIDES)])
def test_every_switch_can_differ_between_groups(kind, names):
    override = {name: OVERRIDES[name] for name in names}
    start, gradients = random(9, seed=0), leaning_gradients(9)
    plain, special = (torch.nn.Parameter(start.clone()) for _ in range(2))
    groups = [{"params": [plain]}, {"params": [special], **override}]
    optimizer = kind(groups, lr=0.01, delta_max=45.0)
    for gradient in gradients:
        plain.grad = special.grad = gradient
        optimizer.step()
    assert torch.equal(plain, run(start, gradients, kind=kind))
    assert torch.equal(special, run(start, gradients, **override, kind=kind))
    assert not torch.equal(plain, special)


def test_global_and_tensor_angles_and_none_side_by_side(kind):
    """A group with its own angles, or without a cap, takes no part in the global angle."""
    starts = [random(9, seed=i) for i in range(4)]
    gradients = [leaning_gradients(9, seed=i) for i in range(4)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "angle": "global"},
        {"params": params[3:], "angle": "global", "clip": "none"},
    ]
    optimizer = kind(groups, lr=0.01, delta_max=45.0)
    for step in zip(*gradients, strict=True):
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient
        optimizer.step()
    expected = reference.moclip_global(
        starts[1:3], list(zip(*gradients[1:3], strict=True)), lr=0.01
    )
    assert torch.equal(params[0], run(starts[0], gradients[0], kind=kind))
    np.testing.assert_allclose(params[1].detach(), expected[0].param, rtol=1e-10)
    np.testing.assert_allclose(params[2].detach(), expected[1].param, rtol=1e-10)
    assert torch.equal(params[3], run(starts[3], gradients[3], clip="none", kind=kind))


@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_a_parameter_without_a_gradient_is_left_alone(kind, angle):
    start, gradients = random(9, seed=0), leaning_gradients(9)
    missing, present = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = kind([missing, present], lr=0.01, weight_decay=0.1, angle=angle, delta_max=45.0)
    train(optimizer, present, gradients)
    assert torch.equal(missing, start)
    assert missing not in optimizer.state
    assert torch.equal(present, run(start, gradients, weight_decay=0.1, kind=kind))
    assert optimizer.angle_statistics().num_angles == len(gradients) - 1
    present.grad = None
    train(optimizer, missing, gradients[:2])
    assert torch.equal(missing, run(start, gradients[:2], weight_decay=0.1, kind=kind))
    assert optimizer.state[missing]["step"] == 2


def test_a_sparse_gradient_is_refused_before_anything_changes(kind):
    dense = torch.nn.Parameter(torch.ones(2, 3))
    sparse = torch.nn.Parameter(torch.ones(2, 3))
    dense.grad, sparse.grad = torch.ones(2, 3), torch.ones(2, 3).to_sparse()
    optimizer = kind([dense, sparse], lr=0.1)
    with pytest.raises(
        TypeError, match=r"dense gradients, got torch.sparse_coo .*\(2, 3\).*sparse="
    ):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2, 3))
    assert not optimizer.state


@pytest.mark.parametrize("clip", CLIPS)
def test_bf16_parameters_are_rounded_once_from_a_float32_step(kind, clip):
    param = torch.nn.Parameter(random(50, seed=0, dtype=torch.bfloat16))
    wide = torch.nn.Parameter(param.detach().float())
    options = {"lr": 0.05, "weight_decay": 0.1, "clip": clip, "delta_max": 45.0}
    optimizer, wide_optimizer = kind([param], **options), MoClip([wide], **options)
    for gradient in leaning_gradients(50, dtype=torch.bfloat16):
        train(optimizer, param, [gradient])
        train(wide_optimizer, wide, [gradient.float()])
        wide.data.copy_(wide.data.bfloat16())
        assert torch.equal(param.data.float(), wide.data)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[param]["exp_avg"], wide_optimizer.state[wide]["exp_avg"])


def test_step_returns_the_loss_of_its_closure(kind):
    param = torch.nn.Parameter(torch.tensor([2.0]))

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    optimizer = kind([param], lr=0.1)
    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(param.data, torch.tensor([2.0 - 0.1 * math.pi / 4]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"delta_max": 0.0}, r"delta_max must be in \(0, 180\] degrees, got 0.0; 180 switches"),
        ({"delta_max": 200.0}, "got 200.0"),
        ({"delta_max": math.nan}, "got nan"),
        (
            {"clip": "turn"},
            "clip must be one of scale, cautious, momentum, project, rotate, none, got 'turn'",
        ),
        ({"angle": "row"}, "angle must be one of tensor, global, got 'row'"),
        ({"second_moment": "both"}, "second_moment must be one of raw, capped, got 'both'"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and not negative, got inf"),
        ({"atan2_scale": -1.0}, "atan2_scale must be finite"),
    ],
)
def test_settings_out_of_range_are_refused_in_the_constructor_and_in_groups(kind, option, message):
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        kind([param], **{"lr": 0.1, **option})
    with pytest.raises(ValueError, match=message):
        kind([{"params": [param], **option}], lr=0.1)


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_two_shards_agree_with_the_whole(kind, clip, angle):
    """Each thread holds one side of every tensor; the third tensor is on one side only."""
    starts = [random(9, seed=0), random(2, seed=1), random(4, seed=2)]
    gradients = [leaning_gradients(len(start), seed=i) for i, start in enumerate(starts)]
    cuts = [4, 1, 0]
    options = {"lr": 0.01, "clip": clip, "angle": angle, "delta_max": 40.0}

    def path(parts: list[slice], **more):
        params = [
            torch.nn.Parameter(start[part].clone())
            for start, part in zip(starts, parts, strict=True)
        ]
        optimizer = kind(params, **options, **more)
        for step in zip(*gradients, strict=True):
            for param, gradient, part in zip(params, step, parts, strict=True):
                param.grad = gradient[part].clone() if param.numel() else None
            optimizer.step()
        return [param.detach() for param in params], optimizer.angle_statistics()

    barrier = threading.Barrier(2, timeout=60)
    tables: list[Any] = [None, None]

    def all_reduce(rank: int):
        def reduce_dots(table: Tensor) -> None:
            tables[rank] = table.clone()
            barrier.wait()
            table.copy_(tables[0] + tables[1])
            barrier.wait()

        return reduce_dots

    shards: list[Any] = [None, None]

    def work(rank: int) -> None:
        parts = [slice(cut) if rank == 0 else slice(cut, None) for cut in cuts]
        shards[rank] = path(parts, reduce_dots=all_reduce(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, whole_statistics = path([slice(None)] * 3)
    for i, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([shards[0][0][i], shards[1][0][i]]), expected)
    for _, statistics in shards:
        assert statistics.histogram == whole_statistics.histogram
        assert statistics.clipped_element_share == whole_statistics.clipped_element_share
