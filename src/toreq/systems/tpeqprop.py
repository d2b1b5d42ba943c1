"""TPEqProp: levels that predict one another, learned by local error nodes in one nudged phase."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from toreq.core.blocks import Given, alignment
from toreq.core.prediction import PredictionEnergy
from toreq.core.residual import Residual
from toreq.core.state import State
from toreq.errors import ConfigError, nearest
from toreq.estimators import Estimator, Predictive
from toreq.layer import Equilibrium
from toreq.solvers import Anderson, FixedPoint, Solver
from toreq.solvers.forward import Forward
from toreq.systems.base import System

TOPOLOGIES = ("chain", "ring", "loop")
DEPTH_SCALES = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
"""Name -> power of the number of branches by which each branch is divided."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Levels:
    """The parts of a network: ``embed`` maps the input to the first level (or to what is injected into a loop),
    ``blocks`` map level to level, ``shapes`` are those of all levels, ``head`` reads the last one."""

    embed: nn.Module
    blocks: list[nn.Module]
    shapes: list[Shape]
    head: nn.Module


def topology_of(name: str) -> str:
    """The name, if it is one.

    Raises:
        ConfigError: with the nearest valid name.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(f"TPEqProp: expected topology in {TOPOLOGIES}, got {name!r}; {nearest(name, TOPOLOGIES)}")
    return name


def depth_scale_of(name: str, scale: float, branches: int) -> float:
    """The factor of each residual branch: ``scale`` over the number of branches to the power that ``name`` stands for.

    Raises:
        ConfigError: for an unknown name or a scale that is not positive.
    """
    if name not in DEPTH_SCALES:
        raise ConfigError(
            f"TPEqProp: expected depth_scale in {list(DEPTH_SCALES)}, got {name!r}; {nearest(name, DEPTH_SCALES)}"
        )
    if not scale > 0:
        raise ConfigError(f"TPEqProp: expected branch_scale > 0, got {scale}; try 1")
    return scale / branches ** DEPTH_SCALES[name]


def prediction_energy(levels: Levels, topology: str = "chain") -> PredictionEnergy:
    r"""The energy :math:`\tfrac12\sum_l\|h_l - f_l(h_{l-1}; x)\|^2` of these parts.

    On a chain the first level is predicted by ``embed(x)`` and each block predicts the next level. On a ring the first
    block predicts level 1 from the last level and ``embed(x)``; a loop is a ring of one.

    Args:
        levels: the parts; a ring's first block is called as ``block(h, embed(x))``.
        topology: ``"chain"``, ``"ring"`` or ``"loop"``.

    Raises:
        ConfigError: for numbers of blocks and shapes that do not fit.
    """
    names = [f"h{i + 1}" for i in range(len(levels.shapes))]
    chain = topology_of(topology) == "chain"
    wanted = len(names) - 1 if chain else len(names)
    if len(levels.blocks) != wanted or not names or (topology == "loop" and len(names) != 1):
        raise ConfigError(
            f"prediction_energy: expected one block per level (a chain's first level has none, a loop is one level), "
            f"got {len(levels.blocks)} blocks and {len(names)} levels on a {topology}; match them"
        )
    if chain:
        terms = [Residual(Given(), names[0], drive=levels.embed)]
        rest = list(zip(names[1:], names, levels.blocks, strict=False))
    else:
        terms = [Residual(levels.blocks[0], names[0], source=names[-1], drive=levels.embed)]
        rest = list(zip(names[1:], names, levels.blocks[1:], strict=False))
    terms += [Residual(block, n, source=s, inject=False) for n, s, block in rest]
    return PredictionEnergy(terms, dict(zip(names, levels.shapes, strict=True)))


def chain(embed: nn.Module, *blocks: nn.Module, example: Tensor, estimator: Estimator | None = None) -> Equilibrium:
    r"""Ordinary modules as a chain of levels: :math:`h_1 = \mathrm{embed}(x),\ h_l = \mathrm{block}_l(h_{l-1})`.

    The layer's output is exactly that of ``nn.Sequential(embed, *blocks)``; its blocks are learned by local errors.

    Args:
        embed: maps the input to the first level.
        blocks: deterministic modules without batch statistics, one per further level.
        example: an input, batch first, from which the levels' shapes are found.
        estimator: ``Predictive()`` when None.

    Raises:
        ConfigError: for a block with batch statistics or dropout.
    """
    shapes: list[Shape] = []
    with torch.no_grad():
        h = example
        for module in (embed, *blocks):
            h = module(h)
            shapes.append(tuple(h.shape[1:]))
    levels = Levels(embed, list(blocks), shapes, nn.Identity())
    return Equilibrium(prediction_energy(levels), default_solver("chain", len(shapes)), estimator)


class FeedForward(nn.Module):
    """The same blocks, one after the other, for ordinary backprop; a ring is passed once, from the injected input.

    Args:
        levels: the parts.
        injected: whether the first block also gets the embedded input.
    """

    def __init__(self, levels: Levels, injected: bool) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = levels.embed, nn.ModuleList(levels.blocks), levels.head
        self.injected = injected

    def forward(self, x: Tensor) -> Tensor:
        d = self.embed(x)
        h = d
        for i, block in enumerate(self.blocks):
            h = block(h, d) if self.injected and i == 0 else block(h)
        return self.head(h)


class TPEqProp(System):
    r"""Levels that predict one another (the seed's predictive equilibrium; cf. Whittington and Bogacz 2017).

    .. math:: E = \tfrac12\sum_l\|h_l - f_l(h_{l-1}; x)\|^2

    Subclasses say what the blocks are, by :meth:`levels`, and call :meth:`build`.
    """

    topology: str

    @abstractmethod
    def levels(self) -> Levels:
        """Freshly initialised parts of the network."""

    def build(self, topology: str, solver: Solver | None, estimator: Estimator | None) -> None:
        """Draw the parts and put them together."""
        self.topology = topology_of(topology)
        parts = self.levels()
        if solver is None:
            solver = default_solver(topology, len(parts.shapes))
        energy = prediction_energy(parts, topology)
        self.assemble(energy, solver, Predictive() if estimator is None else estimator, parts.head)

    def feedforward(self) -> nn.Module:
        """The same blocks, freshly drawn, for plain backprop."""
        return FeedForward(self.levels(), injected=self.topology != "chain")

    def predict(self, x: Tensor, steps: int | None = None) -> Tensor:
        """Logits ``(B, num_classes)`` after at most ``steps`` relaxation steps per example; no gradient.

        An example that settles earlier stops earlier: ``equilibrium.last.free.steps`` tells.

        Args:
            x: ``(B, *input_shape)``.
            steps: at least 1; the solver's own limit when None.

        Raises:
            ConfigError: for a budget on a chain, which is one pass whatever the budget.
        """
        self.check_input(x)
        layer = self.equilibrium
        shipped, warned = layer.solver, layer.warn
        if steps is not None:
            if self.topology == "chain":
                raise ConfigError(
                    "TPEqProp.predict: expected a ring or a loop with a budget of steps, got a chain, which is one "
                    "pass; leave out steps"
                )
            if steps < 1:
                raise ConfigError(f"TPEqProp.predict: expected steps >= 1, got {steps}; give it at least one")
            layer.solver = replace(shipped, max_steps=steps)
            layer.warn = False  # to stop early is what was asked for
        try:
            with torch.no_grad():
                return self.head(layer(x))
        finally:
            layer.solver, layer.warn = shipped, warned

    def errors(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        r"""Size of each level's error node in the nudged phase, :math:`\|\epsilon_l\|/\beta` per example, ``(B,)``:
        for tiny beta the norm of the gradient of the loss in that level's state.

        Args:
            x, y: a batch and its labels.
        """
        self.check_input(x)
        layer = self.equilibrium
        with torch.no_grad():
            h = layer(x)
        with torch.enable_grad():
            h = h.requires_grad_()
            (v,) = torch.autograd.grad(self.criterion(self.head(h), y), h)
        state = layer.solve_nudged(x, v).h
        statistics = layer.last.nudged
        assert statistics is not None
        assert statistics.beta is not None
        size = statistics.beta.shape[0]
        return {n: _size(state, n, size) / statistics.beta for n in layer.dynamics.names}

    def alignment(self) -> dict[str, Tensor]:
        """Angle in degrees between every learned way back and the weight it stands for; empty with exact feedback."""
        return alignment(self.equilibrium)


def _size(state: State, name: str, size: int) -> Tensor:
    return state[f"eps_{name}"][:size].flatten(1).norm(dim=1)


def default_solver(topology: str, levels: int) -> Solver:
    """One pass on a chain, damped sweeps along a ring, Anderson acceleration on a loop."""
    if topology == "chain":
        # an adjoint relaxed instead of swept (Implicit) passes one level in each step
        return Forward(max_steps=max(100, levels + 2))
    if topology == "ring":
        return FixedPoint(order="gauss_seidel", damping=0.9)
    return Anderson(length=5)
