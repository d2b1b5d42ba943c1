"""What the multi-scale systems share: levels joined by springs, read-outs, and leaving early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import Adjoint, Coupling, Energy, Node, ReLU, Replicate, Spring, Tanh
from toreq.core.implicit import implicit_available
from toreq.core.state import State, detached, rows, take
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.layer import Equilibrium
from toreq.settle import full_precision
from toreq.solvers import CoarseToFine, Relaxation, Solver
from toreq.systems.base import System
from toreq.systems.mstep.exits import Parts
from toreq.systems.mstep.sharing import renamed


@dataclass(frozen=True)
class Level:
    """One level: a complete energy on its own input, with its nodes named as in the base system.

    Args:
        nodes, couplings: of the base system.
        head: read-out of the last node; None on a level that is not read out.
    """

    nodes: Sequence[Node]
    couplings: Sequence[Coupling]
    head: nn.Module | None


@dataclass(frozen=True)
class Springs:
    """How neighbouring levels are joined.

    Args:
        strength: curvature of a spring over the curvature of its finer node's own energy at rest, above 0.
        learned: learn the strengths.
        mu: the same for a second spring, from the finer level's average to the coarser; None for none.
        layers: ``"last"`` joins the levels' last nodes, ``"all"`` every pair of nodes.
        axes: axes of a node that differ in size between levels.
    """

    strength: float
    learned: bool
    mu: float | None
    layers: str
    axes: tuple[int, ...]

    def between(self, fine: Sequence[Node], coarse: Sequence[Node]) -> list[Coupling]:
        """The springs of one pair of levels."""
        pairs = list(zip(fine, coarse, strict=True))
        out: list[Coupling] = []
        for f, c in pairs[-1:] if self.layers == "last" else pairs:
            slope = f.activation.gain if isinstance(f.activation, Tanh | ReLU) else 1.0
            up = Replicate(c.shape, 2, self.axes)
            out.append(Spring(f.name, c.name, up, self.strength / slope, self.learned))
            if self.mu is not None:
                down = Adjoint(up, 1 / up.window)
                out.append(Spring(c.name, f.name, down, self.mu / slope, self.learned))
        return out


@dataclass(frozen=True)
class Prediction:
    """What :meth:`MultiScale.predict` found.

    Args:
        logits: ``(B, num_classes)``, of the level at which each example left.
        level: that level, ``(B,)`` int64, 1 the finest.
        steps: sweeps taken on each level, ``(B, L)`` int64, the finest first: a sweep of level l moves the levels
            l to L.
    """

    logits: Tensor
    level: Tensor
    steps: Tensor


class MultiScale(System):
    """A pyramid of levels, each a base system's energy on its own resolution, joined by springs.

    Subclasses say what a level is; see their equations.
    """

    exits: bool
    alone: bool
    levels: int

    def build(
        self, levels: Sequence[Level], springs: Springs, solver: Solver | None, estimator: Estimator | None
    ) -> None:
        """Put levels, springs, heads and the solver together.

        Args:
            levels: the finest first.
            springs: between neighbours.
            solver, estimator: override the shipped ones.
        """
        named, couplings = [], []
        for i, level in enumerate(levels, start=1):
            names = {n.name: f"l{i}_{n.name}" for n in level.nodes}
            named.append([Node(names[n.name], n.shape, n.activation) for n in level.nodes])
            couplings.append([renamed(c, names) for c in level.couplings])
        joints = [c for fine, coarse in pairwise(named) for c in springs.between(fine, coarse)]
        # coarse levels first: the one-pass start then reads them
        nodes = [n for level in reversed(named) for n in level]
        terms = [c for level in reversed(couplings) for c in level] + joints
        energy = Energy(nodes, terms, [[n.name for n in level] for level in named])
        tops = [level[-1].name for level in named]
        solver = CoarseToFine() if solver is None else solver
        joint = self.exits and not self.alone and len(tops) > 1
        self.equilibrium = Equilibrium(energy, solver, estimator, tops if joint else tops[0])
        assert levels[0].head is not None
        self.head = levels[0].head
        self.exit_heads = nn.ModuleList(level.head for level in levels[1:] if level.head is not None and self.exits)
        self.tops = tops
        self.parts = Parts(tops)
        self._read: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # the latest batch's logits hang on a graph, which can be neither copied nor pickled
        return {**self.__dict__, "_read": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        read = self.logits(self.equilibrium(x))
        if self.exits and self.alone:
            for level in range(2, len(self.tops) + 1):
                read[level] = self._head(level)(self.parts.layer(self.equilibrium, level)(x))
        self._read = {level: t for level, t in read.items() if level > 1}
        return read[1]

    def logits(self, h: Tensor | Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Logits ``(B, num_classes)`` per level that is read out, 1 the finest, from the layer's result."""
        if isinstance(h, Tensor):
            return {1: self.head(h)}
        return {i: self._head(i)(h[top]) for i, top in enumerate(self.tops, start=1)}

    def _head(self, level: int) -> nn.Module:
        return self.head if level == 1 else self.exit_heads[level - 2]

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy; with ``exits`` the sum over the levels of the latest forward pass."""
        total = super().criterion(logits, y)
        for other in self._read.values():
            if other.shape == logits.shape:
                total = total + nn.functional.cross_entropy(other, y)
        return total

    @torch.no_grad()
    def predict(self, x: Tensor, margin: float = 0.5) -> Prediction:
        """Settle the coarse levels first; an example leaves where the difference of its two largest class probabilities
        exceeds ``margin``.

        Level l is settled together with all coarser ones and without the finer ones, from where the coarser ones
        settled. Nothing is computed on finer levels for examples that have left.

        Args:
            x: ``(B, *input_shape)``.
            margin: in [0, 1]; 1 lets nothing leave early, and the finest level's equilibrium is the joint one.

        Raises:
            ConfigError: without ``exits``, or for a margin out of range.
        """
        self.check_input(x)
        if not self.exits or not 0 <= margin <= 1:
            raise ConfigError(
                f"{type(self).__name__}.predict: expected exits=True and margin in [0, 1], got exits={self.exits}, "
                f"margin={margin}; create the system with exits=True"
            )
        count = len(self.tops)
        size, device = x.shape[0], x.device
        out = Prediction(
            torch.empty(size, self.num_classes, dtype=next(self.parameters()).dtype, device=device),
            torch.empty(size, dtype=torch.int64, device=device),
            torch.zeros(size, count, dtype=torch.int64, device=device),
        )
        index = torch.arange(size, device=device)
        a: State = {}
        for level in range(count, 0, -1):
            layer = self.parts.layer(self.equilibrium, level)
            # drives of finer levels are computed for those alone who get there
            bindings = detached(layer.dynamics.bind(rows(x, index), rounded=layer.solver.precision == "rounded"))
            with full_precision(bindings):
                problem = Relaxation(layer.dynamics, bindings, as_map=True)
                solution = layer.solver.solve(problem, {**layer.dynamics.initial(bindings), **a})
            logits = self._head(level)(solution.h[self.tops[level - 1]])
            out.steps[index, level - 1] = solution.steps
            out.logits[index], out.level[index] = logits.to(out.logits.dtype), level
            top = logits.softmax(-1).topk(2, -1).values
            stay = (top[:, 0] - top[:, 1] <= margin).nonzero().flatten()
            if level == 1 or not stay.numel():
                break
            a, index = take(solution.state, stay), rows(index, stay)
        return out


def check_pyramid(where: str, options: Mapping[str, Any]) -> None:
    """Refuse options that all pyramids share and that do not fit.

    Args:
        where: the system's name.
        options: ``levels``, ``spring``, ``strength``, ``mu``, ``springs``.
    """
    levels, strength, mu = options["levels"], options["strength"], options["mu"]
    if levels < 1:
        raise ConfigError(f"{where}: expected levels >= 1, got {levels}; 1 is the base system")
    if options["spring"] not in ("fixed", "learned"):
        raise ConfigError(f"{where}: expected spring 'fixed' or 'learned', got {options['spring']!r}; choose one")
    if not strength > 0 or (mu is not None and not mu > 0):
        raise ConfigError(f"{where}: expected strength > 0 and mu None or > 0, got {strength}, {mu}; try 1.0 and None")
    if options["springs"] not in ("last", "all"):
        raise ConfigError(f"{where}: expected springs 'last' or 'all', got {options['springs']!r}; choose one")


def check_nodes(where: str, nodes: Sequence[Node]) -> None:
    """Refuse an activation that springs cannot be solved with."""
    for n in nodes:
        if not implicit_available(n.activation):
            raise ConfigError(
                f"{where}: expected an activation that springs can be solved with, got "
                f"{type(n.activation).__name__}; use tanh, hard_sigmoid, relu or identity"
            )
