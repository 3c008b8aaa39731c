"""The memory that training a model takes, and the settings with which it fits a GPU."""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.config import ModelSettings, RunSettings, TrainSettings, trial_settings
from lrmc_ray.console import plain_console, progress
from lrmc_ray.models.directory import config_directory
from lrmc_ray.models.names import WEIGHT_SUFFIX

if TYPE_CHECKING:
    from lrmc_ray.train.memory import MemoryForecast

CARDS_GB = (24, 48, 80, 141)
"""Of GPUs: L4 and A10G, L40S and A40, A100 and H100, H200."""
USUAL_CARD_GB = 80
MOST_DEVICES = 64
"""Over which a model is divided here."""
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

    With shards it is that of one of ``resources.workers``, or else of as many as it takes on GPUs
    of ``USUAL_CARD_GB``.

    Raises:
        DataError: it cannot be forecast for the model.
        ConfigError: a setting fits nothing in the model, or it cannot be sharded.
    """
    from lrmc_ray.train.memory import MemoryForecast
    from lrmc_ray.tune.recording_memory import recording_memory

    directory = config_directory(settings.model)
    is_sharded = settings.train.parallel == "shard"
    workers = settings.resources.workers[1] if settings.resources.workers else None
    ways = list(_ways(settings.train))
    rows = []
    with progress("Counting", total=len(ways), unit="ways") as bar:
        for changes in ways:
            forecast = MemoryForecast(
                directory,
                trial_settings(settings.train, changes),
                length=settings.data.max_length,
            )
            devices = {card: _devices(forecast, card, workers, is_sharded) for card in CARDS_GB}
            if workers is None:
                workers = (devices[USUAL_CARD_GB] or MOST_DEVICES) if is_sharded else 1
            memory = forecast.of(workers)
            fits = [card for card in CARDS_GB if memory.total <= USABLE * card * 1e9]
            row = {"settings": changes, **memory.as_dict(), "fits_gb": fits}
            rows.append({**row, "devices": {str(card): n for card, n in devices.items()}})
            bar.advance(1)
    train = settings.train
    recording = recording_memory(
        directory,
        settings.record.precision,
        length=settings.data.max_length,
        cards_gb=CARDS_GB,
        usable=USABLE,
    )
    return {
        "recording": recording,
        "model": settings.model.name,
        "length": settings.data.max_length,
        "workers": workers,
        "parallel": train.parallel,
        "rows_of_micro_batch": -(-train.batch_size // train.micro_batches),
        "precision": train.precision,
        "reduction": train.reduction,
        "ways": rows,
    }


def _devices(
    forecast: "MemoryForecast", card: int, workers: int | None, is_sharded: bool
) -> int | None:
    """How many GPUs of ``card`` gigabytes it takes, one for each worker; None: no number does."""
    numbers = range(1, MOST_DEVICES + 1) if is_sharded else [workers or 1]
    for number in numbers:
        if forecast.of(number).total <= USABLE * card * 1e9:
            return number if is_sharded else 1
    return None


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
    if train.parallel == "shard" and train.offload == "none":
        yield {**changes, "offload": "cpu"}
    if not (train.freeze or train.l2_sp_weight):
        yield {**changes, "lora_rank": SMALL_RANK}


_TERMS = {
    "weights": "float32",
    "gradients": "what is added up, and the part that is kept apart",
    "moments": "two of the optimizer",
    "copies": "the base model or its weights beside",
    "gathered": "layers and vocabulary, whole for a while",
    "activations": "of one micro-batch, at their most",
    "loss": "hidden states, candidates, logits of the tail",
    "step": "the optimizer's, when activations are gone",
}


def show_memory(planned: Mapping[str, Any]) -> None:
    """The plan as text on stdout."""
    first = planned["ways"][0]
    is_sharded = planned["parallel"] == "shard"
    worker = f"One of {planned['workers']} workers" if is_sharded else "A worker"
    _print_wrapped(
        f"{first['parameters'] / 1e9:.3g} billion parameters, of which "
        f"{first['trained'] / 1e9:.3g} billion are trained. {worker}, with micro-batches of "
        f"{planned['rows_of_micro_batch']} x {planned['length']} tokens and "
        f"train.precision={planned['precision']}:"
    )
    print()
    for name, meaning in _TERMS.items():
        if first[name]:
            print(f"{name:>14}{first[name] / 1e9:>9.2f} GB  {meaning}")
    print(f"{'at most':>14}{first['total'] / 1e9:>9.2f} GB  beside the process and the driver")
    if first["host"]:
        print(f"{'host':>14}{first['host'] / 1e9:>9.2f} GB  of the host's memory, beside that")
    print()
    print(_HEADER)
    for row in planned["ways"]:
        named = " ".join(f"train.{name}={value}" for name, value in row["settings"].items())
        fits = "".join(f"{row['devices'][str(card)] or '-':>8}" for card in CARDS_GB)
        print(f"{row['total'] / 1e9:>9.1f} GB{fits}")
        of_host = f", and {row['host'] / 1e9:.1f} GB of the host" if row["host"] else ""
        _print_wrapped((named or "as asked") + of_host, indent=" " * 13)
    print()
    _print_wrapped(_EXPLAINED[is_sharded])
    _show_recording(planned["recording"])
    if not any(any(row["devices"].values()) for row in planned["ways"]):
        print("Nothing fits: take shards, a smaller model, or a smaller --max-length.")


def _show_recording(recording: Mapping[str, Any]) -> None:
    """What an actor takes, as text on stdout."""
    print()
    _print_wrapped(
        f"Recording with record.precision={recording['precision']} takes "
        f"{recording['total'] / 1e9:.2f} GB, of which {recording['activations'] / 1e9:.2f} are "
        "activations, which each GPU of an actor has. So many GPUs of a size an actor needs "
        "(resources.gpus_per_actor); -: its layers cannot be divided that far."
    )
    fits = "".join(f"{number or '-':>8}" for number in recording["devices"].values())
    print(f"{_HEADER}\n{'':>12}{fits}\n")


_HEADER = f"{'GPUs of':>12}" + "".join(f"{card:>5} GB" for card in CARDS_GB)
_EXPLAINED = (
    "1: each worker has one such GPU. -: it does not fit. Every worker holds the whole model; "
    "train.parallel=shard divides weights, gradients and moments by the number of workers.",
    "How many such GPUs the model is divided over, one for each worker. -: 64 are too few. There "
    "are at most train.micro_batches workers, unless the first number of resources.workers is "
    "larger.",
)


def _print_wrapped(text: str, indent: str = "") -> None:
    width = plain_console().width
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    print("\n".join(lines))
