"""The looped transformer of this library on sequences of any length: one block, settled, learned at equilibrium."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toreq.core import (
    Attention,
    Coupling,
    Dense,
    Drive,
    Energy,
    LayerNorm,
    Node,
    Potential,
    control_norm,
)
from toreq.estimators import Centered, Estimator, Implicit, Predictive
from toreq.evidence.protocols.sequences.parts import Embedding
from toreq.layer import Equilibrium, wrap
from toreq.solvers import Anderson

BOUND = 0.9
"""Bounds the linear part of the relaxation's Jacobian where attention is even, shared among the couplings, as the
shipped system does."""


class CausalBlock(nn.Module):
    r"""One transformer block as a loop, :math:`h \leftarrow \mathrm{LN}(x + \mathrm{attention}(h) + \mathrm{mlp}(h))`,
    in which a position sees none that comes later.

    Args:
        features: D.
        heads: attention heads; a divisor of D.
        hidden: width of the perceptron.
    """

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        scale = 0.4 / math.sqrt(features)
        self.query, self.key, self.value, self.out = (nn.Linear(features, features, bias=False) for _ in range(4))
        self.inner, self.outer = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=False)
        self.norm = nn.LayerNorm(features)
        for linear in (self.query, self.key, self.value, self.out, self.inner, self.outer):
            nn.init.normal_(linear.weight, std=scale)
            # two paths of two matrices each, through the attention and through the perceptron
            control_norm(linear, math.sqrt(BOUND / 2))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """The next state ``(B, N, D)``."""
        split = [
            linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        ]
        q, k, v = split
        future = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(x + self.out(mixed) + self.outer(torch.tanh(self.inner(h))))


class Looped(nn.Module):
    r"""Tokens that settle, and a linear read-out of each: ``(B, N, ...) -> (B, N, C)``.

    Where every position may see all, the energy is that of the shipped ``LoopedTransformer`` (attention energy and a
    tied perceptron, layer-norm tokens) with positions that any length has, and a read-out of every token:

    .. math:: E = \langle a, h\rangle - \Phi_{LN}(a) - \langle h, \mathrm{embed}(x)\rangle
              - \frac1b\sum_{heads}\sum_i\log\sum_j e^{b\langle q_i, k_j\rangle} - \sum\phi(A h + c)

    A symmetric coupling carries as much from later positions to earlier ones as the other way, so a causal task has no
    such energy: there a `CausalBlock` is wrapped, as a prediction error that one nudged phase learns.

    Args:
        embed: of the inputs.
        features: D.
        heads: attention heads.
        hidden: width of the perceptron.
        outputs: C.
        length: N that the layer is built for; others are built when they come.
        causal: which of the two.
        implicit: learn by the implicit gradient instead of Equilibrium Propagation.
    """

    pool = "mean"

    def __init__(
        self,
        embed: Embedding,
        features: int,
        heads: int,
        hidden: int,
        outputs: int,
        length: int,
        *,
        causal: bool,
        implicit: bool,
    ) -> None:
        super().__init__()
        self.embed, self.features, self.length = embed, features, length
        if causal:
            estimator: Estimator = Implicit() if implicit else Predictive()
            block = CausalBlock(features, heads, hidden)
            self.equilibrium = wrap(block, (length, features), solver=Anderson(length=3), estimator=estimator)
        else:
            estimator = Implicit() if implicit else Centered()
            energy = Energy([_tokens(length, LayerNorm(features))], _couplings(features, heads, hidden))
            self.equilibrium = Equilibrium(energy, Anderson(length=3), estimator)
        self.equilibrium.hasten()
        # examples that did not settle are counted by the protocol
        self.equilibrium.warn = False
        self.head = nn.Linear(features, outputs)

    def layer(self, length: int) -> Equilibrium:
        """The equilibrium layer for sequences of this length, of the same weights."""
        own = self.equilibrium
        if length == self.length:
            return own
        dynamics = own.dynamics
        assert isinstance(dynamics, Energy)
        (name,) = dynamics.names
        nodes = [Node(name, (length, self.features), dynamics.activation(name))]
        other = Equilibrium(Energy(nodes, [c for _, c in dynamics.terms()]), own.solver, own.estimator, warn=False)
        other.report_to(own)
        return other

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, N, C)``."""
        drive = self.embed(x)
        return self.head(self.layer(drive.shape[1])(drive))


def _tokens(length: int, activation: LayerNorm) -> Node:
    return Node("tokens", (length, activation.features), activation)


def _couplings(features: int, heads: int, hidden: int) -> list[Coupling]:
    scale = 0.4 / math.sqrt(features)
    attend, tied = Attention("tokens", features, heads, scale=scale), Dense(features, hidden, scale=scale)
    # half of the bound for each coupling; the attention's has two parts, each |W_q||W_k| where attention is even
    for name in ("query", "key"):
        control_norm(attend, math.sqrt(BOUND / 4), name)
    control_norm(tied, math.sqrt(BOUND / 2))
    return [Drive("tokens", nn.Identity()), attend, Potential(tied, "tokens")]
