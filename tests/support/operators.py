"""Which operators of torch run."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
