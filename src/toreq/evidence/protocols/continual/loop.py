"""One learner through one stream: accuracies on every test set after every phase, and before every batch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toreq.errors import CheckpointError, ConfigError
from toreq.evidence.claim import Cost, Outcome, Points, Quantity
from toreq.evidence.protocols.continual.learner import Learner
from toreq.evidence.protocols.continual.streams import Stream
from toreq.training import checkpoint
from toreq.training.interrupt import Interrupted, StopRequest

WINDOWS = 50
"""Points of the prequential curve, at most."""
SAVE_EVERY = 30.0


@dataclass
class _Progress:
    """How far a run has come.

    Attributes:
        batch: number of the next batch.
        matrix: rows of accuracies in [0, 1], one for each phase that has ended.
        correct, seen: by window of the prequential curve.
        resumed: how often the run was interrupted.
    """

    batch: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    resumed: int = 0


def run(stream: Stream, learner: Learner, *, scratch: Path | None = None, save_every: float = SAVE_EVERY) -> Outcome:
    r"""Learn a stream batch by batch and measure.

    R[i, j] is the accuracy on test set j after phase i; a learner is tested on every batch before it learns from it
    (prequential accuracy). With T phases and as many test sets

    .. math:: \text{final} = \frac1T\sum_j R_{T-1,j},\qquad
              \text{forgetting} = \frac1{T-1}\sum_{j<T-1}\Bigl(\max_{i<T-1} R_{i,j} - R_{T-1,j}\Bigr),\qquad
              \text{backward transfer} = \frac1{T-1}\sum_{j<T-1}\bigl(R_{T-1,j} - R_{j,j}\bigr)

    (Chaudhry et al. 2018; Lopez-Paz and Ranzato 2017).

    Args:
        stream: what comes.
        learner: freshly made.
        scratch: folder in which the state is kept, so that an interrupted run goes on where it was; None keeps none.
        save_every: seconds from one saving to the next; 0 saves after every batch.

    Returns:
        metrics in percent, points and numbers; curves; parameters, operations of learning, samples.

    Raises:
        ConfigError: the learner has to be told of tasks and the stream has none.
        CheckpointError: the scratch folder holds another run.
        Interrupted: after SIGINT or SIGTERM, when the state has been saved.
    """
    if learner.boundaries and not stream.boundaries:
        raise ConfigError(
            f"run: expected a learner that needs no end of a task, got {type(learner).__name__} on the stream "
            f"{stream.name!r}, which has none; use OnlineEWC or a stream of tasks"
        )
    identity = [stream.fingerprint, type(learner).__name__, learner.parameters()]
    folder = None if scratch is None else scratch / "stream"
    at = _resumed(folder, identity, learner)
    windows = min(WINDOWS, len(stream))
    at.correct, at.seen = at.correct or [0] * windows, at.seen or [0] * windows
    saved = time.monotonic()
    with StopRequest() as stop:
        while at.batch < len(stream):
            _step(stream, learner, at, at.batch * windows // len(stream))
            stopping = stop.signal is not None
            if folder is not None and (stopping or time.monotonic() - saved >= save_every):
                _save(folder, identity, learner, at)
                saved = time.monotonic()
            if stopping:
                raise Interrupted(
                    f"stopped after batch {at.batch} of {len(stream)}"
                    + ("; nothing is kept" if folder is None else ", which is kept; the same call goes on")
                )
    return _outcome(stream, learner, at)


def _step(stream: Stream, learner: Learner, at: _Progress, window: int) -> None:
    batch = stream.batch(at.batch)
    at.correct[window] += int((learner.predict(batch.x) == batch.y).sum())
    at.seen[window] += len(batch.y)
    learner.observe(batch.x, batch.y)
    if batch.last:
        if learner.boundaries:
            learner.boundary()
        at.matrix.append([_accuracy(learner, stream, j) for j in range(stream.tests)])
    at.batch += 1


def _accuracy(learner: Learner, stream: Stream, test: int) -> float:
    x, y = stream.test(test)
    return float((learner.predict(x) == y).double().mean())


def _save(folder: Path, identity: list[Any], learner: Learner, at: _Progress) -> None:
    tensors, values = learner.state()
    checkpoint.save(folder, tensors, {"identity": identity, "progress": asdict(at), "learner": values})


def _resumed(folder: Path | None, identity: list[Any], learner: Learner) -> _Progress:
    if folder is None or not (folder / checkpoint.STATE).exists():
        return _Progress()
    tensors, state = checkpoint.load(folder)
    checkpoint.expect(state, ("identity", "progress", "learner"), "run")
    if state["identity"] != identity:
        raise CheckpointError(
            f"run: expected the state of {identity} in {folder}, got that of {state['identity']}; use another folder"
        )
    learner.restore((tensors, state["learner"]))
    at = _Progress(**state["progress"])
    at.resumed += 1
    return at


def mean(values: Sequence[float]) -> float:
    """Their mean, the same in any order; nan of none."""
    return math.fsum(values) / len(values) if values else math.nan


def summary(matrix: Sequence[Sequence[float]]) -> dict[str, Quantity]:
    """Final accuracy, forgetting and backward transfer of R; see `run`.

    Without a row for every test set (joint training), or with one alone, nothing can have been forgotten: None.
    """
    last, square = matrix[-1], len(matrix) == len(matrix[-1])
    found: dict[str, float | None] = {"forgetting": None, "backward transfer": None}
    if square and len(last) > 1:
        old = range(len(last) - 1)
        found["forgetting"] = mean([max(row[j] for row in matrix[:-1]) - last[j] for j in old])
        found["backward transfer"] = mean([last[j] - matrix[j][j] for j in old])
    points = {name: Quantity(None if value is None else 100 * value, "points") for name, value in found.items()}
    return {"final accuracy": Quantity(100 * mean(last), "%"), **points}


def _outcome(stream: Stream, learner: Learner, at: _Progress) -> Outcome:
    rows = at.matrix
    metrics = {
        **summary(rows),
        "prequential accuracy": Quantity(100 * sum(at.correct) / sum(at.seen), "%"),
        "memory": Quantity(float(learner.memory()), "numbers"),
    }
    seen, prequential = 0, list[tuple[float, float | None]]()
    for correct, count in zip(at.correct, at.seen, strict=True):
        seen += count
        prequential.append((float(seen), 100 * correct / count))
    curves: dict[str, Points] = {
        "prequential accuracy": prequential,
        "accuracy on all": [(i + 1.0, 100 * mean(row)) for i, row in enumerate(rows)],
        "accuracy on the past": [(i + 1.0, 100 * mean(row[: i + 1])) for i, row in enumerate(rows)],
    }
    if len(rows) != stream.tests:
        del curves["accuracy on the past"]
    for i, row in enumerate(rows):
        curves[f"after phase {i + 1}"] = [(j + 1.0, 100 * value) for j, value in enumerate(row)]
    notes = (f"interrupted and continued {at.resumed} times",) if at.resumed else ()
    return Outcome(metrics, curves, Cost(learner.parameters(), learner.flops, stream.samples), notes)
