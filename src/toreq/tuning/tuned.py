"""What a search tried and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from toreq.errors import ToreqError
from toreq.tuning.space import Value

State = Literal["complete", "failed"]
Direction = Literal["maximize", "minimize"]


class TuneError(ToreqError):
    """A search that found nothing, or that cannot go on as asked."""


@dataclass(frozen=True)
class Attempt:
    """One trial of a search.

    Attributes:
        number: from 0 on.
        params: name -> value.
        value: of the objective; None where it failed.
        state: ``complete`` or ``failed``.
        seconds: it took, without what an interruption lost.
        reason: why it failed; empty otherwise.
    """

    number: int
    params: dict[str, Value]
    value: float | None
    state: State
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Tuned:
    """The result of `toreq.tuning.tune`.

    Attributes:
        best: the parameters of the best trial.
        value: its value.
        trials: all of them in order, failed ones too.
        space: name -> range, in words.
        size: of the space, in words.
        direction: ``maximize`` or ``minimize``.
        seed: of the search.
        at_edge: parameters whose best value lies at an end of its range.
    """

    best: dict[str, Value]
    value: float
    trials: tuple[Attempt, ...]
    space: dict[str, str] = field(default_factory=dict)
    size: str = ""
    direction: Direction = "maximize"
    seed: int = 0
    at_edge: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all trials together."""
        return sum(attempt.seconds for attempt in self.trials)

    @property
    def failed(self) -> int:
        """How many trials gave no value."""
        return sum(attempt.state == "failed" for attempt in self.trials)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return {**asdict(self), "trials": [asdict(a) for a in self.trials], "at_edge": list(self.at_edge)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuned:
        """The result that `to_json` wrote; raises KeyError or TypeError for something else."""
        trials = tuple(Attempt(**attempt) for attempt in values["trials"])
        return cls(**{**values, "trials": trials, "at_edge": tuple(values["at_edge"])})
