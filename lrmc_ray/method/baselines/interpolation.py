r"""Models between the base and a tuned one, weight by weight, after training and for free.

With the base's weights w_0 and the tuned w, and lambda from 0 to 1::

    "even"    w_0 + lambda (w - w_0)
    "depth"   w_0 + lambda_l (w - w_0),  lambda_l = lambda + (1 - lambda) l / (L - 1)
              in layer l of L (from 0), and lambda in all that is in no layer

``"even"`` is WiSE-FT (arXiv 2109.01903). ``"depth"`` is LiNeS (arXiv 2410.17146), which keeps the
first layers, taken to be the general ones, near the base, with its alpha = lambda and beta = 1 -
lambda: the last layer is the tuned one. As in its authors' code all that is in no layer, a head or
a last norm too, has the smallest factor. Where our reading could differ: a layer is what the first
number in a parameter's name says, so a model with two stacks has two depths.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lrmc_ray.method.names import Blend, check_choice

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


@torch.no_grad()
def interpolate(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], weight: float, form: Blend = "even"
) -> None:
    """Change ``tuned`` to a model between ``base`` and itself, in float32.

    Args:
        tuned: Parameters by name; they are changed in place.
        base: Those of the model that it was made from.
        weight: Lambda; with ``"even"`` 0 gives the base and 1 the tuned model, both to the bit.
        form: See the module.

    Raises:
        ValueError: The two have other parameters.
    """
    if differing := sorted(
        name
        for name in base.keys() | tuned.keys()
        if _shape(base.get(name)) != _shape(tuned.get(name))
    ):
        raise ValueError(
            "a blend needs a base with the same weights as the tuned model, "
            f"{len(differing)} differ, first {differing[0]}; give the base that it was made from"
        )
    weights = blend_weights(tuned, weight, form)
    for name, parameter in tuned.items():
        parameter.copy_(torch.lerp(base[name].float(), parameter.float(), weights[name]))


def blend_weights(names: Iterable[str], weight: float, form: Blend) -> dict[str, float]:
    """The lambda of every parameter, by its name."""
    check_choice("form", form, Blend)
    places = {name: _LAYER.match(name) for name in names}
    if form == "even":
        return dict.fromkeys(places, weight)
    last: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            last[place[1]] = max(last.get(place[1], 0), int(place[2]))
    found = {}
    for name, place in places.items():
        depth = int(place[2]) / max(1, last[place[1]]) if place is not None else 0.0
        found[name] = weight + (1.0 - weight) * depth
    return found


def _shape(parameter: Tensor | None) -> tuple[int, ...] | None:
    return None if parameter is None else tuple(parameter.shape)
