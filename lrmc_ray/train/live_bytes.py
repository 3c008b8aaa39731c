"""Bytes of the tensors that are alive, and the most that there were: counted, not measured.

Inside of it every operator's results are counted as they come and go. With fake tensors, which have
a shape and no memory, that is how much a model would take which this machine could not hold.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lrmc_ray.errors import DataError, first_line
from lrmc_ray.models.forward import one_sequence_a_row


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that operators return while it is entered.

    A storage counts once, however many views it has, until the last of them is gone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes of what is alive."""
        self.most = 0
        """The most that were alive at a time since the last :meth:`begin`."""
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Look for the most from now on."""
        self.most = self.now

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it returns."""
        if func is torch.ops.aten._grouped_mm.default:
            found = _grouped_product(*args[:3], **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _grouped_product(one: Tensor, other: Tensor, ends: Tensor | None = None, **_: Any) -> Tensor:
    """As much as the experts' product returns; torch's own fake of it knows bf16 alone."""
    if one.ndim == 2 and other.ndim == 2:
        assert ends is not None
        return one.new_empty(len(ends), one.shape[0], other.shape[1])
    if one.ndim == 2 or other.ndim == 2:
        return one.new_empty(one.shape[-2], other.shape[-1])
    return one.new_empty(one.shape[0], one.shape[1], other.shape[2])


@contextlib.contextmanager
def without_values(model: Any, *, whose: str, instead: str) -> Iterator[None]:
    """Refuse a model whose passes inside need the values of tensors, which fake ones have not.

    Args:
        model: that runs.
        whose: what the message says needs no values, with its verb.
        instead: the remedy that the message ends with.

    Raises:
        DataError: a pass failed.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise DataError(
            f"{model.config.model_type} must be a type whose {whose} no values of tensors for its "
            f"memory to be forecast, got {first_line(error)}; {instead}"
        ) from error


@contextlib.contextmanager
def counting() -> Iterator[LiveBytes]:
    """Fake tensors in place of all that are made, counted."""
    live = LiveBytes()
    # PEFT moves layers to the device where they are already. Fake ones cannot be moved.
    unmoved = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    # Without values the look for packed sequences would make a mask that training does not have.
    with one_sequence_a_row(), unmoved, FakeTensorMode(), live:
        yield live
