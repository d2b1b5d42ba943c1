"""Checking the types of options, so that a wrong one is named instead of surfacing as a torch error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toreq.errors import ConfigError

_SIMPLE: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def check_types(where: str, values: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Refuse values that do not fit their annotation.

    Args:
        where: what the message begins with.
        values: option name -> value.
        annotations: option name -> annotation as text: ``int``, ``float``, ``str``, ``bool``, ``Sequence[int]``,
            ``None`` and unions of these; other annotations are not checked.

    Raises:
        ConfigError: naming the first option that does not fit.
    """
    for name, value in values.items():
        annotation = annotations.get(name, "")
        parts = [part.strip() for part in annotation.split("|")]
        known = all(part in _SIMPLE or part in ("None", "Sequence[int]") for part in parts)
        if annotation and known and not any(_fits(value, part) for part in parts):
            raise ConfigError(
                f"{where}: expected {name} of type {annotation}, got {value!r}; give it a value of that type"
            )


def _fits(value: Any, part: str) -> bool:
    if part == "None":
        return value is None
    if part == "Sequence[int]":
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, "int") for v in value)
    if isinstance(value, bool):
        return part == "bool"  # True is an int to Python, but not to a reader
    return isinstance(value, _SIMPLE[part])
