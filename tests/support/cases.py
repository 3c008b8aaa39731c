"""Cases of which every run of the suite takes a few; ``-m slow`` takes the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def rest_is_slow(cases: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """``cases`` for ``parametrize``; those that are not among ``few`` are slow.

    Raises:
        ValueError: a case of ``few`` does not exist.
    """
    cases = list(cases)
    if unknown := [case for case in few if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in few else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def asked_for(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """Values of ``argument`` in the selected tests of the module whose fixture asks."""
    parameters = (
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
    )
    return {values[argument] for values in parameters if argument in values}
