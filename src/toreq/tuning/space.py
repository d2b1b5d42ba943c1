"""What is tuned: named parameters with their ranges, and how large such a search is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toreq.errors import ConfigError, nearest

Value = bool | int | float | str | None
EDGE = 0.02
"""A tuned value within this part of a range's end says that the range may be too small."""


@dataclass(frozen=True)
class Real:
    """Numbers from ``low`` to ``high``, both included; with ``log`` every factor is as likely as every other.

    Raises:
        ConfigError: ends that are not finite or not in order, or not above 0 with ``log``.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, self.log)

    @property
    def count(self) -> int | None:
        """How many values there are; None for a continuum."""
        return None

    def at(self, share: float) -> float:
        """The value that lies at a ``share`` in [0, 1] of the range."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        # rounding must not lead out of the range
        return min(max(math.exp(value) if self.log else value, self.low), self.high)

    def share(self, value: float) -> float:
        """Where in the range a value lies, in [0, 1]; the inverse of `at`."""
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (here - low) / (high - low)

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} .. {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Integer:
    """Whole numbers from ``low`` to ``high``, both included; with ``log`` small ones are as likely as large ones.

    Raises:
        ConfigError: ends that are not in order, or not above 0 with ``log``.
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(end, bool) or not isinstance(end, int) for end in (self.low, self.high)):
            raise ConfigError(
                f"Integer: expected whole numbers, got {self.low!r} and {self.high!r}; use Real for others"
            )
        _check_range(self, self.low, self.high, self.log)

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.high - self.low + 1

    def at(self, share: float) -> int:
        """The value that lies at a ``share`` in [0, 1] of the range."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high + 1)
            value = math.floor(math.exp(low + share * (high - low)))
        else:
            value = self.low + math.floor(share * self.count)
        return min(max(value, self.low), self.high)

    def share(self, value: int) -> float:
        """Where in the range a value lies, in [0, 1]."""
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: Any) -> bool:
        """Whether a value is a whole number of the range."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low} .. {self.high}{' (log)' if self.log else ''}, whole"


@dataclass(frozen=True)
class Choice:
    """One of some values, each a number, a text, true, false or None.

    Raises:
        ConfigError: fewer than two values, one given twice, or one of another kind.
    """

    values: tuple[Value, ...]

    def __init__(self, values: Sequence[Value]) -> None:
        object.__setattr__(self, "values", tuple(values))
        if len(self.values) < 2 or len({(type(v), v) for v in self.values}) < len(self.values):
            raise ConfigError(f"Choice: expected two or more different values, got {self.values}; set a single one")
        for value in self.values:
            if value is not None and not isinstance(value, bool | int | float | str):
                raise ConfigError(
                    f"Choice: expected numbers, texts, booleans or None, got {value!r}; name it by a text"
                )

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    def at(self, share: float) -> Value:
        """The value that lies at a ``share`` in [0, 1] of the list."""
        return self.values[min(math.floor(share * len(self.values)), len(self.values) - 1)]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        return any(type(value) is type(own) and value == own for own in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


Parameter = Real | Integer | Choice


def _check_range(kind: object, low: float, high: float, log: bool) -> None:
    name = type(kind).__name__
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{name}: expected low < high, both finite, got {low:g} and {high:g}; swap or set them")
    if log and low <= 0:
        raise ConfigError(f"{name}: expected a low end above 0 on a logarithmic scale, got {low:g}; raise it")


@dataclass(frozen=True)
class Size:
    """How large a search is: the number of continuous dimensions, and the number of values of each discrete one."""

    continuous: int
    discrete: tuple[int, ...]

    def __str__(self) -> str:
        parts = [f"{self.continuous} continuous"] if self.continuous else []
        return ", ".join([*parts, *(f"{count} values" for count in self.discrete)])


@dataclass(frozen=True)
class Space:
    """Parameters by name, searched together.

    Args:
        parameters: name -> `Real`, `Integer` or `Choice`; at least one.

    Raises:
        ConfigError: no parameter, or something that is none.
    """

    parameters: Mapping[str, Parameter]

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ConfigError("Space: expected at least one parameter, got none; name what is to be tuned")
        for name, parameter in self.parameters.items():
            if not isinstance(parameter, Real | Integer | Choice):
                raise ConfigError(f"Space: expected Real, Integer or Choice for {name!r}, got {parameter!r}; use one")

    @property
    def size(self) -> Size:
        """What is compared between sides that are to be tuned equally."""
        counts = [parameter.count for parameter in self.parameters.values()]
        return Size(counts.count(None), tuple(sorted(count for count in counts if count is not None)))

    def at(self, shares: Sequence[float]) -> dict[str, Value]:
        """The point at these shares in [0, 1] of the parameters, in their order."""
        return {name: p.at(share) for (name, p), share in zip(self.parameters.items(), shares, strict=True)}

    def check(self, point: Mapping[str, Any]) -> dict[str, Value]:
        """Return a point in the order of the parameters.

        Raises:
            ConfigError: a name that is missing or unknown, or a value outside its range.
        """
        for name in point:
            if name not in self.parameters:
                raise ConfigError(f"Space: expected a parameter, got {name!r}; {nearest(name, self.parameters)}")
        for name, parameter in self.parameters.items():
            if name not in point:
                raise ConfigError(f"Space: expected a value of {name!r}, got none; a point has all parameters")
            if not parameter.holds(point[name]):
                raise ConfigError(f"Space: expected {name} in {parameter}, got {point[name]!r}; change it or the range")
        return {name: point[name] for name in self.parameters}

    def at_edge(self, point: Mapping[str, Any]) -> list[str]:
        """The parameters of a point whose value lies at an end of its range, where a larger range might do better."""
        found = []
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Real | Integer) and not EDGE < parameter.share(point[name]) < 1 - EDGE:
                found.append(name)
        return found

    def describe(self) -> dict[str, str]:
        """Name -> range in words; what results are compared by."""
        return {name: str(parameter) for name, parameter in self.parameters.items()}
