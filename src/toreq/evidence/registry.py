"""The claims by id; each system's claims are one module that holds ``CLAIMS``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from toreq.errors import ConfigError, nearest
from toreq.evidence.claim import Claim

MODULES = (
    "toreq.evidence.base",
    "toreq.evidence.difftoreqprop",
    "toreq.evidence.htsep",
    "toreq.evidence.tpeqprop",
    "toreq.evidence.mstep",
    "toreq.evidence.tepssr",
)
"""Modules that are asked for their ``CLAIMS``, in the order in which they are listed."""


def claims(system: str | None = None) -> list[Claim]:
    """All claims, or those of one system, in order.

    Raises:
        ConfigError: for a system without claims, with the nearest one.
    """
    found = [c for module in MODULES for c in importlib.import_module(module).CLAIMS]
    if system is None:
        return found
    known = {c.system for c in found}
    if system not in known:
        raise ConfigError(f"evidence: expected a system with claims, got {system!r}; {nearest(system, known)}")
    return [c for c in found if c.system == system]


def claim(name: str) -> Claim:
    """A claim by its id, in capitals or not.

    Raises:
        ConfigError: for an unknown one, with the nearest.
    """
    known = {c.id: c for c in claims()}
    for key in (name, name.upper()):
        if key in known:
            return known[key]
    raise ConfigError(f"evidence: expected the id of a claim, got {name!r}; {nearest(name, known)}")


def chosen(names: Iterable[str]) -> list[Claim]:
    """The claims of these ids, each once; all of them when none is named."""
    wanted = list(dict.fromkeys(claim(name).id for name in names))
    return [claim(name) for name in wanted] if wanted else claims()
