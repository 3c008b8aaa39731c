"""A model's weights: copied as they are, rounded to bf16, or part of the way from the base."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrmc_ray.errors import DataError
from lrmc_ray.files.names import ADAPTER, MODEL_CARD
from lrmc_ray.files.origin import ORIGIN_FILE
from lrmc_ray.method.names import Blend
from lrmc_ray.models.loading import hide_bars, load_model
from lrmc_ray.models.names import WEIGHT_SUFFIX
from lrmc_ray.models.saving import save_model

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bf16"]


def copy_model(source: Path, target: Path) -> None:
    """Copy a model's files, byte by byte, readable for whom the umask allows.

    Its card and its origin stay behind: the copy gets its own. Adapters that are kept beside the
    weights go along.

    Raises:
        DataError: a file is a link to somewhere else; a copy may be given to others.
    """
    own = source.resolve()
    for path in sorted(source.iterdir()):
        if path.is_symlink() and path.resolve().parent != own:
            raise DataError(
                f"{source} must hold the model's own files, {path.name} is a link to "
                f"{path.resolve()}, which would be exported with it; put the file in its place"
            )
        if path.is_dir() and path.name == ADAPTER:
            (target / ADAPTER).mkdir()
            copy_model(path, target / ADAPTER)
        elif path.is_file() and path.name not in (ORIGIN_FILE, MODEL_CARD):
            shutil.copyfile(path, target / path.name)


def write_model(
    source: Path,
    target: Path,
    *,
    dtype: Dtype,
    base: Path | None = None,
    blend: float = 1.0,
    form: Blend = "even",
) -> None:
    """Write a model made from that in ``source``.

    Args:
        source: the tuned model.
        target: an empty directory.
        dtype: of the weights.
        base: the model that it was made from; needed for a ``blend`` other than 1.
        blend: how far to go from ``base``, 0, to the tuned model, 1.
        form: how ``blend`` is spread over the layers, see :func:`blend_into`.

    Raises:
        DataError: the two have other weights.
    """
    if dtype == "float32" and blend == 1.0:
        copy_model(source, target)
        return
    import torch

    hide_bars()
    model = load_model(source)
    if blend != 1.0:
        assert base is not None, "a blend is made from two models"
        blend_into(model, load_model(base), blend, form)
    save_model(model.to(torch.bfloat16) if dtype == "bf16" else model, source, target)


def blend_into(tuned: Any, base: Any, weight: float, form: Blend = "even") -> None:
    """Make ``tuned`` base + weight * (tuned - base), parameter by parameter, in float32.

    Args:
        tuned: a model; it is changed.
        base: the model that it was made from.
        weight: 0 gives the base, 1 the tuned model, both to the bit.
        form: ``depth`` lets the weight grow with the layer, see ``method/baselines``.

    Raises:
        DataError: the two have other parameters.
    """
    from lrmc_ray.method.baselines.interpolation import interpolate

    try:
        interpolate(dict(tuned.named_parameters()), dict(base.named_parameters()), weight, form)
    except ValueError as error:
        raise DataError(str(error)) from None


def lost_by_rounding(
    tuned: Path, base: Path, *, blend: float = 1.0, form: Blend = "even"
) -> float | None:
    """How far bf16 moves the weights, as a share of how far training did.

    Args:
        tuned: directory of the model, in float32.
        base: that of the model that it was made from.
        blend: how far from the base, as in :func:`write_model`.
        form: as there.

    Returns:
        Norm of the rounding errors over that of the change; None where nothing was changed, or the
        two have other tensors.
    """
    import torch

    from lrmc_ray.method.baselines.interpolation import blend_weights

    after, before = _files_of_tensors(tuned), _files_of_tensors(base)
    if after.keys() != before.keys():
        return None
    weights = blend_weights(after, blend, form)
    error = change = 0.0
    for name, path in after.items():
        one, other = _tensor(path, name), _tensor(before[name], name)
        if one.shape != other.shape:
            return None
        exact = torch.lerp(other, one, weights[name])
        error += float((exact.bfloat16().double() - exact).square().sum())
        change += float((exact - other).square().sum())
    return math.sqrt(error / change) if change else None


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Where each tensor of a model is."""
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob(f"*{WEIGHT_SUFFIX}")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _tensor(path: Path, name: str) -> "torch.Tensor":
    """One tensor, in float64: a small change is a difference of near numbers."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.double()


def size_of(source: Path, *, dtype: Dtype) -> int:
    """Bytes that an export takes, about."""
    total = 0
    for path in source.iterdir():
        if path.is_file():
            is_halved = dtype == "bf16" and path.suffix == WEIGHT_SUFFIX
            total += path.stat().st_size // (2 if is_halved else 1)
    return total


def size_of_directory(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
