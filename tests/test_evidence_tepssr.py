"""The claims of TEP-SSR: what they prescribe, and the pieces of them that can be wrong (test_evidence_base.py runs
every one small)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toreq.data import seeded, sequence_task
from toreq.estimators import Implicit
from toreq.evidence import BUDGETS, Claim, Trial
from toreq.evidence.counting import parameters
from toreq.evidence.tepssr import (
    CLAIMS,
    accuracy,
    contraction,
    control,
    gradients,
    memory,
    nets,
    perturbation,
    timing,
)
from toreq.systems.tepssr_nets import StateSpaceClassifier

SMOKE = BUDGETS["smoke"]
EVERY = pytest.mark.parametrize("one", CLAIMS, ids=lambda c: c.id)


@EVERY
def test_a_claim_is_complete(one: Claim) -> None:
    assert one.system == "tepssr"
    assert one.sentence.endswith(".")
    assert len(one.protocol.split()) > 30
    assert one.seeds >= 3
    assert one.exclusive == (one.id in ("S1", "S2"))
    assert len({c.name for c in one.criteria}) == len(one.criteria)


def test_single_seeds_are_asked_for_where_a_training_is_dear() -> None:
    (claim,) = (c for c in CLAIMS if c.id == "S3")
    assert claim.prescribed("pixels tepssr") == 1
    assert claim.prescribed("rows lstm") == 5
    (control_claim,) = (c for c in CLAIMS if c.id == "S5")
    assert control_claim.prescribed("pendulum tepssr") == 20
    assert control_claim.prescribed("hopper bp-eq") == 3


@pytest.mark.parametrize("one", [c for c in CLAIMS if c.tuning is not None and c.id != "S5"], ids=lambda c: c.id)
def test_an_objective_of_tuning_gives_a_number(one: Claim, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert one.tuning is not None
    for side, start in list(one.tuning.start.items())[:2]:
        trial = Trial(SMOKE, side, 1, "cpu", tmp_path_factory.mktemp("tuning"))
        assert math.isfinite(one.tuning.objective(trial, start))


@pytest.mark.parametrize("name", ["sort", "mnist-pixels"])
def test_sides_have_about_as_many_parameters_and_the_same_network(name: str) -> None:
    options: dict[str, Any] = {"chunk": 28} if name == "mnist-pixels" else {"length": 4}
    made = sequence_task(name, train=20, test=10, **options)
    more: dict[str, Any] = {"features": 16, "hidden": 24}
    own = nets.build(nets.OWN, made, 0, **more)
    wanted = parameters(own)
    for side in nets.WORDS:
        assert abs(parameters(nets.build(side, made, 0, **more)) / wanted - 1) < 0.35, side
    implicit = nets.build(nets.IMPLICIT, made, 0, **more)
    assert isinstance(nets.layer(implicit).estimator, Implicit)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), implicit.parameters(), strict=True))
    twin = nets.build(nets.FORWARD, made, 0, **more)
    sums = [sum(float(p.detach().sum()) for p in model.parameters()) for model in (own, twin)]
    assert sums[0] == pytest.approx(sums[1])


def test_networks_of_the_accuracy_claim_are_small_enough() -> None:
    for name, task in accuracy.TASKS.items():
        counts = [parameters(accuracy.build(name, side, 0, small=False)) for side in task.sides]
        assert counts[0] <= accuracy.MOST_PARAMETERS
        assert max(counts) <= 1.2 * counts[0]


def test_pixels_are_read_in_the_order_that_is_said() -> None:
    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    x = torch.arange(784.0).reshape(1, 1, 28, 28)
    assert torch.equal(accuracy.Scanned(Echo(), 28, permuted=False)(x)[0], torch.arange(784.0))
    shuffled = accuracy.Scanned(Echo(), 1, permuted=True)(x)[0]
    assert not torch.equal(shuffled, torch.arange(784.0))
    assert torch.equal(shuffled.sort().values, torch.arange(784.0))


def test_online_gradients_are_those_through_time() -> None:
    assert memory.disagreement(9, 3, 5) < 1e-4


def test_a_slope_on_logarithms_is_the_exponent() -> None:
    assert timing.slope([(2.0, 12.0), (4.0, 48.0), (8.0, 192.0)]) == pytest.approx(2.0)


@pytest.mark.parametrize("paths", [("attention", "ssm"), ("attention",), ("ssm",), ("mlp", "attention")])
def test_a_block_contracts_and_its_state_space_sees_the_past_only(paths: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    block = nets.Block(8, 12, 2, 10, paths)
    g = torch.Generator().manual_seed(1)
    x, a = (torch.randn(2, 10, 8, generator=g) for _ in range(2))
    b = a + 1e-3 * torch.randn(2, 10, 8, generator=g)
    with torch.no_grad():
        assert float((block(a, x) - block(b, x)).norm()) < float((a - b).norm())
        later = a.clone()
        later[:, 6:] += 1
        moved = (block(a, x) - block(later, x)).abs().amax((0, 2))
        assert float(moved[6:].max()) > 1e-4
        assert (float(moved[:6].max()) > 1e-6) == ("attention" in paths)
    used = {name.split(".")[0] for name, _ in block.named_parameters()}
    assert ("ssm" in used, "projections" in used, "inner" in used) == tuple(
        p in paths for p in ("ssm", "attention", "mlp")
    )


def test_the_mark_that_comes_first_decides() -> None:
    x, y = gradients.first_mark(200, 20, seeded(0))
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        marks = [s for s in row if s < 2]
        assert sorted(marks) == [0, 1]
        assert marks[0] == label
    assert 60 < int(y.sum()) < 140


def test_the_last_mark_is_the_label_and_borders_are_known() -> None:
    x, y = perturbation.last_mark(50, 40, seeded(1))
    far = perturbation.across(x, 8)
    for row, labels, beyond in zip(x.tolist(), y.tolist(), far.tolist(), strict=True):
        last = begun = None
        for place, symbol in enumerate(row):
            if symbol < perturbation.MARKS:
                last, begun = symbol, place
            assert labels[place] == (perturbation.IGNORED if last is None else last)
            assert beyond[place] == (begun is not None and begun < place // 8 * 8)


def test_what_is_asked_for_follows_its_key() -> None:
    x, y = perturbation.recall(50, 4, seeded(2))
    assert x.shape == (50, 9)
    for row, value in zip(x.tolist(), y.tolist(), strict=True):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == 4
        assert max(keys) < perturbation.KEYS <= min(values)
        assert values[keys.index(row[-1])] == perturbation.KEYS + value


def test_a_nudge_reaches_the_tokens_and_the_loops_start_is_forgotten() -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier((12,), 2, features=8, hidden=8, vocabulary=6)
    net.equilibrium.warn = False
    net.equilibrium.estimator = perturbation.Centered(beta=1e-2, nudge="absolute")
    net.equilibrium.solver = perturbation.FixedPoint()
    x = torch.randint(6, (2, 12), generator=torch.Generator().manual_seed(1))
    v = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2))
    near, far = (perturbation.nudge_response(net, x, v, n) for n in (10, 60))
    assert far > 0.9 * near > 0
    start, end = (perturbation.early_gradient(net, x, v, n) for n in (10, 60))
    assert end < 1e-3 * start


def test_the_plain_norm_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier((3, 2), 2, features=4, hidden=3, layers=1, attention="none").double()
    x = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layer = net.equilibrium
    layer.solver = perturbation.FixedPoint(tolerance=1e-12, max_steps=500)
    bindings = layer.dynamics.bind(x)
    with torch.no_grad():
        state = layer.free_phase(bindings).state
    names, sizes = list(state), [t.numel() for t in state.values()]

    def mapped(flat: torch.Tensor) -> torch.Tensor:
        parts = [p.view(state[n].shape) for n, p in zip(names, flat.split(sizes), strict=True)]
        h = layer.dynamics.activate(dict(zip(names, parts, strict=True)), bindings)
        out = layer.dynamics.map(h, bindings)
        return torch.cat([out[n].flatten() for n in names])

    at = torch.cat([state[n].flatten() for n in names])
    wanted = torch.autograd.functional.jacobian(mapped, at)
    assert isinstance(wanted, torch.Tensor)
    # two singular values are close, and power iteration slow
    assert contraction.plain_norm(net, x, 300) == pytest.approx(float(torch.linalg.matrix_norm(wanted, 2)), rel=2e-3)
    assert contraction.radius(net, x) == pytest.approx(float(torch.linalg.eigvals(wanted).abs().max()), rel=1e-3)


def test_trunks_are_of_one_size() -> None:
    counts = {how: parameters(control.Tokens(how)(12)) for how in control.HOW}
    heads = 2 * (7 * control.HIDDEN + 1)  # of the settling trunks' system, which the twin's has not
    assert counts[nets.OWN] == counts[nets.IMPLICIT]
    assert counts[nets.OWN] - counts[nets.FORWARD] in (0, heads)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    for how in control.HOW:
        assert control.Tokens(how)(12)(x).shape == (5, control.WINDOW * control.HIDDEN)


def test_one_network_diverging_in_norm_is_among_the_sides(tmp_path: Path) -> None:
    assert contraction.VARIANTS["free"][0]["norm_bound"] is None
    outcome = contraction.run(Trial(SMOKE, "free", 0, "cpu", tmp_path))
    decay = outcome.metrics[contraction.DECAY].value
    assert decay is not None
    assert 0 < decay < 1
