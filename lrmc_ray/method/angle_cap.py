"""Where the cap on the angle between gradient and momentum is computed: the readings of ``clip``.

With theta the angle between a gradient g and its momentum m, and delta = ``delta_max``, the capped
gradient g' is g where theta <= delta. That the angle is capped beyond is the paper's; its formula
could not be read. Each reading is a value of ``clip`` and a function here, and the default,
``"cautious"``, is our choice. All of them are g' = p g + q m, where p and q depend on <g, g>,
<g, m> and <m, m> alone: for a tensor in shards, or a model with one angle, these are only added up.

Where there is no angle, or no direction to turn to:

- m = 0 (the first step) or g = 0: no angle. g' = g; the statistics leave the tensor out. A zero
  gradient still decays both moments, and the weight still moves.
- theta = 180 degrees: ``scale`` and ``momentum`` follow their formulas (s = delta / 180; m stops
  at zero). ``project`` and ``rotate`` find no edge of the cone nearer than another: g' = 0.
- One element cannot turn: ``project`` and ``rotate`` leave it alone, because with g' = 0 its
  momentum could never change sign. ``scale`` and ``momentum`` follow their formulas.
- delta_max = 180: bit-identical with ``clip="none"``, but the angles are measured.
- A gradient that is not finite has no angle: it goes through, as in torch's optimizers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrmc_ray.method.names import Clip

COLLINEAR_SINE = 1e-6
"""Below this sine of theta, rounding decides to which side of the axis g lies."""


class CappedGradient(NamedTuple):
    """The capped gradients of G tensors: g' = ``p_G`` g + ``q_G`` m; without q where it is None."""

    p_G: Tensor
    q_G: Tensor | None
    theta_G: Tensor
    """Angle between g and m before the cap, in radians; NaN where there is none."""

    def is_changed(self) -> Tensor:
        """[G] bool: g' is another than g."""
        is_scaled_G = self.p_G != 1
        return is_scaled_G if self.q_G is None else is_scaled_G | (self.q_G != 0)

    def of(self, index: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The p and q of one tensor, 0-d, on its device."""
        q = None if self.q_G is None else self.q_G[index].to(device)
        return self.p_G[index].to(device), q


def angle_between(dots_G3: Tensor) -> Tensor:
    """Angles theta [G] in radians, from ``dot_products``; NaN where g or m is zero."""
    gg_G, gm_G, mm_G = dots_G3.unbind(-1)
    return (gm_G / (gg_G.sqrt() * mm_G.sqrt())).clamp(-1.0, 1.0).acos()


def cap_angle(
    dots_G3: Tensor, numel_G: Tensor, *, delta_max: float, clip: Clip, beta1: float
) -> CappedGradient:
    """Cap the angle of G gradients to their momenta: g' = g up to ``delta_max``, a reading beyond.

    Args:
        dots_G3: Their ``dot_products``.
        numel_G: Their numbers of elements.
        delta_max: The cap, in degrees.
        clip: The reading: ``"scale"``, ``"momentum"``, ``"rotate"`` and ``"project"`` are the
            functions below. ``"cautious"`` (the default) is ``"scale"``, and leaves out of each
            step the weights that would move against their gradient, see ``moclip.update_``.
            ``"none"`` is g' = g at every angle: Adam-atan2.
        beta1: Decay of the first moment; matters to ``"momentum"`` only.
    """
    delta = math.radians(delta_max)
    g_norm_G, m_norm_G = dots_G3[:, 0].sqrt(), dots_G3[:, 2].sqrt()
    theta_G = angle_between(dots_G3)
    is_capped_G = theta_G - delta > 0  # NaN is not
    q_G = None
    match clip:
        case "scale" | "cautious":
            p_G = scale(theta_G, delta)
        case "momentum":
            p_G = limit_momentum(theta_G, delta, g_norm_G, m_norm_G, beta1)
        case "rotate":
            p_G, q_G = rotate(theta_G, delta, g_norm_G, m_norm_G)
        case "project":
            p_G, q_G = project(theta_G, delta, g_norm_G, m_norm_G)
        case "none":
            p_G = torch.ones_like(theta_G)
    if q_G is not None:
        is_capped_G = is_capped_G & (numel_G > 1)
        q_G = torch.where(is_capped_G, q_G, 0.0)
    # torch.where, not `if`: an `if` on a CUDA tensor would wait for the device.
    return CappedGradient(torch.where(is_capped_G, p_G, 1.0), q_G, theta_G)


def scale(theta_G: Tensor, delta: float) -> Tensor:
    """``"scale"``: g' = (delta / theta) g. It keeps its direction, and counts less."""
    return delta / theta_G


def limit_momentum(
    theta_G: Tensor, delta: float, g_norm_G: Tensor, m_norm_G: Tensor, beta1: float
) -> Tensor:
    """``"momentum"``: g' = s g, the largest s in [0, 1] that turns the *momentum* by at most delta.

    s = min(1, beta1 ||m|| sin(delta) / ((1 - beta1) ||g|| sin(theta - delta))): the law of sines in
    the triangle of beta1 m, (1 - beta1) s g and their sum. Binds on outlier batches only.
    """
    turned_G = beta1 * m_norm_G * math.sin(delta)
    return (turned_G / ((1 - beta1) * g_norm_G * (theta_G - delta).sin())).clamp(max=1.0)


def rotate(
    theta_G: Tensor, delta: float, g_norm_G: Tensor, m_norm_G: Tensor, share_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``"rotate"``: g turned towards m until the angle is delta, its norm kept (times ``share_G``).

    g' = ||g|| (sin(delta) g^ + sin(theta - delta) m^) / sin(theta), with x^ = x / ||x||: the point
    at angle delta on the arc from m^ to g^, as in spherical interpolation. Can inflate the momentum
    and diverge.
    """
    sine_G = theta_G.sin()
    share_G = torch.ones_like(sine_G) if share_G is None else share_G
    length_G = torch.where(sine_G > COLLINEAR_SINE, share_G / sine_G, 0.0)
    return length_G * math.sin(delta), length_G * (theta_G - delta).sin() * g_norm_G / m_norm_G


def project(
    theta_G: Tensor, delta: float, g_norm_G: Tensor, m_norm_G: Tensor
) -> tuple[Tensor, Tensor]:
    """``"project"``: the nearest point to g in the cone of half-angle delta around m.

    It is the rotated g times max(0, cos(theta - delta)). Never ascends, but feeds m to itself.
    """
    share_G = (theta_G - delta).cos().clamp(min=0.0)
    return rotate(theta_G, delta, g_norm_G, m_norm_G, share_G)
