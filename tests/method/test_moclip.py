"""MoClip against the float64 reference, closed forms, torch and adam-atan2-pytorch."""

import copy
import itertools
import math
import pickle
import threading
import warnings

import adam_atan2_pytorch
import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from lrmc_ray.method import moclip
from lrmc_ray.method.baselines.masked_adamw import MaskedAdamW
from lrmc_ray.method.moclip import CappedGradient, MoClip, cap_angle, dot_products
from tests.support import reference

torch.set_num_threads(1)

CLIPS = ["scale", "cautious", "momentum", "project", "rotate", "none"]
CAPS = CLIPS[:-1]


def random(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def leaning_gradients(*shape: int, num: int = 10, seed: int = 0, dtype=torch.float64):
    """Gradients with a common part, so that the angles lie on both sides of 45 degrees."""
    common = random(*shape, seed=seed)
    return [
        (random(*shape, seed=1000 * (seed + 1) + i) + 0.8 * common).to(dtype) for i in range(num)
    ]


def train(optimizer: MoClip, param: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


def run(start: Tensor, gradients: list[Tensor], **options) -> Tensor:
    """With the reference's cap of 45 degrees, which binds on ``leaning_gradients``."""
    param = torch.nn.Parameter(start.clone())
    options = {"lr": 0.01, "delta_max": 45.0, **options}
    return train(MoClip([param], **options), param, gradients)


def cap(gradient: Tensor, momentum: Tensor, *, delta_max: float, clip: str, beta1: float = 0.9):
    """The capped gradient itself, of two float64 vectors."""
    p, q, _ = capped_weights(gradient, momentum, delta_max=delta_max, clip=clip, beta1=beta1)
    return p * gradient + q * momentum


def capped_weights(gradient: Tensor, momentum: Tensor, **options) -> CappedGradient:
    numel = torch.tensor([float(gradient.numel())])
    return cap_angle(dot_products(gradient, momentum)[None], numel, **options)


def angle_deg(a: Tensor, b: Tensor) -> float:
    return reference.angle_deg(a.double().numpy(), b.double().numpy())


# The reference


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
@pytest.mark.parametrize("delta_max", [10.0, 45.0, 100.0])
@pytest.mark.parametrize("shape", [(5, 3), (1,), (2,), ()])
def test_ten_steps_follow_the_float64_reference(clip, second_moment, delta_max, shape):
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
    optimizer = MoClip([param], **options)
    train(optimizer, param, gradients)
    state = optimizer.state[param]
    np.testing.assert_allclose(param.detach(), expected.param, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(state["exp_avg"], expected.exp_avg, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(state["exp_avg_sq"], expected.exp_avg_sq, rtol=1e-9, atol=1e-13)
    assert state["step"] == 10


@pytest.mark.parametrize("clip", CAPS)
def test_a_global_angle_is_that_of_one_long_vector_over_all_groups(clip):
    shapes = [(5, 3), (1,), (7,)]
    starts = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [leaning_gradients(*shape, seed=i) for i, shape in enumerate(shapes)]
    settings_ = {"lr": 0.01, "delta_max": 45.0, "clip": clip}
    expected = reference.moclip_global(starts, list(zip(*gradients, strict=True)), **settings_)
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    # How the tensors are grouped does not matter.
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = MoClip(groups, **settings_, angle="global")
    for step in zip(*gradients, strict=True):
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    for param, result in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach(), result.param, rtol=1e-10)


def test_float32_stays_within_its_own_rounding_of_the_reference():
    start = random(300, 300, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(300, 300, dtype=torch.float32)
    expected = reference.moclip(start.numpy(), [g.numpy() for g in gradients], lr=0.01)
    np.testing.assert_allclose(run(start, gradients), expected.param, rtol=2e-6, atol=2e-7)


# Adam-atan2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_none_is_adam_atan2_bit_for_bit(dtype, weight_decay):
    start, gradients = (
        random(70, 1001, seed=0, dtype=dtype),
        leaning_gradients(70, 1001, dtype=dtype),
    )
    theirs = torch.nn.Parameter(start.clone())
    package = adam_atan2_pytorch.AdamAtan2(
        [theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay, a=1.27, b=1.0
    )
    train(package, theirs, gradients)
    ours = run(start, gradients, clip="none", weight_decay=weight_decay, atan2_scale=1.27)
    assert torch.equal(ours, theirs.data)


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_180_degrees_is_none_bit_for_bit(clip, angle, second_moment):
    start = random(301, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(301, dtype=torch.float32)
    gradients.insert(5, -gradients[4])
    options = {"angle": angle, "second_moment": second_moment, "weight_decay": 0.1}
    expected = run(start, gradients, clip="none", weight_decay=0.1)
    assert torch.equal(run(start, gradients, clip=clip, delta_max=180.0, **options), expected)
    # An angle of exactly 180 degrees: 3, 4, 5 and their halves round nothing.
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0])]
    options["betas"] = (0.5, 0.99)
    expected = run(exact[0], exact, clip="none", weight_decay=0.1, betas=(0.5, 0.99))
    assert torch.equal(run(exact[0], exact, clip=clip, delta_max=180.0, **options), expected)


# The caps, worked by hand and by their properties


def test_caps_of_a_right_angle_by_hand():
    """g = (0, 10) against m = (1, 0), delta 30 degrees."""
    g, m = torch.tensor([0.0, 10.0]).double(), torch.tensor([1.0, 0.0]).double()
    half, root = 0.5, math.sqrt(0.75)
    by_hand = {
        "none": [0.0, 10.0],
        "scale": [0.0, 10.0 / 3.0],
        # The momentum 0.9 (1, 0) turns by 30 degrees where 0.1 s 10 = 0.9 tan(30 degrees).
        "momentum": [0.0, 9.0 * half / root],
        "rotate": [10.0 * root, 10.0 * half],
        "project": [5.0 * root, 5.0 * half],
    }
    for clip, expected in by_hand.items():
        capped = cap(g, m, delta_max=30.0, clip=clip)
        torch.testing.assert_close(capped, torch.tensor(expected).double(), rtol=1e-6, atol=1e-12)


def test_project_is_zero_from_90_degrees_beyond_the_cap():
    m = torch.tensor([1.0, 0.0]).double()
    for theta_deg, is_zero in ((134.9, False), (135.1, True), (180.0, True)):
        theta = math.radians(theta_deg)
        g = torch.tensor([math.cos(theta), math.sin(theta)]).double()
        assert (cap(g, m, delta_max=45.0, clip="project").norm() == 0) == is_zero


vectors = st.integers(0, 2**31 - 1)
deltas = st.floats(1.0, 179.0)


def pair(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Two vectors of very different lengths."""
    lengths = 10.0 ** random(2, seed=seed + 1)
    return random(size, seed=seed) * lengths[0], random(size, seed=seed + 2) * lengths[1]


@given(seed=vectors, delta_max=deltas, clip=st.sampled_from(["project", "rotate"]))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_project_and_rotate_obey_the_cap(seed, delta_max, clip):
    g, m = pair(seed)
    capped = cap(g, m, delta_max=delta_max, clip=clip)
    theta = angle_deg(g, m)
    if theta <= delta_max:
        assert torch.equal(capped, g)
    elif capped.norm() > 0:
        assert abs(angle_deg(capped, m) - delta_max) < 1e-5
        if clip == "rotate":
            torch.testing.assert_close(capped.norm(), g.norm())


@given(seed=vectors, delta_max=st.floats(1.0, 89.0))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_no_point_of_the_cone_is_nearer_than_the_projection(seed, delta_max):
    g, m = pair(seed)
    distance = (g - cap(g, m, delta_max=delta_max, clip="project")).norm()
    others = cap_many(random(200, 4, seed=seed + 3), m, delta_max) * g.norm()
    assert ((g - others).norm(dim=1) >= distance * (1 - 1e-9)).all()


def cap_many(directions: Tensor, axis: Tensor, delta_max: float) -> Tensor:
    """The directions pulled into the cone, at angles up to ``delta_max``, lengths as they are."""
    axis = axis / axis.norm()
    across = directions - (directions @ axis)[:, None] * axis
    across = across / across.norm(dim=1, keepdim=True)
    angle = torch.linspace(0, math.radians(delta_max), len(directions), dtype=axis.dtype)[:, None]
    length = directions.norm(dim=1, keepdim=True)
    return length * (angle.cos() * axis + angle.sin() * across)


@given(seed=vectors, delta_max=deltas, beta1=st.floats(0.1, 0.99))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_momentum_turns_by_at_most_delta_and_no_larger_scale_would_do(seed, delta_max, beta1):
    g, m = pair(seed)
    capped = cap(g, m, delta_max=delta_max, clip="momentum", beta1=beta1)
    turn = angle_deg(beta1 * m + (1 - beta1) * capped, m)
    assert turn <= delta_max + 1e-5
    scale = (capped @ g) / (g @ g)
    torch.testing.assert_close(capped, scale * g)
    assert 0 <= scale <= 1
    if scale < 1:
        larger = beta1 * m + (1 - beta1) * min(1.0, float(scale) * 1.001) * g
        assert angle_deg(larger, m) > delta_max - 1e-5


@given(seed=vectors, delta_max=deltas)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_scale_is_delta_over_theta(seed, delta_max):
    g, m = pair(seed)
    expected = min(1.0, delta_max / angle_deg(g, m))
    torch.testing.assert_close(cap(g, m, delta_max=delta_max, clip="scale"), expected * g)


@given(seed=vectors, delta_max=deltas, clip=st.sampled_from(["scale", "momentum", "project"]))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_the_capped_gradient_never_ascends(seed, delta_max, clip):
    g, m = pair(seed)
    assert cap(g, m, delta_max=delta_max, clip=clip) @ g >= 0


# The cap by weight


def test_cautious_by_hand():
    """beta1 0.5; after a first step of (4, 4, 4, 4, 4), m = 2, the second one is

    - 4: agrees. -1: against m, 0.5. -4: turns m to -1 and agrees. 0: no angle. -2: m is 0.
    """
    first = torch.full((5,), 4.0).double()
    second = torch.tensor([4.0, -1.0, -4.0, 0.0, -2.0]).double()
    betas = (0.5, 0.5)
    paths = {
        clip: run(torch.zeros(5).double(), [first, second], clip=clip, delta_max=179.0, betas=betas)
        for clip in ("scale", "cautious")
    }
    m = torch.tensor([3.0, 0.5, -1.0, 1.0, 0.0]).double()
    v = torch.tensor([12.0, 4.5, 12.0, 4.0, 6.0]).double()
    start = -0.01 * math.pi / 4
    steps = -0.01 * torch.atan2(m / 0.75, (v / 0.75).sqrt())
    torch.testing.assert_close(paths["scale"], start + steps)
    steps[1] = 0.0
    torch.testing.assert_close(paths["cautious"], start + steps)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-25])
def test_cautious_never_moves_a_weight_against_its_gradient(compiled, magnitude):
    """Where ``scale`` does for a third of them; of a product of 1e-50 float32 keeps no sign."""
    gradients = [magnitude * random(20_000, seed=i, dtype=torch.float32) for i in range(8)]
    against = {}
    for clip in ("scale", "cautious"):
        param = torch.nn.Parameter(torch.zeros(20_000))
        optimizer = MoClip([param], lr=0.01, clip=clip, compiled=compiled)
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


def test_cautious_leaves_out_what_cautious_adamw_leaves_out_and_lengthens_nothing():
    """In a tensor of which a tenth of the rows has a gradient, C-AdamW steps 10 times as far."""
    gradients = [random(100, 40, seed=i) for i in range(5)]
    for gradient in gradients:
        gradient[10:] = 0.0
    adamw = torch.nn.Parameter(torch.zeros(100, 40).double())
    ours, plain = (torch.nn.Parameter(torch.zeros(100, 40).double()) for _ in range(2))
    optimizers = [
        MaskedAdamW([adamw], 1e-3, mask="cautious", betas=(0.9, 0.99)),
        MoClip([ours], 1e-3, clip="cautious", delta_max=179.9),
        MoClip([plain], 1e-3, clip="none"),
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


# The angle


@pytest.mark.parametrize("theta_deg", [0.0, 0.01, 1.0, 45.0, 90.0, 179.0, 179.99, 180.0])
@pytest.mark.parametrize("size", [2, 1000, 3_000_001])
def test_float32_angles_are_right_to_a_thousandth_of_a_degree(theta_deg, size):
    m = random(size, seed=0, dtype=torch.float32) * 1e-3
    other = random(size, seed=1)
    across = other - (other @ m.double()) / (m.double() @ m.double()) * m.double()
    theta = math.radians(theta_deg)
    axis = m.double()
    g = axis * math.cos(theta) + across * (axis.norm() / across.norm()) * math.sin(theta)
    param = torch.nn.Parameter(torch.zeros(size))
    optimizer = MoClip([param], lr=0.0, betas=(0.0, 0.99))  # beta1 = 0: the momentum is m itself
    gradients = [m, (7 * g).float()]
    train(optimizer, param, gradients)
    measured_deg = optimizer.angle_statistics().mean_deg
    assert measured_deg == pytest.approx(angle_deg(gradients[1], m), abs=1e-3)
    assert measured_deg == pytest.approx(theta_deg, abs=1e-3)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**20])
def test_scaling_all_gradients_leaves_the_path(clip, factor):
    """Powers of two round nothing: the path is the same bit for bit."""
    start = random(100, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(100, dtype=torch.float32)
    scaled = [factor * g for g in gradients]
    options = {"clip": clip, "second_moment": "capped"}
    assert torch.equal(run(start, scaled, **options), run(start, gradients, **options))


# The step


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_no_step_is_longer_than_its_bound(clip, second_moment):
    """Gradients over twelve orders of magnitude, with zeros among them."""
    lr, scale = 0.1, 1.27
    param = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = MoClip(
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
def test_the_first_step_has_no_angle(clip):
    """m = 0: corrected, both moments are those of g, and atan2(g, |g|) is a quarter of pi."""
    start, gradient = random(20, seed=0), random(20, seed=1)
    param = torch.nn.Parameter(start.clone())
    optimizer = MoClip([param], lr=0.01, clip=clip, delta_max=1.0, second_moment="capped")
    train(optimizer, param, [gradient])
    torch.testing.assert_close(param.data, start - 0.01 * math.pi / 4 * gradient.sign())
    assert optimizer.angle_statistics().num_angles == 0


@pytest.mark.parametrize("clip", CLIPS)
def test_a_zero_gradient_decays_the_moments_and_has_no_angle(clip):
    gradient = random(20, seed=1)
    param = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = MoClip([param], lr=0.01, clip=clip, delta_max=1.0)
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


@pytest.mark.parametrize(
    ("clip", "expected"),
    [("scale", 45 / 180), ("momentum", 0.9 * 3 / (0.1 * 2 * 300)), ("project", 0), ("rotate", 0)],
)
@pytest.mark.parametrize("theta_deg", [180.0, 180.0 - 1e-6])
def test_opposite_vectors(clip, expected, theta_deg):
    """g at 180 degrees to m, 200 times as long: s of g' = s g."""
    theta = math.radians(theta_deg)
    m = torch.tensor([3.0, 0.0, 0.0]).double()
    g = 600 * torch.tensor([math.cos(theta), 0.0, math.sin(theta)]).double()
    torch.testing.assert_close(
        cap(g, m, delta_max=45.0, clip=clip), expected * g, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("clip", "expected"),
    [("scale", -1.5), ("momentum", -2.7 / 0.1), ("project", -6), ("rotate", -6)],
)
def test_one_element(clip, expected):
    """m = 3 against g = -6; for momentum g = -60, so that it binds: s g = 0.9 m / 0.1."""
    m, g = torch.tensor([3.0]).double(), torch.tensor([-6.0]).double()
    g = 10 * g if clip == "momentum" else g
    torch.testing.assert_close(
        cap(g, m, delta_max=45.0, clip=clip), torch.tensor([expected]).double()
    )
    torch.testing.assert_close(cap(-g, m, delta_max=45.0, clip=clip), -g)


def test_gradients_that_are_not_finite_pass_through_and_are_not_counted():
    for bad in (math.nan, math.inf):
        gradients = [torch.ones(3), torch.tensor([-1.0, bad, 1.0])]
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = MoClip([param], lr=0.01, clip="project", delta_max=45.0)
        train(optimizer, param, gradients)
        expected = run(torch.zeros(3), gradients, clip="none")
        torch.testing.assert_close(param.data, expected, rtol=0, atol=0, equal_nan=True)
        assert optimizer.angle_statistics().num_angles == 0


# torch's optimizer contract


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_continues_bit_for_bit(clip, dtype):
    start = random(40, 3, seed=0, dtype=dtype)
    gradients = leaning_gradients(40, 3, dtype=dtype)
    options = {"lr": 0.01, "clip": clip, "weight_decay": 0.1}
    param = torch.nn.Parameter(start.clone())
    optimizer = MoClip([param], **options)
    train(optimizer, param, gradients[:5])
    other_param = torch.nn.Parameter(param.detach().clone())
    other = MoClip([other_param], lr=99.0)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    other.load_state_dict(saved)
    # Both go on: they must not share a tensor either.
    other.load_state_dict(optimizer.state_dict())
    expected = train(optimizer, param, gradients[5:])
    assert torch.equal(train(other, other_param, gradients[5:]), expected)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(other.state[other_param][name], optimizer.state[param][name])
    third_param = torch.nn.Parameter(start.clone())
    third = MoClip([third_param], **options)
    third.load_state_dict(saved)
    assert third.state[third_param]["step"] == 5
    assert third.state[third_param]["exp_avg"].dtype == torch.float32


def test_a_deep_copy_keeps_the_hook():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = MoClip([param], lr=0.1, reduce_dots=torch.Tensor.zero_, compiled=True)
    twin = copy.deepcopy(optimizer)
    assert twin.reduce_dots is torch.Tensor.zero_
    assert twin.compiled


@pytest.mark.parametrize("clip", ["scale", "project"])
def test_a_learning_rate_schedule_scales_each_step(clip):
    """The gradients are given, so step t moves by lr_t times what it moves by at lr 1."""
    gradients = leaning_gradients(6)
    unit_path = [
        run(torch.zeros(6).double(), gradients[: t + 1], lr=1.0, clip=clip) for t in range(6)
    ]
    param = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = MoClip([param], lr=0.5, clip=clip, delta_max=45.0)
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
def test_every_switch_can_differ_between_groups(names):
    override = {name: OVERRIDES[name] for name in names}
    start, gradients = random(9, seed=0), leaning_gradients(9)
    plain, special = (torch.nn.Parameter(start.clone()) for _ in range(2))
    groups = [{"params": [plain]}, {"params": [special], **override}]
    optimizer = MoClip(groups, lr=0.01, delta_max=45.0)
    for gradient in gradients:
        plain.grad = special.grad = gradient
        optimizer.step()
    assert torch.equal(plain, run(start, gradients))
    assert torch.equal(special, run(start, gradients, **override))
    assert not torch.equal(plain, special)


def test_global_and_tensor_angles_and_none_side_by_side():
    """A group with its own angles, or without a cap, takes no part in the global angle."""
    starts = [random(9, seed=i) for i in range(4)]
    gradients = [leaning_gradients(9, seed=i) for i in range(4)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "angle": "global"},
        {"params": params[3:], "angle": "global", "clip": "none"},
    ]
    optimizer = MoClip(groups, lr=0.01, delta_max=45.0)
    for step in zip(*gradients, strict=True):
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient
        optimizer.step()
    expected = reference.moclip_global(
        starts[1:3], list(zip(*gradients[1:3], strict=True)), lr=0.01
    )
    assert torch.equal(params[0], run(starts[0], gradients[0]))
    np.testing.assert_allclose(params[1].detach(), expected[0].param, rtol=1e-10)
    np.testing.assert_allclose(params[2].detach(), expected[1].param, rtol=1e-10)
    assert torch.equal(params[3], run(starts[3], gradients[3], clip="none"))


@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_a_parameter_without_a_gradient_is_left_alone(angle):
    start, gradients = random(9, seed=0), leaning_gradients(9)
    missing, present = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = MoClip([missing, present], lr=0.01, weight_decay=0.1, angle=angle, delta_max=45.0)
    train(optimizer, present, gradients)
    assert torch.equal(missing, start)
    assert missing not in optimizer.state
    assert torch.equal(present, run(start, gradients, weight_decay=0.1))
    assert optimizer.angle_statistics().num_angles == len(gradients) - 1
    present.grad = None
    train(optimizer, missing, gradients[:2])
    assert torch.equal(missing, run(start, gradients[:2], weight_decay=0.1))
    assert optimizer.state[missing]["step"] == 2


def test_a_sparse_gradient_is_refused_before_anything_changes():
    dense = torch.nn.Parameter(torch.ones(2, 3))
    sparse = torch.nn.Parameter(torch.ones(2, 3))
    dense.grad, sparse.grad = torch.ones(2, 3), torch.ones(2, 3).to_sparse()
    optimizer = MoClip([dense, sparse], lr=0.1)
    with pytest.raises(
        TypeError, match=r"dense gradients, got torch.sparse_coo .*\(2, 3\).*sparse="
    ):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2, 3))
    assert not optimizer.state


@pytest.mark.parametrize("clip", CLIPS)
def test_bf16_parameters_are_rounded_once_from_a_float32_step(clip):
    param = torch.nn.Parameter(random(50, seed=0, dtype=torch.bfloat16))
    wide = torch.nn.Parameter(param.detach().float())
    options = {"lr": 0.05, "weight_decay": 0.1, "clip": clip, "delta_max": 45.0}
    optimizer, wide_optimizer = MoClip([param], **options), MoClip([wide], **options)
    for gradient in leaning_gradients(50, dtype=torch.bfloat16):
        train(optimizer, param, [gradient])
        train(wide_optimizer, wide, [gradient.float()])
        wide.data.copy_(wide.data.bfloat16())
        assert torch.equal(param.data.float(), wide.data)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[param]["exp_avg"], wide_optimizer.state[wide]["exp_avg"])


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
        optimizer = MoClip(params, lr=0.01, clip="project", delta_max=45.0, weight_decay=0.1)
        for step in zip(*gradients, strict=True):
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.T.contiguous().T if layouts[1] else gradient.clone()
            optimizer.step()
        for param, start, steps in zip(params, starts, gradients, strict=True):
            expected = run(start, steps, clip="project", weight_decay=0.1)
            torch.testing.assert_close(param.data, expected, rtol=1e-6, atol=1e-7)


def test_step_returns_the_loss_of_its_closure():
    param = torch.nn.Parameter(torch.tensor([2.0]))

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    optimizer = MoClip([param], lr=0.1)
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
def test_settings_out_of_range_are_refused_in_the_constructor_and_in_groups(option, message):
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        MoClip([param], **{"lr": 0.1, **option})
    with pytest.raises(ValueError, match=message):
        MoClip([{"params": [param], **option}], lr=0.1)


# Statistics, shards, device


def test_angle_statistics_by_hand():
    """Angles of 90, 180 and 0 degrees in tensors of 2, 2 and 4 elements, cap 100 degrees."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 2, 4)]
    firsts = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.ones(4)]
    seconds = [torch.tensor([0.0, 3.0]), torch.tensor([-2.0, 0.0]), torch.ones(4)]
    optimizer = MoClip(params, lr=0.1, delta_max=100.0)
    for gradients in (firsts, seconds):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
    statistics = optimizer.angle_statistics()
    assert statistics.num_angles == 3
    assert statistics.mean_deg == pytest.approx(90.0, abs=1e-5)
    assert statistics.clipped_share == pytest.approx(1 / 3)
    assert statistics.clipped_element_share == pytest.approx(2 / 8)
    assert len(statistics.histogram) == moclip.NUM_ANGLE_BINS == 36
    assert {i: n for i, n in enumerate(statistics.histogram) if n} == {0: 1, 18: 1, 35: 1}
    empty = optimizer.angle_statistics()
    assert empty.num_angles == sum(empty.histogram) == 0
    assert math.isnan(empty.mean_deg)
    assert math.isnan(empty.clipped_share)


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize(("delta_max", "share"), [(1.0, 1.0), (179.0, 0.0)])
def test_a_cap_that_always_or_never_binds_shows(clip, delta_max, share):
    param = torch.nn.Parameter(torch.zeros(30))
    optimizer = MoClip([param], lr=0.1, clip=clip, delta_max=delta_max, betas=(0.5, 0.99))
    train(optimizer, param, [100.0**i * random(30, seed=i).float() for i in range(5)])
    statistics = optimizer.angle_statistics()
    assert statistics.num_angles == 4
    assert statistics.clipped_share == statistics.clipped_element_share == share


@pytest.mark.parametrize("clip", CAPS)
@pytest.mark.parametrize("angle", ["tensor", "global"])
def test_two_shards_agree_with_the_whole(clip, angle):
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
        optimizer = MoClip(params, **options, **more)
        for step in zip(*gradients, strict=True):
            for param, gradient, part in zip(params, step, parts, strict=True):
                param.grad = gradient[part].clone() if param.numel() else None
            optimizer.step()
        return [param.detach() for param in params], optimizer.angle_statistics()

    barrier, tables = threading.Barrier(2, timeout=60), [None, None]

    def all_reduce(rank: int):
        def reduce_dots(table: Tensor) -> None:
            tables[rank] = table.clone()
            barrier.wait()
            table.copy_(tables[0] + tables[1])
            barrier.wait()

        return reduce_dots

    shards = [None, None]

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


@pytest.mark.parametrize("piece", [10, 1000, 10**6])
def test_dot_products_of_many_vectors_are_those_of_each(piece, monkeypatch):
    """Whole, and in pieces of which some come together and some are parts of a vector."""
    monkeypatch.setattr(moclip, "_CACHED_BYTES", 8 * piece)
    monkeypatch.setattr(moclip, "_DEVICE_BYTES", 8 * 1500)
    sizes = (5, 1, 3000, 77, 1, 400)
    grads = [random(n, seed=n, dtype=torch.float32) * 10.0 ** (i - 3) for i, n in enumerate(sizes)]
    momenta = [random(n, seed=n + 1, dtype=torch.float32) for n in sizes]
    momenta[3].zero_()
    grads[4].fill_(math.inf)
    found = moclip.foreach_dot_products(grads, momenta).numpy()
    for row, grad, momentum in zip(found, grads, momenta, strict=True):
        g, m = grad.double().numpy(), momentum.double().numpy()
        expected = [g @ g, g @ m, m @ m]
        # The products' sum has the error of its terms, which may cancel.
        error = 1e-14 * np.abs(g * m).sum() if np.isfinite(g).all() else 0.0
        np.testing.assert_allclose(row, expected, rtol=1e-13, atol=error)


@pytest.mark.parametrize("seed", range(5))
def test_batches_are_in_order_and_have_small_temporaries(seed, monkeypatch):
    monkeypatch.setattr(moclip, "_DEVICE_BYTES", 4 * 100)
    sizes = torch.randint(1, 130, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = list(moclip._by_size(sizes, lambda size: size, torch.float32))
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
    optimizer = MoClip(params, lr=0.1, clip=clip, angle=angle, delta_max=45.0, weight_decay=0.1)
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
    optimizer = MoClip(params, lr=0.1, clip=clip, angle=angle, delta_max=45.0, weight_decay=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].device.type == "meta"
    assert optimizer.state[params[0]]["step"] == 3


# The compiled update


def test_arctan2_in_float32():
    """Against float64, over all magnitudes; the bound on the step needs pi / 2 at most."""
    exponents = torch.linspace(-30, 37, 135, dtype=torch.float64)
    magnitudes = torch.cat([torch.zeros(1), (10.0**exponents).float(), torch.rand(5000)])
    y, x = (t.flatten() for t in torch.meshgrid(magnitudes, magnitudes[:400], indexing="ij"))
    expected = torch.atan2(y.double(), x.double())
    actual = moclip.arctan2_nonnegative(y, x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=5e-7, atol=1e-36)
    assert torch.equal(moclip.arctan2_nonnegative(-y, x), -actual)
    assert actual.max() == torch.tensor(math.pi / 2)
    assert moclip.arctan2_nonnegative(torch.tensor(math.nan), torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("clip", ["scale", "cautious", "project", "none"])
@pytest.mark.parametrize("second_moment", ["raw", "capped"])
def test_the_stated_update_equals_the_foreach_update(clip, second_moment):
    start, gradients = random(5000, seed=0), leaning_gradients(5000)
    for i, gradient in enumerate(gradients):
        gradient[i::7] = 0.0
    options = {"clip": clip, "second_moment": second_moment, "weight_decay": 0.1, "lr": 0.01}
    param, m, v = start.clone(), torch.zeros(5000).double(), torch.zeros(5000).double()
    group = MoClip([param], **options).param_groups[0]
    for step, gradient in enumerate(gradients, start=1):
        p, q, _ = capped_weights(gradient, m, delta_max=45.0, clip=clip, beta1=0.9)
        scalars = moclip._step_scalars(group, step)
        update = moclip.TensorUpdate(param, gradient, m, v, p, q, scalars)
        param, m, v = moclip.moclip_update(update, second_moment, clip == "cautious")
    torch.testing.assert_close(param, run(start, gradients, **options), rtol=1e-12, atol=1e-14)


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
            optimizer = MoClip(
                params, lr=0.01, clip=clip, compiled=compiled, weight_decay=0.1, delta_max=60.0
            )
            for i, step in enumerate(zip(*gradients, strict=True)):
                optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
                for param, gradient in zip(params, step, strict=True):
                    param.grad = gradient.clone()
                optimizer.step()
            assert optimizer.compiled == compiled
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
    capless = run(starts[1], path, clip="none", **options)
    assert torch.equal(run(starts[1], path, delta_max=180.0, **options), capless)


def test_without_a_compiler_the_step_warns_and_goes_on_uncompiled():
    start = random(20_000, seed=0, dtype=torch.float32)
    gradients = leaning_gradients(20_000, dtype=torch.float32)
    param = torch.nn.Parameter(start.clone())
    optimizer = MoClip([param], lr=0.01, compiled=True, delta_max=45.0)
    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch("cpp.cxx", (None, "/nonexistent"))
    with fresh_cache(), no_compiler, pytest.warns(RuntimeWarning, match="No working C.. compiler"):
        train(optimizer, param, gradients[:1])
    assert not optimizer.compiled
    with warnings.catch_warnings(action="error"):
        train(optimizer, param, gradients[1:])
    torch.testing.assert_close(param.data, run(start, gradients), rtol=1e-6, atol=1e-7)
