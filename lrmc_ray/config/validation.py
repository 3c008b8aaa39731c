"""Errors of settings that name the rule, the value and the remedy."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import (
    ValidationError,
)
from pydantic.fields import FieldInfo

from lrmc_ray.command_line import nearest
from lrmc_ray.config.base import Settings
from lrmc_ray.errors import ConfigError

SettingsType = TypeVar("SettingsType", bound=Settings)

_RULES = {
    "model_type": "must be a section of settings",
    "dict_type": "must be a section of settings",
    "tuple_type": "must be a list",
    "missing": "is missing",
    "too_short": "must not be empty",
}
"""What pydantic says in Python's terms, in TOML's."""

_SHOULD = re.compile("^[A-Z][a-z]+ should")


def setting_names(settings: type[Settings]) -> list[str]:
    """All settings of all sections, as ``section.key``."""
    return [
        f"{section}.{name}"
        for section, field in settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
        for name in field.annotation.model_fields
    ]


def _elsewhere(settings: type[Settings], name: str) -> str:
    """A question after the section that was left out; empty where no section has ``name``."""
    found = [f"'{known}'" for known in setting_names(settings) if known.split(".")[1] == name]
    return f". Did you mean {' or '.join(found)}?" if found else ""


def _locate(
    settings: type[Settings], location: tuple[Any, ...]
) -> tuple[type[Settings], FieldInfo | None]:
    """The section that ``location`` leads to, and the last known setting on the way."""
    field = None
    for part in location:
        if field is not None:
            inner = (get_args(field.annotation) or (field.annotation,))[-1]
            if isinstance(inner, type) and issubclass(inner, Settings):
                settings = inner
        field = settings.model_fields.get(str(part), field)
    return settings, field


def validate(
    settings: type[SettingsType],
    values: Mapping[str, Any],
    source: str,
    *,
    of_file: Mapping[str, Any] | None = None,
) -> SettingsType:
    """``settings`` made from ``values``.

    Args:
        settings: a class of settings.
        values: by section and key.
        source: where they come from.
        of_file: what ``source`` says, before the command line changed it; what is wrong with
            ``values`` but not with this is the command line's fault.

    Raises:
        ConfigError: with every broken setting, its value, the rule and the nearest known name.
    """
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        problems = _in_words(settings, error)
    own = set(problems)
    if of_file is not None:
        try:
            settings.model_validate(dict(of_file))
            own = set()
        except ValidationError as error:
            own = set(_in_words(settings, error))
    blamed = {
        source: [problem for problem in problems if problem in own],
        "command line": [problem for problem in problems if problem not in own],
    }
    raise ConfigError(
        "; ".join(f"{name}: {'; '.join(lines)}" for name, lines in blamed.items() if lines)
    )


def _in_words(settings: type[Settings], error: ValidationError) -> list[str]:
    """Every problem with its value, the rule and the nearest known name."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        section, field = _locate(settings, problem["loc"])
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            close = _elsewhere(settings, name) if len(problem["loc"]) == 1 else ""
            close = close or nearest(name, section.model_fields, above=key.removesuffix(name))
            lines.append(f"unknown setting {key}{close}")
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}" if key else message)
        else:
            rule = _RULES.get(problem["type"]) or _SHOULD.sub("must", problem["msg"])
            rule = rule.replace("False", "false")
            text = " ".join((field.description or "").split()) if field else ""
            meaning = f" ({text})" if text else ""
            lines.append(f"{key} {rule}, got {problem['input']!r}{meaning}")
    return lines
