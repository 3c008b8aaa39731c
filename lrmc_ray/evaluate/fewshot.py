"""Examples in a prompt: the item that is asked is never one of them."""

import json
from typing import Any

from lrmc_ray.errors import ConfigError


def tested_split(task: Any) -> str | None:
    """The split whose items are asked."""
    split: str | None = task.config.test_split or task.config.validation_split
    return split


def drawn_split(task: Any) -> str | None:
    """The split whose items are examples, as lm-eval chooses it; None for examples of their own."""
    config, fewshot = task.config, task.fewshot_cfg
    if fewshot.split is None and fewshot.samples is not None:
        return None
    others = (fewshot.split, config.training_split, config.validation_split, config.test_split)
    return next((split for split in others if split is not None), None)


def never_its_own_example(task: Any) -> None:
    """Let lm-eval leave the item that it asks out of the examples that it draws.

    It does so where ``fewshot_split`` is the split that is tested. Where it draws from that split
    for want of another, an item may stand in the prompt with its answer.

    Args:
        task: lm-eval's, with its items.

    Raises:
        ConfigError: the examples are made from the tested items and do not equal them.
    """
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    if not config.num_fewshot or fewshot is None or not hasattr(task, "sampler"):
        return
    tested, drawn = tested_split(task), drawn_split(task)
    if drawn is None or (drawn != tested and not _share_items(task)):
        return
    if drawn == tested and fewshot.process_docs is not config.process_docs:
        raise ConfigError(
            f"task {config.task}: its examples are the tested items, processed otherwise, so an "
            "item cannot be told from its own example; name another fewshot_split"
        )
    # lm-eval leaves the item out where these two are the same; the examples are drawn already.
    fewshot.split = config.test_split


def _share_items(task: Any) -> bool:
    """Whether an item of the tested split is among the examples."""
    examples = {json.dumps(item, sort_keys=True, default=str) for item in task.sampler.df}
    return any(json.dumps(i, sort_keys=True, default=str) in examples for i in task.eval_docs)
