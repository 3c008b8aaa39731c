"""Memory of a training worker: forecast from config.json against what a process takes.

    python benchmarks/memory_forecast.py [--points llama gemma3] [--heap]
    python benchmarks/memory_forecast.py --points "shards: llama" "shards: qwen3"

Every point is a model of random weights, saved and trained for two steps in a process of its own:
its greatest resident memory over that before it had the model; with shards in as many as there are
workers, of which the one that takes most counts. What is imported and compiled is
there already, by a tiny model that was trained before the process was forked. The forecast is made
from the configuration alone. The last line is one JSON object.

Tensors have mappings of their own here, as far as the C library allows, so that what is measured is
what they take. With --heap they are in its heap, as in training, which keeps freed memory: gaps are
measured as well.
"""

import argparse
import ctypes
import json
import multiprocessing
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.peak_memory import peak_bytes
from benchmarks.tiny_models import make_config
from lrmc_ray.config import TrainSettings

VOCABULARY = 16_000
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
STEPS = 2
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""


@dataclass(frozen=True)
class Point:
    """A model and how it is trained."""

    model_type: str
    length: int
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    """More than one hold shards."""


_SHARDS = {"parallel": "shard", "reduction": "fast"}
POINTS = {
    "llama": Point(
        "llama", 512, {"tie_word_embeddings": True}, {"batch_size": 4, "micro_batches": 2}
    ),
    "qwen3, bf16, moments too": Point(
        "qwen3",
        1024,
        {"tie_word_embeddings": False},
        {"batch_size": 2, "micro_batches": 2, "precision": "bf16", "state_dtype": "bf16"},
    ),
    "gemma3": Point(
        "gemma3_text",
        768,
        {"tie_word_embeddings": True, "sliding_window": 1024},
        {"batch_size": 2, "micro_batches": 2},
    ),
    "qwen3_moe": Point(
        "qwen3_moe",
        512,
        {
            "tie_word_embeddings": False,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
        },
        {"batch_size": 2, "micro_batches": 2},
    ),
    "llama, adapters": Point(
        "llama",
        1024,
        {"tie_word_embeddings": True},
        {"batch_size": 2, "micro_batches": 2, "lora_rank": 8},
    ),
    "llama, selective": Point(
        "llama", 2048, {"tie_word_embeddings": True}, {"batch_size": 2, "micro_batches": 2}
    ),
    "llama, layers again": Point(
        "llama",
        2048,
        {"tie_word_embeddings": True},
        {"batch_size": 2, "micro_batches": 2, "gradient_checkpointing": "full"},
    ),
    "shards: llama": Point(
        "llama",
        512,
        {"tie_word_embeddings": True, "num_hidden_layers": 12},
        {"batch_size": 4, "micro_batches": 4, **_SHARDS},
        workers=2,
    ),
    "shards: qwen3": Point(
        "qwen3",
        512,
        {"tie_word_embeddings": False, "num_hidden_layers": 12},
        {
            "batch_size": 3,
            "micro_batches": 3,
            "precision": "bf16",
            "state_dtype": "bf16",
            **_SHARDS,
        },
        workers=3,
    ),
    "shards: gemma3": Point(
        "gemma3_text",
        768,
        {"tie_word_embeddings": True, "sliding_window": 1024, "num_hidden_layers": 8},
        {"batch_size": 2, "micro_batches": 2, **_SHARDS},
        workers=2,
    ),
    "shards: qwen3_moe": Point(
        "qwen3_moe",
        256,
        {
            "tie_word_embeddings": False,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
        },
        {"batch_size": 2, "micro_batches": 2, **_SHARDS},
        workers=2,
    ),
    "shards: llama, 3": Point(
        "llama",
        1024,
        {"tie_word_embeddings": False, "num_hidden_layers": 16},
        {"batch_size": 3, "micro_batches": 3, "gradient_checkpointing": "full", **_SHARDS},
        workers=3,
    ),
}


def config_of(point: Point) -> Any:
    """The configuration of a point's model, in the sizes of this benchmark."""
    known = make_config(point.model_type).to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return make_config(point.model_type, **{**sizes, **point.options})


def settings_of(point: Point) -> TrainSettings:
    """A point's settings; packing has nothing to share here."""
    return TrainSettings(packing=False, **point.train)


def make_samples(number: int, length: int) -> list[Any]:
    """Random tokens, half of them prompt, with 64 candidates at every position."""
    from lrmc_ray.method.microbatch import Sample
    from lrmc_ray.method.subsets import CandidateSets

    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(number):
        ids_T = torch.randint(1, VOCABULARY, (length,), generator=generator)
        tokens_PK = (ids_T[1:, None] + torch.arange(64) * 7) % VOCABULARY
        samples.append(
            Sample(
                f"{index}",
                ids_T,
                torch.arange(length - 1),
                torch.arange(length - 1) >= length // 2,
                CandidateSets(
                    offsets=torch.arange(length) * 64,
                    token_ids=tokens_PK.flatten().int(),
                    logprobs=torch.full((64 * (length - 1),), -4.5, dtype=torch.float16),
                    gold_ids=ids_T[1:].int(),
                ),
            )
        )
    return samples


def train_two_steps(
    directory: Path,
    settings: TrainSettings,
    samples: list[Any],
    rank: int = 0,
    workers: int = 1,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Load the model and train it as a worker does, without Ray."""
    from lrmc_ray.method.training_loop import StepOptions, train
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.train.learner import Learner

    group = WorkerGroup(rank, workers)
    learner = Learner(settings, directory, device, group=group)
    options = StepOptions(
        num_micro_batches=settings.micro_batches,
        reduction=settings.reduction,
        autocast=learner.autocast,
        probes_at=lambda _: learner.sharding is not None,
        after_update=learner.vocabulary.after_update,
    )
    steps = train(
        learner.trained_model,
        learner.optimizer,
        lambda _: samples,
        learner.loss,
        options,
        group,
        steps=range(STEPS),
        lr_of_step=lambda _: settings.lr,
    )
    for _ in steps:
        pass


def save_random(config: Any, directory: Path) -> None:
    """A model of random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    factory.from_config(config, dtype=torch.float32).save_pretrained(directory)


def warm_up() -> None:
    """Train a tiny model, so that what is imported and compiled is there before the count."""
    ways: list[dict[str, Any]] = [{}, {"lora_rank": 2, "precision": "bf16"}]
    for train in ways:
        with tempfile.TemporaryDirectory() as directory:
            save_random(make_config("llama", vocab_size=VOCABULARY), Path(directory))
            settings = TrainSettings(packing=False, batch_size=2, micro_batches=2, **train)
            train_two_steps(Path(directory), settings, make_samples(2, 16))


def _return_freed_memory() -> None:
    """Let every tensor have a mapping of its own, which is gone when it is: no gaps in a heap."""
    mock.patch("lrmc_ray.train.learner.keep_freed_memory").start()
    mallopt = ctypes.CDLL(None).mallopt
    for name, value in ((_MMAP_THRESHOLD, 2**16), (_TRIM_THRESHOLD, 0)):
        if not mallopt(name, value):
            raise RuntimeError("the C library does not take the setting")


def _measure(directory: Path, point: Point, has_heap: bool, rank: int, found: Any) -> None:
    if not has_heap:
        _return_freed_memory()
    settings = settings_of(point)
    samples = make_samples(settings.batch_size, point.length)
    if point.workers > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{directory}/group",
            rank=rank,
            world_size=point.workers,
        )
    found.put(
        peak_bytes(
            lambda: train_two_steps(directory, settings, samples, rank, point.workers),
            torch.device("cpu"),
        )
    )


def compare(point: Point, *, has_heap: bool) -> dict[str, Any]:
    """Forecast and measured bytes."""
    from lrmc_ray.train.memory import training_memory

    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        config = config_of(point)
        config.save_pretrained(directory)
        forecast = training_memory(
            directory,
            settings_of(point),
            length=point.length,
            workers=point.workers,
            on_gpu=False,
        )
        processes = multiprocessing.get_context("fork")
        saving = processes.Process(target=save_random, args=(config, directory))
        saving.start()
        saving.join()
        found = processes.SimpleQueue()
        running = [
            processes.Process(target=_measure, args=(directory, point, has_heap, rank, found))
            for rank in range(point.workers)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a process ended with {process.exitcode}")
        measured = max(found.get() for _ in running)
    return {**forecast.as_dict(), "measured": measured, "ratio": forecast.total / measured}


def main() -> None:
    """Print a table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--heap", action="store_true", help="with the gaps of the heap")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    columns = (
        "weights",
        "gradients",
        "moments",
        "gathered",
        "activations",
        "loss",
        "total",
        "measured",
    )
    print(
        f"{'MB':26}" + "".join(f"{column:>12}" for column in columns) + f"{'ratio':>8}", flush=True
    )
    found = {}
    for name in arguments.points:
        row = found[name] = compare(POINTS[name], has_heap=arguments.heap)
        numbers = "".join(f"{row[column] / 1e6:12.0f}" for column in columns)
        print(f"{name:26}{numbers}{row['ratio']:8.2f}", flush=True)
    print(json.dumps({"benchmark": "memory_forecast", "torch": torch.__version__, "points": found}))


if __name__ == "__main__":
    main()
