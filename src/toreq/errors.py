"""The exceptions of toreq; messages have the form `<where>: expected ..., got ...; <remedy>`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToreqError(Exception):
    """Base class of every error that toreq raises on purpose."""


class ConfigError(ToreqError, ValueError):
    """An option, name or argument is not one that toreq can use."""


class DataError(ToreqError):
    """A data set is missing, damaged or not of the shape, dtype or range that was asked for."""


class CheckpointError(ToreqError):
    """A checkpoint is truncated, foreign or does not fit the network."""


class WriteError(ToreqError, OSError):
    """A file could not be written; the previous file, if any, is unchanged."""


class DivergenceError(ToreqError, RuntimeError):
    """A loss or a relaxation is no longer finite."""


class ConvergenceWarning(UserWarning):
    """A relaxation stopped at its step limit with a residual above the tolerance."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a remedy that names the entry of `names` closest to `name`, or all when none is close."""
    known = sorted(names)
    close = difflib.get_close_matches(name.lower(), [entry.lower() for entry in known], n=1)
    if close:
        match = next(entry for entry in known if entry.lower() == close[0])
        return f"did you mean {match!r}?"
    return f"choose one of {', '.join(map(repr, known))}" if known else "there is nothing to choose from"
