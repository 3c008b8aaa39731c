"""One optimizer step on the parameters of SmolLM2-135M: MoClip against AdamW and Adam-atan2.

    python benchmarks/moclip_step.py [--threads 1] [--clock cpu] [--repeats 9] [--layers 30]

All optimizers share the weights and the gradients and take turns within one run; the table shows
medians, as ratios to torch's AdamW with foreach and with fused kernels. "first s" is the first
step: states are made, and MoClip's loops compile (less where their cache is warm). Memory
is what a later step needs at its peak beyond weights, gradients and states. "limit" is the time of
the bytes alone, at the bandwidth measured beside it: MoClip reads weight, gradient and both
moments, writes all but the gradient, and reads gradient and momentum once more for the angle.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from adam_atan2_pytorch import AdamAtan2
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.peak_memory import peak_bytes
from lrmc_ray.method.fast.moclip_update import FastMoClip
from lrmc_ray.method.moclip import MoClip

VOCABULARY, HIDDEN, INTERMEDIATE, KEY_VALUE = 49_152, 576, 1_536, 3 * 64
LAYER_SHAPES = (
    (HIDDEN, HIDDEN),  # query, 9 heads of 64
    (KEY_VALUE, HIDDEN),
    (KEY_VALUE, HIDDEN),
    (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN),  # gate
    (INTERMEDIATE, HIDDEN),  # up
    (HIDDEN, INTERMEDIATE),  # down
    (HIDDEN,),
    (HIDDEN,),
)

FOREACH, FUSED = "AdamW, foreach", "AdamW, fused"
MOCLIP_PASSES = 9
"""Tensors of the model's size that a step reads or writes."""

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    FOREACH: lambda params: AdamW(params, lr=1e-6, foreach=True),
    FUSED: lambda params: AdamW(params, lr=1e-6, fused=True),
    "adam-atan2-pytorch": lambda params: AdamAtan2(params, lr=1e-6, weight_decay=0.01),
    "MoClip, plain": lambda params: MoClip(params, lr=1e-6, weight_decay=0.01),
    "MoClip": lambda params: FastMoClip(params, lr=1e-6, weight_decay=0.01),
    "MoClip, bf16 moments": lambda params: FastMoClip(
        params, lr=1e-6, weight_decay=0.01, state_dtype=torch.bfloat16
    ),
    "MoClip, scale": lambda params: FastMoClip(params, lr=1e-6, weight_decay=0.01, clip="scale"),
    "MoClip, global angle": lambda params: FastMoClip(
        params, lr=1e-6, weight_decay=0.01, angle="global"
    ),
    "MoClip, summed over workers": lambda params: FastMoClip(
        params, lr=1e-6, weight_decay=0.01, reduce_dots=lambda dots: None
    ),
    "MoClip, project": lambda params: FastMoClip(
        params, lr=1e-6, weight_decay=0.01, clip="project"
    ),
}


def shapes(num_layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The head is tied to the embedding, so it is no parameter of its own."""
    return [(vocabulary, HIDDEN), *(LAYER_SHAPES * num_layers), (HIDDEN,)]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU seconds of the process; on a busy machine they are steadier, with one thread as telling."""


def timed(
    function: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def bandwidth_bytes_per_second(device: str) -> float:
    """Best of several copies of 256 MiB, bytes read plus bytes written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(8))


def measure(args: argparse.Namespace) -> dict[str, object]:
    generator = torch.Generator().manual_seed(args.seed)
    device = args.device
    params = [
        (torch.randn(shape, generator=generator) * 0.02).to(device)
        for shape in shapes(args.layers, args.vocabulary)
    ]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(device)
    numel = sum(param.numel() for param in params)
    steps = {name: make(params).step for name, make in OPTIMIZERS.items()}
    first = {name: timed(step, device) for name, step in steps.items()}
    memory = {name: peak_bytes(step, torch.device(device)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, CLOCKS[args.clock]))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bandwidth = bandwidth_bytes_per_second(device)
    limit = MOCLIP_PASSES * numel * 4 / bandwidth

    print(
        f"{numel:,} float32 parameters in {len(params)} tensors, "
        f"{torch.cuda.get_device_name() if device == 'cuda' else f'{args.threads} thread(s)'}; "
        f"bandwidth {bandwidth / 1e9:.1f} GB/s, MoClip's limit {limit * 1e3:.0f} ms"
    )
    header = ("ms", "fastest", "/ foreach", "/ fused", "memory MB", "first s")
    print(f"{'optimizer':28s}" + "".join(f"{title:>11s}" for title in header))
    rows = {}
    for name, value in median.items():
        rows[name] = {
            "seconds": value,
            "fastest_seconds": min(seconds[name]),
            "ratio_to_foreach": value / median[FOREACH],
            "ratio_to_fused": value / median[FUSED],
            "extra_bytes": memory[name],
            "first_step_seconds": first[name],
        }
        extra = memory[name]
        used = "-" if extra is None else f"{extra / 1e6:.1f}"
        print(
            f"{name:28s}{value * 1e3:11.1f}{min(seconds[name]) * 1e3:11.1f}"
            f"{value / median[FOREACH]:11.2f}{value / median[FUSED]:11.2f}{used:>11s}"
            f"{first[name]:11.1f}"
        )
    return {
        "parameters": numel,
        "bandwidth_bytes_per_second": bandwidth,
        "limit_seconds": limit,
        "moclip_over_fused_adamw": median["MoClip"] / median[FUSED],
        "moclip_over_foreach_adamw": median["MoClip"] / median[FOREACH],
        "optimizers": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each optimizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=30, help="fewer need less memory")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="the same")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    settings = {"benchmark": "moclip_step", "torch": torch.__version__, **vars(args)}
    print(json.dumps({**settings, **result}))


if __name__ == "__main__":
    main()
