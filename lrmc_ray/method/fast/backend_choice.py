"""Which way to the losses on candidates is the fastest: a rule by size, without a measurement.

On a CPU a dense product does six multiplications in the time of one of the sparse way (one thread,
float32). So the candidates alone are computed while they are at most a sixth of all logits. Of
a GPU the seconds are estimated, from what one H100 took (``benchmarks/README.md``):

- ``dense``: all logits and ``cross_entropy`` took 14 to 16 ps a logit and 0.13 ps for each
  multiplication of it (0.0135 with half precision), at all of the eight sizes that were measured.
- ``sparse``: 2.3 to 5.5 ms, mostly the time of its calls.
- ``kernel``: **not measured**. Counted are its launches, and the bytes of the rows it gathers at a
  tenth of the card's bandwidth. The longest row that one program takes is counted once more, at
  that program's speed; longer ones are divided (``loss_plan``), for more launches. What dense tiles
  save is not counted. ``benchmarks/gpu_round.sh`` is there to correct these three.

``dense`` of this project (``dense_product``) makes the same matrix products in the same types as
all logits and ``cross_entropy``, and 6 bytes of [N, V] tensors where those make 20 with bf16. So
their seconds are taken for its own. What it does with the candidates comes on top: some 30 more
calls, which is felt where all logits take a fraction of a millisecond. No other way without kernels
has fewer.
"""

from dataclasses import dataclass

import torch

from lrmc_ray.method.fast.loss_plan import LONG
from lrmc_ray.method.names import LogitsBackend

_CPU_SPEEDUP = 6
"""Multiplications of a dense product in the time of one of the sparse way."""
_SECONDS_PER_LOGIT = 15e-12
_SECONDS_PER_PRODUCT = {True: 0.0135e-12, False: 0.13e-12}
"""By whether the weight is in half precision."""
_SPARSE_SECONDS = {True: 3.5e-3, False: 1.35e-3}
_SPARSE_SECONDS_PER_PRODUCT = {True: 0.03e-9, False: 0.065e-9}
_LAUNCH_SECONDS = 10e-6
_KERNEL_LAUNCHES = 10
_TAIL_LAUNCHES = 20
"""More with a sampled tail, those of torch's operators that sort it included."""
_PARTS_LAUNCHES = 4
"""More where rows are divided."""
_GATHER_BYTES_PER_SECOND = 0.3e12
_PROGRAM_BYTES_PER_SECOND = 20e9
_LONGEST = 1024
"""Candidates of the longest row where no plan says how many there are: as many as are recorded."""


@dataclass(frozen=True)
class LossSize:
    """The size of a loss on candidates."""

    num_rows: int
    num_hidden: int
    vocabulary_size: int
    num_entries: int
    weight_type: torch.dtype
    num_tail: int = 0
    longest: int | None = None
    """Candidates of the longest row, where it is known without waiting for a GPU."""

    @property
    def is_half(self) -> bool:
        """Whether the weight is in half precision."""
        return self.weight_type.itemsize == 2


def dense_seconds(size: LossSize) -> float:
    """All logits and ``cross_entropy`` on a GPU, forward and backward."""
    per_logit = _SECONDS_PER_LOGIT + _SECONDS_PER_PRODUCT[size.is_half] * size.num_hidden
    return size.num_rows * size.vocabulary_size * per_logit


def sparse_seconds(size: LossSize) -> float:
    """The operator of ``candidate_logits`` on a GPU, forward and backward."""
    products = size.num_entries * size.num_hidden
    return _SPARSE_SECONDS[size.is_half] + _SPARSE_SECONDS_PER_PRODUCT[size.is_half] * products


def kernel_seconds(size: LossSize) -> float:
    """The kernels of ``fused_loss``, forward and backward."""
    row_bytes = size.num_hidden * size.weight_type.itemsize
    longest = min(_LONGEST, size.num_entries) if size.longest is None else size.longest
    launches = _KERNEL_LAUNCHES + (_TAIL_LAUNCHES if size.num_tail else 0)
    launches += _PARTS_LAUNCHES if longest > LONG else 0
    products = size.num_rows * size.num_tail * size.num_hidden
    return (
        launches * _LAUNCH_SECONDS
        + 3 * size.num_entries * row_bytes / _GATHER_BYTES_PER_SECOND
        + 2 * min(longest, LONG) * row_bytes / _PROGRAM_BYTES_PER_SECOND
        + products * _SECONDS_PER_PRODUCT[size.is_half]
    )


def prefers_kernel(size: LossSize) -> bool:
    """Whether the kernels are the fastest way on a GPU."""
    return kernel_seconds(size) < min(dense_seconds(size), sparse_seconds(size))


def logits_backend(device_type: str, size: LossSize) -> LogitsBackend:
    """The fastest of the ways without kernels."""
    if device_type == "cpu":
        is_dense = size.num_entries * _CPU_SPEEDUP > size.num_rows * size.vocabulary_size
    elif device_type == "cuda":
        is_dense = dense_seconds(size) < sparse_seconds(size)
    else:
        return "gather"
    return "dense" if is_dense else "sparse"
