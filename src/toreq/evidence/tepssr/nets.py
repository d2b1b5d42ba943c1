"""What the protocols of TEP-SSR share: the network of a side for a task, and blocks with an ordinary attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import SSM, control_norm
from toreq.data import SequenceTask
from toreq.estimators import Estimator, Implicit
from toreq.evidence.protocols.sequences import models
from toreq.evidence.protocols.sequences.parts import Embedding
from toreq.layer import Equilibrium, equilibria, wrap
from toreq.solvers import Anderson
from toreq.systems.tepssr import TEPSSR, chunk_for
from toreq.systems.tepssr_nets import StateSpaceClassifier, StateSpaceTagger

SEED_FILE = "004_20577c1546d9a984.txt"
OWN, IMPLICIT, FORWARD = "tepssr", "bp-eq", "bp-ff"
"""Sides of one network: its own estimator, the implicit gradient, and its feed-forward twin by backprop."""
LOOPED, LOOPED_BP, LSTM, DIAGONAL = "looped", "looped-bp", "lstm", "ssm"
FUSED = "looped-fused"
BASELINES = {LOOPED: "looped-eqprop", LOOPED_BP: "looped-implicit", LSTM: "lstm", DIAGONAL: "ssm"}
"""Sides of the shared sequence protocol by their names there."""
WORDS = {
    OWN: "tokens joined by state-space maps, centered EqProp, fast settings",
    IMPLICIT: "the same network with the implicit gradient",
    FORWARD: "one upward pass of the same network, backprop",
    LOOPED: "the looped transformer, centered EqProp, fast settings",
    LOOPED_BP: "the looped transformer with the implicit gradient (backprop at equilibrium), fast settings",
    FUSED: "an ordinary block of fused softmax attention and a perceptron in a loop, implicit gradient, fast settings",
    LSTM: "LSTM, backprop through time",
    DIAGONAL: "two blocks of diagonal state spaces (S4D), backprop through time",
}
BOUND, HEADS = 0.9, 4
"""Of the blocks below: bounds the linear part of their Jacobian, by equal shares for their paths."""


def network(made: SequenceTask, seed: int, estimator: Estimator | None = None, **options: Any) -> TEPSSR:
    """A network of TEP-SSR for a task, freshly drawn: a label for each sequence or for each position.

    Args:
        made: the task.
        seed: of the weights.
        estimator: the shipped one when None.
        options: of the architecture.
    """
    shape = (made.length,) if made.vocabulary else (made.length, made.features)
    given = {"vocabulary": made.vocabulary, "padding": made.padding, **options}
    kind = StateSpaceTagger if made.targets == "position" else StateSpaceClassifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(shape, made.outputs, estimator=estimator, **given)
    net.equilibrium.hasten()
    net.equilibrium.warn = False  # what did not settle is counted
    return net


def build(side: str, made: SequenceTask, seed: int, device: str = "cpu", **options: Any) -> nn.Module:
    """The model that a side trains; other models get the number of parameters that the network has.

    Args:
        side: a key of `WORDS`.
        made, seed, options: as for `network`.
        device: where it is to be.
    """
    net = network(made, seed, Implicit() if side == IMPLICIT else None, **options)
    if side in (OWN, IMPLICIT):
        return net.to(device)
    if side == FORWARD:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return net.feedforward().to(device)
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if side == FUSED:
        with torch.random.fork_rng(devices=[]):
            sizes = {n: sum(p.numel() for p in FusedLoop(made, n).parameters()) for n in range(HEADS, 129, HEADS)}
            torch.manual_seed(seed)
            return FusedLoop(made, min(sizes, key=lambda n: abs(sizes[n] - parameters))).to(device)
    return models.build(BASELINES[side], made, parameters, seed, device)


def layer(model: nn.Module) -> Equilibrium:
    """The only equilibrium layer of a model."""
    (found,) = equilibria(model)
    return found


class Block(nn.Module):
    r"""An ordinary block in a loop, :math:`h \leftarrow \mathrm{LN}(x + \text{paths}(h))`, each path of two matrices.

    Softmax attention has free queries, keys and values, through PyTorch's fused kernel; it has no energy. The
    state-space path is :math:`V\tanh(S h)` with a time-invariant map, forwards only; the perceptron
    :math:`V\tanh(W h + c)`.

    Args:
        features: D.
        hidden: width of the perceptron, channels of the state-space map.
        heads: attention heads, a divisor of D.
        length: of the sequences, which chunks are made for.
        paths: some of ``attention``, ``ssm`` and ``mlp``.
    """

    def __init__(self, features: int, hidden: int, heads: int, length: int, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.heads, self.paths = heads, paths
        share = math.sqrt(BOUND / len(paths))
        self.norm = nn.LayerNorm(features)
        if "attention" in paths:
            self.projections = nn.ModuleList(_bounded(features, features, share) for _ in range(4))
        if "ssm" in paths:
            timescales = (1.0, max(2.0, length / 2))
            self.ssm = SSM(features, hidden, 2, chunk=chunk_for(length), timescales=timescales)
            control_norm(self.ssm.project, share)
            self.read = _bounded(hidden, features, share)
        if "mlp" in paths:
            self.inner, self.outer = _bounded(features, hidden, share), _bounded(hidden, features, share)
            self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """The next state ``(B, N, D)``."""
        out = x
        if "attention" in self.paths:
            query, key, value, mix = self.projections
            q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (query, key, value))
            out = out + mix(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if "ssm" in self.paths:
            out = out + self.read(self.ssm(h).tanh())
        if "mlp" in self.paths:
            out = out + self.outer((self.inner(h) + self.bias).tanh())
        return self.norm(out)


class FusedLoop(nn.Module):
    """A wrapped `Block` of attention and perceptron over embedded tokens with sines and cosines of the position.

    Args:
        made: the task.
        features: D.
    """

    pool = "mean"

    def __init__(self, made: SequenceTask, features: int) -> None:
        super().__init__()
        self.embed = Embedding(made, features, positioned=True)
        block = Block(features, 2 * features, HEADS, made.length, ("attention", "mlp"))
        solver = Anderson(length=3)
        self.equilibrium = wrap(block, (made.length, features), solver=solver, estimator=Implicit())
        self.equilibrium.hasten()
        self.equilibrium.warn = False  # what did not settle is counted
        self.head = nn.Linear(features, made.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, N, C)``."""
        return self.head(self.equilibrium(self.embed(x)))


def _bounded(inputs: int, outputs: int, bound: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.4 / math.sqrt(inputs))
    control_norm(linear, bound)
    return linear
