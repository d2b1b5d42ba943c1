"""What generality costs: the engine against a hand-written loop of the same equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from toreq.bench.loops import CASES, NEVER, TANH, Case, full
from toreq.bench.timing import environment, interleaved, ratio
from toreq.bench.timing import threads as at_threads
from toreq.errors import ConfigError, ToreqError, nearest
from toreq.solvers import FixedPoint, Solver

TARGET = 1.15
AGREEMENT = 1e-5


def run(
    nets: Sequence[str] = tuple(CASES),
    batches: Sequence[int] = (16, 64, 128, 256),
    threads: Sequence[int] = (1, 2),
    steps: int = 20,
    repetitions: int = 15,
) -> dict[str, Any]:
    """Time a fixed number of plain Jacobi steps, the residual checked after each, on the drive of a given batch.

    The loop by hand is timed with ``torch.tanh`` and with ``2 sigmoid(2a) - 1``; the ratio is to the faster one. Both
    sides must first agree on the state.

    Args:
        nets: of ``mlp`` (ToroidalMLP 512), ``conv`` (ConvHopfield 32-64), ``transformer`` (LoopedTransformer).
        batches: batch sizes.
        threads: thread counts.
        steps: of each relaxation; so few that no residual reaches zero.
        repetitions: counted runs of each side.

    Raises:
        ConfigError: for an unknown net.
        ToreqError: when the two sides disagree, or the engine stopped early.
    """
    for net in nets:
        if net not in CASES:
            raise ConfigError(f"overhead: expected nets of {list(CASES)}, got {net!r}; {nearest(net, CASES)}")
    solver = full(FixedPoint(max_steps=steps, tolerance=NEVER))
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for net in nets:
        for batch in batches:
            case = CASES[net].of(batch)
            for count in threads:
                with at_threads(count):
                    agree(case, solver, steps)
                    sides: dict[str, Callable[[], object]] = {"engine": lambda case=case: case.engine(solver)}
                    for name, tanh in TANH.items():
                        sides[f"by hand, {name}"] = lambda case=case, tanh=tanh: case.by_hand(steps, tanh)
                    timings = interleaved(sides, repetitions)
                for side, timing in timings.items():
                    row = {"net": net, "batch": batch, "threads": count, "side": side}
                    rows.append({**row, "step_ms": timing.median * 1e3 / steps, **timing.milliseconds()})
                best = min(t.median for side, t in timings.items() if side != "engine")
                name = f"{net}, batch {batch}, {count} thread(s): engine / by hand"
                ratios.append(ratio(name, timings["engine"].median / best, TARGET))
    return {"bench": "overhead", "environment": environment(), "steps": steps, "rows": rows, "ratios": ratios}


def agree(case: Case, solver: Solver, steps: int) -> None:
    """Refuse to compare two loops that do not compute the same state."""
    solution = case.engine(solver)
    if int(solution.steps.min()) != steps:
        raise ToreqError(
            f"overhead: expected {steps} steps of every example, got {int(solution.steps.min())}; use fewer steps"
        )
    for name, tanh in TANH.items():
        for node, a in case.by_hand(steps, tanh).items():
            apart = float((a - solution.state[node]).abs().max() / a.abs().max())
            if not apart <= AGREEMENT:
                raise ToreqError(
                    f"overhead: expected the engine and the loop by hand ({name}) to agree to {AGREEMENT} on node "
                    f"{node!r} of {case.arch!r}, got {apart:.1e}; one of the two is wrong"
                )
