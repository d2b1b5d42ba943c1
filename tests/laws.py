"""Small networks whose law at a temperature is known: by linear algebra, or by quadrature over the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from toreq.core import Bilinear, Dense, Drive, Energy, Identity, Lateral, Node, Tanh
from toreq.core.state import State, repeated
from toreq.solvers import Relaxation


@dataclass(frozen=True)
class Law:
    """A law on a grid: probabilities ``(G,)``, activations ``(G, n)`` of all nodes side by side, energies ``(G,)``."""

    p: Tensor
    h: Tensor
    energy: Tensor

    def mean(self, f: Tensor) -> Tensor:
        """Mean of what is given on the grid, ``(G, ...)``."""
        return (self.p.view(-1, *([1] * (f.dim() - 1))) * f).sum(0)

    def covariance(self, f: Tensor, g: Tensor) -> Tensor:
        """Covariance of two numbers given on the grid."""
        return self.mean((f - self.mean(f)) * (g - self.mean(g)))


def quadrature(
    energy: Energy, x: Tensor, temperature: float | Tensor, tilt: Callable[[Tensor], Tensor] | None = None
) -> Law:
    """The law ``exp(-(E + tilt)/temperature) dh`` of one or two tanh units, with a graph to the parameters.

    Args:
        energy: nodes of one tanh unit each.
        x: one input, ``(1, ...)``.
        temperature: above 0; a tensor to differentiate by it.
        tilt: a cost ``(G, n) -> (G,)``.
    """
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(160))
    # the density has a kink of its derivative at the ends: h = sin(pi s / 2) puts nodes there
    h, w = torch.sin(0.5 * torch.pi * nodes), weights * 0.5 * torch.pi * torch.cos(0.5 * torch.pi * nodes)
    names = energy.names
    grid = torch.cartesian_prod(*[h] * len(names)).view(-1, len(names))
    measure = torch.cartesian_prod(*[w] * len(names)).view(-1, len(names)).prod(1)
    state = {}
    for i, n in enumerate(names):
        sigma = energy.activation(n)
        assert isinstance(sigma, Tanh)
        state[n] = grid[:, i : i + 1].atanh() / sigma.gain
    e = energy(state, repeated(energy.bind(x), grid.shape[0]))
    total = e if tilt is None else e + tilt(grid)
    p = torch.softmax(-total / temperature + measure.log(), 0)
    return Law(p, grid, e)


def weighted(op: Dense, value: float) -> Dense:
    """The operator with every entry set."""
    with torch.no_grad():
        op.weight.fill_(value)
    return op


def driven(node: str, weight: float, bias: float) -> Drive:
    """A drive ``weight * x + bias`` of one unit."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(weight)
        assert layer.bias is not None
        layer.bias.fill_(bias)
    return Drive(node, layer)


def one_unit(self_coupling: float = 0.6, gain: float = 1.0) -> Energy:
    """A tanh unit that reads itself."""
    lateral = Lateral(weighted(Dense(1, 1, symmetric=True), self_coupling), "h")
    return Energy([Node("h", 1, Tanh(gain))], [driven("h", 0.7, 0.2), lateral]).double()


def bistable_pair(strength: float = 1.5, bias: float = -0.06) -> Energy:
    """Two tanh units that want to agree: two wells, of which the bias favours one."""
    nodes = [Node("a", 1, Tanh()), Node("b", 1, Tanh())]
    couple = Bilinear(weighted(Dense(1, 1), strength), "a", "b")
    return Energy(nodes, [driven("a", 0.3, bias), couple]).double()


def gaussian(seed: int = 0) -> Energy:
    """Identity nodes, one of them softly clamped, with a lateral and a bilinear coupling: a Gaussian law."""
    g = torch.Generator().manual_seed(seed)
    nodes = [Node("v", 2, Identity(0.5)), Node("u", 1, Identity())]
    terms = [
        Drive("v", nn.Linear(2, 2)),
        Lateral(Dense(2, 2, symmetric=True, scale=0.25, generator=g), "v"),
        Bilinear(Dense(2, 1, scale=0.3, generator=g), "v", "u"),
    ]
    energy = Energy(nodes, terms).double()
    with torch.no_grad():
        for p in energy.couplings[0].parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return energy


def relaxation(energy: Energy, x: Tensor, chains: int) -> tuple[Relaxation, State]:
    """The network bound to as many copies of one input, and the start of a layer."""
    with torch.no_grad():
        bindings = energy.bind(x.expand(chains, -1))
        return Relaxation(energy, bindings), energy.initial(bindings)


def hessian(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and minimum of a quadratic energy in the pre-activations of all nodes side by side, by autograd."""
    bindings = energy.bind(x)
    sizes = [s[0] for s in energy.shapes.values()]

    def value(a: Tensor) -> Tensor:
        state = dict(zip(energy.names, a[None].split(sizes, 1), strict=True))
        return energy(state, bindings).sum()

    zero = torch.zeros(sum(sizes), dtype=x.dtype)
    curvature = torch.autograd.functional.hessian(value, zero)
    slope = torch.autograd.functional.jacobian(value, zero)
    assert isinstance(curvature, Tensor)
    assert isinstance(slope, Tensor)
    return curvature.detach(), -torch.linalg.solve(curvature, slope).detach()
