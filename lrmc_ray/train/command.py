"""Stage 1 from the command line: ``python -m lrmc_ray.train``."""

import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrmc_ray.cluster.beforehand import check_beforehand, trains_lora
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser, pasteable
from lrmc_ray.config.arguments import (
    add_run_arguments,
    add_setting_flags,
    flag_overrides,
    settings_from,
)
from lrmc_ray.console import progress, setup_logging
from lrmc_ray.evaluate.allowed_python import allow_python
from lrmc_ray.evaluate.task_files import check_tasks
from lrmc_ray.evaluate.task_names import asked_tasks
from lrmc_ray.evaluate.task_sources import remote_data
from lrmc_ray.files.allowed_addresses import allow_addresses
from lrmc_ray.files.artifacts import fingerprint, read_manifest
from lrmc_ray.files.metrics_log import read_new_lines
from lrmc_ray.files.names import METRICS, MODEL
from lrmc_ray.files.origin import origin_of, write_origin
from lrmc_ray.files.place import place_of
from lrmc_ray.record.prepare import prepare
from lrmc_ray.record.run import record
from lrmc_ray.train.checks import check_settings
from lrmc_ray.train.driver import MADE_BY, check_converged, run_identity, train, with_steps
from lrmc_ray.train.precision import with_precision


@contextmanager
def _shown_progress(directory: Path, steps: int) -> Iterator[None]:
    """A bar that follows the metrics which rank 0 writes."""
    stop = threading.Event()
    path = directory / METRICS
    lines, offset = read_new_lines(path, 0)
    shown = lines[-1].step if lines else 0
    _log.info("%s", LEGEND)
    with progress("Training", total=steps, unit="steps", completed=shown) as bar:

        def follow() -> None:
            nonlocal offset, shown
            seen: dict[str, float] = {}
            is_last = False
            while not is_last:
                is_last = stop.wait(0.5)
                lines, offset = read_new_lines(path, offset)
                for line in lines:
                    seen |= line.metrics
                    if line.step > shown:
                        bar.advance(line.step - shown, note=progress_note(seen))
                        shown = line.step

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


_NOTES = (
    ("loss", "train/loss", "{:.3f}"),
    ("held-out NLL", "train/held_out_nll", "{:.3f}"),
    ("tokens/s", "train/tokens_per_second", "{:.0f}"),
    ("K", "subset/k_mean", "{:.0f}"),
    ("active", "subset/active_share", "{:.0%}"),
    ("rho", "subset/rho", "{:.4f}"),
    ("angle", "moclip/angle_deg", "{:.0f}"),
    ("clipped", "moclip/clipped_share", "{:.0%}"),
    ("workers", "elastic/world_size", "{:.0f}"),
)


LEGEND = (
    "K: candidates of a position; active: positions with a candidate beside the right token; rho: "
    "probability outside the candidates; angle: of gradient and momentum, in degrees; clipped: "
    "tensors whose angle was capped"
)
"""What the words of :func:`progress_note` mean."""

_log = logging.getLogger(__name__)


def progress_note(metrics: Mapping[str, float]) -> str:
    """The metrics that say at a glance how training goes, in one line."""
    return ", ".join(
        f"{name} {form.format(metrics[key])}"
        for name, key, form in _NOTES
        if math.isfinite(metrics.get(key, math.nan))
    )


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.train``."""
    parser = CommandParser(
        "train",
        usage="lrmc train [OPTION ...] [section.key=value ...]",
        description="Stage 1: fine-tune on the recorded candidates with MoClip. Records first "
        "where that has not been done.",
    )
    add_run_arguments(parser)
    add_setting_flags(parser)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    arguments.overrides += flag_overrides(arguments)
    settings = settings_from(arguments)
    storage = settings.resources.storage
    check_beforehand(
        settings,
        arguments.output,
        address=arguments.address,
        tasks=False,
        lora=trains_lora(settings),
    )
    if arguments.domain_tasks or arguments.general_tasks:  # by which the model is to be scored
        names = asked_tasks(settings.evaluate)
        check_tasks(names, "test")
        allow_python(names)
        allow_addresses(*remote_data(names))
    place_of(storage).check()
    allow_addresses(storage)
    check_settings(settings)
    prepare(settings, arguments.output)  # bad rows are found before Ray starts
    with ray_session(
        arguments.address,
        log=arguments.output / RAY_LOG,
        verbose=arguments.verbose,
        storage=storage,
    ):
        recorded = record(settings, arguments.output)
        settings = with_precision(with_steps(settings, recorded), recorded)
        identity = run_identity(settings, recorded)
        directory = arguments.output / "training" / fingerprint(identity)
        with _shown_progress(directory, settings.train.steps):
            train(settings, recorded, directory)
    manifest = read_manifest(directory, made_by=MADE_BY)
    if arguments.json:
        print(json.dumps({"directory": str(directory), **manifest}))
    else:
        print(
            f"{manifest['steps']} steps in {manifest['train_seconds']:.0f} s, "
            f"{manifest['processed_tokens']} of {manifest['original_tokens']} tokens processed."
        )
    check_converged(manifest)
    write_origin(directory / MODEL, origin_of(settings, arguments.output))
    if not arguments.json:
        print(f"The model is in {directory / MODEL}.")
        print(f"Next: {pasteable('lrmc', 'evaluate', '--tuned', directory / MODEL)}")
    return 0
