"""Which way to the losses on candidates is the fastest: a rule by size, without a measurement.

On a CPU a dense product does six multiplications in the time of one of the sparse way (one thread,
float32). So the candidates alone are computed while they are at most a sixth of all logits. Of
a GPU the seconds are estimated: launches, 10 us each by assumption, and what one H100 took for
products and bytes (``benchmarks/README.md``).

- All logits and ``cross_entropy``, by which no loss goes, are the measure: 10 launches (12 in half
  precision), 36 bytes a logit (42), 0.13 ps for each multiplication (0.0135). That is what was
  measured at eight sizes, within a fifth.
- ``dense_kernel`` (``dense_loss``): the same products, fewer launches and no more bytes **at every
  size**. So where the kernels can be used, ``auto`` takes nothing that has more to do than the
  measure has. Beside the bytes of [N, V], a candidate costs 32 at most in each of three passes,
  and all of a position's no more than its row, since they rise.
- ``kernel`` (``fused_loss``): **not measured**. Counted are its launches, and the bytes of the rows
  it gathers at a tenth of the card's bandwidth. The longest row that one program takes is counted
  once more, at that program's speed; longer ones are divided (``loss_plan``), for more launches.
  What dense tiles save is not counted.
- ``sparse``: 2.3 to 5.5 ms, mostly the time of its calls.
- ``dense`` (``dense_product``): the products of ``dense_kernel``, some 40 launches. Where kernels
  are not used (off by default, no Triton, float64) it is the best there is for few logits, and then
  slower than all logits and ``cross_entropy``, by 30 launches.

What Python takes around a launch is not counted. ``benchmarks/gpu_round.sh`` is there to correct
all that was not measured.
"""

from dataclasses import dataclass

import torch

from lrmc_ray.method.fast.loss_plan import LONG
from lrmc_ray.method.names import KernelBackend, LogitsBackend

_CPU_SPEEDUP = 6
"""Multiplications of a dense product in the time of one of the sparse way."""
_LOGIT_BYTES = {True: 42, False: 36}
"""That all logits and ``cross_entropy`` move for each logit. By whether the weight is in half
precision, as the two below."""
_LOGIT_LAUNCHES = {True: 12, False: 10}
_SECONDS_PER_PRODUCT = {True: 0.0135e-12, False: 0.13e-12}
_BYTES_PER_SECOND = 2.6e12
"""Of tensors that are passed over."""
_SECTOR_BYTES = 32
"""The least that memory gives."""
_DENSE_KERNEL_LAUNCHES = 7
_DENSE_LAUNCHES = 42
_ENTRY_BYTES = 300
"""Of a candidate in ``dense``, by some 30 operators."""
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


def cross_entropy_seconds(size: LossSize) -> float:
    """All logits and ``cross_entropy`` on a GPU, forward and backward: what to compare with."""
    moved = size.num_rows * size.vocabulary_size * _LOGIT_BYTES[size.is_half]
    launches = _LOGIT_LAUNCHES[size.is_half] * _LAUNCH_SECONDS
    return launches + moved / _BYTES_PER_SECOND + _all_products(size)


def dense_kernel_seconds(size: LossSize) -> float:
    """All logits and the kernels of ``dense_loss``, forward and backward."""
    itemsize = size.weight_type.itemsize
    logits = size.num_rows * size.vocabulary_size
    # Products are written, and derivatives written and read by two products.
    moved = logits * (4 + 3 * itemsize)
    gathered = _SECTOR_BYTES * size.num_entries
    # Twice a token and its product are read, once its derivative is written over the zeros.
    moved += 2 * (4 * size.num_entries + min(gathered, 4 * logits))
    moved += min(gathered, itemsize * logits)
    launches = _DENSE_KERNEL_LAUNCHES + (_TAIL_LAUNCHES if size.num_tail else 0)
    launches += 1 if size.weight_type == torch.float16 else 0
    return launches * _LAUNCH_SECONDS + moved / _BYTES_PER_SECOND + _all_products(size)


def dense_seconds(size: LossSize) -> float:
    """All logits and the operators of ``dense_product`` on a GPU, forward and backward."""
    moved = size.num_rows * size.vocabulary_size * (4 + 3 * size.weight_type.itemsize)
    moved += size.num_entries * _ENTRY_BYTES
    launches = _DENSE_LAUNCHES + (_TAIL_LAUNCHES if size.num_tail else 0)
    return launches * _LAUNCH_SECONDS + moved / _BYTES_PER_SECOND + _all_products(size)


def _all_products(size: LossSize) -> float:
    products = size.num_rows * size.vocabulary_size * size.num_hidden
    return products * _SECONDS_PER_PRODUCT[size.is_half]


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


def kernel_backend(size: LossSize, *, gathers: bool = True) -> KernelBackend:
    """The faster of the ways by kernels; ``gathers`` says whether ``kernel`` can be taken."""
    is_faster = gathers and kernel_seconds(size) < dense_kernel_seconds(size)
    return "kernel" if is_faster else "dense_kernel"


def logits_backend(device_type: str, size: LossSize) -> LogitsBackend:
    """The fastest of the ways without kernels."""
    if device_type == "cpu":
        is_dense = size.num_entries * _CPU_SPEEDUP > size.num_rows * size.vocabulary_size
    elif device_type == "cuda":
        is_dense = dense_seconds(size) < sparse_seconds(size)
    else:
        return "gather"
    return "dense" if is_dense else "sparse"
