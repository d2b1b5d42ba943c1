"""The small networks of the tests: one for each node, operator and coupling, and for their combinations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oracles import TIGHT, Case
from toreq.core import (
    Attention,
    Bilinear,
    Circulant,
    Conv,
    Dense,
    Drive,
    Energy,
    HardSigmoid,
    Identity,
    IdentityOperator,
    Lateral,
    LayerNorm,
    LinearAttention,
    Node,
    Potential,
    ReLU,
    Resample,
    Residual,
    Softmax,
    Spring,
    Tanh,
    VectorField,
)
from toreq.solvers import FixedPoint

Build = Callable[[torch.Generator], dict[str, Any]]
BUILDERS: dict[str, Build] = {}
BATCH = 3
SLOW = FixedPoint(max_steps=3000, tolerance=1e-13, damping=0.5, check_every=1)


def _register(build: Build) -> Build:
    BUILDERS[build.__name__] = build
    return build


def linear(n_in: int, n_out: int, g: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A linear layer drawn from ``g`` alone (``nn.Linear`` would use the global generator)."""
    layer = nn.Linear(n_in, n_out, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=g) * gain / n_in**0.5)
        layer.bias.copy_(torch.randn(n_out, generator=g) * 0.3)
    return layer


def case(name: str, seed: int = 0) -> Case:
    """A network of the zoo in float64 with an input of three examples."""
    g = torch.Generator().manual_seed(seed)
    spec = BUILDERS[name](g)
    dynamics = spec.pop("dynamics").double()
    shape = spec.pop("input")
    x = torch.randn(BATCH, *shape, generator=g, dtype=torch.float64)
    return Case(name=name, dynamics=dynamics, x=x, **spec)


@_register
def identity_pair(g: torch.Generator) -> dict[str, Any]:
    """Linear in the state: two identity nodes, a symmetric lateral and a bilinear coupling."""
    nodes = [Node("a", 5, Identity()), Node("b", 3, Identity())]
    terms = [
        Drive("a", linear(4, 5, g)),
        Lateral(Dense(5, 5, symmetric=True, scale=0.08, generator=g), "a"),
        Bilinear(Dense(5, 3, scale=0.11, generator=g), "a", "b"),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,)}


@_register
def tanh_layers(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("h1", 7, Tanh()), Node("h2", 5, Tanh()), Node("out", 3, Identity())]
    terms = [
        Drive("h1", linear(4, 7, g)),
        Drive("out", linear(4, 3, g)),
        Lateral(Dense(7, 7, symmetric=True, scale=0.1, generator=g), "h1"),
        Bilinear(Dense(7, 5, scale=0.13, generator=g), "h1", "h2"),
        Bilinear(Dense(5, 3, scale=0.2, generator=g), "h2", "out"),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,)}


@_register
def gated(g: torch.Generator) -> dict[str, Any]:
    gate = nn.Sequential(linear(4, 6, g), nn.Sigmoid())
    terms = [
        Drive("h", linear(4, 6, g)),
        Lateral(Dense(6, 6, symmetric=True, scale=0.4, generator=g), "h", gate),
    ]
    return {"dynamics": Energy([Node("h", 6, Tanh())], terms), "input": (4,)}


@_register
def convolutional(g: torch.Generator) -> dict[str, Any]:
    """Stride, padding, pooling that drops a row, and a dense read-out."""
    first = nn.Conv2d(1, 2, 3, dtype=torch.float64)
    assert first.bias is not None
    with torch.no_grad():
        first.weight.copy_(torch.randn(2, 1, 3, 3, generator=g) * 0.3)
        first.bias.copy_(torch.randn(2, generator=g) * 0.3)
    nodes = [
        Node("c1", (2, 7, 6), Tanh()),
        Node("c2", (3, 4, 3), Tanh()),
        Node("c3", (2, 2, 2), Tanh()),
        Node("out", 3, Identity()),
    ]
    terms = [
        Drive("c1", first),
        Bilinear(Conv((2, 7, 6), 3, kernel=3, stride=2, padding=1, scale=0.07, generator=g), "c1", "c2"),
        Bilinear(Conv((3, 4, 3), 2, kernel=2, padding=1, pool=2, scale=0.2, generator=g), "c2", "c3"),
        Bilinear(Dense((2, 2, 2), 3, scale=0.15, generator=g), "c3", "out"),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (1, 9, 8)}


@_register
def transformer(g: torch.Generator) -> dict[str, Any]:
    """A token node under a layer norm with learnt gain and bias, attention energy and a tied potential."""
    norm = LayerNorm(6)
    with torch.no_grad():
        norm.log_gain.fill_(-0.2)
        norm.bias.copy_(torch.randn(6, generator=g) * 0.3)
    potential = Potential(Dense(6, 8, scale=0.15, generator=g), "tokens")
    with torch.no_grad():
        assert potential.bias is not None
        potential.bias.copy_(torch.randn(8, generator=g) * 0.3)
    terms = [
        Drive("tokens", linear(5, 6, g, gain=2.0)),
        Attention("tokens", 6, heads=2, scale=0.15, generator=g),
        potential,
    ]
    return {"dynamics": Energy([Node("tokens", (4, 6), norm)], terms), "input": (4, 5)}


@_register
def linear_attention(g: torch.Generator) -> dict[str, Any]:
    terms = [
        Drive("tokens", linear(5, 6, g, gain=2.0)),
        LinearAttention("tokens", 6, heads=2, head_features=4, scale=0.15, generator=g),
    ]
    return {"dynamics": Energy([Node("tokens", (4, 6), Tanh())], terms), "input": (4, 5)}


@_register
def softmax_output(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("h", 6, Tanh()), Node("p", 4, Softmax())]
    terms = [Drive("h", linear(4, 6, g)), Bilinear(Dense(6, 4, scale=0.5, generator=g), "h", "p")]
    return {"dynamics": Energy(nodes, terms), "input": (4,)}


@_register
def springs(g: torch.Generator) -> dict[str, Any]:
    """Two learnable springs: one through an average over windows, one through a matrix."""
    nodes = [Node("fine", (2, 4), Tanh()), Node("coarse", (2, 2), Tanh()), Node("out", 3, Tanh())]
    terms = [
        Drive("fine", nn.Sequential(linear(4, 8, g), nn.Unflatten(1, (2, 4)))),
        Spring("coarse", "fine", Resample((2, 4), 2, dims=1), strength=0.4, learnable=True),
        Spring("out", "coarse", Dense((2, 2), 3, scale=0.4, generator=g), strength=0.3, learnable=True),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,), "solver": SLOW}


@_register
def circulant(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("h", 6, Tanh()), Node("k", 6, Tanh())]
    terms = [
        Drive("h", linear(4, 6, g)),
        Lateral(Circulant(6, symmetric=True, scale=0.08, generator=g), "h"),
        Bilinear(Circulant(6, scale=0.1, generator=g), "h", "k"),
        Spring("k", "h", IdentityOperator(6), strength=0.2),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,)}


@_register
def driven_potential(g: torch.Generator) -> dict[str, Any]:
    terms = [
        Drive("h", linear(4, 5, g)),
        Potential(Dense(5, 7, scale=0.25, generator=g), "h", phi="softplus", drive=linear(4, 7, g)),
    ]
    return {"dynamics": Energy([Node("h", 5, Tanh())], terms), "input": (4,)}


@_register
def hard_sigmoid(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("h", 8, HardSigmoid()), Node("out", 4, HardSigmoid())]
    terms = [Drive("h", linear(4, 8, g)), Bilinear(Dense(8, 4, scale=0.3, generator=g), "h", "out")]
    terms.append(Drive("out", linear(4, 4, g, gain=0.3)))
    return {"dynamics": Energy(nodes, terms), "input": (4,), "smooth": False, "readout": ("h", "out")}


@_register
def relu(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("h", 8, ReLU()), Node("out", 4, Identity())]
    terms = [
        Drive("h", linear(4, 8, g)),
        Bilinear(Dense(8, 4, scale=0.17, generator=g), "h", "out"),
        Potential(Dense(8, 6, scale=0.15, generator=g), "h", phi="relu2"),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,), "smooth": False}


class Block(nn.Module):
    """``tanh(W h + x) V``: an ordinary block whose Jacobian is not symmetric."""

    def __init__(self, features: int, g: torch.Generator, inputs: int | None = None, gain: float = 0.4) -> None:
        super().__init__()
        self.inner = linear(features, 7, g, gain)
        self.outer = linear(7, features, g, gain)
        self.inject = None if inputs is None else linear(inputs, 7, g)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        z = self.inner(h)
        if self.inject is not None and x is not None:
            z = z + self.inject(x)
        return self.outer(z.tanh())


class AttentionBlock(nn.Module):
    """A pre-norm transformer block with untied softmax attention and a feed-forward part: no energy has this field."""

    def __init__(self, features: int, g: torch.Generator, gain: float = 0.5) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(features, features, g, gain) for _ in range(3))
        self.up, self.down = linear(features, 8, g, gain), linear(8, features, g, gain)
        self.norm = nn.LayerNorm(features, dtype=torch.float64)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        z = self.norm(h + 2 * x)
        q, k, v = self.q(z), self.k(z), self.v(z)
        z = 0.3 * h + (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + 0.5 * (z + self.down(nn.functional.gelu(self.up(z))))


@_register
def residual_loop(g: torch.Generator) -> dict[str, Any]:
    """A pure prediction-error energy of one node that predicts itself."""
    energy = Energy([Node("h", 5, Identity())], [Residual(Block(5, g, inputs=4), "h", source="h")])
    return {"dynamics": energy, "input": (4,), "solver": SLOW}


@_register
def residual_chain(g: torch.Generator) -> dict[str, Any]:
    """A pure prediction-error energy of three levels, the first predicted from the input alone."""
    nodes = [Node("l1", 6, Identity()), Node("l2", 5, Identity()), Node("l3", 3, Identity())]
    terms = [
        Residual(linear(4, 6, g), "l1"),
        Residual(nn.Sequential(nn.Tanh(), linear(6, 5, g)), "l2", source="l1", inject=False),
        Residual(nn.Sequential(nn.Tanh(), linear(5, 3, g)), "l3", source="l2", inject=False),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,), "solver": SLOW}


@_register
def residual_mixed(g: torch.Generator) -> dict[str, Any]:
    """A predicted node beside ordinary couplings: not a pure prediction-error energy."""
    nodes = [Node("h", 5, Tanh()), Node("e", 4, Identity())]
    terms = [
        Drive("h", linear(4, 5, g)),
        Lateral(Dense(5, 5, symmetric=True, scale=0.15, generator=g), "h"),
        Residual(nn.Sequential(linear(5, 4, g, 0.5), nn.Tanh()), "e", source="h", inject=False),
        Drive("e", linear(4, 4, g, 0.3)),
    ]
    return {"dynamics": Energy(nodes, terms), "input": (4,), "solver": SLOW}


@_register
def field_mlp(g: torch.Generator) -> dict[str, Any]:
    """A vector field under a tanh node."""
    return {"dynamics": VectorField(Node("h", 5, Tanh()), Block(5, g, inputs=4)), "input": (4,)}


@_register
def field_layer_norm(g: torch.Generator) -> dict[str, Any]:
    """A vector field whose node has a learnt layer norm, with a drive beside it."""
    norm = LayerNorm(5)
    with torch.no_grad():
        norm.bias.copy_(torch.randn(5, generator=g) * 0.3)
    field = VectorField(Node("h", 5, norm), Block(5, g, gain=0.5), inject=False, drive=linear(4, 5, g, 2.0))
    return {"dynamics": field, "input": (4,)}


@_register
def field_attention(g: torch.Generator) -> dict[str, Any]:
    return {"dynamics": VectorField(Node("h", (4, 6), Identity()), AttentionBlock(6, g)), "input": (4, 6)}


class _Pair(nn.Module):
    """Two nodes that push each other without symmetry."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.forth, self.back, self.inject = linear(5, 3, g, 0.7), linear(3, 5, g, 0.7), linear(4, 5, g)

    def forward(self, h: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"a": self.back(h["b"]) + self.inject(x), "b": self.forth(h["a"])}


@_register
def field_pair(g: torch.Generator) -> dict[str, Any]:
    nodes = [Node("a", 5, Tanh()), Node("b", 3, Identity())]
    return {"dynamics": VectorField(nodes, _Pair(g)), "input": (4,), "readout": ("a", "b")}


ALL = tuple(BUILDERS)
ENERGIES = tuple(n for n in ALL if not n.startswith("field_"))
FIELDS = tuple(n for n in ALL if n.startswith("field_"))
COUPLED = tuple(n for n in ENERGIES if not n.startswith("residual_"))

__all__ = ["ALL", "COUPLED", "ENERGIES", "FIELDS", "TIGHT", "AttentionBlock", "Block", "case", "linear"]
