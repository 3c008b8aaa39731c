"""Output head and loss, forward and backward: candidates only against the whole vocabulary.

    python benchmarks/restricted_head.py [--sizes N,D,V,K ...] [--threads 1] [--repeats 5]

Every method starts from hidden states [N, D] and leaves gradients for them and for the head's
weight [V, D]. The weight's ``grad`` exists already and is added to, as in any micro-batch after
the first. Methods take turns within one run; the table shows medians, as ratios to plain logits
and cross-entropy. Memory is what a method needs at its peak beyond what was there before.

With TRITON_INTERPRET=1 the kernels are among the methods on a CPU as well, as a try of this script.

Candidates are made to look like recorded ones: set sizes are log-normal, token frequencies follow
Zipf's law (for N = 1024 and 24 candidates on average, SmolLM2-135M on English text touched about
4,900 distinct tokens). "x limit" is a method's time over the time that reading the touched rows
twice and adding to their gradients once takes at the memory bandwidth measured beside it.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_losses import FusedLoss, usable
from benchmarks.peak_memory import peak_bytes
from lrmc_ray.method.baselines.vocabulary_loss import full_cross_entropy
from lrmc_ray.method.fast.triton_support import is_interpreted
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.restricted_loss import draw_tail, restricted_cross_entropy
from lrmc_ray.method.subsets import CandidateSets

SIZES = ("1024,576,49152,24", "2048,576,49152,24", "1024,640,262144,24", "512,2560,151936,32")
BASELINE = "logits + cross_entropy"

Method = Callable[[Tensor, Tensor, CandidateSets], Tensor]


def zipf_candidates(
    num_rows: int, vocabulary_size: int, mean_size: float, generator: torch.Generator
) -> CandidateSets:
    """Candidate sets with log-normal sizes and Zipf-distributed tokens; the last is gold."""
    spread = torch.randn(num_rows, generator=generator, dtype=torch.float64).mul(1.5).exp()
    sizes = (spread * mean_size / spread.mean()).round().long().clamp(1, 1024)
    frequency = (torch.arange(vocabulary_size, dtype=torch.float64) + 30).pow(-1.5)
    shares = frequency.cumsum(0) / frequency.sum()
    token_of_rank = torch.randperm(vocabulary_size, generator=generator)
    rows = []
    for size in sizes.tolist():
        draws = torch.rand(16 * size, generator=generator, dtype=torch.float64)
        ranks = torch.searchsorted(shares, draws).clamp_max(vocabulary_size - 1)
        rows.append(token_of_rank[list(dict.fromkeys(ranks.tolist()))[:size]].int())
    sizes = torch.tensor([len(row) for row in rows])
    token_ids = torch.cat(rows)
    return CandidateSets(
        offsets=F.pad(sizes.cumsum(0), (1, 0)),
        token_ids=token_ids,
        logprobs=torch.full(token_ids.shape, -7.0, dtype=torch.float16),
        gold_ids=torch.stack([row[-1] for row in rows]),
    )


def methods(device: torch.device, dtype: torch.dtype, vocabulary_size: int) -> dict[str, Method]:
    tail = draw_tail(min(1024, vocabulary_size), vocabulary_size, seed=0, step=0).to(device)

    def plain(h: Tensor, w: Tensor, c: CandidateSets) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), c.gold_ids.long(), reduction="sum")

    def with_tail(h: Tensor, w: Tensor, c: CandidateSets) -> Tensor:
        return restricted_cross_entropy(h, OutputHead(w), c, tail=tail, backend="sparse")

    found: dict[str, Method] = {BASELINE: plain}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda h, w, c: F.linear_cross_entropy(
            h, w, c.gold_ids.long(), reduction="sum"
        )
    if device.type == "cuda" or is_interpreted():
        found |= {name: of_gold(loss) for name, loss in usable(device, dtype).items()}
    found["full_cross_entropy (ours)"] = lambda h, w, c: full_cross_entropy(
        h, OutputHead(w), c.gold_ids
    )
    found["restricted, gather"] = lambda h, w, c: restricted_cross_entropy(
        h, OutputHead(w), c, backend="gather"
    )
    found["restricted, sparse"] = lambda h, w, c: restricted_cross_entropy(
        h, OutputHead(w), c, backend="sparse"
    )
    found["restricted, sparse, tail 1024"] = with_tail
    if device.type == "cuda" or is_interpreted():
        found["restricted, kernel"] = lambda h, w, c: restricted_cross_entropy(
            h, OutputHead(w), c, backend="kernel"
        )
        found["restricted, kernel, tail 1024"] = lambda h, w, c: restricted_cross_entropy(
            h, OutputHead(w), c, tail=tail, backend="kernel"
        )
        found["restricted, dense_kernel"] = lambda h, w, c: restricted_cross_entropy(
            h, OutputHead(w), c, backend="dense_kernel"
        )
        found["restricted, dense_kernel, tail 1024"] = lambda h, w, c: restricted_cross_entropy(
            h, OutputHead(w), c, tail=tail, backend="dense_kernel"
        )
        found["restricted, auto"] = lambda h, w, c: restricted_cross_entropy(h, OutputHead(w), c)
    return found


def of_gold(loss: FusedLoss) -> Method:
    """A loss over the whole vocabulary as one of the methods."""
    return lambda h, w, c: loss(h, w, c.gold_ids.long())


def bandwidth_bytes_per_second(device: torch.device, clock: Callable[[], float]) -> float:
    """Best of several copies of 256 MiB, bytes read plus bytes written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device, clock) for _ in range(8)]
    return 2 * source.nbytes / min(seconds)


def timed(
    function: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def measure(size: str, args: argparse.Namespace) -> dict[str, object]:
    num_rows, hidden_size, vocabulary_size, mean_size = (int(x) for x in size.split(","))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(args.seed)
    candidates = zipf_candidates(num_rows, vocabulary_size, mean_size, generator)
    candidates.check(vocabulary_size)
    nnz = candidates.token_ids.numel()
    distinct = candidates.token_ids.unique().numel()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        candidates = candidates.planned()  # as batches are made
    candidates = candidates.to(device)
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    weight = torch.randn(vocabulary_size, hidden_size, generator=generator) / math.sqrt(hidden_size)
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype).requires_grad_()
    weight.grad = torch.zeros_like(weight)

    def step(method: Method) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = None
            method(hidden, weight, candidates).backward()  # type: ignore[no-untyped-call]

        return run

    def first_step(method: Method) -> Callable[[], None]:
        def run() -> None:
            weight.grad = None
            step(method)()

        return run

    found = methods(device, dtype, vocabulary_size)
    for name, method in found.items():
        if name != BASELINE:
            step(method)()  # warm up; the baseline is left out, it is slow and has no set-up
    memory = {name: peak_bytes(step(method), device) for name, method in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    first = "restricted, sparse, first micro-batch"
    seconds[first] = []
    for _ in range(args.repeats):
        for name, method in found.items():
            # The fast ones more often: a disturbance is longer than they are.
            for _ in range(5 if name.startswith("restricted") else 1):
                seconds[name].append(timed(step(method), device, clock))
        seconds[first].append(timed(first_step(found["restricted, sparse"]), device, clock))
    bandwidth = bandwidth_bytes_per_second(device, clock)
    row_bytes = distinct * hidden_size * weight.element_size()
    limit = 4 * row_bytes / bandwidth
    median = {name: statistics.median(values) for name, values in seconds.items()}
    full_memory = memory[BASELINE]

    print(
        f"\nN {num_rows}, D {hidden_size}, V {vocabulary_size}: {nnz} candidates "
        f"({nnz / num_rows:.1f} on average), {distinct} distinct rows; bandwidth "
        f"{bandwidth / 1e9:.1f} GB/s, limit {limit * 1e3:.2f} ms"
    )
    header = ("ms", "speed-up", "memory MB", "share", "x limit")
    print(f"{'method':40s} {{:>10s}} {{:>9s}} {{:>10s}} {{:>7s}} {{:>8s}}".format(*header))
    rows = {}
    for name, value in median.items():
        used = memory.get(name)
        share = used / full_memory if used is not None and full_memory else None
        rows[name] = {
            "seconds": value,
            "speed_up": median[BASELINE] / value,
            "fastest_seconds": min(seconds[name]),
            "extra_bytes": used,
            "extra_memory_share": share,
            "times_limit": value / limit,
        }
        print(
            f"{name:40s} {value * 1e3:10.2f} {median[BASELINE] / value:8.1f}x "
            f"{'-' if used is None else f'{used / 1e6:.1f}':>10s} "
            f"{'-' if share is None else f'{share:.1%}':>7s} {value / limit:8.1f}"
        )
    return {
        "size": size,
        "candidates": nnz,
        "distinct_rows": distinct,
        "bandwidth_bytes_per_second": bandwidth,
        "limit_seconds": limit,
        "methods": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="N,D,V,K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time of this process, for a machine with other work; one thread only",
    )
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu adds up threads and sees no GPU: it takes --threads 1 on the CPU")
    torch.set_num_threads(args.threads)
    results = [measure(size, args) for size in args.sizes]
    print(
        json.dumps(
            {
                "benchmark": "restricted_head",
                "torch": torch.__version__,
                "device": args.device,
                "dtype": args.dtype,
                "threads": args.threads,
                "clock": args.clock,
                "repeats": args.repeats,
                "seed": args.seed,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
