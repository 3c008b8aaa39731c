"""What is wrong with the inputs of a search, found before Ray starts and a study is begun."""

from pathlib import Path

from lrmc_ray.cluster.beforehand import check_beforehand, check_model, model_here, trains_lora
from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.task_files import check_tasks, task_data
from lrmc_ray.evaluate.task_names import asked_tasks
from lrmc_ray.files.place import place_of
from lrmc_ray.record.prepare import look, prepare
from lrmc_ray.record.sources import training_files
from lrmc_ray.train.checks import check_settings
from lrmc_ray.tune.provenance import contents
from lrmc_ray.tune.used import samples_of_search


def check_quickly(settings: RunSettings, output: Path, address: str) -> None:
    """Look at whatever can be looked at in seconds: downloads no model, reads no training data.

    Raises:
        LrmcError: something is missing or wrong; the message says what to do.
    """
    check_beforehand(settings, output, address=address, lora=trains_lora(settings))
    check_model(settings.model)
    training_files(settings)
    names = asked_tasks(settings.evaluate)
    check_tasks(names, "dev")
    task_data(names, "test")


def check_to_explain(settings: RunSettings) -> None:
    """Look at the first rows of the training data, and at settings that not all models know.

    Makes and downloads nothing: where the model is not on this machine, rows are only read.

    Raises:
        LrmcError: one of them cannot be used; the message says why.
    """
    directory = model_here(settings.model)
    look(settings, directory)
    if directory is not None:
        check_settings(settings)


def check_inputs(settings: RunSettings, output: Path) -> dict[str, str]:
    """Look at the storage, the model and every row of the training data; returns their digests.

    Raises:
        LrmcError: one of them cannot be used; the message says why.
    """
    place_of(settings.resources.storage).check()
    check_settings(settings)
    prepare(settings, output, samples_of_search(settings))
    return contents(settings)
