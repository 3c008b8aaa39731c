"""Rounding to the type of a tensor, by the same rule compiled and interpreted; a first kernel.

A GPU's conversion to bfloat16 rounds to the nearest, ties to even. Triton's interpreter cuts the
last bits off (``findings/triton_interpreter_cuts_bfloat16.sh``). So it is done with integers here:
a few operations where a kernel waits for memory anyway.
"""

import triton
import triton.language as tl


@triton.jit
def narrowed(values, TYPE: tl.constexpr):
    """``values``, which are float32, as ``TYPE``: to the nearest, ties to even."""
    if tl.bfloat16 == TYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(TYPE)


@triton.jit
def set_to_one(target):
    """The least kernel: whether it runs says whether any does."""
    tl.store(target, 1.0)
