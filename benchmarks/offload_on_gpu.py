"""Full fine-tuning of a Qwen3-4B of random weights on one GPU: memory against the forecast.

    python -m benchmarks.offload_on_gpu [--length 1024] [--small]

A worker alone holds all shards and takes two steps of 8 samples, with `precision=bf16
gradient_checkpointing=full micro_batches=8`, each way in a process of its own:

    offload     `offload=cpu`: weights, gradients and moments in the host's memory
    bf16 state  `state_dtype=bf16`, all on the GPU

The model's bf16 checkpoint takes 8 GB of disk, and the first way 64 GB of the host's memory. With
--small it is a tiny model, on the CPU where there is no GPU, where its figures mean nothing. The
last line is one JSON object: of each way the forecast and the peak in bytes, of the GPU and of the
host, and the seconds of both steps with loading.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from benchmarks.memory_forecast import VOCABULARY, make_samples, train_two_steps
from benchmarks.peak_memory import peak_bytes
from lrmc_ray.config import TrainSettings

SHAPES: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
WAYS: dict[str, dict[str, Any]] = {
    "offload": {"offload": "cpu"},
    "bf16 state": {"state_dtype": "bf16"},
}


def make(directory: Path, *, is_small: bool) -> None:
    """Save the random model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**(SHAPES | (SMALL if is_small else {}))))
    model.to(torch.bfloat16).save_pretrained(directory)


def measure(_: int, place: Path, way: str, length: int) -> None:
    """Train in this process; what it took is left in a file."""
    from lrmc_ray.train.measures import Usage
    from lrmc_ray.train.memory import training_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainSettings(
        parallel="shard",
        reduction="fast",
        precision="bf16",
        gradient_checkpointing="full",
        batch_size=8,
        micro_batches=8,
        packing=False,
        **WAYS[way],
    )
    is_on_gpu = device.type == "cuda"
    forecast = training_memory(place / "model", settings, length=length, on_gpu=is_on_gpu)
    samples = make_samples(settings.batch_size, length)
    host, start = Usage(torch.device("cpu")), time.perf_counter()
    peak = peak_bytes(
        lambda: train_two_steps(place / "model", settings, samples, device=device), device
    )
    found = {
        "forecast": forecast.total,
        "peak": peak,
        "ratio": forecast.total / peak if peak else None,
        "host_forecast": forecast.host,
        "host_peak": host.peak_bytes,
        "seconds": time.perf_counter() - start,
    }
    (place / "found.json").write_text(json.dumps(found))


def main() -> None:
    """Print all numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        parser.error("torch sees no GPU here; run it on a machine with one, or with --small")
    ways: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make(place / "model", is_small=args.small)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for way in WAYS:
            start_processes(  # type: ignore[no-untyped-call]
                measure, (place, way, args.length), nprocs=1, start_method="spawn"
            )
            ways[way] = json.loads((place / "found.json").read_text())
            print(way, ways[way], flush=True)
    print(json.dumps({"benchmark": "offload_on_gpu", "torch": torch.__version__, "ways": ways}))


if __name__ == "__main__":
    main()
