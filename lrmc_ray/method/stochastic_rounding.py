"""Float32 numbers kept in bf16: rounded up or down at random, the nearer one more often.

bf16 is the upper half of a float32. A moment changes by a hundredth of itself per step, or less,
which is about half of bf16's last bit: rounded to the nearest, it would often stay where it is for
ever. Rounded at random it is right on average::

    rounded = upper half of (bits of x + r),    r uniform in 0 .. 2^16 - 1

r is a hash of a key and the element's place, not drawn from a stream of random numbers. So every
worker rounds alike, and so does a run that goes on from a checkpoint. 0 stays 0.

Source: stochastic rounding for bf16 weights and moments, e.g. "Revisiting BFloat16 Training"
(arXiv 2010.06192); the hash is the finalizer of MurmurHash3.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
GOLDEN, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
"""Of the hash."""


def rounding_key(place: int, step: int, first: int = 0) -> int:
    """32 bits that belong to one tensor in one step.

    Args:
        place: of the tensor among all.
        step: of the optimizer.
        first: place of its first element in the whole, where it is a shard of it.
    """
    # An element's hash begins with its place times GOLDEN plus the key.
    return _mixed(_mixed(place * GOLDEN & _MASK) + step & _MASK) + first * GOLDEN & _MASK


def random_bits(shape: torch.Size, key: int, device: torch.device) -> Tensor:
    """32 bits of each element of a contiguous tensor of this shape, as int64."""
    places = torch.arange(shape.numel(), device=device)
    bits = (places * GOLDEN + key) & _MASK
    bits = ((bits ^ (bits >> 16)) * FIRST) & _MASK
    bits = ((bits ^ (bits >> 13)) * SECOND) & _MASK
    return (bits ^ (bits >> 16)).view(shape)


def round_to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """``values`` in bf16.

    Args:
        values: Of any shape; taken as float32.
        bits: r, below 2^16, int64 of the same shape.
    """
    whole = values.float().contiguous().view(torch.int32) + bits.int()
    return (whole & ~0xFFFF).view(torch.float32).bfloat16()


def _mixed(bits: int) -> int:
    bits = ((bits ^ (bits >> 16)) * FIRST) & _MASK
    bits = ((bits ^ (bits >> 13)) * SECOND) & _MASK
    return bits ^ (bits >> 16)
