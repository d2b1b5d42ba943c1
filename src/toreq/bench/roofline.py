"""How much of the processor the relaxation uses: its rate against that of its own products, measured beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from toreq.bench.loops import CASES, NEVER, Case, full
from toreq.bench.timing import Timing, environment, interleaved, ratio
from toreq.bench.timing import threads as at_threads
from toreq.errors import ConfigError, nearest
from toreq.solvers import FixedPoint, Solver

TARGET, FROM_BATCH = 0.6, 128


def run(
    nets: Sequence[str] = tuple(CASES),
    batches: Sequence[int] = (64, 128, 256, 512),
    threads: Sequence[int] = (1, 2),
    steps: int = 12,
    repetitions: int = 15,
) -> dict[str, Any]:
    r"""FLOP/s of relaxations, counting the products of the couplings only, and of these products alone.

    .. math:: \frac{\text{rate of the relaxation}}{\text{rate of the products}}
              = \frac{\sum_b \mathrm{steps}_b\,F / t_{\text{relaxation}}}{B F / t_{\text{products}}}

    with F the operations of one sweep over one example. Activations, residuals, checks, extrapolation and the start are
    in the relaxation's time and not in its operations. In float32 the plain and the shipped solver run a fixed number
    of steps, the residual checked as always; in bfloat16 (``precision="mixed"``, on solvers that have it) they settle
    to their own tolerance, finish in float32 included, and the products are those of bfloat16.

    Args:
        nets: ``mlp`` (one 512 x 512 product a sweep), ``conv`` (a 5x5 stride-2 convolution 32 to 64 and its transpose),
            ``transformer`` (16 tokens of 96: the products with the weights, and the batched ones of attention).
        batches: batch sizes.
        threads: thread counts.
        steps: of the float32 relaxations.
        repetitions: counted runs of each side.

    Raises:
        ConfigError: for an unknown net.
    """
    for net in nets:
        if net not in CASES:
            raise ConfigError(f"roofline: expected nets of {list(CASES)}, got {net!r}; {nearest(net, CASES)}")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for net in nets:
        for batch in batches:
            case = CASES[net].of(batch)
            for count in threads:
                with at_threads(count):
                    measured = _measure(case, steps, repetitions)
                for (precision, side), (timing, work) in measured.items():
                    _, products_work = measured[precision, "products"]
                    products = products_work / measured[precision, "products"][0].median
                    rate = work / timing.median
                    row = {"net": net, "batch": batch, "threads": count, "precision": precision, "side": side}
                    rows.append({**row, "gflops": rate / 1e9, "gflop": work / 1e9, **timing.milliseconds()})
                    if side != "products":
                        name = f"{net}, batch {batch}, {count} thread(s), {precision}: {side} / products"
                        target = TARGET if batch >= FROM_BATCH else None
                        ratios.append(ratio(name, rate / products, target, at_most=False))
    return {"bench": "roofline", "environment": environment(), "steps": steps, "rows": rows, "ratios": ratios}


def solvers(case: Case, steps: int) -> dict[tuple[str, str], Solver]:
    """``(precision, side)`` -> solver: plain and shipped, in float32 and, where solvers can, in mixed precision."""
    shipped = case.net.equilibrium.solver
    plain = FixedPoint(tolerance=shipped.tolerance, max_steps=shipped.max_steps)
    found = {
        ("float32", name): dataclasses.replace(full(solver), max_steps=steps, tolerance=NEVER)
        for name, solver in (("plain", plain), ("shipped", shipped))
    }
    for name, solver in (("plain", plain), ("shipped", shipped)):
        if "precision" in {f.name for f in dataclasses.fields(solver)}:
            found["bfloat16", name] = full(solver, "mixed")
    return found


def _measure(case: Case, steps: int, repetitions: int) -> dict[tuple[str, str], tuple[Timing, float]]:
    """Timing and floating-point operations of every side, all interleaved."""
    chosen = solvers(case, steps)
    sides: dict[str, Callable[[], object]] = {}
    work: dict[tuple[str, str], float] = {}
    keys: dict[str, tuple[str, str]] = {}
    for key, solver in chosen.items():
        # the operations that were needed: an example that has settled early needs no more of them
        work[key] = float(case.engine(solver).steps.sum()) * case.flops()
        keys[str(key)] = key
        sides[str(key)] = lambda solver=solver: case.engine(solver)
    for precision in dict.fromkeys(precision for precision, _ in chosen):
        key = precision, "products"
        sweep = case.products(getattr(torch, precision))
        work[key] = float(steps * case.size * case.flops())
        keys[str(key)] = key
        sides[str(key)] = lambda sweep=sweep: _repeat(sweep, steps)
    timings = interleaved(sides, repetitions)
    return {keys[name]: (timing, work[keys[name]]) for name, timing in timings.items()}


@torch.no_grad()
def _repeat(sweep: Callable[[], object], times: int) -> None:
    for _ in range(times):
        sweep()
