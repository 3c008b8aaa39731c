"""What of a task would be scored wrongly or in part, refused before a model is loaded."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lrmc_ray.command_line import nearest
from lrmc_ray.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

SCORED = {
    "multiple_choice": (
        *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score"),
    ),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
"""lm-eval's own metrics that are scored here, by output type."""

_AGGREGATIONS = ("mean", "nanmean")
_OWN_AGGREGATION = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
}
"""Of metrics whose own aggregation over items follows from what is kept of each item."""

_UNSUPPORTED = {
    "doc_to_image": "pictures",
    "doc_to_audio": "sound",
    "unsafe_code": "running code that a model writes",
    "use_prompt": "a prompt of another file or package",
}


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task that would not be scored, or not as lm-eval scores it.

    Args:
        name: of the task.
        config: its file's content, perhaps with functions that are not resolved.

    Raises:
        ConfigError: names what is not scored.
    """
    check_supported(name, config)
    output_type = config.get("output_type") or "generate_until"
    if output_type not in SCORED:
        raise ConfigError(
            f"lm-eval refuses the task {name}: output_type must be one of {', '.join(SCORED)}, got "
            f"{output_type}"
        )
    own = config.get("process_results") is not None
    for entry in config.get("metric_list") or ():
        if not isinstance(entry, Mapping) or "metric" not in entry:
            raise ConfigError(f"task {name}: every entry of metric_list must name a metric")
        _check_metric(name, output_type, entry, own=own)


def check_supported(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task that has what is not supported at all, before lm-eval makes it.

    Raises:
        ConfigError: names it.
    """
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ConfigError(
                f"task {name} needs {what} ({key}), which is not supported; choose another task"
            )


def _check_metric(name: str, output_type: str, entry: Mapping[str, Any], *, own: bool) -> None:
    """Refuse a metric that has no value of each item, or another one than its items' mean."""
    metric, aggregation = entry["metric"], entry.get("aggregation")
    if own:
        if aggregation not in (None, *_AGGREGATIONS, *_OWN_AGGREGATION.values()):
            _log.warning(
                "task %s: %s is made of all items by an aggregation of the task's own and is not "
                "shown; the task is judged by its other metrics",
                *(name, metric),
            )
        return
    is_built_in = isinstance(metric, str) and not entry.get("hf_evaluate")
    if is_built_in and metric not in SCORED[output_type]:
        raise ConfigError(
            f"task {name}: the metric {metric} is not scored for {output_type}, which has "
            f"{', '.join(SCORED[output_type])}: a score is the mean of a value of each item; leave "
            "it out of metric_list"
        )
    if not is_built_in and output_type != "generate_until":
        raise ConfigError(f"task {name}: {output_type} has lm-eval's own metrics, not {metric}")
    allowed: tuple[str | None, ...] = (None, *_AGGREGATIONS)
    if is_built_in and metric in _OWN_AGGREGATION:
        allowed = (None, _OWN_AGGREGATION[metric])
    if aggregation not in allowed:
        raise ConfigError(
            f"task {name}: the aggregation of {metric} must be {allowed[-1]}, got {aggregation}"
        )


def right_choices(task: Any, doc: Mapping[str, Any]) -> tuple[list[int], int]:
    """Indices of an item's right choices, as lm-eval takes them, and the number of choices.

    An index that does not exist is among them; see :func:`check_items`.
    """
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    indices = [
        choices.index(g) if isinstance(g, str) and g in choices else g if isinstance(g, int) else -1
        for g in golds
    ]
    return indices, len(choices)


def check_items(task: Any, items: Sequence[Mapping[str, Any]], place: Callable[[int], str]) -> None:
    """Refuse items that lm-eval would ask or score otherwise than their file says.

    Args:
        task: lm-eval's task.
        items: those that it asks, or its examples.
        place: where the item of an index stands.

    Raises:
        ConfigError: the task file names a field that no item has.
        DataError: an item cannot be scored, or its answer would be taken for another.
    """
    config = task.config
    _check_names(config, task.features)
    first: type | None = None
    for index, item in enumerate(items):
        where = place(index)
        _check_rendering(config, item, task.features, where)
        text, target = task.doc_to_text(item), task.doc_to_target(item)
        first = first or type(target)
        if (type(target) is list) != (first is list):
            raise DataError(
                f"{where}: doc_to_target must give a list for every item or for none; the first "
                f"item has {'a list' if first is list else 'one answer'}"
            )
        if isinstance(text, int) != bool(task.multiple_input):
            raise DataError(
                f"{where}: the prompt is {text!r}, and lm-eval takes a number for the index of a "
                "choice; write a word beside it in doc_to_text"
            )
        if task.OUTPUT_TYPE == "multiple_choice":
            _check_choice(task, item, where)
        else:
            _check_answer(task, item, target, where)


def _check_names(config: Any, features: Sequence[str]) -> None:
    """Refuse a prompt or an answer that is one word and no field: it was meant to be one."""
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = getattr(config, key)
        if not isinstance(value, str) or value in features or not re.fullmatch(r"[\w.-]+", value):
            continue
        choices = config.doc_to_choice
        if key == "doc_to_target" and (
            value.isdigit() or (isinstance(choices, list) and value in choices)
        ):
            continue
        hint = nearest(value, features)
        raise ConfigError(
            f"task {config.task}: {key} must be a field of the items ({', '.join(features)}) or a "
            f"template such as {{{{{features[0]}}}}}, got {value}{hint}"
        )


class _Missing:
    """In place of a value that an item lacks: nothing in a condition, an error in a text."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Missing)

    def __hash__(self) -> int:
        return hash(None)

    def __iter__(self) -> Iterator[Any]:
        raise _MissingError(self._name)

    def __str__(self) -> str:
        raise _MissingError(self._name)


class _MissingError(Exception):
    """A text was to show a value that is not there."""


def _marked(value: Any, name: str) -> Any:
    if value is None:
        return _Missing(name)
    if isinstance(value, dict):
        return {key: _marked(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [_marked(part, name) for part in value]
    return value


@lru_cache(maxsize=1)
def _environment() -> Any:
    """lm-eval's templates, for which a missing value is none and cannot be written."""
    from lm_eval.utils import env

    own = env.overlay()
    own.tests = {**env.tests, "none": lambda value: value is None or isinstance(value, _Missing)}
    return own


def _check_rendering(
    config: Any, item: Mapping[str, Any], features: Sequence[str], where: str
) -> None:
    """Refuse a prompt or an answer in which a missing value would stand as the word None."""
    marked = {name: _marked(item.get(name), name) for name in features}
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix"):
        template = getattr(config, key)
        if not isinstance(template, str) or not template:
            continue
        try:
            if template in features:
                if isinstance(marked[template], _Missing):
                    raise _MissingError(template)
            elif "{" in template:
                _environment().from_string(template).render(**marked)
        except _MissingError as error:
            raise DataError(
                f"{where} has no {error}, which {key} shows; it would be the word None: give the "
                "item one, or ask for it in the template"
            ) from None
        except Exception as error:  # whatever a template may raise
            raise DataError(
                f"{where}: {key} cannot be made of it: {type(error).__name__}: {error}"
            ) from error


def _check_choice(task: Any, item: Mapping[str, Any], where: str) -> None:
    """Refuse an item whose right choice is none, or not the one that its file names."""
    choices = task.doc_to_choice(item)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: its choices must be a list of texts, got {choices!r}")
    key = "doc_to_text" if task.multiple_input else "doc_to_target"
    gold = getattr(task, key)(item)
    golds = gold if isinstance(gold, list) else [gold]
    if not golds or any(isinstance(g, bool) for g in golds):
        raise DataError(
            f"{where}: the right choice must be the index or the text of a choice, got {gold!r}, "
            "which lm-eval would take for an index"
        )
    for g in golds:
        is_text = isinstance(g, str) and g in choices and not isinstance(gold, list)
        if not is_text and not (isinstance(g, int) and 0 <= g < len(choices)):
            raise DataError(
                f"{where}: the right choice must be the text of one of {choices!r}, or its index "
                f"from 0 to {len(choices) - 1}, got {g!r}"
            )
    template = getattr(task.config, key)
    if isinstance(gold, int) and isinstance(template, str) and template not in task.features:
        written = str(gold)
        is_index = isinstance(_value(template, item), int)
        if not is_index and written in choices and choices[gold] != written:
            raise DataError(
                f"{where}: lm-eval takes the answer {written} for an index, the choice "
                f"{choices[gold]!r}, and a choice reads {written!r}; let doc_to_target name a "
                "field that has the text, or the index as a number"
            )


def _value(template: str, item: Mapping[str, Any]) -> Any:
    """What a template shows, before it is a text; None where it shows more than one value."""
    inner = re.fullmatch(r"\s*{{((?:(?!}}).)*)}}\s*", template, re.DOTALL)
    return _environment().compile_expression(inner[1])(**item) if inner else None


def _check_answer(task: Any, item: Mapping[str, Any], target: Any, where: str) -> None:
    """Refuse an answer that is not compared as it stands in the file."""
    config = task.config
    if task.OUTPUT_TYPE != "generate_until":
        if not isinstance(target, str) or not target:
            raise DataError(f"{where}: the text that is scored must not be empty, got {target!r}")
        return
    if config.process_results is not None:
        return  # the task's own comparison
    if config.doc_to_choice is not None:
        if isinstance(target, bool) or not isinstance(target, int):
            raise DataError(f"{where}: the right choice must be an index, got {target!r}")
        return
    if isinstance(target, bool) or target is None or isinstance(target, dict):
        raise DataError(f"{where}: the answer must be a text or a number, got {target!r}")
    if not isinstance(target, list):
        return
    template = config.doc_to_target
    is_template = isinstance(template, str) and template not in task.features
    if is_template and not isinstance(_value(template, item), list):
        raise DataError(
            f"{where}: lm-eval takes the answer {target!r} for a list of answers; let "
            "doc_to_target name the field that has the text"
        )
    if not target or not all(isinstance(answer, str) for answer in target):
        raise DataError(f"{where}: a list of right answers must hold texts, got {target!r}")
