"""The tasks that settings ask for, each of them under a name of its own."""

from lrmc_ray.config import EvaluateSettings
from lrmc_ray.errors import ConfigError
from lrmc_ray.evaluate.task_files import task_label
from lrmc_ray.tasks.registry import expand


def asked_tasks(settings: EvaluateSettings) -> tuple[str, ...]:
    """All tasks, groups replaced by theirs, those of the domain first.

    Raises:
        ConfigError: a task is both of the domain and general, or two have one name in the scores.
    """
    domain, general = expand(settings.domain_tasks), expand(settings.general_tasks)
    if both := [name for name in domain if name in general]:
        raise ConfigError(
            f"a task must be of the domain or general, {both[0]} is both; take it out of "
            "evaluate.general_tasks (--general-tasks) or of evaluate.domain_tasks (--domain-tasks)"
        )
    names: dict[str, str] = {}
    for name in (*domain, *general):
        label = task_label(name)
        if label in names:
            raise ConfigError(
                f"scores call a task by its name, or its file's without folder and suffix, and "
                f"{names[label]} and {name} are both {label}; rename one of them"
            )
        names[label] = name
    return tuple(names.values())
