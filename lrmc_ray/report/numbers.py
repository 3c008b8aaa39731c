"""Numbers as the report writes them: points, percentages, intervals, settings."""

from collections.abc import Mapping
from typing import Any

from lrmc_ray.evaluate.statistics import Interval

_MINUS = "\N{MINUS SIGN}"


# Numbers as text


def number(value: float, decimals: int) -> str:
    """A number with a real minus sign and no minus zero."""
    text = f"{value:.{decimals}f}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    return text.replace("-", _MINUS)


def points(value: float, decimals: int = 1) -> str:
    """A difference of fractions as signed points of 100: 0.034 is ``+3.4``."""
    text = number(100.0 * value, decimals)
    return f"+{text}" if float(text.replace(_MINUS, "-")) > 0.0 else text


def points_range(interval: Interval) -> str:
    """Both ends of an interval in points of 100."""
    return f"{points(interval.low)} to {points(interval.high)}"


def percent(value: float) -> str:
    """A fraction as a whole percentage."""
    return f"{number(100.0 * value, 0)} %"


def percent_range(interval: Interval) -> str:
    """Both ends of an interval of fractions."""
    return f"{number(100.0 * interval.low, 0)} to {number(100.0 * interval.high, 0)} %"


def setting(value: Any) -> str:
    """A setting's value; learning rates and the like stay short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) rows."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", setting(value)))
    return rows
