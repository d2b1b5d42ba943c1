"""The map from the papers to toreq (docs/papers.md): their algorithms, written from the equations, give its gradients.

Nothing of toreq but its parameters enters the left-hand sides: they are autograd on the papers' own functions, run for
a fixed number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toreq
from toreq.core import Energy, Identity, Node, Residual, State
from toreq.estimators import Centered, Estimator, Implicit, NonConservative, OneSided, Predictive
from toreq.solvers import FixedPoint
from toreq.systems import System

STEPS = 400
BATCH = 5
CLASSES = 4
Cost = Callable[[Tensor, Tensor], Tensor]


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (out - F.one_hot(y, CLASSES).to(out.dtype)).square().sum(1)


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def network(nonlinearity: str, order: str, estimator: Estimator) -> System:
    """A 6-7-5-4 network with its output units inside the energy, in float64."""
    torch.manual_seed(3)
    net = toreq.systems.create(
        "toreqprop",
        input_shape=(6,),
        num_classes=CLASSES,
        arch="hopfield",
        hidden=(7, 5),
        output="node",
        nonlinearity=nonlinearity,
        gain=None if nonlinearity == "hard_sigmoid" else 1.0,
        norm_bound=None,
        solver=FixedPoint(order=order, tolerance=0, max_steps=STEPS),  # type: ignore[arg-type]
        estimator=estimator,
    ).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1 or name.endswith("value"):
                p.copy_(0.3 * torch.randn(p.shape, dtype=torch.float64))
    return net


def synapses(net: System) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, as the papers have them."""
    p = dict(net.equilibrium.dynamics.named_parameters())
    names = [
        ("couplings.0.module.1.weight", "couplings.0.module.1.bias"),
        ("couplings.2.op.weight", "couplings.1.module.value"),
        ("couplings.4.op.weight", "couplings.3.module.value"),
    ]
    assert {name for pair in names for name in pair} == set(p)
    return [(p[w], p[b]) for w, b in names]


def primitive(layers: list[tuple[Tensor, Tensor]], x: Tensor, s: list[Tensor]) -> Tensor:
    """Laborieux et al. (2021): Phi = sum_l s_{l+1} . (W_l s_l + b_l), per example; minus rain's energy."""
    below = [x, *s[:-1]]
    return torch.stack([(up * (u @ w.T + b)).sum(1) for (w, b), u, up in zip(layers, below, s, strict=True)]).sum(0)


def relax(
    layers: list[tuple[Tensor, Tensor]],
    x: Tensor,
    s: list[Tensor],
    rho: Callable[[Tensor], Tensor],
    cost: Callable[[Tensor], Tensor],
    beta: float,
    steps: int = STEPS,
    asynchronous: bool = False,
) -> list[Tensor]:
    """s <- rho(dPhi/ds) with -beta C added to Phi; the output unit is linear."""
    fixed = [(w.detach(), b.detach()) for w, b in layers]
    activations = [rho] * (len(s) - 1) + [lambda a: a]
    groups = [range(0, len(s), 2), range(1, len(s), 2)] if asynchronous else [range(len(s))]
    for _ in range(steps):
        for group in groups:
            s = [t.detach().requires_grad_() for t in s]
            phi = (primitive(fixed, x, s) - beta * cost(s[-1])).sum()
            grads = torch.autograd.grad(phi, s)
            s = [activations[i](grads[i]) if i in group else s[i] for i in range(len(s))]
    return [t.detach() for t in s]


def papers_gradient(
    net: System,
    x: Tensor,
    y: Tensor,
    cost: Cost,
    betas: tuple[float, float],
    rho: Callable[[Tensor], Tensor],
    asynchronous: bool = False,
) -> list[Tensor]:
    """The papers' update: (dPhi(s at beta_1) - dPhi(s at beta_2)) / (beta_2 - beta_1), averaged over the batch."""
    layers = synapses(net)
    zeros = [torch.zeros(len(x), len(b), dtype=x.dtype) for _, b in layers]

    def c(out: Tensor) -> Tensor:
        return cost(out, y)

    free = relax(layers, x, zeros, rho, c, 0.0, asynchronous=asynchronous)
    first, second = (relax(layers, x, free, rho, c, beta, asynchronous=asynchronous) for beta in betas)
    delta = (primitive(layers, x, first).mean() - primitive(layers, x, second).mean()) / (betas[1] - betas[0])
    return list(torch.autograd.grad(delta, [t for pair in layers for t in pair]))


def toreq_gradient(net: System, x: Tensor, y: Tensor, cost: Cost) -> list[Tensor]:
    net.equilibrium.loss(x, lambda out: cost(out["output"], y)).backward()
    gradients = [t.grad for pair in synapses(net) for t in pair]
    assert all(g is not None for g in gradients)
    return [g for g in gradients if g is not None]


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 6, generator=g, dtype=torch.float64), torch.randint(0, CLASSES, (BATCH,), generator=g)


@pytest.mark.parametrize("cost", [squared_error, cross_entropy])
@pytest.mark.parametrize(
    ("estimator", "betas"),
    [
        (OneSided(nudge="cost", beta=0.1, tolerance=0), (0.0, 0.1)),
        (Centered(nudge="cost", beta=0.1, tolerance=0), (-0.1, 0.1)),
    ],
    ids=["one-sided", "centered"],
)
def test_laborieux_2021(estimator: Estimator, betas: tuple[float, float], cost: Cost) -> None:
    net = network("tanh", "jacobi", estimator)
    x, y = batch()
    expected = papers_gradient(net, x, y, cost, betas, torch.tanh)
    for ours, theirs in zip(toreq_gradient(net, x, y, cost), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_one_step_of_the_papers_loop_is_one_step_of_the_solver() -> None:
    net = network("tanh", "jacobi", Centered())
    net.equilibrium.solver = FixedPoint(tolerance=0, max_steps=4)
    x, y = batch()
    dynamics = net.equilibrium.dynamics
    bindings = dynamics.bind(x)
    start = dynamics.activate(dynamics.initial(bindings), bindings)
    s = [t.detach() for t in start.values()]
    expected = relax(synapses(net), x, s, torch.tanh, lambda out: squared_error(out, y), 0.0, steps=4)
    for ours, theirs in zip(net.equilibrium.solve(x).h.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rain_energy_based_learning() -> None:
    """Scellier et al. (2023): hard-sigmoid layers, a linear output, block sweeps, variant 'centered'."""
    estimator = Centered(nudge="cost", beta=0.25, tolerance=0)
    net = network("hard_sigmoid", "gauss_seidel", estimator)
    x, y = batch()
    expected = papers_gradient(net, x, y, squared_error, (-0.25, 0.25), lambda a: a.clamp(0, 1), asynchronous=True)
    for ours, theirs in zip(toreq_gradient(net, x, y, squared_error), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


class Cell(nn.Module):
    """tanh(W h + U x): the f of a deep equilibrium model."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(8, 8, dtype=torch.float64), nn.Linear(6, 8, dtype=torch.float64)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(h) + self.u(x))


def deep_equilibrium(f: nn.Module, x: Tensor) -> Tensor:
    """Bai et al. (2019): a fixed point found without a graph, and g <- J^T g + dC/dz in a backward hook."""
    with torch.no_grad():
        z = torch.zeros(len(x), 8, dtype=x.dtype)
        for _ in range(STEPS):
            z = f(z, x)
    point = z.clone().requires_grad_()
    image = f(point, x)

    def adjoint(cotangent: Tensor) -> Tensor:
        g = cotangent
        for _ in range(STEPS):
            g = torch.autograd.grad(image, point, g, retain_graph=True)[0] + cotangent
        return g

    out = f(z, x)
    out.register_hook(adjoint)
    return out


@pytest.mark.parametrize(
    ("form", "estimator", "rtol"),
    [
        ("vector_field", Implicit(tolerance=0, max_steps=STEPS), 1e-9),
        ("vector_field", NonConservative(beta=1e-4, tolerance=1e-9), 1e-5),
        ("residual", Implicit(tolerance=0, max_steps=STEPS), 1e-9),
        ("residual", Predictive(tolerance=1e-9), 1e-4),
    ],
    ids=["implicit", "nonconservative", "residual-implicit", "predictive"],
)
def test_deep_equilibrium_model(form: str, estimator: Estimator, rtol: float) -> None:
    torch.manual_seed(0)
    cell, (x, _) = Cell(), batch()
    target = torch.randn(BATCH, 8, dtype=torch.float64)
    F.mse_loss(deep_equilibrium(cell, x), target).backward()
    expected = {n: p.grad.clone() for n, p in cell.named_parameters() if p.grad is not None}
    cell.zero_grad()
    layer = toreq.wrap(
        cell,
        8,
        form=form,  # type: ignore[arg-type]
        solver=FixedPoint(tolerance=1e-13, max_steps=STEPS),
        estimator=estimator,
    )
    F.mse_loss(layer(x), target).backward()
    for name, p in cell.named_parameters():
        assert p.grad is not None
        error = (p.grad - expected[name]).norm() / expected[name].norm()
        assert error < rtol, name


def test_predictive_coding() -> None:
    """Inference by gradient descent on E + beta C, learning by dE/dtheta / beta (jpc, pcx; weakly nudged output)."""
    torch.manual_seed(0)
    sizes, (x, y), beta = [6, 7, 5, CLASSES], batch(), 1e-4
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()).double() for a, b in pairwise(sizes)]
    parameters = [p for block in blocks for p in block.parameters()]

    def energy(z: list[Tensor]) -> Tensor:
        below = [x, *z[:-1]]
        return torch.stack([0.5 * (up - f(u)).square().sum(1) for f, u, up in zip(blocks, below, z, strict=True)]).sum(
            0
        )

    z, u = [], x
    for block in blocks:
        u = block(u).detach()
        z.append(u)
    for _ in range(1500):
        z = [t.detach().requires_grad_() for t in z]
        total = (energy(z) + beta * squared_error(z[-1], y)).sum()
        z = [t - 0.4 * g for t, g in zip(z, torch.autograd.grad(total, z), strict=True)]
    expected = torch.autograd.grad(energy([t.detach() for t in z]).mean() / beta, parameters)

    names = ["h1", "h2", "output"]
    nodes = [Node(n, size, Identity()) for n, size in zip(names, sizes[1:], strict=True)]
    first = Residual(blocks[0], "h1")
    rest = [Residual(f, n, source=s, inject=False) for f, s, n in zip(blocks[1:], names, names[1:], strict=False)]
    layer = toreq.Equilibrium(Energy(nodes, [first, *rest]))
    assert isinstance(layer.estimator, Predictive)

    def cost(out: State) -> Tensor:
        return squared_error(out["output"], y)

    layer.loss(x, cost).backward()
    for p, g in zip(parameters, expected, strict=True):
        assert p.grad is not None
        assert (p.grad - g).norm() < 1e-3 * g.norm()
