"""The readings of the cap, worked by hand and by their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmc_ray.method.angle_cap import CappedGradient, cap_angle
from lrmc_ray.method.dot_products import dot_products
from tests.support.moclip_paths import angle_deg, random

torch.set_num_threads(1)


def cap(gradient: Tensor, momentum: Tensor, *, delta_max: float, clip: str, beta1: float = 0.9):
    """The capped gradient itself, of two float64 vectors."""
    p, q, _ = capped_weights(gradient, momentum, delta_max=delta_max, clip=clip, beta1=beta1)
    assert (q is not None) == (clip in ("rotate", "project"))
    return p * gradient if q is None else p * gradient + q * momentum


def capped_weights(gradient: Tensor, momentum: Tensor, **options) -> CappedGradient:
    numel = torch.tensor([float(gradient.numel())])
    return cap_angle(dot_products(gradient, momentum)[None], numel, **options)


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
