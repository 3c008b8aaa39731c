"""A task file is data: its templates see values alone, and its metrics are lm-eval's own.

What it names by ``!function`` is the only code that it brings along.
"""

import functools
from collections.abc import Callable
from typing import Any

from lrmc_ray.errors import ConfigError


@functools.cache
def keep_code_out() -> None:
    """Make lm-eval, in this process, take templates and metrics for data."""
    import lm_eval.api.task as task
    from lm_eval import utils
    from lm_eval.api.registry import get_metric

    utils.env = _sandbox(utils.env)
    task.get_metric = functools.partial(_registered_metric, get_metric)


def _sandbox(plain: Any) -> Any:
    """Templates that reach values and nothing behind them."""
    from jinja2.sandbox import SandboxedEnvironment

    made = SandboxedEnvironment(
        loader=plain.loader,
        undefined=plain.undefined,
        keep_trailing_newline=plain.keep_trailing_newline,
    )
    made.filters.update(plain.filters)
    return made


def _registered_metric(
    get_metric: Callable[[str], Any], name: str, hf_evaluate_metric: bool = False
) -> Any:
    """A metric of lm-eval's own.

    Raises:
        ConfigError: it is none.
    """
    import lm_eval.api.metrics  # noqa: F401  (registers them)
    from lm_eval.api.registry import METRIC_REGISTRY

    if hf_evaluate_metric or name not in METRIC_REGISTRY:
        raise ConfigError(
            f"metrics must be lm-eval's own, got {name}, which would be a script from elsewhere; "
            "leave it out of metric_list, or write process_results in Python beside the task"
        )
    return get_metric(name)
