"""Stage 0 from the command line: ``python -m lrmc_ray.record``."""

import json
from collections.abc import Sequence

from lrmc_ray.cluster.beforehand import check_beforehand
from lrmc_ray.cluster.session import RAY_LOG, ray_session
from lrmc_ray.command_line import CommandParser, pasteable
from lrmc_ray.config import ResourceSettings
from lrmc_ray.config.arguments import (
    add_record_arguments,
    add_run_arguments,
    settings_from,
    without_aliases,
)
from lrmc_ray.console import setup_logging
from lrmc_ray.files.allowed_addresses import allow_addresses
from lrmc_ray.files.artifacts import is_finished, read_manifest
from lrmc_ray.files.place import place_of
from lrmc_ray.record.names import MADE_BY


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.record``."""
    parser = CommandParser(
        "record",
        description="Stage 0: record the candidate tokens of every position of the training data.",
    )
    add_run_arguments(parser)
    add_record_arguments(parser)
    argv = without_aliases(argv)
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(arguments.verbose, quiet=arguments.quiet)
    settings = settings_from(arguments)
    uri = settings.resources.storage
    check_beforehand(
        settings, arguments.output, address=arguments.address, tasks=False, workers=False
    )
    place = place_of(uri)
    place.check()
    allow_addresses(uri)

    from lrmc_ray.record.describe import print_summary
    from lrmc_ray.record.prepare import prepare
    from lrmc_ray.record.run import record

    # Bad rows are found before Ray starts.
    directory = prepare(settings, arguments.output).final
    if not is_finished(directory):
        log = arguments.output / RAY_LOG
        with ray_session(arguments.address, log=log, verbose=arguments.verbose, storage=uri):
            record(settings, arguments.output)
    else:
        # An earlier command may have recorded it without the storage.
        place.either(lambda: directory, lambda _: record(settings, arguments.output))
    manifest = read_manifest(directory, made_by=MADE_BY)
    if arguments.json:
        print(json.dumps({"directory": str(directory), **manifest["summary"]}))
    else:
        print_summary(manifest["summary"], k_max=settings.record.k_max)
        where = f", its files in {uri}" if uri else ""
        print(f"The record is in {directory}{where}. Look into it: lrmc inspect {directory}")
        print(f"Next: {pasteable('lrmc', 'train', *argv, *gpu_of_worker(settings.resources))}")
    return 0


def gpu_of_worker(resources: ResourceSettings) -> list[str]:
    """What to add for training: where actors alone were given GPUs, a worker takes one, too."""
    apart = resources.gpus_per_actor and not resources.gpus_per_worker
    return ["resources.gpus_per_worker=1"] if apart else []
