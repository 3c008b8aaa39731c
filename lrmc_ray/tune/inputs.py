"""What is wrong with the inputs of a search, found before Ray starts and a study is begun."""

from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.task_files import task_fingerprints
from lrmc_ray.files.place import place_of
from lrmc_ray.record.prepare import prepare
from lrmc_ray.tasks.registry import expand


def check_inputs(settings: RunSettings, output: Path) -> None:
    """Look at the storage, the tasks and the training data.

    Raises:
        LrmcError: one of them cannot be used; the message says why.
    """
    place_of(settings.resources.storage).check()
    names = expand([*settings.evaluate.domain_tasks, *settings.evaluate.general_tasks])
    for split in ("dev", "test"):
        task_fingerprints(names, split)
    prepare(settings, output)
