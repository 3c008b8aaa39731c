"""What all settings share: strict types, frozen values, the names of the embedded data."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

DEMO = "demo"
"""Names the embedded model and the embedded data."""

GEMMA = "gemma-270m"
"""Names the base model Gemma 3 270M, made from wheels once its terms are accepted."""

PACKET_FILTER = "packet_filter"
"""Names the task of questions about network traffic, and its training data."""

CT_RADIO = "ct_radio"
"""Names the task of radio exam questions, and its training data."""

ENGLISH = "english"
"""Names general text to be replayed: sentences that no task of ours asks about."""


def as_tuple(value: Any) -> Any:
    """TOML has lists only, and one string may stand for a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Strings = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(as_tuple)]

Range = Annotated[tuple[int, int], BeforeValidator(as_tuple)]

Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]

Betas = Annotated[tuple[float, float], BeforeValidator(as_tuple)]


class Settings(BaseModel):
    """Base of all settings: unknown keys, wrong types and non-finite numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their dotted names: ``{"train": {"lr": 1}}`` is ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
