"""The memory that training a model takes, and the settings with which it fits a GPU."""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.config import ModelSettings, RunSettings, TrainSettings, trial_settings
from lrmc_ray.console import plain_console, progress
from lrmc_ray.errors import ConfigError
from lrmc_ray.models import WEIGHT_SUFFIX, config_directory

CARDS_GB = (24, 48, 80, 141)
"""Of GPUs: L4 and A10G, L40S and A40, A100 and H100, H200."""
USABLE = 0.9
"""Of a GPU's memory; the rest goes to its driver and lies unused between tensors."""
SMALL_RANK = 16
"""Of the adapters that are proposed."""


def has_no_weights(model: ModelSettings) -> bool:
    """Whether the model is a directory with a configuration alone."""
    directory = Path(model.name)
    return (directory / "config.json").is_file() and not any(directory.glob(f"*{WEIGHT_SUFFIX}"))


def plan_memory(settings: RunSettings) -> dict[str, Any]:
    """The memory of a worker as asked for, and with settings that take less.

    Raises:
        DataError: it cannot be forecast for the model.
        ConfigError: a setting fits nothing in the model.
    """
    from lrmc_ray.train.memory import training_memory

    if settings.train.parallel == "shard":
        raise ConfigError(
            "train.parallel must be 'replicate' for a forecast of memory, got 'shard': that of "
            "shards is not known yet; leave it out, and divide weights, gradients and moments by "
            "the number of workers"
        )
    directory = config_directory(settings.model)
    workers = settings.resources.workers[1] if settings.resources.workers else 1
    ways = list(_ways(settings.train))
    rows = []
    with progress("Counting", total=len(ways), unit="ways") as bar:
        for changes in ways:
            memory = training_memory(
                directory,
                trial_settings(settings.train, changes),
                length=settings.data.max_length,
                workers=workers,
            )
            fits = [card for card in CARDS_GB if memory.total <= USABLE * card * 1e9]
            rows.append({"settings": changes, **memory.as_dict(), "fits_gb": fits})
            bar.advance(1)
    train = settings.train
    return {
        "model": settings.model.name,
        "length": settings.data.max_length,
        "workers": workers,
        "rows_of_micro_batch": -(-train.batch_size // train.micro_batches),
        "precision": train.precision,
        "reduction": train.reduction,
        "ways": rows,
    }


def _ways(train: TrainSettings) -> Iterator[dict[str, Any]]:
    """Changes to the settings, each of which takes less than the one before."""
    yield {}
    changes: dict[str, Any] = {}
    if train.micro_batches < train.batch_size:
        changes["micro_batches"] = train.batch_size
    if train.gradient_checkpointing != "full":
        changes["gradient_checkpointing"] = "full"
    if changes:
        yield dict(changes)
    if train.lora_rank:
        return
    if train.state_dtype != "bf16" and train.optimizer in ("moclip", "adam_atan2"):
        yield {**changes, "state_dtype": "bf16"}
    if not (train.freeze or train.l2_sp_weight):
        yield {**changes, "lora_rank": SMALL_RANK}


_TERMS = {
    "weights": "float32",
    "gradients": "what is added up, and the part that is kept apart",
    "moments": "two of the optimizer",
    "copies": "the base model or its weights beside",
    "activations": "of one micro-batch, at their most",
    "loss": "hidden states, candidates, logits of the tail",
    "step": "the optimizer's, when activations are gone",
}


def show_memory(planned: Mapping[str, Any]) -> None:
    """The plan as text on stdout."""
    first = planned["ways"][0]
    _print_wrapped(
        f"{first['parameters'] / 1e9:.3g} billion parameters, of which "
        f"{first['trained'] / 1e9:.3g} billion are trained. A worker, with micro-batches of "
        f"{planned['rows_of_micro_batch']} x {planned['length']} tokens and "
        f"train.precision={planned['precision']}:"
    )
    print()
    for name, meaning in _TERMS.items():
        if first[name]:
            print(f"{name:>14}{first[name] / 1e9:>9.2f} GB  {meaning}")
    print(f"{'at most':>14}{first['total'] / 1e9:>9.2f} GB  beside the process and the driver\n")
    print(f"{'GPUs of':>12}" + "".join(f"{card:>5} GB" for card in CARDS_GB))
    for row in planned["ways"]:
        named = " ".join(f"train.{name}={value}" for name, value in row["settings"].items())
        fits = "".join(f"{'1' if card in row['fits_gb'] else '-':>8}" for card in CARDS_GB)
        print(f"{row['total'] / 1e9:>9.1f} GB{fits}")
        _print_wrapped(named or "as asked", indent=" " * 13)
    print()
    _print_wrapped(
        "1: each worker has one such GPU. -: it does not fit. Every worker holds the whole model; "
        "train.parallel=shard divides weights, gradients and moments by the number of workers."
    )
    if not any(row["fits_gb"] for row in planned["ways"]):
        print("Nothing fits: take shards, a smaller model, or a smaller --max-length.")


def _print_wrapped(text: str, indent: str = "") -> None:
    width = plain_console().width
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    print("\n".join(lines))
