"""Budgets: how much time a claim may take, and the sizes that a protocol picks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from toreq.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """A named amount of work.

    Attributes:
        name: ``smoke``, ``quick`` or ``full``.
        seconds: wall-clock seconds that a whole claim, all sides and seeds, is sized to on two cores.
        conclusive: whether a result of this budget may settle a claim; a smoke run only shows that the protocol runs.
    """

    name: str
    seconds: float
    conclusive: bool = True

    def pick(self, smoke: T, quick: T, full: T) -> T:
        """The one of three settings that belongs to this budget."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.name]


BUDGETS = {
    "smoke": Budget("smoke", 3.0, conclusive=False),
    "quick": Budget("quick", 300.0),
    "full": Budget("full", 1800.0),
}


def find(name: str) -> Budget:
    """A budget by its name.

    Raises:
        ConfigError: for an unknown one, with the nearest.
    """
    if name not in BUDGETS:
        raise ConfigError(f"evidence: expected a budget, got {name!r}; {nearest(name, BUDGETS)}")
    return BUDGETS[name]
