"""From the text of `--set key=value` to options."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toreq.errors import ConfigError, nearest

_REPEATED = ("--set", "--space")
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")
_CONSTANTS = {"true": True, "false": False, "none": None}


def expand_set(arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with `--set a=1 b=2` written as `--set a=1 --set b=2`, so that a SYSTEM may follow it.

    `--space` likewise.
    """
    expanded: list[str] = []
    flag, values = "", 0
    for argument in arguments:
        if argument in _REPEATED:
            flag, values = argument, 0
        elif expanded and _follows_set(expanded) and _ASSIGNMENT.match(argument):
            if values:
                expanded.append(flag)
            values += 1
        expanded.append(argument)
    return expanded


def _follows_set(arguments: Sequence[str]) -> bool:
    if arguments[-1] in _REPEATED:
        return True
    return len(arguments) > 1 and arguments[-2] in _REPEATED and bool(_ASSIGNMENT.match(arguments[-1]))


def parse_set(assignments: Sequence[str], options_of: Callable[[str | None], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options of `assignments` ("key=value"), values read as Python literals, else as text.

    `options_of(arch)` gives the legal options with defaults. An option whose default is a tuple takes a single number
    too, and one whose default is text takes the value as text. Raises `ConfigError` for what is not an assignment, a
    key given twice, or a key that is neither an option nor of the solver or estimator.
    """
    options: dict[str, Any] = {}
    given: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set: expected key=value, got {assignment!r}; for example --set arch=conv")
        if key in options:
            raise ConfigError(f"--set: expected each key once, got {key!r} twice; leave one out")
        options[key], given[key] = literal(text), text
    arch = options.get("arch")
    defaults = options_of(None if arch is None else str(arch))
    known = [*defaults, "solver", "estimator", "settings"]
    for key, value in options.items():
        if "." not in key and key not in known:
            raise ConfigError(f"--set: expected an option of the system, got {key!r}; {nearest(key, known)}")
        if isinstance(defaults.get(key), (tuple, list)) and isinstance(value, (int, float)):
            options[key] = (value,)
        elif isinstance(defaults.get(key), str) and not isinstance(value, str):
            options[key] = given[key]  # attention=none names a kind of attention
    return options


def literal(text: str) -> Any:
    """Return `text` as a Python literal (numbers, tuples, true, false, none), or as it is."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
