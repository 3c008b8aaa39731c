"""Numbers as people read them, in every table: percentages, points of 100, intervals, settings.

An accuracy or a probability is a percentage, a change of one is in points of 100 with its sign.
Files and JSON have fractions.
"""

from collections.abc import Mapping
from typing import Any

from lrmc_ray.evaluate.changes import MetricChange
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


def is_fraction(change: MetricChange) -> bool:
    """Whether a metric is a fraction of 1, such as an accuracy."""
    values = (change.before.value, change.after.value)
    return all(is_share(change.metric, value) for value in values)


def is_share(metric: str, value: float) -> bool:
    """Whether a value of a metric is a fraction of 1."""
    return metric != "cross_entropy" and 0.0 <= value <= 1.0


def value_texts(change: MetricChange, interval: Interval) -> tuple[str, str]:
    """A value of a metric, and both ends of its interval."""
    if is_fraction(change):
        return percent(interval.value), percent_range(interval)
    return number(interval.value, 3), f"{number(interval.low, 3)} to {number(interval.high, 3)}"


def delta_texts(change: MetricChange) -> tuple[str, str]:
    """The change of a metric, and both ends of its interval, with signs."""
    delta = change.delta
    if is_fraction(change):
        return points(delta.value), points_range(delta)
    value, low, high = (_signed(end) for end in (delta.value, delta.low, delta.high))
    return value, f"{low} to {high}"


def _signed(value: float) -> str:
    text = number(value, 3)
    return f"+{text}" if float(text.replace(_MINUS, "-")) > 0.0 else text
