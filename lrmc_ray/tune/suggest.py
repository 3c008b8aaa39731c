"""Ranges of tau and delta_max worth searching, from the record and a short run.

    lrmc suggest --model M --train-data F

The paper leaves the automatic choice of its two thresholds open. These rules are ours:

- **tau** from the recorded candidates. Up to the largest tau that at most ``MOST_CAPPED`` of the
  supervised positions miss because ``record.k_max`` cuts their sets short: beyond it a larger tau
  changes little. But up to ``GOOD_TAU`` at least, which gained most where it was measured, with
  many positions capped: these keep their most probable candidates. Down to the smallest at which
  at least ``LEAST_ACTIVE`` of the positions have a candidate beside gold, below which most of the
  loss is exactly zero. But not below ``LEAST_TAU``: a tau of 0.80 cost half of the gain
  (experiments/small-tau.md).
- **delta_max** from the angles between gradient and momentum, tensor by tensor, in a run of
  ``STEPS`` steps in which the cap never binds. Up to their quantile ``BINDS_ABOVE``: a looser cap
  binds on less than one tensor in twenty. Down to ``SHORTEST`` of their median: there the reading
  ``scale`` leaves that share of a typical gradient.

A search asks for them by ``range = "auto"``.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrmc_ray.cluster.beforehand import check_beforehand
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser
from lrmc_ray.config import AUTOMATIC, ParameterRange, RunSettings
from lrmc_ray.config.arguments import add_run_arguments, settings_from
from lrmc_ray.console import plain_console, progress, setup_logging
from lrmc_ray.errors import DataError
from lrmc_ray.files.place import place_of
from lrmc_ray.files.study import FoundRange
from lrmc_ray.models.directory import local_directory
from lrmc_ray.record.capped import MOST_CAPPED
from lrmc_ray.record.prepare import prepare
from lrmc_ray.record.run import record
from lrmc_ray.train.run_files import LocalRun

if TYPE_CHECKING:
    from lrmc_ray.method.subsets import CandidateSets


LEAST_ACTIVE = 0.50

GOOD_TAU = 0.99
"""The best tau of the project's experiments."""

LEAST_TAU = 0.95
"""Half way, by the logarithm of the missed probability, between ``GOOD_TAU`` and 0.80, which costs
half of the gain; between them nothing was measured."""

BINDS_ABOVE = 0.95

SHORTEST = 0.25

STEPS = 12

WARM_UP_STEPS = 3
"""First steps whose angles do not count: momentum is a single gradient then."""

POSITIONS = 20_000
"""Supervised positions that are looked at; a quantile needs no more."""

TAU_GRID = (
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98),
    *(0.985, 0.99, 0.995, 0.999),
)


@dataclass(frozen=True)
class TauRow:
    """What the record says of one tau."""

    tau: float
    k_median: float
    k_p95: float
    active_share: float
    capped_share: float


def tau_table(candidates: "CandidateSets", taus: Sequence[float] = TAU_GRID) -> list[TauRow]:
    """K, active and capped share at every tau that ``candidates`` were recorded for."""
    from lrmc_ray.method.subsets import cut

    rows = []
    for tau in taus:
        sets = cut(candidates, tau)
        sizes = sets.sizes.numpy()
        rows.append(
            TauRow(
                tau=tau,
                k_median=float(np.median(sizes)),
                k_p95=float(np.quantile(sizes, 0.95)),
                active_share=float(sets.active().double().mean()),
                capped_share=float(sets.capped(tau).double().mean()),
            )
        )
    return rows


def suggest_tau(rows: Sequence[TauRow]) -> FoundRange:
    """The range of tau by the rule in the file's head; never empty."""
    high = next(
        row
        for row in reversed(rows)
        if row.capped_share <= MOST_CAPPED or row.tau <= GOOD_TAU or row is rows[0]
    )
    if high is rows[0]:
        high = rows[1]
    below = [row for row in rows if row.tau < high.tau]
    fit = [row for row in below if row.active_share >= LEAST_ACTIVE and row.tau >= LEAST_TAU]
    low = fit[0] if fit else below[-1]
    doubt = "" if high.tau >= LEAST_TAU else f"; record a larger tau: {high.tau:g} cost much before"
    return FoundRange(
        low.tau,
        high.tau,
        f"at {low.tau:g} {low.active_share:.0%} of the positions are active, K median "
        f"{low.k_median:g}; at {high.tau:g} {high.capped_share:.0%} are capped by record.k_max, K "
        f"95th percentile {high.k_p95:g}{doubt}",
    )


def quantile_of_histogram(histogram: Sequence[int], share: float) -> float:
    """The angle in degrees below which ``share`` of the counts lie, linear inside a bin.

    Raises:
        DataError: nothing was counted.
    """
    counts = np.asarray(histogram, dtype=np.float64)
    if counts.sum() <= 0:
        raise DataError(
            "no angle between gradient and momentum was measured; use train.optimizer = moclip "
            "and more steps"
        )
    edges = np.linspace(0.0, 180.0, len(counts) + 1)
    reached = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    # Empty bins make plateaus; the quantile is the first angle that reaches the share.
    index = int(np.searchsorted(reached, share, side="left"))
    if index == 0:
        return float(edges[0])
    part = (share - reached[index - 1]) / (reached[index] - reached[index - 1])
    return float(edges[index - 1] + part * (edges[index] - edges[index - 1]))


def suggest_delta_max(histogram: Sequence[int]) -> FoundRange:
    """The range of delta_max by the rule in the file's head."""
    median = quantile_of_histogram(histogram, 0.5)
    high = min(AUTOMATIC["delta_max"], quantile_of_histogram(histogram, BINDS_ABOVE))
    low = SHORTEST * median
    return FoundRange(
        round(max(1.0, low), 1),
        round(max(high, 2.0), 1),
        f"gradients are {median:.0f} degrees off the momentum in the median, "
        f"{high:.0f} at the 95th percentile, over {sum(histogram)} tensors and steps",
    )


def recorded_candidates(record: Path) -> "CandidateSets":
    """Candidates of up to ``POSITIONS`` supervised positions, from samples all over the record."""
    from lrmc_ray.method.subsets import CandidateSets
    from lrmc_ray.record.reader import Records

    records = Records(record)
    order = np.random.default_rng(0).permutation(len(records))
    parts: list[CandidateSets] = []
    found = 0
    for index in order:
        sample = records[int(index)]
        part = sample.candidates.rows(sample.is_supervised_P)
        parts.append(part)
        found += part.num_rows
        if found >= POSITIONS:
            break
    return CandidateSets.concatenate(parts)


def measured_angles(settings: RunSettings, record: Path) -> list[int]:
    """Histogram of the angles in a short run whose cap never binds, in this process."""
    import torch

    from lrmc_ray.method.measure import NUM_ANGLE_BINS
    from lrmc_ray.method.moclip import MoClip
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.train.loop import TrainingRun

    torch.set_num_threads(settings.resources.cpus_per_worker)
    short = settings.train.model_copy(
        update={
            **{"optimizer": "moclip", "clip": "scale", "delta_max": 180.0, "steps": STEPS},
            **{"epochs": None, "warmup_steps": 0, "evaluate_every": 0, "probe_every": 0},
            **{"export": "last", "refresh_every": 0, "schedule": "constant"},
        }
    )
    total = np.zeros(NUM_ANGLE_BINS, dtype=int)
    with (
        tempfile.TemporaryDirectory(prefix="lrmc-suggest-") as scratch,
        progress("Measuring angles", total=STEPS, unit="steps") as bar,
    ):
        run = TrainingRun(
            short,
            record=record,
            model_directory=local_directory(settings.model),
            files=LocalRun(Path(scratch)),
            group=WorkerGroup(),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        optimizer = run.learner.optimizer
        assert isinstance(optimizer, MoClip)
        for result in run.steps():
            histogram = optimizer.angle_statistics().histogram
            if result.step >= WARM_UP_STEPS:
                total += histogram
            bar.advance(1)
    counts: list[int] = total.tolist()
    return counts


def suggest(settings: RunSettings, record: Path, names: Sequence[str]) -> dict[str, FoundRange]:
    """Ranges of those of ``names`` that can be found automatically."""
    found = {}
    if "tau" in names:
        found["tau"] = suggest_tau(tau_table(recorded_candidates(record), _taus(settings)))
    if "delta_max" in names:
        found["delta_max"] = suggest_delta_max(measured_angles(settings, record))
    return found


def _taus(settings: RunSettings) -> list[float]:
    return [tau for tau in TAU_GRID if tau <= settings.recorded_tau()]


def automatic(settings: RunSettings) -> list[str]:
    """Parameters whose range is still to be found."""
    return [name for name, searched in settings.parameters.items() if searched.range == "auto"]


def with_ranges(settings: RunSettings, found: Mapping[str, FoundRange]) -> RunSettings:
    """``settings`` with the ranges that were found in place of ``auto``."""
    parameters = dict(settings.parameters)
    for name, one in found.items():
        parameters[name] = ParameterRange(low=one.low, high=one.high, when=parameters[name].when)
    return settings.model_copy(update={"parameters": parameters})


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc suggest``."""
    parser = CommandParser(
        "suggest",
        description="Ranges of tau and delta_max worth searching for this model and data, from the "
        "record and a short run without a cap. Records first where that has not been done.",
    )
    add_run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    settings = settings_from(arguments)
    check_beforehand(settings, arguments.output, address=arguments.address, tasks=False)
    place = place_of(settings.resources.storage)
    place.check()
    prepare(settings, arguments.output)  # bad rows are found before Ray starts
    wide = {name: ParameterRange(range="auto") for name in AUTOMATIC}
    settings = settings.model_copy(update={"parameters": {**settings.parameters, **wide}})
    with ray_session(
        arguments.address,
        log=arguments.output / RAY_LOG,
        verbose=arguments.verbose,
        storage=place.uri,
    ):
        recorded = record(settings, arguments.output)
    rows = tau_table(recorded_candidates(recorded), _taus(settings))
    found = {
        "tau": suggest_tau(rows),
        "delta_max": suggest_delta_max(measured_angles(settings, recorded)),
    }
    if arguments.json:
        ranges = {name: asdict(one) for name, one in found.items()}
        print(json.dumps({**ranges, "tau_table": [asdict(row) for row in rows]}))
        return 0
    from rich.table import Table

    table = Table(title="The record at each tau", title_justify="left")
    for column in ("tau", "K median", "K 95th percentile", "active", "capped"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tau:g}",
            f"{row.k_median:g}",
            f"{row.k_p95:g}",
            f"{row.active_share:.0%}",
            f"{row.capped_share:.0%}",
        )
    plain_console().print(table)
    print("[parameters]")
    for name, one in found.items():
        print(f"# {one.reason}")
        print(f"{name} = {{ low = {one.low:g}, high = {one.high:g} }}")
    print('\nNext: put these lines into a space file; or range = "auto", which finds them itself')
    return 0
