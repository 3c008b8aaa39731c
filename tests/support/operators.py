"""Which operators of torch run."""

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


_WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
)
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class NoHostSync(TorchDispatchMode):
    """Fails on the operations by which the host waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in _WAITING
        if name in _INDEXED:
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if func is torch.ops.aten.repeat_interleave.Tensor:
            waits = (kwargs or {}).get("output_size") is None
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class NothingRead(NoHostSync):
    """Fails also where a tensor's content is taken to the host, which torch's modes do not see."""

    def __enter__(self) -> Self:
        def refuse(*args: Any, **options: Any) -> None:
            raise AssertionError("a tensor's content is read, so the host waits for the device")

        with contextlib.ExitStack() as stack:
            patches = stack.enter_context(pytest.MonkeyPatch.context())
            for name in ("tolist", "numpy", "cpu", "__array__"):
                patches.setattr(torch.Tensor, name, refuse)
            super().__enter__()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()


_STARTS_NOTHING = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "_unsafe_view"),
        *("t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
        *(
            "as_strided",
            "alias",
            "lift_fresh",
            "split",
            "unbind",
            "promote_types",
            "_record_function_enter_new",
            "_record_function_exit",
        ),
    )
)


class Launches(TorchDispatchMode):
    """Counts what is started on a device, and the bytes of [N, V] tensors that live at a time."""

    _now: "Launches | None" = None

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes = shapes
        self.calls: collections.Counter[str] = collections.Counter()
        self.peak = 0
        """Largest number of bytes of tensors of one of ``shapes`` at a time."""
        self._living: dict[int, int] = {}

    @property
    def number(self) -> int:
        """Of launches in all."""
        return self.calls.total()

    def __enter__(self) -> Self:
        Launches._now = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Launches._now = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _STARTS_NOTHING:
            self.calls[name] += 1
        if isinstance(made, Tensor) and tuple(made.shape) in self.shapes:
            self._live(made)
        return made

    def _live(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key = storage._cdata
        if key not in self._living:
            self._living[key] = made.numel() * made.element_size()
            weakref.finalize(made, self._living.pop, key, None)
            self.peak = max(self.peak, sum(self._living.values()))

    @staticmethod
    def kernel(name: str) -> Any:
        """A kernel that is counted and does nothing."""

        class Counted:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return functools.partial(Launches._count, name)

        return Counted()

    @staticmethod
    def as_one(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function`` counted as one launch, whatever it does here."""

        def call(*args: Any) -> Tensor:
            now = Launches._now
            assert now is not None
            now.calls[name] += 1
            with _disable_current_modes():
                made = function(*args)
            if tuple(made.shape) in now.shapes:
                now._live(made)
            return made

        return call

    @staticmethod
    def _count(name: str, *args: Any, **options: Any) -> None:
        assert Launches._now is not None
        Launches._now.calls[name] += 1
