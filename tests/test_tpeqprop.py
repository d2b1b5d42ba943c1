"""The TPEqProp system: gradients of every architecture on every topology, its twin, budgets, feedback, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toreq import equilibria
from toreq.diagnostics.gradients import against_implicit, gradients
from toreq.diagnostics.locality import against_local
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import Centered, Implicit, Predictive
from toreq.solvers import Anderson
from toreq.systems.tpeqprop import Levels, TPEqProp, chain, prediction_energy
from toreq.systems.tpeqprop_coding import PredictiveCoding
from toreq.systems.tpeqprop_nets import ARCHITECTURES, PredictiveMLP, PredictiveResidual, PredictiveTransformer

SHAPE = (1, 12, 12)
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "chain": {
        "mlp": {"hidden": (16, 12, 10)},
        "residual": {"width": 12, "levels": 5},
        "conv": {"channels": (3, 4)},
        "transformer": {"features": 8, "hidden": 12, "patch": 4, "sublayers": True},
    },
    "ring": {
        "mlp": {"hidden": (16, 12, 10)},
        "residual": {"width": 12, "levels": 3},
        "conv": {"channels": (3,), "blocks": 2},
        "transformer": {"features": 8, "hidden": 12, "patch": 4},
    },
    "loop": {
        "mlp": {"hidden": (16,)},
        "residual": {"width": 12},
        "conv": {"channels": (3,)},
        "transformer": {"features": 8, "hidden": 12, "patch": 4},
    },
}
CASES = [(t, a) for t, nets in SMALL.items() for a in nets]


def _net(arch: str = "residual", topology: str = "chain", **more: Any) -> TPEqProp:
    torch.manual_seed(0)
    net = ARCHITECTURES[arch](SHAPE, 10, topology=topology, **{**SMALL[topology][arch], **more})  # type: ignore[call-arg]
    assert isinstance(net, TPEqProp)
    return net


def _batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(size, *SHAPE, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 10, (size,), generator=g)


def _smallest(net: nn.Module, wanted: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    found = gradients(net, x, y)
    assert set(found) == set(wanted)
    cosines = [
        nn.functional.cosine_similarity(found[n].double().flatten(), w.double().flatten(), dim=0)
        for n, w in wanted.items()
    ]
    return float(torch.stack(cosines).min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arch", SMALL["chain"])
def test_on_a_chain_the_gradient_is_backprops(arch: str, dtype: torch.dtype) -> None:
    net = _net(arch).to(dtype)
    torch.manual_seed(0)
    twin = net.feedforward().to(dtype)
    x, y = _batch(dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x), rtol=1e-6, atol=1e-6)
    wanted = gradients(twin, x, y)
    found = gradients(net, x, y)
    pairs = list(zip(net.parameters(), found.values(), strict=True))
    assert len(pairs) == len(wanted)
    by_size = sorted(wanted.values(), key=lambda g: float(g.norm()))
    ours = sorted(found.values(), key=lambda g: float(g.norm()))
    for w, g in zip(by_size, ours, strict=True):
        assert w.shape == g.shape
        torch.testing.assert_close(g, w, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("topology", "arch"), CASES)
def test_shipped_gradient_against_implicit(topology: str, arch: str, dtype: torch.dtype) -> None:
    net = _net(arch, topology).to(dtype).eval()
    x, y = _batch(dtype=dtype)
    (rows,) = against_implicit(net, x, y, [("predictive", net.equilibrium.estimator)])
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    least = 0.9999 if topology == "chain" else 0.999
    assert min(row.cosine for row in rows if row.cosine is not None) > least


@pytest.mark.parametrize(("topology", "arch"), [c for c in CASES if c[0] != "chain"])
def test_tight_loops_have_the_exact_gradient(topology: str, arch: str) -> None:
    net = _net(arch, topology).double().eval()
    x, y = _batch(dtype=torch.float64)
    layer = net.equilibrium
    layer.solver = replace(layer.solver, tolerance=1e-11, max_steps=3000)
    layer.estimator = Predictive(beta=1e-9, tolerance=1e-8, max_steps=3000)
    exact = copy.deepcopy(net)
    exact.equilibrium.estimator = Implicit(tolerance=1e-12, max_steps=3000)
    assert _smallest(net, gradients(exact, x, y), x, y) > 1 - 1e-9


@pytest.mark.parametrize(("topology", "arch"), CASES)
def test_updates_are_local(topology: str, arch: str) -> None:
    net = _net(arch, topology).eval()
    rows = against_local(net, *_batch())
    assert max(row.error for row in rows) < 1e-4
    rows = against_local(net.double(), *_batch(dtype=torch.float64))
    assert max(row.error for row in rows) < 1e-12


@pytest.mark.parametrize("arch", ["residual", "transformer"])
def test_centered_agrees_on_the_same_energy(arch: str) -> None:
    net = _net(arch, "loop").double().eval()
    x, y = _batch(dtype=torch.float64)
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-11, max_steps=2000)
    wanted = gradients(net, x, y)
    net.equilibrium.estimator = Centered(beta=1e-3, tolerance=1e-7, max_steps=5000)
    assert _smallest(net, wanted, x, y) > 0.9999


def test_tied_levels_share_one_block_and_add_up_their_updates() -> None:
    net = _net("residual", tied=True, levels=6)
    assert sum(p.numel() for p in net.equilibrium.parameters()) < sum(
        p.numel() for p in _net("residual", levels=3).equilibrium.parameters()
    )
    torch.manual_seed(0)
    twin = net.feedforward()
    x, y = _batch()
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x))
    wanted = dict(zip(["embed.1.weight"], [gradients(twin, x, y)["embed.1.weight"]], strict=True))
    found = gradients(net, x, y)["equilibrium.dynamics.couplings.0.drive.1.weight"]
    torch.testing.assert_close(found, wanted["embed.1.weight"], rtol=1e-4, atol=1e-7)


def test_a_budget_of_steps_and_per_example_stopping() -> None:
    net = _net("residual", "loop").eval()
    x, _ = _batch(16)
    x[8:] *= 0.01
    full = net.predict(x)
    free = net.equilibrium.last.free
    assert free is not None
    assert len(set(free.steps.tolist())) > 1  # examples stop one by one
    errors = [float((net.predict(x, steps=k) - full).norm()) for k in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2]
    assert net.equilibrium.last.free is not None
    assert int(net.equilibrium.last.free.steps.max()) <= 6
    assert torch.equal(net.predict(x), full)  # the shipped solver is back
    with pytest.raises(ConfigError, match="a chain, which is one pass"):
        _net().predict(x, steps=3)
    with pytest.raises(ConfigError, match="steps >= 1"):
        net.predict(x, steps=0)


def test_errors_by_level_are_gradients_in_the_states() -> None:
    net = _net("residual", levels=4).double()
    x, y = _batch(dtype=torch.float64)
    found = net.errors(x, y)
    torch.manual_seed(0)
    twin = net.feedforward().double()
    states, h = [], twin.embed(x)  # type: ignore[operator]
    states.append(h)
    for block in twin.blocks:  # type: ignore[union-attr]
        states.append(block(states[-1]))
    loss = net.criterion(twin.head(states[-1]), y)  # type: ignore[operator]
    for size, g in zip(found.values(), torch.autograd.grad(loss, states), strict=True):
        torch.testing.assert_close(size, g.flatten(1).norm(dim=1), rtol=1e-9, atol=0)


def test_one_step_of_training_is_backprops() -> None:
    net = _net("transformer")
    torch.manual_seed(0)
    twin = net.feedforward()
    losses: list[list[float]] = []
    for model in (net, twin):
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        losses.append([])
        for i in range(8):
            x, y = _batch(16)
            optimizer.zero_grad()
            loss = net.criterion(model(x.roll(i, 0)), y.roll(i, 0))
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("arch", SMALL["chain"])
def test_learned_feedback_aligns_and_learns(arch: str) -> None:
    """With the same updates and decoupled decay the ways back turn towards the weights."""
    net = _net(arch, feedback="learned")
    before = net.alignment()
    assert before
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=4.0)
    x, y = _batch(32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = net.criterion(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = net.alignment()
    mean = [float(torch.stack(list(a.values())).mean()) for a in (before, after)]
    assert mean[0] > 75
    assert mean[1] < mean[0] - 15
    assert losses[-1] < losses[0]
    assert not _net(arch).alignment()


def test_learned_feedback_is_exact_once_aligned() -> None:
    net, exact = _net("transformer", feedback="learned"), _net("transformer")
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("_back")}
    exact.load_state_dict(own)
    x, y = _batch()
    wanted = gradients(exact, x, y)
    free = {n: g for n, g in gradients(net, x, y).items() if n in wanted}
    first = next(n for n in wanted if "drive" in n and wanted[n].dim() == 2)
    assert float(nn.functional.cosine_similarity(free[first].flatten(), wanted[first].flatten(), dim=0)) < 0.9
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("_back"):
                p.copy_(dict(net.named_parameters())[name.removesuffix("_back")])
    aligned = {n: g for n, g in gradients(net, x, y).items() if n in wanted}
    for n, g in wanted.items():
        torch.testing.assert_close(aligned[n], g, rtol=1e-4, atol=1e-7)


def test_ordinary_modules_as_a_chain() -> None:
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Flatten(), nn.Linear(144, 16))
    blocks = [nn.Sequential(nn.Linear(16, 12), nn.Tanh()), nn.GRUCell(12, 12), nn.LayerNorm(12)]
    x, _ = _batch()
    layer = chain(embed, *blocks, example=x[:1])
    plain = nn.Sequential(embed, *blocks)
    assert torch.equal(layer(x).detach(), plain(x).detach())
    wanted = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()), allow_unused=True)
    layer(x).square().sum().backward()
    for p, w in zip(plain.parameters(), wanted, strict=True):
        if w is not None:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-6)


def test_predictive_coding_tends_to_the_gradient() -> None:
    """In its exact limit (weak cost, many steps) it is the gradient; as usually run its early levels see little."""
    net = _net("mlp", nonlinearity="tanh").double()
    x, y = _batch(dtype=torch.float64)
    wanted = gradients(net, x, y)
    net.equilibrium.estimator = PredictiveCoding(steps=600, rate=0.2, beta=1e-5)
    assert _smallest(net, wanted, x, y) > 0.9999
    net.equilibrium.estimator = PredictiveCoding(steps=3, rate=0.1)
    first = "equilibrium.dynamics.couplings.0.drive.1.weight"
    few = gradients(net, x, y)
    assert float(few[first].norm()) < 0.1 * float(wanted[first].norm())
    cosines = []
    for steps in (5, 20, 80):
        net.equilibrium.estimator = PredictiveCoding(steps=steps, rate=0.1)
        cosines.append(float(gradients(net, x, y)[first].flatten() @ wanted[first].flatten()))
    assert cosines[0] < cosines[1] < cosines[2]


def test_predictive_coding_takes_the_cost_at_the_moving_state() -> None:
    net = _net("mlp", nonlinearity="tanh", hidden=(12, 10)).double()
    x, y = _batch(dtype=torch.float64)
    layer = net.equilibrium
    layer.estimator = PredictiveCoding(steps=800, rate=0.3, beta=1.0, nudge="cost")
    target = nn.functional.one_hot(y, 10).double()
    layer.loss(x, lambda out: 0.5 * (out["h2"] - target).square().sum(1)).backward()
    # the minimum of energy + cost, found by an independent optimizer
    h = {n: t.clone().requires_grad_() for n, t in layer.solve(x).h.items()}
    optimizer = torch.optim.LBFGS(h.values(), lr=0.5, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16)
    bound = layer.dynamics.bind(x)

    def total() -> Tensor:
        optimizer.zero_grad()
        energy = layer.dynamics(h, bound) + 0.5 * (h["h2"] - target).square().sum(1)
        energy.sum().backward(inputs=list(h.values()), retain_graph=True)
        return energy.sum()

    optimizer.step(total)  # type: ignore[arg-type]
    weight = layer.dynamics.couplings[0].drive[1].weight  # type: ignore[union-attr, index]
    state = {n: t.detach() for n, t in h.items()}
    (wanted,) = torch.autograd.grad(layer.dynamics(state, bound).mean(), [weight])
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-8)


def test_predictive_coding_guards_its_rate() -> None:
    """Levels so steep that the steps of the states are not stable: guarded, it still finds the minimum."""
    net = _net("mlp", nonlinearity="tanh").double()
    with torch.no_grad():
        for p in net.equilibrium.parameters():
            p.mul_(3)
    x, y = _batch(dtype=torch.float64)
    wanted = gradients(net, x, y)
    found = {}
    for guard in (True, False):
        net.equilibrium.estimator = PredictiveCoding(steps=1500, rate=0.5, beta=1e-5, guard=guard)
        found[guard] = _smallest(net, wanted, x, y)
    assert found[True] > 0.99
    assert found[False] < 0.9


def test_predictive_coding_diverges_loudly() -> None:
    net = _net("mlp")
    net.equilibrium.estimator = PredictiveCoding(steps=2000, rate=1.9, guard=False)
    x, y = _batch()
    with torch.no_grad():
        for p in net.equilibrium.parameters():
            p.mul_(4)
    with pytest.raises(DivergenceError, match="lower the rate"):
        net.criterion(net(x), y).backward()


def test_symbols() -> None:
    torch.manual_seed(0)
    net = PredictiveTransformer((6,), 3, features=8, hidden=12, vocabulary=5, pool="mean")
    x = torch.randint(0, 5, (4, 6))
    net.criterion(net(x), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ConfigError, match="integer symbols"):
        net(torch.rand(4, 6))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _net("residual", "chain", topology_="x"), "unexpected keyword"),
        (lambda: PredictiveResidual(SHAPE, 10, topology="rings"), "did you mean 'ring'"),
        (lambda: PredictiveResidual(SHAPE, 10, depth_scale="square"), "depth_scale"),
        (lambda: PredictiveResidual(SHAPE, 10, branch_scale=0.0), "branch_scale > 0"),
        (lambda: PredictiveResidual(SHAPE, 10, topology="ring", tied=True), "a tied ring is a loop"),
        (lambda: PredictiveResidual(SHAPE, 10, levels=1), "levels >= 2"),
        (lambda: PredictiveMLP(SHAPE, 10, hidden=(8, 8), topology="loop"), "levels=1 on a loop"),
        (lambda: PredictiveMLP(SHAPE, 10, feedback="random"), "'exact' or 'learned'"),
        (lambda: PredictiveMLP(SHAPE, 10, nonlinearity="sine"), "a nonlinearity"),
        (lambda: ARCHITECTURES["conv"](SHAPE, 10, topology="ring"), "one stage"),  # type: ignore[call-arg]
        (lambda: ARCHITECTURES["conv"](SHAPE, 10, kernel=4), "odd kernel"),  # type: ignore[call-arg]
        (lambda: PredictiveTransformer(SHAPE, 10, features=10, heads=4), "heads that divide"),
        (lambda: PredictiveTransformer(SHAPE, 10, topology="loop", sublayers=True, patch=4), "sublayers=False"),
        (lambda: _net("residual", estimator=object), "supports|estimator"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises((ConfigError, TypeError, AttributeError), match=message):
        build()


def test_blocks_that_cannot_be_levels_are_refused() -> None:
    x, _ = _batch()
    flat = nn.Flatten()
    with pytest.raises(ConfigError, match="depends on that example only"):
        chain(flat, nn.Sequential(nn.Linear(144, 4), nn.BatchNorm1d(4)).eval(), example=x)
    with pytest.raises(ConfigError, match="deterministic block"):
        chain(flat, nn.Sequential(nn.Linear(144, 4), nn.Dropout(0.5)), example=x)
    wrong = Levels(flat, [nn.Bilinear(144, 144, 7)], [(144,)], nn.Identity())
    net = prediction_energy(wrong, "loop")
    with pytest.raises(ConfigError, match="a loop needs an output of its input's shape"):
        net.map({"h1": torch.zeros(4, 144)}, net.bind(x))
    with pytest.raises(ConfigError, match="match them"):
        prediction_energy(Levels(flat, [], [(4,), (5,)], nn.Identity()))


def test_a_loop_that_runs_away_is_an_error() -> None:
    net = _net("residual", "loop", norm_bound=None)
    net.equilibrium.solver = Anderson(length=2, max_steps=30)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "block" in name and p.dim() == 2:
                p.mul_(40)
    x, y = _batch()
    with pytest.raises(DivergenceError, match=r"expected a finite state, got 4 of 4"):
        net.criterion(net(x), y).backward()


def test_one_equilibrium_layer_per_system() -> None:
    assert len(equilibria(_net())) == 1
