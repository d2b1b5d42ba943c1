"""The run-time type checker of the tests: beartype, with int accepted where a float is asked for (PEP 484)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_checked: Callable[[Any], Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Any) -> Any:
    """Return `function` with its annotations checked in each call."""
    try:
        return _checked(function)
    except BeartypeDecorHintPep3119Exception:
        # A Protocol that is not @runtime_checkable has no instance check; such a function stays as it is.
        return function
