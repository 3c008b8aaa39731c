"""What recording would cost, before it is paid: K, bytes and hours, measured on a sample.

    lrmc plan --model Qwen/Qwen3-4B --train-data my.jsonl

The training data are read, checked and tokenized in full, which the record then need not do
again; the real model sees a random sample of them. Ray is not needed.

    lrmc plan --cluster cluster.yaml resources.gpus_per_worker=1 --gpu-tflops 60

How many trials of a search fit side by side on that cluster, and the hours that the search takes.

    lrmc plan --memory --model Qwen/Qwen3-4B --max-length 2048 --lora-rank 16

The memory that training and recording take, from the model's ``config.json`` alone.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrmc_ray.cluster.beforehand import check_output, check_packages
from lrmc_ray.cluster.cluster_file import cluster_slots, load_cluster
from lrmc_ray.cluster.resources import local_cpus
from lrmc_ray.command_line import CommandParser, arguments_for, pasteable
from lrmc_ray.config import RunSettings
from lrmc_ray.config.arguments import (
    add_record_arguments,
    add_run_arguments,
    add_setting_flags,
    flag_overrides,
    settings_from,
    without_aliases,
)
from lrmc_ray.console import format_seconds, progress, setup_logging
from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.models.loading import vocabulary_size
from lrmc_ray.record.capped import MOST_CAPPED, capped_text
from lrmc_ray.record.examples import SORT_WINDOW, read_examples
from lrmc_ray.record.names import EXAMPLES, PLAN
from lrmc_ray.record.prepare import Preparation, prepare
from lrmc_ray.tune.forecast import divide, forecast
from lrmc_ray.tune.plan_memory import has_no_weights, plan_memory, show_memory

if TYPE_CHECKING:
    from lrmc_ray.method.microbatch import Sample
    from lrmc_ray.method.subsets import CandidateSets
    from lrmc_ray.record.candidates import CandidateRecorder


TAUS = (0.8, 0.9, 0.95, 0.99)

ACTORS = (1, 2, 4, 8, 16, 32, 64)

UNCAPPED_CANDIDATES = 2**24
"""Candidates without a cap, at least as many as one sample's, that exist at a time."""

OF_MEMORY = (
    *("precision", "state_dtype", "lora_rank", "gradient_checkpointing"),
    *("batch_size", "micro_batches", "parallel", "reduction", "offload"),
)
"""Settings of ``train`` that have a flag here, since the memory of training depends on them."""

SAMPLE_TOKENS = 4096
"""Enough for K, bytes and speed within some ten percent."""


def measure(prepared: Preparation, *, sample_tokens: int, seed: int) -> dict[str, Any]:
    """The estimates for a record that is prepared.

    Args:
        prepared: the tokenized training data.
        sample_tokens: tokens of the random samples that the model sees, at least.
        seed: of the choice of samples.
    """
    from lrmc_ray.method.subsets import CandidateSets
    from lrmc_ray.record.describe import summarize

    settings = prepared.settings
    plan = json.loads((prepared.partial / PLAN).read_text())
    rows = random_rows(prepared.partial / EXAMPLES, plan["samples"], sample_tokens, seed)
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    samples, recording_seconds = _recorded(prepared, rows)
    part, writing_seconds = _written(settings, samples, plan["tokenizer_size"])
    seconds = recording_seconds + writing_seconds
    of_sample = summarize(plan, [part])
    supervised = CandidateSets.concatenate(
        [sample.candidates.rows(sample.is_supervised_P) for sample in samples]
    )
    num_prompt = plan["tokens"] - plan["samples"] - plan["supervised_tokens"]
    if not settings.record.prompt_k_max:
        num_prompt = 0
    per_supervised = of_sample["supervised_bytes"] / of_sample["supervised_positions"]
    per_prompt = of_sample["prompt_bytes"] / max(1, of_sample["prompt_positions"])
    other_bytes = part["bytes"] - of_sample["supervised_bytes"] - of_sample["prompt_bytes"]
    at_tau = [_at(supervised, tau) for tau in sorted({*TAUS, settings.recorded_tau()})]
    capped = next(row for row in at_tau if row["tau"] == settings.recorded_tau())["capped_share"]
    actors = _actors_here(settings)
    per_second = num_tokens / seconds
    counted = ("samples", "tokens", "supervised_tokens", "dropped", "truncated", "rejected")
    return {
        "data": {name: plan[name] for name in counted} | {"prompt_positions": num_prompt},
        "measured": {
            "samples": len(rows),
            "tokens": num_tokens,
            "supervised_positions": of_sample["supervised_positions"],
            "seconds": round(seconds, 2),
            "tokens_per_second": round(per_second, 1),
        },
        "at_tau": at_tau,
        "recorded_tau": settings.recorded_tau(),
        "k_max": settings.record.k_max,
        "capped_share": capped,
        "needed_k_max": _needed_k_max(prepared, rows) if capped > MOST_CAPPED else None,
        "bytes": {
            "supervised": round(per_supervised * plan["supervised_tokens"]),
            "prompt": round(per_prompt * num_prompt),
            "tokens": round(other_bytes * plan["tokens"] / num_tokens),
            "per_supervised_position": round(per_supervised, 1),
            "per_prompt_position": round(per_prompt, 1),
        },
        "actors_here": actors,
        "hours_here": plan["tokens"] / per_second / actors / 3600,
        "hours_by_actors": {n: plan["tokens"] / per_second / n / 3600 for n in ACTORS},
    }


def _recorded(prepared: Preparation, rows: list[dict[str, Any]]) -> tuple[list["Sample"], float]:
    """The rows recorded by the real model, and the seconds that this took."""
    from lrmc_ray.record.candidates import batches

    record = prepared.settings.record
    recorder = _recorder(
        prepared,
        tau=max(*TAUS, prepared.settings.recorded_tau()),
        k_max=record.k_max,
        prompt_k_max=record.prompt_k_max,
    )
    recorder.record(rows[:1])  # the first forward pass sets up a lot
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    samples: list[Sample] = []
    seconds = 0.0
    with progress("Measuring", total=num_tokens, unit="tokens") as bar:
        for batch in batches(rows):
            start = time.perf_counter()
            samples += recorder.record(batch)
            seconds += time.perf_counter() - start
            bar.advance(sum(len(row["input_ids"]) for row in batch))
    return samples, seconds


def _recorder(
    prepared: Preparation, *, tau: float, k_max: int, prompt_k_max: int
) -> "CandidateRecorder":
    """What an actor records with; on the processor where this machine has no GPU."""
    import torch

    from lrmc_ray.record.candidates import CandidateRecorder, own_devices

    record, resources = prepared.settings.record, prepared.settings.resources
    gpus = resources.whole_gpus_of_actor() if torch.cuda.is_available() else 1
    return CandidateRecorder(
        prepared.model_directory,
        tau=tau,
        k_min=record.k_min,
        k_max=k_max,
        prompt_k_max=prompt_k_max,
        precision=record.precision,
        devices=own_devices(gpus),
        threads=resources.cpus_per_worker,
    )


def _needed_k_max(prepared: Preparation, rows: Sequence[Mapping[str, Any]]) -> int:
    """Candidates that are enough for all but ``MOST_CAPPED`` of the learned positions.

    Measured without a cap on some of the rows, since a set may then be as large as the vocabulary.
    """
    from lrmc_ray.method.subsets import CandidateSets

    vocabulary = vocabulary_size(prepared.model_directory)
    recorder = _recorder(
        prepared, tau=prepared.settings.recorded_tau(), k_max=vocabulary, prompt_k_max=0
    )
    most = max(1, UNCAPPED_CANDIDATES // vocabulary)
    found: list[CandidateSets] = []
    # Shuffled, since they come shortest first.
    for row in random.Random(0).sample(list(rows), len(rows)):
        if found and sum(len(sets.sizes) for sets in found) >= most:
            break
        (sample,) = recorder.record([row])
        found.append(sample.candidates.rows(sample.is_supervised_P))
    sizes = CandidateSets.concatenate(found).sizes.double()
    needed = float(sizes.quantile(1.0 - MOST_CAPPED))
    return int(2 ** math.ceil(math.log2(max(2.0, needed))))


def _written(
    settings: RunSettings, samples: Sequence["Sample"], tokenizer_size: int
) -> tuple[dict[str, Any], float]:
    """What a file of these samples holds, and the seconds that cutting and writing took."""
    from lrmc_ray.method.subsets import cut
    from lrmc_ray.record.describe import describe
    from lrmc_ray.record.schema import write_part

    tau, k_min = settings.recorded_tau(), settings.record.k_min
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "sample.parquet"
        start = time.perf_counter()
        kept = [replace(s, candidates=cut(s.candidates, tau, k_min=k_min)) for s in samples]
        write_part(path, kept, {"lrmc.tau": repr(tau)})
        part = describe(path, tokenizer_size=tokenizer_size)
        return part, time.perf_counter() - start


def random_rows(path: Path, num_rows: int, num_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Random examples, shortest first, of ``num_tokens`` tokens or more if there are as many."""
    order = random.Random(seed).sample(range(num_rows), num_rows)
    rows: list[dict[str, Any]] = []
    windows: dict[int, list[dict[str, Any]]] = {}
    tokens = 0
    for index in order:
        if tokens >= num_tokens:
            break
        window = index // SORT_WINDOW
        if window not in windows:
            if len(windows) == 8:  # a large data set has thousands
                windows.clear()
            start = window * SORT_WINDOW
            windows[window] = read_examples(path, start, min(start + SORT_WINDOW, num_rows))
        row = windows[window][index % SORT_WINDOW]
        rows.append(row)
        tokens += len(row["input_ids"])
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def _at(supervised: "CandidateSets", tau: float) -> dict[str, float]:
    """Candidates of the supervised positions, were ``tau`` the threshold."""
    from lrmc_ray.method.subsets import cut

    candidates = cut(supervised, tau)
    sizes = candidates.sizes.double()
    return {
        "tau": tau,
        "k_mean": round(float(sizes.mean()), 1),
        "k_median": float(sizes.median()),
        "k_95": round(float(sizes.quantile(0.95)), 1),
        "capped_share": round(float(candidates.capped(tau).double().mean()), 4),
        "active_share": round(float(candidates.active().double().mean()), 4),
    }


def _actors_here(settings: RunSettings) -> int:
    """Actors that `record` starts on this machine by itself."""
    import torch

    resources = settings.resources
    if resources.actors:
        return resources.actors[1]
    if gpus := resources.of_actors().gpus_per_worker:
        return max(1, int(torch.cuda.device_count() // gpus))
    return max(1, local_cpus() // resources.cpus_per_worker)


def _slots_of(arguments: argparse.Namespace, settings: RunSettings) -> int:
    if arguments.slots is not None:
        if arguments.slots < 1:
            raise ConfigError(f"--slots must be at least 1, got {arguments.slots}")
        return int(arguments.slots)
    return cluster_slots(load_cluster(arguments.cluster), settings.resources)


def plan_search(
    settings: RunSettings, output: Path, slots: int, gpu_tflops: float | None
) -> dict[str, Any]:
    """Trials side by side where ``slots`` workers fit, and what the search takes.

    Raises:
        ResourceError: not one trial fits.
    """
    concurrent, (fewest, most) = divide(slots, settings.resources, settings.search.trials)
    gpu_flops = None if gpu_tflops is None else gpu_tflops * 1e12
    cost = forecast(settings, output, slots=slots, gpu_flops=gpu_flops)
    gpus = settings.resources.gpus_per_worker
    return {
        "slots": slots,
        "trials": settings.search.trials,
        "trials_side_by_side": concurrent,
        "workers_of_a_trial": [fewest, min(most, max(fewest, settings.train.micro_batches))],
        "hours": cost.seconds / 3600 if cost else None,
        "core_hours": cost.core_seconds / 3600 if cost and not gpus else None,
        "gpu_hours": (
            cost.core_seconds / settings.resources.cpus_per_worker * gpus / 3600
            if cost and gpus
            else None
        ),
        "basis": cost.basis if cost else None,
    }


def show_search(planned: Mapping[str, Any]) -> None:
    """The plan of a search as text on stdout."""
    fewest, most = planned["workers_of_a_trial"]
    print(
        f"{planned['slots']} workers fit: {planned['trials_side_by_side']} of "
        f"{planned['trials']} trials side by side, of {fewest} to {most} workers each."
    )
    if planned["hours"] is None:
        print(
            "Hours: unknown. No earlier search in the output directory had this model, data and "
            "tasks, and the model is not on this machine or its GPUs' speed is not given "
            "(--gpu-tflops). Two trials tell: search.trials=2."
        )
        return
    kind = "GPU" if planned["gpu_hours"] is not None else "core"
    held = planned["gpu_hours"] if kind == "GPU" else planned["core_hours"]
    print(
        f"The search takes about {format_seconds(planned['hours'] * 3600)}, {held:.2g} {kind} "
        "hours, without the time in which nodes start."
    )
    print(f"({planned['basis'][0].upper()}{planned['basis'][1:]}.)")


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc plan``."""
    argv = without_aliases(argv)
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    arguments.overrides += flag_overrides(arguments)
    settings = settings_from(arguments)
    if arguments.memory or has_no_weights(settings.model):
        needed = plan_memory(settings)
        if arguments.json:
            print(json.dumps(needed))
        else:
            show_memory(needed)
        return 0
    if arguments.cluster is not None or arguments.slots is not None:
        planned = plan_search(
            settings, arguments.output, _slots_of(arguments, settings), arguments.gpu_tflops
        )
        if arguments.json:
            print(json.dumps(planned))
        else:
            show_search(planned)
        return 0
    if arguments.sample_tokens < 1:
        raise ConfigError(f"--sample-tokens must be at least 1, got {arguments.sample_tokens}")
    check_output(arguments.output)
    check_packages(tasks=(), data=settings.data.train, lora=False)
    prepared = prepare(settings, arguments.output)
    if is_finished(prepared.final):
        print(f"The record is there already: lrmc inspect {prepared.final}", file=sys.stderr)
        print(json.dumps({"directory": str(prepared.final)}) if arguments.json else "", end="")
        return 0
    result = measure(prepared, sample_tokens=arguments.sample_tokens, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
        of_record = arguments_for(_record_parser(), argv, parser)
        print(f"Next: {pasteable('lrmc', 'record', *of_record)}")
    return 0


def _record_parser() -> CommandParser:
    parser = CommandParser("record")
    add_run_arguments(parser)
    add_record_arguments(parser)
    return parser


def _parser() -> CommandParser:
    parser = CommandParser(
        "plan",
        description="What recording would cost: candidates per position at several tau, bytes on "
        "disk, hours. Measured with the real model on a random sample of the training data.",
    )
    add_run_arguments(parser)
    add_record_arguments(parser)
    parser.add_argument(
        "--sample-tokens",
        type=int,
        default=SAMPLE_TOKENS,
        metavar="N",
        help=f"tokens of the sample, at least (default: {SAMPLE_TOKENS})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice of samples (default: 0)"
    )
    add_setting_flags(parser, OF_MEMORY)
    parser.add_argument(
        "--memory",
        action="store_true",
        help="plan the memory of a training worker and of a recording actor instead, from the "
        "model's config.json alone; the same where a directory has no weights",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="plan a search on the cluster of this file instead: trials side by side, hours",
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="the same, where N workers fit, without a file"
    )
    parser.add_argument(
        "--gpu-tflops",
        type=float,
        metavar="T",
        help="what one GPU sustains, in TFLOP/s (about a third of its data sheet), where no "
        "earlier search in the output directory tells",
    )
    return parser


def show(result: Mapping[str, Any]) -> None:
    """The estimates as text on stdout."""
    data, measured, size = result["data"], result["measured"], result["bytes"]
    print(
        f"{data['samples']} samples, {data['tokens']} tokens, {data['supervised_tokens']} of them "
        f"to be learned; {data['dropped']} dropped, {data['truncated']} truncated, "
        f"{data['rejected']} rejected."
    )
    print(
        f"Measured on {measured['samples']} random samples, {measured['tokens']} tokens: "
        f"{measured['tokens_per_second']:.0f} tokens per second and actor.\n"
    )
    names = ("K mean", "median", "95 %", "capped", "active")
    print(f"{'tau':>8}" + "".join(f"{name:>9}" for name in names))
    for row in result["at_tau"]:
        print(
            f"{row['tau']:>8g}{row['k_mean']:>9.1f}{row['k_median']:>9.0f}{row['k_95']:>9.0f}"
            f"{row['capped_share']:>9.1%}{row['active_share']:>9.1%}"
        )
    warning = capped_text(result["capped_share"], result["k_max"], needed=result["needed_k_max"])
    if warning is not None:
        print(f"Warning: {warning}")
    total = size["supervised"] + size["prompt"] + size["tokens"]
    print(f"\non disk at tau {result['recorded_tau']:g}: {total / 1e6:.1f} MB")
    for name, note in (
        ("supervised", f"{size['per_supervised_position']} bytes a position"),
        ("prompt", f"{size['per_prompt_position']} bytes a position; --prompt-k-max 0: none"),
        ("tokens", "the text itself"),
    ):
        print(f"{name:>14}{size[name] / 1e6:>9.1f} MB  {note}")
    here, actors = result["hours_here"], result["actors_here"]
    print(f"\nthis machine, {actors} actor(s): {format_seconds(here * 3600)}, start-up apart")
    for count, hours in result["hours_by_actors"].items():
        print(f"{count:>14} actor(s)  {format_seconds(hours * 3600)}")
