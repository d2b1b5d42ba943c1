"""The coarser levels of a pyramid by themselves: what is read where examples leave early."""

from __future__ import annotations

from toreq.core import Coupling, Energy, Node
from toreq.layer import Equilibrium


def alone(energy: Energy, level: int) -> Energy:
    r"""The energy of the levels ``level`` to L without the finer ones and the springs to them.

    .. math:: E^{\ge l} = \sum_{k=l}^L E_k(h^k; x^k) + \text{springs between these levels}

    Nodes and couplings are those of ``energy``, not copies: both energies learn the same weights.

    Args:
        energy: of the whole pyramid.
        level: l, 1 the finest.
    """
    levels = energy.levels()[level - 1 :]
    names = frozenset().union(*levels)
    nodes = [Node(n, s, energy.activation(n)) for n, s in energy.shapes.items() if n in names]
    couplings = [c for c in energy.couplings if isinstance(c, Coupling) and names.issuperset(c.nodes)]
    part = Energy(nodes, couplings, [[n.name for n in nodes if n.name in held] for held in levels])
    part.prepare = energy.prepare
    return part


class Parts:
    """Layers of the coarser levels alone, made when they are asked for, with the whole pyramid's solver and estimator.

    No module: their weights are the pyramid's, which would otherwise be saved twice.

    Args:
        tops: the node that is read on each level, the finest first.
    """

    def __init__(self, tops: list[str]) -> None:
        self.tops = tops
        self._made: dict[int, Equilibrium] = {}

    def layer(self, whole: Equilibrium, level: int) -> Equilibrium:
        """The layer of the levels ``level`` to L, as ``whole`` is set."""
        if level == 1:
            return whole
        assert isinstance(whole.dynamics, Energy)
        made = self._made.get(level)
        if made is None:
            energy = alone(whole.dynamics, level)
            made = self._made[level] = Equilibrium(energy, whole.solver, whole.estimator, self.tops[level - 1])
        made.solver, made.estimator, made.warn = whole.solver, whole.estimator, whole.warn
        made.dynamics.prepare = whole.dynamics.prepare
        made.training = whole.training
        return made

    def __getstate__(self) -> dict[str, object]:
        # a copy makes layers of its own weights
        return {"tops": self.tops, "_made": {}}
