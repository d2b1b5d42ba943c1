"""The claims of MS-TEP about settling, leaving early, gradients and overhead: the pieces that can be wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from toreq.core.state import detached
from toreq.diagnostics.work import field_flops, fine_sweep
from toreq.evidence import BUDGETS, claim
from toreq.evidence.base import nets as shared
from toreq.evidence.mstep import exits, nets, overhead, passage
from toreq.solvers import CoarseToFine, FixedPoint, Relaxation
from toreq.solvers.problem import relative
from toreq.systems.mstep import MultiScale

SMOKE = BUDGETS["smoke"]


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return shared.mnist(12, 1).inputs("train", slice(None))


def _phase(net: MultiScale, x: torch.Tensor, tolerance: float = 1e-3) -> passage.Phase:
    energy = nets.energy(net)
    with torch.no_grad():
        bindings = detached(energy.bind(x))
        problem = Relaxation(energy, bindings, as_map=True)
        start = energy.initial(bindings)
        return passage.Phase(
            problem, (start, problem.activate(start)), relative, tolerance, fine_sweep(energy, bindings)
        )


# -- work


def test_work_of_the_plain_iteration_is_its_steps_times_a_whole_field(x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "conv", strength=0.1).eval()
    phase = _phase(net, x[:1])
    taken = passage.passage(FixedPoint(damping=0.5), phase, 200)
    assert taken is not None
    assert taken.settled
    bindings = phase.problem.bindings
    whole = field_flops(nets.energy(net), bindings) / fine_sweep(nets.energy(net), bindings)
    solved = replace(FixedPoint(damping=0.5), max_steps=200, tolerance=phase.tolerance).solve(
        phase.problem, phase.start[0]
    )
    # a solver learns of a residual one step after the state that has it
    assert taken.work == pytest.approx((int(solved.steps) - 1) * whole)
    assert len(taken.curve) == int(solved.steps) - 1


def test_all_solvers_end_at_one_equilibrium_of_the_asked_residual(x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "dense").eval()
    phase = _phase(net, x[:2], 1e-4)
    for name, solvers in passage.columns().items():
        taken, _ = passage.best(solvers, phase, 300)
        assert taken.settled, name
        last = taken.curve[-1][1]
        assert last is not None
        assert last <= 1.5e-4, name


def test_what_does_not_settle_counts_all_steps(x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "dense", strength=20.0).eval()
    phase = _phase(net, x[:1])
    one = passage.passage(FixedPoint(), phase, 1)
    taken, _ = passage.best([FixedPoint()], phase, 40)
    assert one is not None
    assert not taken.settled
    assert taken.work == pytest.approx(40 * one.work)
    # and a bound ends a hopeless run
    assert passage.passage(FixedPoint(), phase, 40, bound=2 * one.work) is None


def test_a_nudged_phase_starts_with_what_is_known_and_costs_alike_for_both_signs(x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "conv").eval()
    phases = passage.Phases(net, x[:2], torch.tensor([1, 2]))
    found = dict(phases)
    assert list(found) == ["cold free", "cold nudged"]
    first = passage.passage(FixedPoint(damping=0.2), found["cold nudged"], 1)
    assert first is not None
    assert first.work == 0
    warm = dict(passage.Phases(net, x[:2], torch.tensor([1, 2]), phases.equilibria()))
    # under unchanged weights everything has settled before the first step
    for name in ("warm free", "warm nudged"):
        again = passage.passage(CoarseToFine(), warm[name], 5)
        assert again is not None
        assert again.settled
        assert len(again.curve) <= 2


# -- networks


def test_springs_left_out_of_the_jacobian_come_back(x: torch.Tensor) -> None:
    soft = nets.pyramid(SMOKE, 0, "cpu", "dense", strength=1e-6).eval()
    assert nets.radius_alone(soft, x[:4]) == pytest.approx(soft.radius(x[:4]), rel=1e-3)
    stiff = nets.pyramid(SMOKE, 0, "cpu", "dense", strength=4.0).eval()
    before = [float(s.log_strength) for s in nets.springs(stiff)]
    assert nets.radius_alone(stiff, x[:4]) < 1 < stiff.radius(x[:4])
    assert [float(s.log_strength) for s in nets.springs(stiff)] == before


def test_every_parameter_belongs_to_a_group() -> None:
    for arch in nets.WIDTHS:
        net = nets.pyramid(SMOKE, 0, "cpu", arch, spring="learned", exits=True)
        group = nets.groups(net)
        found = {group(name) for name, p in net.named_parameters() if p.requires_grad}
        assert {"level 1", "adapters", "springs", "read-outs"} <= found
        own = nets.pyramid(SMOKE, 0, "cpu", arch, shared=False)
        names = {nets.groups(own)(name) for name, p in own.named_parameters() if p.requires_grad}
        assert {"level 1", "level 2", "read-outs"} == names


@pytest.mark.parametrize("arch", list(nets.WIDTHS))
def test_a_pyramid_with_its_couplings_off_settles_at_its_drives(arch: str, x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", arch).eval()
    energy = nets.energy(net)
    with net.equilibrium.couplings_off(), torch.no_grad():
        state = net.equilibrium.solve(x[:2]).state
        for name, drive in energy.static(energy.bind(x[:2])).items():
            assert torch.equal(state[name], drive)


# -- leaving early


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2, 1.0])
def test_leaving_is_read_off_one_pass_in_which_nobody_leaves(margin: float, x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "conv", exits=True, levels=3, kernel=3).eval()
    logits, steps = exits.levels_read(net, x)
    place = exits.left_at(logits, margin)
    wanted = net.predict(x, margin)
    assert torch.equal(place + 1, wanted.level)
    torch.testing.assert_close(logits[torch.arange(len(x)), place], wanted.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(steps * (torch.arange(3) >= place[:, None]), wanted.steps)


def test_a_sweep_costs_what_the_field_on_its_levels_does(x: torch.Tensor) -> None:
    net = nets.pyramid(SMOKE, 0, "cpu", "conv", exits=True).eval()
    energy = nets.energy(net)
    bindings = detached(energy.bind(x[:4]))
    sweeps, starts = exits.costs(net, x[:4])
    assert sweeps[0] == pytest.approx(field_flops(energy, bindings) / 4)
    assert sweeps[1] == pytest.approx(field_flops(energy, bindings, energy.levels()[1]) / 4)
    assert starts[0] > starts[1] > 0


# -- overhead


def test_ratios_are_those_of_the_networks_themselves() -> None:
    cost = overhead._cost(SMOKE, 0, "cpu", overhead.SHARED, "conv", 32)
    one = overhead._cost(SMOKE, 0, "cpu", overhead.ONE, "conv", 32)
    own = overhead._cost(SMOKE, 0, "cpu", overhead.OWN, "conv", 32)
    assert one[0] == sum(p.numel() for p in overhead._network(SMOKE, 0, "cpu", overhead.ONE, "conv", 32).parameters())
    assert one[0] < cost[0] < own[0]
    assert cost[1] > one[1]


def test_the_claims_judge_what_they_say() -> None:
    one = claim("M1")
    judged = {c.side for c in one.criteria if not c.condition}
    assert judged == {"conv", "dense", "sequence"}
    assert {one.prescribed(side) for side in judged} == {3}
    assert {c.versus for c in claim("M5").criteria} == {
        ("settled jointly",),
        ("one level",),
        ("one level, early stop",),
    }
