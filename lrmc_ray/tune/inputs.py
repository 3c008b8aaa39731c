"""What is wrong with the inputs of a search, found before Ray starts and a study is begun."""

from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.task_files import check_tasks, task_data
from lrmc_ray.files.place import place_of
from lrmc_ray.record.prepare import prepare
from lrmc_ray.tasks.registry import expand
from lrmc_ray.train.checks import check_settings
from lrmc_ray.tune.provenance import contents


def check_inputs(settings: RunSettings, output: Path) -> dict[str, str]:
    """Look at the storage, the tasks and the training data; returns their digests.

    Raises:
        LrmcError: one of them cannot be used; the message says why.
    """
    place_of(settings.resources.storage).check()
    names = expand([*settings.evaluate.domain_tasks, *settings.evaluate.general_tasks])
    check_tasks(names, "dev")
    task_data(names, "test")
    check_settings(settings)
    prepare(settings, output)
    return contents(settings)
