"""The benches of the engine, tiny: finite numbers of the right shape, and the facts that they rest on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from toreq.bench import memory, overhead, roofline, scaling, settling, systems
from toreq.bench.loops import CASES, NEVER, TANH, full
from toreq.bench.plots import draw
from toreq.errors import ConfigError, ToreqError
from toreq.solvers import FixedPoint

SMALL = {
    "mlp": {"hidden": (16,)},
    "conv": {"channels": (3, 5)},
    "transformer": {"features": 8, "heads": 2, "hidden": 12},
}


def well_formed(result: dict[str, Any], name: str) -> None:
    assert result["bench"] == name
    assert result["environment"]["denormals_flushed"] == torch.set_flush_denormal(True)
    assert result["rows"]
    for row in result["rows"]:
        assert all(not isinstance(v, float) or math.isfinite(v) for v in row.values()), row
    for line in result["ratios"]:
        assert set(line) == {"name", "value", "target", "holds"}
        assert line["value"] is None or math.isfinite(line["value"])
        assert (line["holds"] is None) == (line["target"] is None)
    assert draw(result).axes


@pytest.mark.parametrize("net", list(CASES))
@pytest.mark.parametrize("tanh", list(TANH))
def test_a_loop_by_hand_is_the_same_relaxation(net: str, tanh: str) -> None:
    case = CASES[net].of(3, **SMALL[net])
    solution = case.engine(full(FixedPoint(max_steps=6, tolerance=NEVER)))
    assert solution.steps.tolist() == [6, 6, 6]
    for node, a in case.by_hand(6, TANH[tanh]).items():
        torch.testing.assert_close(a, solution.state[node], rtol=1e-5, atol=1e-5)


def test_two_loops_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"].of(2, **SMALL["mlp"])
    solver = full(FixedPoint(max_steps=4, tolerance=NEVER))
    overhead.agree(case, solver, 4)
    monkeypatch.setitem(TANH, "wrong", lambda a: a.tanh() * 1.001)
    with pytest.raises(ToreqError, match="wrong"):
        overhead.agree(case, solver, 4)
    with pytest.raises(ToreqError, match="5 steps"):
        overhead.agree(case, solver, 5)


def multiply_adds(net: str) -> int:
    """What one sweep over one example multiplies, written out for the small networks."""
    if net == "mlp":
        return 16 * 16
    if net == "conv":  # 28 -> 12 -> 4 pixels a side, both directions
        return 2 * (4 * 4 * 5) * (3 * 5 * 5)
    tokens, features, hidden = 16, 8, 12
    weights = 2 * tokens * (2 * features * features + features * hidden)
    return weights + 3 * tokens * tokens * features


@pytest.mark.parametrize("net", list(CASES))
def test_operations_are_counted_from_the_shapes(net: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES[net].of(3, **SMALL[net])
    assert case.flops() == 2 * multiply_adds(net)
    if net != "conv":  # torch counts a transposed convolution by its output's size
        with FlopCounterMode(display=False) as counter:
            case.products(torch.float32)()
        assert counter.get_total_flops() == 3 * case.flops()


def test_overhead() -> None:
    result = overhead.run(nets=("mlp", "transformer"), batches=(2, 3), threads=(1,), steps=3, repetitions=2)
    well_formed(result, "overhead")
    assert len(result["rows"]) == 2 * 2 * 3
    assert [line["target"] for line in result["ratios"]] == [overhead.TARGET] * 4


def test_roofline() -> None:
    result = roofline.run(nets=("mlp",), batches=(2, 128), threads=(1,), steps=3, repetitions=2)
    well_formed(result, "roofline")
    sides = {row["side"] for row in result["rows"] if row["precision"] == "float32"}
    assert sides == {"plain", "shipped", "products"}
    assert {row["side"] for row in result["rows"] if row["precision"] == "bfloat16"} == sides
    # only batches of 128 and more are judged
    assert all((line["target"] is None) == ("batch 2," in line["name"]) for line in result["ratios"])
    row = next(r for r in result["rows"] if r["side"] == "products" and r["batch"] == 128)
    assert row["gflop"] == pytest.approx(3 * 128 * 2 * 512**2 / 1e9)
    assert row["gflops"] == pytest.approx(row["gflop"] / row["median_ms"] * 1e3)


def test_memory() -> None:
    pytest.importorskip("torchdeq")
    # ten steps fill the ring of past iterates, so that it counts in both
    result = memory.run(steps=(10, 60), depths=(1, 2), width=16, width_at_depth=8, batch=16, steps_at_depth=3)
    well_formed(result, "memory")
    assert all(row["ran"] == row["steps"] for row in result["rows"])
    ratios = {line["name"]: line for line in result["ratios"]}
    assert ratios["eqprop: peak at 60 / 10 steps"]["holds"]
    assert ratios["unrolled: peak at 60 / 10 steps"]["value"] > 1.1
    assert ratios["torchdeq: peak at 2 / 1 depth"]["value"] > 1


def test_settling() -> None:
    result = settling.run(seeds=(0,), radii=(0.9, 1.1), tolerances=(1e-3,), width=16, batch=2, max_steps=150)
    well_formed(result, "settling")
    steps = {(r["problem"], r["radius"], r["side"]): r["steps"] for r in result["rows"]}
    sides = ("plain", "gauss-seidel", "fading", "heavy ball", "anderson")
    assert all(steps["bipartite", 0.9, side] is not None for side in sides)
    assert steps["bipartite", 0.9, "gauss-seidel"] < 0.7 * steps["bipartite", 0.9, "plain"]
    assert ("lateral", 0.9, "gauss-seidel") not in steps
    assert steps["lateral", 1.1, "plain"] is None
    assert steps["lateral", 1.1, "anderson"] is not None
    # nothing is judged where there is no equilibrium
    assert not any(line["name"].startswith("bipartite, radius 1.1") for line in result["ratios"])


def test_a_state_that_overflows_has_not_settled() -> None:
    setup = settling.quadratic("bipartite", (-1.2, 1.2), 8, 2, seed=0)
    assert settling.steps_to(FixedPoint(order="gauss_seidel", max_steps=3000), setup, 1e-3) is None


def test_systems() -> None:
    result = systems.run(archs=("mlp",), bounds=(0.5,), batch=4)
    well_formed(result, "systems")
    assert [row["solver"] for row in result["rows"]] == list(systems.SOLVERS)


def test_scaling() -> None:
    result = scaling.run(
        nets=("mlp",), batches=(4, 8), widths=(8, 16), width=8, batch=4, threads=(1,), warm=1, repetitions=2
    )
    well_formed(result, "scaling")
    assert len(result["fits"]) == 4
    assert {fit["points"] for fit in result["fits"]} == {"4 to 8", "8 to 16"}


def test_the_exponent_is_that_of_the_upper_half() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    slope, offset, r2 = scaling.exponent(sizes, [100.0] * 3 + [3 * n**1.7 for n in sizes[3:]])
    assert (slope, math.exp(offset), r2) == pytest.approx((1.7, 3.0, 1.0))
    crooked, _, worse = scaling.exponent(sizes, [1.0, 1.0, 1.0, 8.0, 4.0, 8.0, 64.0])
    assert (crooked, worse) == pytest.approx((1.0, 5 / 9))
    assert scaling.exponent([2.0, 4.0], [5.0, 5.0])[::2] == (0.0, 1.0)


@pytest.mark.parametrize("bench", [overhead, roofline, scaling])
def test_unknown_nets_are_refused(bench: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        bench.run(nets=("mpl",))


def test_unknown_sides_and_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'torchdeq'"):
        memory.run(sides=("torchdq",))
    with pytest.raises(ConfigError, match="did you mean 'lateral'"):
        settling.run(problems=("laterl",))
    with pytest.raises(ConfigError, match="two sizes"):
        scaling.run(batches=(4,))
