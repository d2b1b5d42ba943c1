"""Energies and vector fields: stationarity, E = 0 of prediction errors, contrast, colours, start, radius, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import EXACT, autograd_field, precise, residual_of
from toreq import Equilibrium
from toreq.core import (
    Bilinear,
    Conv,
    Dense,
    Drive,
    Energy,
    Identity,
    Lateral,
    Node,
    Potential,
    Residual,
    Tanh,
    VectorField,
)
from toreq.core.spectral import field_products, relaxation_radius
from toreq.errors import ConfigError
from toreq.estimators import Centered
from toreq.solvers import FixedPoint
from zoo import ALL, COUPLED, ENERGIES, SLOW, Block, case, linear


def _state(dynamics: Energy | VectorField, seed: int, batch: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(batch, *s, generator=g, dtype=torch.float64) for n, s in dynamics.shapes.items()}


@pytest.mark.parametrize("name", ENERGIES)
def test_energy_gradient_is_activation_slope_times_residual(name: str) -> None:
    """dE/da = sigma'(a)(a - field), and the field is dK/dh of the sum of all couplings."""
    c = case(name)
    assert isinstance(c.dynamics, Energy)
    energy = c.dynamics
    with torch.no_grad():
        bindings = energy.bind(c.x)
        a = _state(energy, 1)
        h = energy.activate(a, bindings)
        field = energy.field(h, bindings)
        wanted = energy.derivative(a, h, {n: a[n] - field[n] for n in a}, bindings)
    found = autograd_field(lambda s: energy(s, bindings), a)
    pulled = autograd_field(lambda s: energy.coupling(s, bindings), h)
    for n in a:
        torch.testing.assert_close(found[n], wanted[n], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(field[n], pulled[n], rtol=1e-9, atol=1e-10)
    assert energy(a, bindings).shape == (3,)


@pytest.mark.parametrize("name", ENERGIES)
def test_fixed_points_are_stationary(name: str) -> None:
    c = case(name)
    layer = c.layer()
    solution = layer.solve(c.x)
    assert bool(solution.converged.all())
    assert isinstance(c.dynamics, Energy)
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
    energy = c.dynamics
    for g in autograd_field(lambda s: energy(s, bindings), solution.state).values():
        assert float(g.abs().max()) < 1e-11


@pytest.mark.parametrize("name", ALL)
def test_field_of_some_nodes_is_part_of_the_whole(name: str) -> None:
    c = case(name)
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        h = c.dynamics.activate(_state(c.dynamics, 1), bindings)
        for whole_of, part_of in ((c.dynamics.field, c.dynamics.field), (c.dynamics.map, c.dynamics.map)):
            whole = whole_of(h, bindings)
            assert set(whole) == set(c.dynamics.names)
            for n in c.dynamics.names:
                part = part_of(h, bindings, None, frozenset([n]))
                assert set(part) == {n}
                torch.testing.assert_close(part[n], whole[n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "field_layer_norm"])
def test_static_forces_join_the_drives(name: str) -> None:
    c = case(name)
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        h = c.dynamics.activate(_state(c.dynamics, 1), bindings)
        force = _state(c.dynamics, 2)
        static = c.dynamics.static(bindings)
        pushed = {n: static[n] + f if n in static else f for n, f in force.items()}
        found, plain = c.dynamics.field(h, bindings, pushed), c.dynamics.field(h, bindings)
    for n in found:
        torch.testing.assert_close(found[n], plain[n] + force[n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["residual_loop", "residual_chain"])
def test_prediction_errors_vanish_at_the_free_equilibrium(name: str) -> None:
    c = case(name)
    assert isinstance(c.dynamics, Energy)
    assert c.dynamics.predictive
    state = c.layer().solve(c.x).state
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        assert float(c.dynamics(state, bindings).abs().max()) < 1e-20
        a = _state(c.dynamics, 1)
        wanted = torch.zeros(3, dtype=torch.float64)
        for i, term in enumerate(c.dynamics.couplings):
            assert isinstance(term, Residual)
            error = a[term.node] - term.prediction(a, bindings[f"coupling_{i}"])
            wanted = wanted + 0.5 * error.square().sum(1)
        torch.testing.assert_close(c.dynamics(a, bindings), wanted, rtol=1e-12, atol=1e-12)
    assert not case("residual_mixed").dynamics.predictive  # type: ignore[union-attr]


@pytest.mark.parametrize("name", COUPLED)
def test_contrast_is_the_weight_gradient_of_the_energy(name: str) -> None:
    c = case(name)
    energy = c.dynamics
    assert isinstance(energy, Energy)
    weight = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    plus, minus = _state(energy, 1), _state(energy, 2)
    parameters = [p for p in energy.parameters() if p.requires_grad]
    bindings = energy.bind(c.x)
    total = (weight * (energy(plus, bindings) - energy(minus, bindings))).sum()
    wanted = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
    with torch.no_grad():
        found = energy.contrast(
            (plus, energy.activate(plus, bindings)), (minus, energy.activate(minus, bindings)), weight, bindings
        )
    flat = [t for b in bindings.values() for group in (b.shared, b.batched) for t in group.values()]
    assert len(flat) == len(found)
    pairs = [(t, g.sum_to_size(t.shape)) for t, g in zip(flat, found, strict=True) if g is not None and t.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    pulled = torch.autograd.grad(outputs, parameters, cotangents, materialize_grads=True, allow_unused=True)
    # a learnt gain moves h as well: dE/dgain has the part through h, which vanishes only at equilibrium
    skip = {id(p) for n in energy.names for p in energy.activation(n).parameters()}
    for p, f, w in zip(parameters, pulled, wanted, strict=True):
        if id(p) not in skip:
            torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-10)


def test_contrast_of_a_learnt_layer_norm_is_minus_the_potentials_gradient() -> None:
    energy = case("transformer").dynamics
    assert isinstance(energy, Energy)
    x = case("transformer").x
    plus, minus = _state(energy, 1), _state(energy, 2)
    weight = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    norm = energy.activation("tokens")
    wanted = torch.autograd.grad(
        -(weight * (norm.potential(plus["tokens"]) - norm.potential(minus["tokens"]))).sum(), list(norm.parameters())
    )
    bindings = energy.bind(x)
    with torch.no_grad():
        pairs = [(s, energy.activate(s, bindings)) for s in (plus, minus)]
        found = energy.contrast(pairs[0], pairs[1], weight, bindings)
    pulled = torch.autograd.grad(
        list(bindings["node_tokens"].shared.values()), list(norm.parameters()), [g for g in found[:2] if g is not None]
    )
    for f, w in zip(pulled, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_colours_partition_the_nodes_into_independent_groups(name: str) -> None:
    c = case(name)
    colours = c.dynamics.colours()
    assert sorted(n for group in colours for n in group) == sorted(c.dynamics.names)
    if isinstance(c.dynamics, VectorField):
        # nobody knows which node a block reads where: all of them move together
        assert colours == [frozenset(c.dynamics.names)]
        return
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        h = c.dynamics.activate(_state(c.dynamics, 1), bindings)
        base = c.dynamics.map(h, bindings)
        for group in colours:
            for n in group:
                moved = c.dynamics.map({**h, n: h[n] + 1}, bindings)
                for m in group - {n}:
                    assert torch.equal(moved[m], base[m]), f"{m} reads {n} of its own colour"


def test_layered_networks_have_two_colours() -> None:
    assert len(case("convolutional").dynamics.colours()) == 2


def test_start_is_one_feed_forward_pass() -> None:
    c = case("convolutional")
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        start = c.dynamics.initial(bindings)
        assert torch.equal(start["c1"], bindings["coupling_0"].batched["drive"])
        h: dict[str, Tensor] = {n: torch.zeros(3, *s, dtype=torch.float64) for n, s in c.dynamics.shapes.items()}
        h["c1"] = start["c1"].tanh()
        wanted = c.dynamics.field(h, bindings)["c2"]
    torch.testing.assert_close(start["c2"], wanted)
    assert float(start["out"].norm()) > 0


@pytest.mark.parametrize("name", ALL)
def test_radius_is_that_of_the_explicit_jacobian(name: str) -> None:
    c = case(name)
    state = c.layer().solve(c.x).state
    names, sizes = list(state), [t[0].numel() for t in state.values()]
    wanted = []
    for i in range(3):
        with torch.no_grad():
            bindings = c.dynamics.bind(c.x[i : i + 1])

        def relax(flat: Tensor, bindings=bindings) -> Tensor:
            parts = zip(names, flat.split(sizes), strict=True)
            a = {n: p.view(1, *c.dynamics.shapes[n]) for n, p in parts}
            f = c.dynamics.map(c.dynamics.activate(a, bindings), bindings)
            return torch.cat([f[n].flatten() for n in names])

        flat = torch.cat([state[n][i].flatten() for n in names])
        jacobian = torch.autograd.functional.jacobian(relax, flat)
        wanted.append(float(torch.linalg.eigvals(jacobian).abs().max()))
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
    found = relaxation_radius(c.dynamics, bindings, state, iterations=400)
    assert found.shape == (3,)
    for f, w in zip(found.tolist(), wanted, strict=True):
        assert f == pytest.approx(w, rel=0.03, abs=1e-3)


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "field_pair", "field_attention", "residual_loop"])
def test_field_products_are_the_jacobian_and_its_transpose(name: str) -> None:
    c = case(name)
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        h = c.dynamics.activate(_state(c.dynamics, 1), bindings)
    transpose, forward = field_products(c.dynamics, h, bindings, both=True)
    u, w, eps = _state(c.dynamics, 2), _state(c.dynamics, 3), 1e-6
    with torch.no_grad():
        up = c.dynamics.map({n: t + eps * u[n] for n, t in h.items()}, bindings)
        down = c.dynamics.map({n: t - eps * u[n] for n, t in h.items()}, bindings)
    ju, jw = forward(u), transpose(w)
    for n in h:
        torch.testing.assert_close(ju[n], (up[n] - down[n]) / (2 * eps), rtol=1e-5, atol=1e-7)
    left = sum((ju[n] * w[n]).sum() for n in h)
    right = sum((jw[n] * u[n]).sum() for n in h)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    only, same = field_products(c.dynamics, h, bindings)
    assert same is only


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "field_mlp"])
def test_couplings_off_leaves_the_drives(name: str) -> None:
    c = case(name)
    layer = c.layer()
    on = layer.solve(c.x)
    with layer.couplings_off():
        off = layer.solve(c.x)
        if name != "field_mlp":
            with torch.no_grad():
                static = c.dynamics.static(c.dynamics.bind(c.x))
            for n, t in off.state.items():
                torch.testing.assert_close(t, static.get(n, torch.zeros_like(t)))
        else:
            assert isinstance(c.dynamics, VectorField)
            with torch.no_grad():
                wanted = c.dynamics.block(torch.zeros(3, 5, dtype=torch.float64), c.x)
            torch.testing.assert_close(off.state["h"], wanted)
    again = layer.solve(c.x)
    for n in on.state:
        assert torch.equal(on.state[n], again.state[n])
        assert float((on.state[n] - off.state[n]).abs().max()) > 1e-4


def test_a_new_energy_needs_only_a_value() -> None:
    """A subclass with ``value`` alone gets its field and its learning rule by autograd."""
    from toreq.core import Bound, Coupling, State

    class Cubic(Coupling):
        def __init__(self) -> None:
            super().__init__(["h"])
            self.w = nn.Parameter(torch.tensor([0.1, -0.2, 0.15]).double())

        def bind(self, x: Tensor) -> Bound:
            return Bound(shared={"w": self.w})

        def value(self, h: State, bound: Bound) -> Tensor:
            return (bound["w"] * h["h"].pow(3)).sum(1)

    g = torch.Generator().manual_seed(0)
    energy = Energy([Node("h", 3, Tanh())], [Drive("h", linear(4, 3, g)), Cubic()])
    layer = Equilibrium(energy, FixedPoint(tolerance=1e-12), precise(Centered()))
    x = torch.randn(5, 4, generator=g, dtype=torch.float64)
    layer(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.estimator = EXACT
    layer(x).square().sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-8)


def test_residual_recomputation_of_the_oracle_itself() -> None:
    c = case("identity_pair")
    zero = {n: torch.zeros(3, *s, dtype=torch.float64) for n, s in c.dynamics.shapes.items()}
    torch.testing.assert_close(residual_of(c.dynamics, c.x, zero), torch.ones(3, dtype=torch.float64))


def test_bad_input() -> None:
    g = torch.Generator().manual_seed(0)
    node = Node("hidden", 3, Tanh())
    with pytest.raises(ConfigError, match="at least one node"):
        Energy([], [])
    with pytest.raises(ConfigError, match="unique names"):
        Energy([node, node], [])
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        Energy([node], [Lateral(Dense(3, 3, symmetric=True), "hiden")])
    with pytest.raises(ConfigError, match="identity on the predicted node"):
        Energy([node], [Residual(Block(3, g), "hidden", source="hidden", inject=False)])
    clamped = Node("hidden", 3, Identity(0.5))  # h = f holds for the ordinary identity only
    with pytest.raises(ConfigError, match=r"Identity of gain 0\.5"):
        Energy([clamped], [Residual(Block(3, g), "hidden", source="hidden", inject=False)])
    undriven = Equilibrium(Energy([node], [Lateral(Dense(3, 3, symmetric=True), "hidden")]))
    with pytest.raises(ConfigError, match="add a Drive"):
        undriven(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="inject=True or a drive"):
        VectorField(node, Block(3, g), inject=False)
    with pytest.raises(ConfigError, match="LayerNorm or GroupNorm"):
        VectorField(node, nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match="noise redrawn at every step"):
        VectorField(node, nn.Sequential(nn.Dropout(0.1)))


MISFITS = {
    "source": lambda: Bilinear(Dense(5, (2, 3, 3)), "a", "b"),
    "target": lambda: Bilinear(Dense(4, 7), "a", "b"),
    "conv": lambda: Bilinear(Conv((2, 3, 3), 2, 3), "b", "a"),
    "lateral": lambda: Lateral(Dense(5, 5, symmetric=True), "a"),
    "potential": lambda: Potential(Dense(5, 6), "a"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_operators_that_do_not_fit_their_nodes_are_refused(name: str) -> None:
    nodes = [Node("a", 4, Tanh()), Node("b", (2, 3, 3), Tanh())]

    def build_and_run() -> None:
        energy = Energy(nodes, [Drive("a", nn.Linear(3, 4)), MISFITS[name]()])
        Equilibrium(energy, readout="a")(torch.zeros(2, 3))

    with pytest.raises((ConfigError, RuntimeError)):
        build_and_run()


def test_a_drive_of_the_wrong_shape_is_named() -> None:
    energy = Energy([Node("a", 4, Tanh())], [Drive("a", nn.Linear(3, 5))])
    with pytest.raises(ConfigError, match=r"drive of shape \(2, 4\) on node 'a', got \(2, 5\)"):
        Equilibrium(energy)(torch.zeros(2, 3))
    field = VectorField(Node("h", 4, Identity()), nn.Linear(4, 3), inject=False, drive=nn.Linear(3, 4))
    with pytest.raises(ConfigError, match="output of its input's shape"):
        Equilibrium(field, SLOW)(torch.zeros(2, 3))
