"""A Qwen3-1.7B of random weights: makes it, or records with it beside a bare forward loop.

    python benchmarks/qwen_on_gpu.py make DIRECTORY [--small]
    python benchmarks/qwen_on_gpu.py record DIRECTORY [--rows 32] [--length 1024]

The shapes are those of Qwen3-1.7B, and the tokenizer is the demo's. The last norm is scaled so that
the logits are as peaked as a trained model's: of flat ones every position would keep all candidates
that it may. ``record`` prints one JSON object, with the tokens per second of recording over those
of ``model(ids).logits`` on the same batches, in turn, medians of three.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lrmc_ray.config import ModelSettings
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.record.candidates import CandidateRecorder, batches

SHAPES: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
"""For a try on a CPU."""
SPREAD = 6.0
"""Standard deviation of the logits: from about 5 on, a few tokens have most of the probability."""


def make(directory: Path, *, is_small: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**(SHAPES | (SMALL if is_small else {})))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():
        deviation = float(model.get_output_embeddings().weight.std())
        model.model.norm.weight.fill_(SPREAD / (deviation * config.hidden_size**0.5))
    model.to(torch.bfloat16).save_pretrained(directory)
    load_tokenizer(local_directory(ModelSettings(name="demo"))).save_pretrained(directory)


def median_seconds(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(directory: Path, num_rows: int, length: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "sample_id": str(number),
            "domain": "",
            "input_ids": torch.randint(40_000, (length,), generator=generator).tolist(),
            "is_target": [place >= length * 3 // 4 for place in range(length)],
        }
        for number in range(num_rows)
    ]
    options: dict[str, Any] = {"tau": 0.99, "k_min": 1, "k_max": 1024, "prompt_k_max": 64}
    record = CandidateRecorder(directory, threads=1, **options).record
    sizes = torch.cat([sample.candidates.sizes for sample in record(rows)])
    recording = median_seconds(lambda: record(rows))
    model = load_model(directory).to(device)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches(rows):
                ids = [row["input_ids"] for row in batch]
                model(input_ids=torch.tensor(ids, device=device), use_cache=False)

    plain = median_seconds(forward)
    tokens = num_rows * length
    print(
        json.dumps(
            {
                "benchmark": "qwen_on_gpu",
                "torch": torch.__version__,
                "mean_candidates": float(sizes.double().mean()),
                "recording_tokens_per_second": tokens / recording,
                "forward_tokens_per_second": tokens / plain,
                "recording_over_forward": plain / recording,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["make", "record"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--small", action="store_true", help="two layers, for a try")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    if args.action == "make":
        make(args.directory, is_small=args.small)
    else:
        compare(args.directory, args.rows, args.length)


if __name__ == "__main__":
    main()
